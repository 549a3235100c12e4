"""What the library does with a model on CUDA, on pretended devices (`pretended_devices`): no tensor of the CPU or of
another device meets the model's, the products are those of the kernels, and the results are the CPU's.

Only `dgq bench` is run in parts: its clock is CUDA's own.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from comparing import assert_close
from pretended_devices import CPU, Pretended

import dgq
from dgq.bench import files, worker
from dgq.bench.worker import Spec
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.header import Header
from dgq.errors import DgqError
from dgq.evaluation import evaluate
from dgq.inspection.measure import MeasureOptions, measure_checkpoint
from dgq.integer.layer import IntegerLayer
from dgq.integer.shared_input import prepare_all
from dgq.pictures.generation import Settings, generate
from dgq.pictures.loras import load_loras
from dgq.recipe import Recipe
from dgq_kernels import native

# Not the device that "cuda" stands for.
SECOND = torch.device("cuda:1")
RECIPES = {
    "w8-shift": Recipe(wbits=8, abits=8, rounding="nearest", channels="shift"),
    "w4-smooth": Recipe(wbits=4, abits=8, rounding="nearest", channels="smooth"),
    "paper": Recipe(name="paper", wbits=4, groups=1),
}


@dataclass
class Made:
    """A checkpoint calibrated on the second device, and what ran there."""

    folder: Path
    header: Header
    ran: Counter


def pretend(patch: pytest.MonkeyPatch, device: torch.device) -> Pretended:
    """Pretended devices, of which one is the default."""
    patch.setattr("dgq.devices.default_device", lambda: device)
    return Pretended()


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """That torch counts before it is asked for one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture(
    scope="module",
    params=["w8-shift", pytest.param("w4-smooth", marks=pytest.mark.slow), "paper"],
)
def made(request, tiny_pipeline, tmp_path_factory) -> Made:
    """Calibrated in two sittings: the second takes calls and finished layers from files."""
    out = tmp_path_factory.mktemp("cuda") / request.param
    options = {"prompts": ["a cat"], "steps": 1, "evaluate": 1}

    def interrupt(stage, done, total, detail):
        if stage == "quantize" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pretend(patch, SECOND) as mode:
        recipe = RECIPES[request.param]
        with pytest.raises(KeyboardInterrupt):
            calibrate(tiny_pipeline, out, recipe, Options(**options), interrupt)
        header = calibrate(tiny_pipeline, out, recipe, Options(**options, resume=True))
    return Made(out, header, mode.ran)


def operators(ran, device):
    """The own operators that ran on a device."""
    return {op.__name__.split(".")[0] for op, place in ran if op.namespace == "dgq" and place == device}


def draw(pipe):
    return generate(pipe, ["a cat"], Settings(steps=2, guidance=1.0, seed=3))[0].latents


def latents(folder, device):
    pipe = dgq.load(folder, device=device, dtype=torch.float32)
    return pipe, draw(pipe)


def test_calibrate_compares_on_the_device(made):
    assert {device for _, device in made.ran} == {SECOND}
    assert made.header.calibration["fidelity"]["latent_sqnr_db"] > (0 if made.header.table else 10)
    if made.header.table is None:
        product = "int4" if made.header.recipe.wbits == 4 else "int8"
        ran = operators(made.ran, SECOND)
        assert {f"linear_{product}", "quantize_samples"} <= ran
        assert "log_attention" not in ran  # torch's is the faster one there


def test_a_loaded_model_runs_on_its_device(made, monkeypatch):
    place = torch.device("cuda:0")
    with Pretended() as mode:
        pipe = dgq.load(made.folder, device="cuda", dtype=torch.float32)
        modules = [*pipe.unet.modules(), *pipe.vae.modules()]
        layers = [module for module in modules if isinstance(module, IntegerLayer)]
        packed = [layer._prepared for layer in layers]
        got = draw(pipe)
        # no layer was packed again in the call, and the joined ones stay so
        assert all(layer.prepare(place) is one for layer, one in zip(layers, packed, strict=True))
        assert all(tensor.device == place for tensor in pipe.unet.state_dict().values())
        got = got.cpu()
    assert {device for _, device in mode.ran} == {place}
    if made.header.table is None:
        assert all(one.fuses for one in packed)
        assert {"group_norm_quantize_samples", "layer_norm_quantize_rows"} <= operators(mode.ran, place)
        monkeypatch.setenv("DGQ_BACKEND", "reference")
    # one code's step is up to 3% of this model's latents
    assert_close("output", got, latents(made.folder, "cpu")[1], 0.06)


def test_moving_between_devices(made):
    """To another device, to the CPU and back: packed layers make their stored form again."""
    with Pretended() as mode:
        pipe, first = latents(made.folder, SECOND)
        for place in ("cuda:0", "cpu", "cuda:1"):
            pipe.to(place)
            prepare_all(pipe.unet, torch.device(place))
            again = draw(pipe)
            assert again.device == torch.device(place)
            assert_close("output", again.cpu(), first.cpu(), 0.06)
    assert {device for _, device in mode.ran} == {SECOND, torch.device("cuda:0")}


def test_offloaded_models_draw_the_same(made, tmp_path, monkeypatch):
    """With LoRA, for which diffusers takes offloading off and puts it on again."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cuda")
    loras = [(tiny_pipelines.lora(tmp_path / "style.safetensors"), 0.5)] if made.header.table is None else []
    with Pretended() as mode:
        pipe, plain = latents(made.folder, SECOND)
        load_loras(pipe, loras)
        expected = draw(pipe)
        mode.ran.clear()
        pipe = dgq.load(made.folder, device=SECOND, dtype=torch.float32, offload=True)
        assert torch.equal(draw(pipe).cpu(), plain.cpu())
        load_loras(pipe, loras)
        assert torch.equal(draw(pipe).cpu(), expected.cpu())
        places = {name: getattr(pipe, name).device for name in ("text_encoder", "unet", "vae")}
    assert {device for _, device in mode.ran} == {SECOND}
    assert places == {"text_encoder": CPU, "unet": CPU, "vae": SECOND}  # the last one stays


def test_what_cannot_be_offloaded(made):
    with pytest.raises(DgqError, match="no GPU to offload from"):
        dgq.load(made.folder, device="cpu", offload=True)
    with pytest.raises(DgqError, match="offloading moves them"):
        dgq.load(made.folder, device=SECOND, offload=True, graph=True)


def test_measure_and_evaluate(made, monkeypatch):
    with pretend(monkeypatch, SECOND) as mode:
        measured = measure_checkpoint(made.folder, MeasureOptions(prompts=1, steps=1))
        report = evaluate.evaluate(str(made.folder), None, evaluate.Options("2", floor=1, settings=Settings(steps=1)))
    assert {device for _, device in mode.ran} == {SECOND}
    monkeypatch.setattr(native, "attention_pays", lambda: False)  # as on CUDA
    expected = measure_checkpoint(made.folder, MeasureOptions(prompts=1, steps=1, device="cpu"))
    assert measured.output_sqnr_db == pytest.approx(expected.output_sqnr_db, abs=1.5)
    assert report["floor"]["dtype"] == "float16"
    assert report["fidelity"]["latent_mse"]["mean"] < 10 * report["floor"]["latent_mse"]["mean"] + 1


def test_the_system_that_bench_times(made, tmp_path):
    """Its model and calls, in half precision, and the bytes it says of the weights."""
    calls = tmp_path / "calls"
    with Pretended() as mode, torch.no_grad():
        spec = Spec("dgq", str(made.folder), "float16", str(calls), "cuda:1")
        unet = worker._eager(spec)
        files.save_calls([dgq.architectures.call(unet, 2, SECOND)], calls)
        (call,) = files.load_calls(calls)
        moved = {name: worker.cast(value, torch.float16, SECOND) for name, value in call.items()}
        assert worker._steps(unet)(moved).device == SECOND
        kept = worker.weight_bytes(unet)
        stored = sum(tensor.nbytes for tensor in unet.state_dict().values())
    assert {device for _, device in mode.ran} == {SECOND}
    assert kept >= stored
    if made.header.recipe.channels != "shift":  # else the weight's natural order is kept too
        assert kept == stored
