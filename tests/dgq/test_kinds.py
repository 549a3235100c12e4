"""The kinds of models that people bring, the whole way: SDXL and its kin, LCM, fp16 files, shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import BUILDERS, inpainting

from dgq.bench import Options as BenchOptions
from dgq.bench import bench_step, files, steps, worker
from dgq.bench.systems import System
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.header import Header
from dgq.checkpoint.reading import network_bytes, read_header, weight_files
from dgq.errors import DgqError
from dgq.inspection.inspect import inspect
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import load
from dgq.recipe import Recipe

CPU = torch.device("cpu")
FAST = Recipe(rounding="nearest", channels="none")
OPTIONS = Options(prompts=["a cat"], steps=2, guidance=3.0, evaluate=1)


@pytest.fixture(scope="session", params=BUILDERS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float pipeline's folder, and its checkpoint's."""
    root = tmp_path_factory.mktemp(request.param)
    source = BUILDERS[request.param](root / "float")
    calibrate(source, root / "quantized", FAST, OPTIONS)
    return source, root / "quantized"


def header(folder: Path) -> Header:
    found = read_header(folder)
    assert found is not None
    return found


def stored(component: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component."""
    return {name: tensor for file in weight_files(component) for name, tensor in load_file(file).items()}


def test_the_estimate_is_of_what_a_call_computes(kind: tuple[Path, Path]) -> None:
    source, checkpoint = kind
    predicted = estimate(source, FAST, OPTIONS)
    plans = header(checkpoint).layers
    assert predicted.layers == len(plans)
    pipe = load(source, dtype=torch.float32)
    macs = 0

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            nonlocal macs
            macs += output.numel() * module.weight[0].numel()

        return hook

    for name in {plan.owner(name) for name, plan in plans.items()}:
        pipe.unet.get_submodule(name).register_forward_hook(count(name))
    generate(pipe, ["a cat"], Settings(steps=1, guidance=3.0))
    # SDXL's pooled embedding and an LCM's guidance scale have layers of their own: every one was counted
    assert predicted.macs_per_call == macs
    halves = 2 if pipe.unet.config.time_cond_proj_dim is None else 1
    alone = estimate(source, FAST, Options(prompts=["a cat"], steps=2, guidance=1.0, evaluate=1))
    assert predicted.macs_per_call == halves * alone.macs_per_call


def test_a_checkpoint_draws_what_the_float_model_draws(kind: tuple[Path, Path]) -> None:
    source, checkpoint = kind
    fidelity = header(checkpoint).calibration["fidelity"]
    assert fidelity["latent_sqnr_db"] > 12
    found = inspect(checkpoint)
    assert len(found.layers) == len(header(checkpoint).layers)
    assert inspect(source).unet_bytes == network_bytes(source)
    pictures = [generate(load(folder), ["a cat"], Settings(steps=2, guidance=3.0))[0] for folder in kind]
    assert pictures[0].image.size == (16, 16)
    error = pictures[1].latents - pictures[0].latents
    assert 0 < float(error.norm() / pictures[0].latents.norm()) < 0.25


def test_a_checkpoint_has_plain_names_and_the_same_other_components(kind: tuple[Path, Path]) -> None:
    source, checkpoint = kind
    assert not [file for file in checkpoint.rglob("*") if "fp16" in file.name]
    before, after = stored(source / "vae"), stored(checkpoint / "vae")
    ends = [tensor for tensor in before if "conv_in" in tensor or "quant_conv" in tensor]
    assert ends
    assert all(torch.equal(before[tensor].half(), after[tensor]) for tensor in ends)  # what is not quantized of it
    for name in ("text_encoder", "text_encoder_2"):
        if not (source / name).is_dir():
            continue
        before, after = stored(source / name), stored(checkpoint / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
        assert {file.suffix for file in (checkpoint / name).iterdir()} == {".json", ".safetensors"}
    assert [file.name for file in weight_files(checkpoint / "unet")] == ["diffusion_pytorch_model.safetensors"]


def test_the_systems_of_a_bench_run_its_calls(kind: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the processes: the files are written and the systems loaded and run here."""
    source, _ = kind
    outputs: dict[str, torch.Tensor] = {}

    def measured(systems: Sequence[System], *args: Any) -> tuple[list[Any], list[str]]:
        for system in systems:
            spec = system.specs[0]
            step, _ = worker.LOADERS[spec.kind](spec)
            call = files.load_calls(Path(spec.calls))[0]
            dtype = getattr(torch, spec.dtype)
            outputs[system.name] = step({key: worker.cast(value, dtype, CPU) for key, value in call.items()}).float()
            assert system.stored_bytes == network_bytes(Path(spec.folder))
        return [], []

    def written(task: str, target: Path, source: Path, **arguments: Any) -> None:
        files.TASKS[task](target=str(target), source=str(source), **arguments)

    monkeypatch.setattr(steps, "RECORDED_STEPS", 2)
    monkeypatch.setattr(steps, "measure", measured)
    monkeypatch.setattr(steps, "write", written)
    with torch.no_grad():
        bench_step(source, 8, BenchOptions(1, CPU, compiled=False))
    assert list(outputs) == ["float32", "bfloat16", "dgq W8A8"]
    reference = outputs["float32"]
    for name, limit in (("bfloat16", 0.1), ("dgq W8A8", 0.1)):
        assert 0 < float((outputs[name] - reference).norm() / reference.norm()) < limit


def test_a_unet_that_takes_a_mask_is_refused_in_one_line(tmp_path: Path) -> None:
    """By its pipeline; and where the index names a text-to-image one, by its channels."""
    from diffusers import DiffusionPipeline

    folder = inpainting(tmp_path / "inpainting")
    pipe = DiffusionPipeline.from_pretrained(folder)
    index, words = folder / "model_index.json", ("the pipeline is 'StableDiffusionInpaintPipeline'", "channels")
    for said in words:
        for attempt in (
            lambda: estimate(folder, FAST, OPTIONS),
            lambda: calibrate(folder, tmp_path / "out", FAST, OPTIONS),
            lambda: load(folder, dtype=torch.float32),
            lambda: bench_step(folder, 8, BenchOptions(1, CPU, compiled=False)),
        ):
            with pytest.raises(DgqError, match=said):
                attempt()
        index.write_text(index.read_text().replace("StableDiffusionInpaintPipeline", "StableDiffusionPipeline"))
    with pytest.raises(DgqError, match="the UNet takes 9 channels, the latents have 4"):
        generate(pipe, ["a cat"], Settings(steps=1, guidance=3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["inpainting"]
