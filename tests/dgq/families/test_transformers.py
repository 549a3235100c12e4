"""Every transformer that dgq knows goes the whole way on a tiny pipeline of its own classes."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_transformers import BUILDERS
from torch import Tensor, nn
from typer.testing import CliRunner

import dgq
from dgq import architectures
from dgq.bench import bench
from dgq.calibration.estimate import estimate
from dgq.calibration.resume import Partial
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.header import Header
from dgq.checkpoint.reading import family_at, read_header, tensor_table, weight_files
from dgq.errors import DgqError
from dgq.evaluation import evaluate as evaluation
from dgq.family import FAMILIES, Family, family_of, network_of, working
from dgq.inspection.inspect import inspect, short_block, split_name
from dgq.inspection.measure import MeasureOptions, measure_checkpoint
from dgq.integer.channels import no_groups
from dgq.integer.layer import IntegerLayer
from dgq.integer.on_the_fly import round_to_nearest
from dgq.integer.plan import Layer, input_owners, plan_layer
from dgq.integer.shared_input import Shared
from dgq.integer.skeleton import SplitLayer, stored_names
from dgq.pictures.generation import Settings, check_prompts, generate
from dgq.recipe import LayerPlan, Recipe
from dgq.replay import predicted, record_inputs, replay
from dgq_cli.main import app

STEPS = 2


@dataclass(frozen=True)
class Made:
    """A family's tiny pipeline, and what dgq makes of it."""

    name: str
    float_folder: Path
    folder: Path
    header: Header
    settings: Settings
    float_pipe: Any
    pipe: Any


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Pictures of 16 pixels (Sana's of 32) also where a family says 1024."""
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            if type(family).default_size is not Family.default_size:
                patch.setattr(type(family), "default_size", lambda self, pipe: (16, 16))
        yield


@pytest.fixture(scope="module", params=BUILDERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    folder = BUILDERS[request.param](root / "float")
    # W4A8 with all that calibration does for one, W8A8 for the others
    recipe = Recipe(wbits=4) if request.param == "flux" else Recipe(wbits=8, rounding="nearest", channels="none")
    options = Options(prompts=["a cat", "a dog"], steps=STEPS, evaluate=1)
    header = calibrate(folder, root / "out", recipe, options)
    settings = Settings(steps=STEPS, seed=7).resolved(root / "out")
    expected = estimate(folder, recipe, options)
    assert expected.layers == len(header.layers) > 15
    assert expected.calls == header.calibration["calls"] * (1 + expected.passes)
    pipes = (dgq.load(one, device="cpu") for one in (folder, root / "out"))
    return Made(request.param, folder, root / "out", header, settings, *pipes)


def bits(name: str) -> int:
    return 4 if name == "flux" else 8


def sqnr(signal: Tensor, other: Tensor) -> float:
    return float(20 * torch.log10(signal.norm() / (signal - other).norm()))


def test_a_float_picture_is_the_one_that_diffusers_makes(made: Made) -> None:
    """From the same noise, packed and decoded as the pipeline does it; in a batch as alone."""
    pipe = made.float_pipe
    told: list[tuple[int, int]] = []
    one, two = (
        generate(pipe, ["a cat", "a bowl of fruit"], made.settings),
        generate(
            pipe,
            ["a cat", "a bowl of fruit"],
            Settings(**{**vars(made.settings), "batch": 2}),
            progress=lambda *step: told.append(step),
        ),
    )
    family = family_of(network_of(pipe))
    width, height = one[0].image.size
    plain = pipe(
        **family.pipeline_arguments(["a cat"], "", made.settings.guidance or 0),
        num_inference_steps=STEPS,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    apart = np.abs(np.asarray(one[0].image, dtype=int) - np.asarray(plain, dtype=int))
    assert apart.max() <= 1  # latents are scaled in another order of operations: a last digit may round otherwise
    assert (apart > 0).mean() < 1e-3
    assert one[0].image.getextrema() != ((0, 0),) * 3
    assert told == [(1, STEPS), (2, STEPS)]
    for alone, together in zip(one, two, strict=True):
        assert sqnr(alone.latents, together.latents) > 70


def test_a_checkpoint_draws_the_same_by_dgq_and_by_diffusers(made: Made, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipes = made.pipe, DiffusionPipeline.from_pretrained(made.folder)
    pipes[1].set_progress_bar_config(disable=True)
    first, second = (generate(pipe, ["a cat"], made.settings)[0] for pipe in pipes)
    assert first.image.tobytes() == second.image.tobytes()
    reference = generate(made.float_pipe, ["a cat"], made.settings)[0]
    assert (25 if bits(made.name) == 4 else 35) < sqnr(reference.latents, first.latents) < 90
    first.save(tmp_path / "cat.png")
    assert (tmp_path / "cat.png").stat().st_size > 100


def test_the_quantized_network_is_close_to_the_float_one(made: Made, tmp_path: Path) -> None:
    network, quantized = network_of(made.float_pipe), network_of(made.pipe)
    (calls,) = record_inputs(lambda *_: generate(made.float_pipe, ["a cat"], made.settings), network, ["a cat"])
    family = family_of(network)
    assert len(calls) == STEPS * (2 if family.separate_guidance else 1)
    Partial(tmp_path, "", resume=False).store_calls([calls])
    kept = Partial(tmp_path, "", resume=True).calls()
    assert kept is not None
    with torch.no_grad():
        for call, again in zip(calls, kept[0], strict=True):
            target = predicted(network, call)
            assert torch.equal(predicted(network, again), target)  # as an interrupted calibration finds it
            assert sqnr(target, predicted(quantized, call)) > (20 if bits(made.name) == 4 else 32)


def test_what_is_quantized_is_what_the_family_says(made: Made) -> None:
    quantized = network_of(made.pipe)
    family = family_of(quantized)
    layers = {name: one for name, one in quantized.named_modules() if isinstance(one, IntegerLayer)}
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, IntegerLayer | SplitLayer):
            assert family.kept(name) or (isinstance(module, nn.Conv2d) and module.groups > 1), name
    for name, layer in layers.items():
        wide = any(fnmatch.fnmatchcase(name, pattern) for pattern in family.wide_layers)
        assert layer.plan.wbits == (8 if wide else bits(made.name)), name
    for pattern in (*family.float_layers, *family.wide_layers):  # none is a slip of the pen
        known = family.skeleton(dict(quantized.config)).named_modules()
        assert any(fnmatch.fnmatchcase(name, pattern) for name, one in known if isinstance(one, nn.Linear | nn.Conv2d))
    assert made.header.attention is None
    (file,) = weight_files(made.folder / "transformer")
    own = stored_names(quantized)  # all else is in half precision, a table of positions too
    assert {kind for name, (_, kind) in tensor_table(file).items() if name not in own} <= {"F16", "I64"}
    blocks = {split_name(name)[0] for name in layers}
    assert all(short_block(block)[-1].isdigit() for block in blocks if family.block.match(block))
    assert len([block for block in blocks if family.block.match(block)]) > 1


def test_layers_that_read_one_tensor_are_treated_alike(made: Made) -> None:
    """Their input can then be quantized once: by structure, queries, keys, values and what the family adds to them."""
    network = network_of(made.float_pipe)
    seen: dict[str, int] = {}
    modules = dict(network.named_modules())
    owners = input_owners(network, [name for name in made.header.layers if name in modules])
    notes = {name: lambda _, args, at=name: seen.update({at: id(args[0])}) for name in owners}
    call = architectures.call(network, 1, torch.device("cpu"), tokens=5, pixels=64)
    replay(network, [call], [modules[name].register_forward_pre_hook(note) for name, note in notes.items()], print)
    together = [name for name, owner in owners.items() if owner != name]
    assert len(together) > 3
    assert set(seen) == set(owners)
    for name in together:
        assert seen[name] == seen[owners[name]], name


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_layers_that_read_one_tensor_compute_together(
    made: Made, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every call of the network all take what the first made, and the picture is the one of layers left alone."""
    monkeypatch.setenv("DGQ_BACKEND", backend)
    pipe = dgq.load(made.folder, device="cpu")
    layers = [layer for layer in network_of(pipe).modules() if isinstance(layer, IntegerLayer)]
    groups = {ready.shared for layer in layers if (ready := layer._prepared) is not None and ready.shared is not None}
    assert groups
    taken, take = [0], Shared.take

    def counted(*arguments: Any) -> Any:
        found = take(*arguments)
        taken[0] += found is not None
        return found

    monkeypatch.setattr(Shared, "take", counted)
    together = generate(pipe, ["a cat"], made.settings)[0].image
    assert taken[0] >= STEPS * sum(len(group.layers) for group in groups)
    assert all(group._last is None and group._left == 0 for group in groups)
    monkeypatch.setattr(Shared, "take", lambda *_: None)
    assert np.array_equal(np.asarray(generate(pipe, ["a cat"], made.settings)[0].image), np.asarray(together))


def test_a_checkpoint_is_inspected_measured_and_evaluated(made: Made) -> None:
    measured = measure_checkpoint(
        made.folder, MeasureOptions(prompts=1, device="cpu", against=str(made.float_folder), steps=STEPS)
    )
    assert len(measured.timesteps) == len(measured.output_sqnr_db_by_step) == STEPS
    assert measured.output_sqnr_db > (15 if bits(made.name) == 4 else 28)
    assert {one.name for one in measured.layers} == set(made.header.layers)
    assert all(one.sqnr_db > 5 for one in measured.layers)
    found = inspect(made.folder, measurement=measured)
    assert found.network == family_at(made.folder).title
    assert found.ratio < 1
    report = evaluation.evaluate(
        str(made.folder),
        str(made.float_folder),
        evaluation.Options(prompts="2", floor=0, device="cpu", settings=Settings(steps=STEPS, batch=2)),
    )
    assert report is not None
    assert report["pictures"] == 2
    assert report["fidelity"]["psnr_db"]["mean"] > 20


def test_prompts_that_are_cut_are_refused(made: Made) -> None:
    check_prompts(made.pipe, ["a cat"])
    with pytest.raises(DgqError, match=r"the prompt has \d+ tokens, the model reads \d+"):
        check_prompts(made.pipe, ["cat " * 1000])


def test_another_models_parts_are_refused(made: Made, tmp_path: Path) -> None:
    """A text encoder or a VAE whose sizes are not the network's."""
    folder = tmp_path / "other"
    shutil.copytree(made.float_folder, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    name = next(key for key in ("joint_attention_dim", "caption_channels", "cap_feat_dim") if key in config)
    network = family_at(folder).network_class().from_config({**config, name: config[name] + 16})
    network.save_pretrained(folder / "transformer")
    with pytest.raises(DgqError, match=r"text of width \d+, but the transformer takes \d+"):
        dgq.load(folder)


def test_a_negative_prompt_that_nothing_reads_is_refused() -> None:
    for family in FAMILIES:
        for name in family.pipelines:
            if name in ("FluxPipeline", "Flux2KleinPipeline"):
                with pytest.raises(DgqError, match="takes no negative prompt"):
                    family.pipeline_arguments(["a cat"], "blurry", 4.0)
                assert "negative_prompt" not in family.pipeline_arguments(["a cat"], "", 4.0)
            else:
                assert family.pipeline_arguments(["a cat"], "blurry", 4.0)["negative_prompt"] == ["blurry"]


def test_defaults_are_the_models_own(tmp_path: Path) -> None:
    known = {family.network: family for family in FAMILIES}
    flux, klein = known["FluxTransformer2DModel"], known["Flux2Transformer2DModel"]
    assert flux.generation({}, {"guidance_embeds": True}) == {"steps": 28, "guidance": 3.5}
    assert flux.generation({}, {"guidance_embeds": False}) == {"steps": 4, "guidance": 0.0}
    assert klein.generation({"is_distilled": True}, {}) == {"steps": 4, "guidance": 1.0}
    assert klein.generation({"is_distilled": False}, {})["steps"] == 50
    assert not klein.doubled(None, 1.0)
    folder = BUILDERS["qwen-image"](tmp_path / "qwen")
    settings = Settings().resolved(folder)
    assert (settings.steps, settings.guidance) == (50, 4.0)


def test_joined_inputs_of_different_ranges_have_scales_of_their_own() -> None:
    """The last layer of a parallel block reads attention and MLP: one scale a row rounds the small one away."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32 + 96, 48), torch.randn(2, 40, 128)
    x[..., :32] /= 30
    layer.weight.data[:, :32] *= 30  # both halves count alike in the result
    whole = plan_layer(layer, 8, Recipe())
    columns = ([], [0, 32], [32, 128])
    parts = []
    for own in columns:
        plan = LayerPlan.from_dict(
            {
                **whole.to_dict(),
                **({"columns": own, "in_features": own[1] - own[0], "class_ends": [own[1] - own[0]]} if own else {}),
                "bias": own != [32, 128],
            }
        )
        one = Layer("x", layer, plan)
        weight = round_to_nearest(one.weight, plan.wbits, plan.weight_group)
        parts.append(IntegerLayer.from_quantized(plan, weight, no_groups(plan.in_features), one.bias))
    with torch.no_grad():
        target = layer(x)
        joined, split = (sqnr(target, one(x)) for one in (parts[0], SplitLayer.of(parts[1:])))
    assert split > 35
    assert split > joined + 12


def test_the_commands_work_on_a_transformer(tmp_path: Path) -> None:
    """PixArt in W4A8, from a float folder to an evaluation."""
    folder, out = BUILDERS["pixart"](tmp_path / "float"), tmp_path / "out"

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    run("calibrate", str(folder), "--out", str(out), "--prompts", "1", "--steps", "2", "--evaluate", "1")
    run("generate", "a cat", "--model", str(out), "--out", str(tmp_path / "cat.png"), "--steps", "2")
    assert (tmp_path / "cat.png").is_file()
    header = read_header(out)
    assert header is not None
    found = json.loads(run("inspect", str(out), "--measure", "--prompts", "1", "--against", str(folder), "--json"))
    assert found["network"] == "PixArt transformer"
    report = json.loads(
        run("eval", str(out), "--against", str(folder), "--prompts", "2", "--floor", "0", "--steps", "2", "--json")
    )
    assert report["pictures"] == 2
    card = (out / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=4.5" in card


def test_a_pipeline_of_no_family_is_refused_in_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    index = {"_class_name": "ChromaPipeline", "transformer": ["diffusers", "ChromaTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "ChromaTransformer2DModel"}')
    for attempt in (
        lambda: dgq.load(tmp_path),
        lambda: calibrate(tmp_path, tmp_path / "out", Recipe()),
        lambda: inspect(tmp_path),
        lambda: evaluation.evaluate(str(tmp_path), None, evaluation.Options()),
        lambda: bench(tmp_path),
    ):
        with pytest.raises(DgqError) as caught:
            attempt()
        assert caught.value.message.endswith(f"the pipeline is 'ChromaPipeline'; dgq works with {working()}")
    for name in ("FluxPipeline", "QwenImagePipeline", "SanaPipeline", "PixArtAlphaPipeline"):
        assert name in working()


def test_the_paper_recipe_is_of_networks_with_a_start_token(tmp_path: Path) -> None:
    folder = BUILDERS["pixart"](tmp_path / "float")
    with pytest.raises(DgqError, match="the paper recipe sets a start token apart"):
        estimate(folder, Recipe(name="paper"), Options(prompts=["a cat"], steps=2))
    with pytest.raises(DgqError, match="the paper recipe sets a start token apart"):
        calibrate(folder, tmp_path / "out", Recipe(name="paper"), Options(prompts=["a cat"], steps=2, evaluate=0))
    assert not (tmp_path / "out").exists()
