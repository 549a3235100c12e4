"""Samplers by name: each draws what the model was trained for, and who has none of that name is told."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny_transformers
import torch
from diffusers import StableDiffusionPipeline

from dgq.errors import DgqError
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import find_model, load
from dgq.pictures.samplers import SAMPLERS, available, chosen, config_of, drawing_with

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
SDXL = {"_class_name": "EulerDiscreteScheduler", **BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    **BETAS,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
FLOW = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
CONFIGS = {"sd": SD, "sdxl": SDXL, "zero-snr": ZERO_SNR, "flow": FLOW}
WITH_ZERO_SNR = {"DDIM", "DDPM", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "UniPC"}


def scheduler(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def ideal(config, target):
    """A network that knows the one picture there is: model(x, t) for x as it is scaled to variance one at time t, or as
    it lies between picture and noise."""
    if config is FLOW:
        return lambda x, t: ((x.double() - target) / (float(t) / 1000)).float()
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):
        root = alphas.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root**2
        alphas[-1] = 2**-24
    noise = (0.5 * ((1 - alphas) / alphas).log()).numpy()  # log sigma, in which times lie between whole ones

    def model(x, t):
        sigma = float(np.exp(np.interp(float(t), np.arange(1000), noise)))
        alpha, rest = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        epsilon = (x.double() - alpha * target) / rest
        return (alpha * epsilon - rest * target if config.get("prediction_type") else epsilon).float()

    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_arrives_at_the_picture(kind):
    """Values of latents are beyond those of pixels, at which samplers clip if they are let."""
    config = CONFIGS[kind]
    own = scheduler(config)
    pipe = SimpleNamespace(scheduler=own)
    target = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = ideal(config, target)
    names = available(config_of(pipe))
    for name in names:
        g = torch.Generator().manual_seed(2)
        with drawing_with(pipe, name), torch.no_grad():
            sampler = pipe.scheduler
            assert (sampler is own) == (name == next(iter(names)))
            sampler.set_timesteps(20)
            x = torch.randn(1, 4, 8, 8, generator=g) * sampler.init_noise_sigma
            for t in sampler.timesteps:
                out = model(sampler.scale_model_input(x, t), t)
                more = {"generator": g} if "generator" in sampler.step.__code__.co_varnames else {}
                x = sampler.step(out, t, x, **more).prev_sample
        assert float((x - target).abs().max()) < 0.25, name
        assert pipe.scheduler is own


def test_names_of_a_model():
    names = list(available(config_of(SimpleNamespace(scheduler=scheduler(SD)))))
    assert names[0] == "PNDM"
    assert names[1:] == [
        one
        for name, (kind, _) in SAMPLERS.items()
        for one in (name, f"{name} Karras")
        if one == name or "use_karras_sigmas" in getattr(diffusers, kind)().config
    ]
    assert {name.removesuffix(" Karras") for name in available(ZERO_SNR)} == WITH_ZERO_SNR
    assert next(iter(available(SDXL))) == "EulerDiscrete"
    assert set(available(FLOW)) == {"DPMSolverMultistep", "DPM++ 2M", "DPM++ 2M SDE", "UniPC"}
    for kind in ("FlowMatchEulerDiscrete", "LCM"):  # made for one way of training
        assert list(available({"_class_name": f"{kind}Scheduler"})) == [kind]


def test_names_are_found_in_any_case():
    assert chosen(SD, " dpm++ 2m KARRAS ") == "DPM++ 2M Karras"
    with pytest.raises(DgqError, match="the sampler 'Heun' is not there") as error:
        chosen(ZERO_SNR, "Heun")
    assert "Euler a" in error.value.hint


def test_the_class_is_the_one_that_the_index_names(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    found = find_model(folder)
    pipe = load(found)
    settings = Settings(2, 1.0, sampler="eulerdiscrete").resolved(found)
    assert settings.sampler == "EulerDiscrete"
    own, named = (generate(pipe, ["a cat"], one)[0].latents for one in (Settings(2, 1.0), settings))
    assert torch.equal(own, named)


def test_generate_draws_with_it(tiny_checkpoint):
    found = find_model(tiny_checkpoint)
    pipe = load(found)
    own, drawn = pipe.scheduler, {}
    for name in (None, "ddim", "Euler a", "dpm++ 2m"):
        seen = []
        settings = Settings(3, 2.0, seed=4, batch=2, sampler=name).resolved(found, 2)
        pictures = generate(pipe, ["a cat", "a dog"], settings, progress=lambda *done, to=seen: to.append(done))
        assert seen == [(1, 3), (2, 3), (3, 3)]
        drawn[settings.sampler] = pictures[1].latents
        assert f"Sampler: {settings.sampler or 'DDIM'}, " in pictures[0].parameters
        (alone,) = generate(pipe, ["a dog"], Settings(3, 2.0, seed=5, sampler=settings.sampler))
        torch.testing.assert_close(alone.latents, pictures[1].latents, rtol=0, atol=0.05)
    assert list(drawn) == [None, "DDIM", "Euler a", "DPM++ 2M"]
    assert torch.equal(drawn[None], drawn["DDIM"])
    assert not torch.equal(drawn["Euler a"], drawn["DPM++ 2M"])
    assert pipe.scheduler is own
    with pytest.raises(DgqError, match="'Euler b' is not there"):
        Settings(sampler="Euler b").resolved(found)


@pytest.mark.parametrize("name, calls", [("Heun", 7), ("PLMS", 5)])
def test_progress_is_of_steps_where_the_network_is_called_more_often(name, calls, tiny_pipeline):
    """Of a model that was trained as Stable Diffusion 1 was."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(SD)
    called, seen = [], []
    pipe.unet.register_forward_pre_hook(lambda *_: called.append(1))
    settings = Settings(4, 1.0, seed=4, sampler=name)
    generate(pipe, ["a cat"], settings, progress=lambda done, total: seen.append((done, total)))
    assert len(called) == calls
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


def test_progress_of_a_pipeline_that_counts_steps_itself(tmp_path):
    pipe = load(tiny_transformers.pixart(tmp_path / "pixart"))
    seen = []
    settings = Settings(4, 3.0, seed=4, sampler="Heun")
    generate(pipe, ["a cat"], settings, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
