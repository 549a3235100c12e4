"""From a float pipeline to a dgq checkpoint: the work behind `dgq calibrate`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from . import architectures, embedded
from .attention import AttentionPlan, use_log_attention
from .calibration import (
    DEFAULT_BUDGET_BYTES,
    GPTQ_MAX_REDUCTION,
    Layer,
    Progress,
    QuantizedLayer,
    passes,
    plan_layers,
    quantize_unet,
    record_inputs,
    silent,
    spread,
)
from .checkpoint import (
    Header,
    check_folder,
    check_target,
    copied_files,
    read_header,
    read_json,
    weight_files,
    write_checkpoint,
)
from .errors import DgqError
from .fidelity import compare
from .generation import Picture, Settings, check_prompts, check_text_to_image, generate
from .layers import IntegerLayer, buffer_specs, prepare_all
from .pipelines import load, resolve
from .prompts import calibration_prompts, evaluation_prompts
from .recipe import LayerPlan, Recipe
from .version import __version__
from .writing import atomic_file, save_tensors, workplace


@dataclass(frozen=True)
class Options:
    """Options of a calibration.

    Attributes:
        prompts: calibration prompts, or how many to take from the built-in ones.
        steps, guidance: of the float pipeline; None takes the model's defaults.
        seed: seed of the first calibration picture and of the choice of prompts.
        calls: UNet calls replayed for the statistics, spread over prompts and steps.
        evaluate: prompts, apart from calibration, on which the result is compared with the float model.
        budget: bytes for statistics held at one time.
        overwrite: replace a checkpoint that is there, never anything else.
        resume: go on from an interrupted calibration of the same settings.
    """

    prompts: Sequence[str] | int = 32
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    calls: int = 160
    evaluate: int = 4
    budget: int = DEFAULT_BUDGET_BYTES
    overwrite: bool = False
    resume: bool = False


@dataclass
class Estimate:
    """What a calibration would do, from the configuration alone (`dgq calibrate --dry-run`).

    Attributes:
        layers: quantized layers; kept: {name: reason} of layers that stay float.
        float16_bytes, packed_bytes: UNet file before and after.
        statistics_bytes: peak of second moments and samples; passes: runs over the recorded calls.
        memory_bytes: rough peak of the process (float32 model, statistics, packed layers).
        calls: UNet calls: recorded and replayed.
        macs_per_call: multiply-accumulates of the quantized layers in one UNet call, of both halves where the guidance
            doubles it.
        seconds: rough time on this machine, from a short timed float product.
    """

    layers: int
    kept: dict[str, str]
    float16_bytes: int
    packed_bytes: int
    statistics_bytes: int
    passes: int
    memory_bytes: int
    calls: int
    macs_per_call: int
    seconds: float


def _float_folder(model: str | os.PathLike[str] | None) -> Path:
    folder = resolve(model)
    if read_header(folder) is not None:
        raise DgqError(f"{folder}: is quantized already", "calibrate the float model it was made from")
    if not (folder / "unet").is_dir():
        raise DgqError(f"{folder}: has no unet", "dgq quantizes Stable Diffusion pipelines")
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    check_text_to_image(unet.get("in_channels", 4), vae.get("latent_channels", 4))
    return folder


def _model_name(model: str | os.PathLike[str] | None, folder: Path) -> str:
    return embedded.NAME if folder == embedded.FOLDER else str(model)


def packed_bytes(plan: LayerPlan) -> int:
    """Stored bytes of one quantized layer."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in buffer_specs(plan).values())


def estimate(model: str | os.PathLike[str] | None, recipe: Recipe, options: Options) -> Estimate:
    """Predict what `calibrate` would do, without loading a weight.

    Raises:
        DgqError: as `calibrate` would.
    """
    from diffusers import UNet2DConditionModel

    folder = _float_folder(model)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
    layers, kept = plan_layers(unet, recipe)
    settings = Settings(options.steps, options.guidance).resolved(folder)
    assert settings.steps is not None
    count = options.prompts if isinstance(options.prompts, int) else len(options.prompts)
    recorded = count * settings.steps
    replayed = min(recorded, options.calls)
    groups = passes(layers, options.budget)
    parameters = sum(p.numel() for p in unet.parameters())
    quantized = sum(layer.weight.numel() + layer.plan.bias * layer.plan.out_features for layer in layers)
    packed = sum(packed_bytes(layer.plan) for layer in layers)
    statistics = max(sum(layer.moment_bytes for layer in group) for group in groups)
    assert settings.guidance is not None
    # a UNet that is told the guidance scale (LCM) is called once for it
    doubled = settings.guidance > 1 and unet.config.time_cond_proj_dim is None
    outputs = _outputs_per_call(unet, layers, 2 if doubled else 1)
    macs = sum(outputs[layer.name] * layer.plan.reduction * layer.plan.out_features for layer in layers)
    work = (recorded + len(groups) * replayed + 2 * options.evaluate * settings.steps) * macs
    for layer in layers:
        k = layer.plan.reduction
        if k <= GPTQ_MAX_REDUCTION:
            work += replayed * outputs[layer.name] * k * k + k**3 + 2 * layer.plan.out_features * k * k
    return Estimate(
        layers=len(layers), kept=kept, float16_bytes=2 * parameters,
        packed_bytes=2 * (parameters - quantized) + packed, statistics_bytes=statistics, passes=len(groups),
        memory_bytes=4 * parameters + statistics + packed + 2**30, calls=recorded + len(groups) * replayed,
        macs_per_call=macs, seconds=work / _macs_per_second(),
    )  # fmt: skip


def _outputs_per_call(unet: nn.Module, layers: Sequence[Layer], batch: int) -> dict[str, int]:
    """Rows (tokens or pixels, of all samples) each layer computes in one UNet call, found on the meta device."""
    rows: dict[str, int] = {}

    def hook(layer: Layer) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            rows[layer.name] = output.numel() // layer.plan.out_features

        return note

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    device = torch.device("meta")
    with device, torch.no_grad():
        unet(**architectures.call(unet, batch, device))
    for handle in handles:
        handle.remove()
    return rows


def _macs_per_second() -> float:
    """Float32 multiply-accumulates a second of this machine, from a short matmul, less what small layers lose."""
    import time

    a = torch.randn(768, 768)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return 0.35 * 5 * 768**3 / (time.perf_counter() - start)


class Partial:
    """Finished layers and recorded calls of a calibration, for another run to go on from.

    Args:
        folder: the `writing.workplace` of the checkpoint, which outlives an interrupted run.
        fingerprint: of everything that the calls and layers depend on.
        resume: go on from what is there; else it is removed.
        progress: told of "resume", where something there is damaged.

    Raises:
        DgqError: what is there belongs to a calibration of other settings.
    """

    def __init__(self, folder: Path, fingerprint: str, resume: bool, progress: Progress = silent) -> None:
        self.folder, self.fingerprint, self.progress = folder, fingerprint, progress
        mark = folder / "fingerprint"
        if not resume:
            self.remove()
        elif mark.is_file() and mark.read_text(errors="replace") != fingerprint:
            raise DgqError(
                f"{folder}: belongs to a calibration of another model or with other settings",
                "repeat them, or leave out --resume",
            )

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        mark = self.folder / "fingerprint"
        if not mark.exists():
            with atomic_file(mark) as handle:
                handle.write(self.fingerprint.encode())
        with atomic_file(self.folder / f"{name}.safetensors") as handle:
            save_tensors({key: value.contiguous() for key, value in tensors.items()}, Path(handle.name), metadata)

    def _drop(self, file: Path, error: Exception) -> None:
        """Remove a file that cannot be used, and say so."""
        file.unlink()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.progress("resume", 1, 1, f"{file.name} cannot be used and is made again: {reason}")

    def store(self, name: str, result: QuantizedLayer) -> None:
        """Keep one finished layer."""
        plan = json.dumps({"name": name, "plan": result.layer.plan.to_dict(), "sqnr_db": result.sqnr_db})
        self._write(f"layer-{name}", dict(result.layer.state_dict()), {"layer": plan})

    def layers(self, plans: Mapping[str, LayerPlan]) -> dict[str, QuantizedLayer]:
        """The finished ones of the layers to quantize, whose plans before calibration are given by name; files that
        are damaged or of other layers are dropped."""
        done = {}
        for file in sorted(self.folder.glob("layer-*.safetensors")):
            try:
                with safe_open(str(file), framework="pt") as handle:
                    entry = json.loads(handle.metadata()["layer"])
                name, plan = entry["name"], LayerPlan.from_dict(entry["plan"])
                chosen = {key: getattr(plan, key) for key in ("channels", "class_ends", "reordered")}
                if file.stem != f"layer-{name}" or dataclasses.replace(plans[name], **chosen) != plan:
                    raise DgqError("its layer is another one")
                layer = IntegerLayer(plan)
                layer.load_state_dict(load_file(str(file)))
                done[name] = QuantizedLayer(layer, float(entry["sqnr_db"]))
            except _DAMAGED as error:
                self._drop(file, error)
        return done

    def store_calls(self, recorded: list[list[dict[str, Any]]]) -> None:
        """Keep the recorded UNet calls (their tensors; the rest is the pipeline's constants)."""
        tensors: dict[str, Tensor] = {}
        for i, calls in enumerate(recorded):
            for j, call in enumerate(calls):
                for key, value in call.items():
                    inner = value if isinstance(value, dict) else {"": value}
                    for part, tensor in inner.items():
                        if isinstance(tensor, Tensor):
                            tensors[f"{i}/{j}/{key}/{part}"] = tensor.clone()
        self._write("calls", tensors, {})

    def calls(self) -> list[list[dict[str, Any]]] | None:
        """The recorded calls, or None; a damaged file is dropped."""
        file = self.folder / "calls.safetensors"
        if not file.is_file():
            return None
        table: dict[int, dict[int, dict[str, Any]]] = {}
        try:
            for path, tensor in load_file(str(file)).items():
                i, j, key, part = path.split("/")
                call = table.setdefault(int(i), {}).setdefault(int(j), {})
                if part:
                    call.setdefault(key, {})[part] = tensor
                else:
                    call[key] = tensor
        except _DAMAGED as error:
            self._drop(file, error)
            return None
        return [[calls[j] for j in sorted(calls)] for _, calls in sorted(table.items())]

    def remove(self) -> None:
        """Forget everything."""
        for file in (*self.folder.glob("layer-*"), *self.folder.glob("calls*"), self.folder / "fingerprint"):
            file.unlink(missing_ok=True)
        for file in self.folder.glob(".dgq-*.tmp"):
            file.unlink()


# What reading a file of `Partial` that was cut, or is another's, may raise.
_DAMAGED = (SafetensorError, OSError, DgqError, KeyError, TypeError, ValueError, RuntimeError)


def _fingerprint(folder: Path, recipe: Recipe, prompts: Sequence[str], settings: Settings, calls: int) -> str:
    """Of everything that recorded calls and quantized layers depend on, the content of the model's files included."""
    weights = weight_files(folder / "unet")
    contents = {}
    for file in (*copied_files(folder).values(), folder / "unet" / "config.json", *weights):
        with open(file, "rb") as handle:
            contents[str(file.relative_to(folder))] = hashlib.file_digest(handle, "sha256").hexdigest()
    parts = [
        __version__, contents, recipe.to_dict(), list(prompts), dataclasses.asdict(settings), calls,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def calibrate(
    model: str | os.PathLike[str] | None,
    out: Path,
    recipe: Recipe,
    options: Options | None = None,
    progress: Progress = silent,
) -> Header:
    """Quantize a float pipeline and write the checkpoint.

    Args:
        model: a local diffusers folder, a hub id, or None for the embedded model.
        out: folder of the checkpoint.
        recipe: what to quantize and how.
        options: prompts, seeds, limits.
        progress: told of the stages "record", "statistics", "quantize" (or "calibrate"), "compare" and "save"; and of
            "resume" for each file of an interrupted run that cannot be used.

    Returns:
        The header of the written checkpoint.

    Raises:
        DgqError: bad input, a place that no checkpoint of this model may go to, one that another process is writing,
            or the checkpoint cannot be written. An interrupted run leaves a hidden `.partial` folder beside `out` that
            `resume` continues from, never a folder that looks like a checkpoint; a checkpoint that was to be replaced
            is still there.
    """
    options = options or Options()
    folder = _float_folder(model)
    check_target(out, folder, options.overwrite)
    settings = Settings(options.steps, options.guidance, seed=options.seed).resolved(folder)
    if isinstance(options.prompts, int):
        prompts = calibration_prompts(folder, options.prompts, options.seed)
    else:
        prompts = list(options.prompts)
    if not prompts:
        raise DgqError("no calibration prompts", "give at least one")
    with workplace(out) as work:
        check_target(out, folder, options.overwrite)  # a replacement that was killed may just have been undone
        fingerprint = _fingerprint(folder, recipe, prompts, settings, options.calls)
        partial = Partial(work, fingerprint, options.resume, progress)
        header = _calibrated(model, folder, out, recipe, options, prompts, settings, partial, progress)
        partial.remove()
    progress("save", 1, 1, str(out))
    return header


def _calibrated(
    model: str | os.PathLike[str] | None, folder: Path, out: Path, recipe: Recipe, options: Options,
    prompts: Sequence[str], settings: Settings, partial: Partial, progress: Progress,
) -> Header:  # fmt: skip
    """`calibrate`, in the place that it works in."""
    pipe = load(folder, dtype=torch.float32)
    check_prompts(pipe, prompts)
    # an override that matches no layer is told before the work
    plans = {} if recipe.name == "paper" else {layer.name: layer.plan for layer in plan_layers(pipe.unet, recipe)[0]}
    done = partial.layers(plans)
    reference = _evaluate(pipe, folder, settings, options, prompts, "float", progress, 0)
    recorded = partial.calls()
    if recorded is None:
        recorded = record_inputs(
            lambda prompt, i: generate(pipe, [prompt], dataclasses.replace(settings, seed=settings.seed + i)),
            pipe.unet, prompts, progress,
        )  # fmt: skip
        partial.store_calls(recorded)
    header = Header(
        recipe,
        base_model=_model_name(model, folder),
        generation={"steps": settings.steps, "guidance": settings.guidance},
        calibration={"prompts": len(prompts), "steps": settings.steps, "seed": settings.seed},
        dgq_version=__version__,
    )
    if recipe.name == "paper":
        from .paper_calibration import calibrate_paper

        header.paper = calibrate_paper(
            pipe.unet, recorded, wbits=recipe.wbits, abits=recipe.abits, groups=recipe.groups,
            progress=lambda stage, i, total: progress(stage, i, total, ""),
        )  # fmt: skip
    else:
        calls = spread(recorded, options.calls)
        header.calibration["calls"] = len(calls)
        header.layers, sqnr = quantize_unet(
            pipe.unet, calls, recipe, progress=progress, store=partial.store, done=done,
            budget=options.budget,
        )  # fmt: skip
        header.calibration["sqnr_db"] = {name: round(value, 2) for name, value in sqnr.items()}
        if recipe.attention == "log":
            header.attention = AttentionPlan.for_activations(recipe.abits)
            use_log_attention(pipe.unet, header.attention)
    if reference:
        prepare_all(pipe.unet, pipe.unet.device)
        pictures = _evaluate(pipe, folder, settings, options, prompts, recipe.label, progress, len(reference))
        header.calibration["fidelity"] = compare(reference, pictures)
    progress("save", 0, 1, str(out))
    write_checkpoint(folder, pipe.unet, header, out, options.overwrite, partial.folder)
    check_folder(out)
    return header


def _evaluate(
    pipe: Any, folder: Path, settings: Settings, options: Options, prompts: Sequence[str], label: str,
    progress: Progress, before: int,
) -> list[Picture]:  # fmt: skip
    """Pictures of the evaluation prompts (none of them a calibration prompt)."""
    pool = evaluation_prompts(folder, options.evaluate + len(prompts))
    chosen = [prompt for prompt in pool if prompt not in prompts][: options.evaluate]
    pictures = []
    for i, prompt in enumerate(chosen):
        pictures += generate(pipe, [prompt], dataclasses.replace(settings, seed=10_000 + i))
        progress("compare", before + i + 1, 2 * len(chosen), f"{label}: {prompt}")
    return pictures
