"""Speed, memory and error of quantized layers and of a whole UNet step against float, on this machine.

The systems of a table run interleaved (A B C A B C ...), so that a machine that slows down slows all of them, and the
median is reported with the 20th and 80th percentile. Nothing is predicted: a number that was not measured is None.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import datetime
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dgq_kernels import backend

from . import architectures, doctor, embedded
from .attention import AttentionPlan, use_log_attention
from .calibration import Progress, plan_layers, record_inputs, silent
from .checkpoint import Header, read_header, read_json, unet_bytes, write_checkpoint
from .doctor import isa_flags, machine, relative_error
from .errors import DgqError
from .fusion import fuse
from .generation import Settings, generate
from .layers import IntegerLayer, replace_module
from .pipelines import default_device, load, resolve
from .prompts import evaluation_prompts
from .quantizers.channels import no_groups, to_matrix
from .quantizers.weights import SUBSCALE_MAX, IntegerWeight, nearest, quantize_weight
from .recipe import LayerPlan, Recipe
from .version import __version__

WARM_UP = 2
# Sampler steps run to get real UNet inputs; the calls of all of them measure the error.
RECORDED_STEPS = 4
# Layer shapes of Stable Diffusion at 512 pixels: rows, inputs, outputs of linear layers, and 3x3 convolutions as
# channels and side of the picture.
LARGE_LINEAR = (
    (4096, 320, 320), (4096, 320, 2560), (1024, 640, 640), (1024, 640, 5120), (256, 1280, 1280), (256, 1280, 10240),
    (77, 768, 320), (64, 256, 256),
)  # fmt: skip
LARGE_CONV = ((320, 64), (640, 32), (1280, 16))

Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """One system on one case. None means that it was not measured.

    Attributes:
        system: "float32", "float32 channels-last", "bfloat16" ("float16" on CUDA) or "dgq W4A8" and the like.
        case: the layer's shape, or "UNet step".
        p20_ms, p50_ms, p80_ms: percentiles of the time of one call, in ms.
        ratio_to_float32: p50_ms over float32's p50_ms; below 1 is faster than float32.
        relative_error: norm of the output's difference to float32 over the norm of float32's output.
        disk_mib: the UNet's weight files.
        peak_rss_mib: peak resident memory of a process that only loads the UNet and runs a step.
        weights_mib: the UNet's weights in memory, with what a backend keeps beside them.
        gops: 10^9 operations a second (2 a multiply-accumulate) at p50_ms.
        table: "kernels" or "step".
    """

    system: str
    case: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio_to_float32: float
    relative_error: float | None = None
    disk_mib: float | None = None
    peak_rss_mib: float | None = None
    weights_mib: float | None = None
    gops: float | None = None
    table: Literal["kernels", "step"] = "kernels"


@dataclass
class Report:
    """What `dgq bench` measured: where (`doctor.machine` and "date", "model"), what, and what to know about it."""

    machine: dict[str, Any]
    rows: list[Row]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    def append_csv(self, path: Path) -> None:
        """Append the rows, each with the machine's facts, to a CSV file; a new file starts with a header.

        Raises:
            DgqError: the file cannot be written, or has other columns.
        """
        facts = ("date", "model", "dgq", "torch", "cpu", "cores", "threads", "isa", "device", "backend")
        columns = [*facts, *(item.name for item in dataclasses.fields(Row))]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                with open(path, newline="", encoding="utf-8") as file:
                    if next(csv.reader(file)) != columns:
                        raise DgqError(f"{path}: has other columns", "name another --csv file")
                new = False
            else:
                new = True
            with open(path, "a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(columns)
                for row in self.rows:
                    writer.writerow([*(self.machine[name] for name in facts), *dataclasses.astuple(row)])
        except (OSError, UnicodeDecodeError) as error:
            raise DgqError(f"{path}: cannot be written ({error})") from None


@dataclass(frozen=True)
class Case:
    """One layer and the input it meets.

    Attributes:
        plan: the layer; bits are set by the systems.
        shape: of the input, (M, C) or (B, C, H, W).
    """

    plan: LayerPlan
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the product: tokens, or output pixels over the batch."""
        if len(self.shape) == 2:
            return self.shape[0]
        plan = self.plan
        batch, _, *sides = self.shape
        height, width = ((side + 2 * plan.padding - plan.kernel_size) // plan.stride + 1 for side in sides)
        return batch * height * width

    @property
    def operations(self) -> int:
        """Two for every multiply-accumulate."""
        return 2 * self.rows * self.plan.reduction * self.plan.out_features

    def __str__(self) -> str:
        plan = self.plan
        if plan.kind == "linear":
            return f"linear {self.rows}x{plan.in_features}x{plan.out_features}"
        batch, _, height, width = self.shape
        stride = f" stride {plan.stride}" if plan.stride > 1 else ""
        return f"conv{plan.kernel_size} {batch}x{plan.in_features}x{height}x{width} to {plan.out_features}{stride}"


def interleaved(
    runs: Runs, repeats: int, device: torch.device, on_call: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, list[float]]:
    """Time every function `repeats` times in turns, after a warm-up; milliseconds a call.

    On CUDA a call is timed by events on the stream, else by the clock. `on_call(done, total)` runs between the calls.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    for i in range(repeats):
        for name, run in runs.items():
            times[name].append(_time(run, device))
        on_call((i + 1) * len(runs), repeats * len(runs))
    return times


def _time(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def make_rows(case: str, times: Mapping[str, Sequence[float]], table: Literal["kernels", "step"]) -> list[Row]:
    """Percentiles and ratios of one case; `times` must hold "float32"."""
    base = float(np.percentile(times["float32"], 50))
    rows = []
    for system, values in times.items():
        low, middle, high = (float(np.percentile(values, q)) for q in (20, 50, 80))
        rows.append(Row(system, case, low, middle, high, middle / base, table=table))
    return rows


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit float that people run on a device."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- layers ---


def model_cases(folder: Path) -> list[Case]:
    """The distinct layer shapes of a model's UNet at its default size, two samples (guidance), largest first."""
    unet = float_skeleton(folder)
    layers, _ = plan_layers(unet, Recipe())
    cases: dict[str, Case] = {}

    def hook(plan: LayerPlan) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            shape = tuple(args[0].shape) if plan.kind != "linear" else (args[0].shape[:-1].numel(), plan.in_features)
            case = Case(plan, shape)
            cases[str(case)] = case

        return note

    for layer in layers:
        layer.module.register_forward_pre_hook(hook(layer.plan))
    with torch.no_grad():
        unet(**_synthetic_call(folder, unet, torch.device("meta")))
    return sorted(cases.values(), key=lambda case: (case.plan.kind, -case.operations))


def large_cases() -> list[Case]:
    """Layer shapes of Stable Diffusion at 512 pixels."""
    cases = [Case(LayerPlan("linear", k, n, 4, 8, True, class_ends=[k]), (m, k)) for m, k, n in LARGE_LINEAR]
    for channels, side in LARGE_CONV:
        plan = LayerPlan("conv2d", channels, channels, 4, 8, True, kernel_size=3, padding=1, class_ends=[channels])
        cases.append(Case(plan, (1, channels, side, side)))
    return cases


def random_layer(plan: LayerPlan) -> IntegerLayer:
    """An integer layer with random weights over their whole range: its speed is that of any weights."""
    layer = IntegerLayer(plan)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.int8:
            buffer.random_(-127, 128, generator=generator)
        elif name == "subscales":
            nibbles = torch.randint(1, 16, (2, *buffer.shape), generator=generator, dtype=torch.uint8)
            buffer.copy_(nibbles[0] | nibbles[1] << 4)
        elif name == "packed":
            buffer.random_(0, 256, generator=generator)
        else:
            buffer.fill_(1e-3)
    return layer


def float_layer(plan: LayerPlan) -> nn.Module:
    """The float layer of a plan, random weights."""
    if plan.kind == "linear":
        return nn.Linear(plan.in_features, plan.out_features, plan.bias)
    return nn.Conv2d(plan.in_features, plan.out_features, plan.kernel_size, plan.stride, plan.padding, bias=plan.bias)


@torch.no_grad()
def bench_kernels(
    cases: Sequence[Case], bits: Sequence[int], repeats: int, device: torch.device, progress: Progress = silent
) -> list[Row]:
    """Time single layers, the run-time quantization of their input included.

    A quantized convolution gets its input channels-last, as its neighbours in a quantized UNet hand it on; a float one
    gets torch's default layout.
    """
    rows: list[Row] = []
    half = half_dtype(device)
    work = half if device.type == "cuda" else torch.float32
    for i, case in enumerate(cases):
        x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(device)
        layer = float_layer(case.plan).eval().to(device)
        lower, x_half = copy.deepcopy(layer).to(half), x.to(half)
        runs: dict[str, Callable[[], object]] = {
            "float32": functools.partial(layer, x),
            _name(half): functools.partial(lower, x_half),
        }
        format_ = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        x_quantized = x.to(work).contiguous(memory_format=format_)
        for wbits in bits:
            quantized = random_layer(dataclasses.replace(case.plan, wbits=wbits)).to(device)
            runs[f"dgq W{wbits}A8"] = functools.partial(quantized, x_quantized)
        for row in make_rows(str(case), interleaved(runs, repeats, device), "kernels"):
            rows.append(dataclasses.replace(row, gops=case.operations / row.p50_ms / 1e6))
        progress("kernels", i + 1, len(cases), str(case))
    return rows


# --- the whole UNet ---


def float_skeleton(folder: Path) -> nn.Module:
    """The float UNet a folder's config describes, on the meta device (no weights)."""
    from diffusers import UNet2DConditionModel

    config = read_json(folder / "unet" / "config.json")
    config.pop("quantization_config", None)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).eval()


def _synthetic_call(folder: Path, unet: nn.Module, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of one UNet call at the default size, two samples, random values.

    Raises:
        DgqError: the UNet wants more than latents, a timestep and text states.
    """
    config: Any = unet.config
    if config.addition_embed_type is not None or config.class_embed_type is not None:
        raise DgqError("the UNet takes added conditions, whose shapes are not in its config", "use --what step")
    text = folder / "text_encoder" / "config.json"
    tokens = read_json(text).get("max_position_embeddings", 77) if text.is_file() else 77
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=generator).to(device)

    return {
        "sample": noise(2, config.in_channels, height, width),
        "timestep": torch.full((), 500, device=device),
        "encoder_hidden_states": noise(2, tokens, config.cross_attention_dim),
    }


def searched_weight(matrix: Tensor, plan: LayerPlan) -> IntegerWeight:
    """A weight rounded to nearest on the best grid of the range search: what calibration does at least."""
    ones = torch.ones(plan.reduction)
    return quantize_weight(matrix, plan.wbits, plan.weight_group, ones, nearest(ones))


def absmax_weight(matrix: Tensor, plan: LayerPlan) -> IntegerWeight:
    """A weight (N, K) rounded to nearest on a grid that spans its range: no search, seconds for a thousand million."""
    largest = matrix.abs().amax(1).clamp(min=1e-12)
    if plan.wbits == 8:
        scale = largest / 127
        return IntegerWeight((matrix / scale[:, None]).round_().to(torch.int8), scale)
    group, k = plan.weight_group, matrix.shape[1]
    groups = nn.functional.pad(matrix, (0, -k % group)).unflatten(1, (-1, group))
    scale = largest / (7.5 * SUBSCALE_MAX)
    subscales = (groups.abs().amax(2) / (7.5 * scale[:, None])).ceil_().clamp_(1, SUBSCALE_MAX)
    codes = (groups / (subscales * scale[:, None])[:, :, None]).round_().clamp_(-8, 7).flatten(1)[:, :k]
    return IntegerWeight(codes.to(torch.int8), scale, subscales.to(torch.uint8), group)


def quantize_nearest(
    unet: nn.Module, recipe: Recipe, progress: Progress = silent,
    rounded: Callable[[Tensor, LayerPlan], IntegerWeight] = searched_weight,
) -> Header:  # fmt: skip
    """Quantize a float UNet in place without calibration: nearest rounding, channels as they are.

    Returns:
        The header that describes it.
    """
    layers, _ = plan_layers(unet, recipe)
    for i, layer in enumerate(layers):
        weight = rounded(to_matrix(layer.weight.cpu()), layer.plan)
        groups = no_groups(layer.plan.in_features)
        bias = None if layer.module.bias is None else layer.module.bias.cpu()
        device = layer.module.weight.device
        replace_module(unet, layer.name, IntegerLayer.from_quantized(layer.plan, weight, groups, bias).to(device))
        progress("quantize", i + 1, len(layers), layer.name)
    plan = AttentionPlan.for_activations(recipe.abits)
    use_log_attention(unet, plan)
    fuse(unet)
    return Header(recipe, {layer.name: layer.plan for layer in layers}, plan, dgq_version=__version__)


def weight_bytes(unet: nn.Module) -> int:
    """Bytes of a UNet's weights in memory, with the form a backend has packed for itself."""
    total = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    for module in unet.modules():
        if isinstance(module, IntegerLayer):
            total += module.prepared_bytes
    return total


def _stored_bytes(unet: nn.Module) -> int:
    """Bytes of the tensors as a checkpoint stores them: integer layers as they are, the rest in half precision."""
    own = {name for name, module in unet.named_modules() if isinstance(module, IntegerLayer)}
    return sum(
        tensor.nbytes if name.rpartition(".")[0] in own else 2 * tensor.numel()
        for name, tensor in unet.state_dict().items()
    )


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A UNet call's argument on a device, its float tensors in a dtype."""
    if isinstance(value, dict):
        return {key: _cast(item, dtype, device) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() and value.dim() > 1 else value.dtype)
    return value


@dataclass
class _Systems:
    """The UNets of the step table, by system name, and what is known about them."""

    unets: dict[str, nn.Module]
    dtypes: dict[str, torch.dtype]
    disk: dict[str, int]
    has_float_weights: bool


def _output(unet: nn.Module, call: dict[str, Any]) -> Tensor:
    result = unet(**call)
    return result[0] if isinstance(result, tuple) else result.sample


@torch.no_grad()
def bench_step(
    folder: Path, bits: int | None, repeats: int, memory: bool, device: torch.device, progress: Progress = silent
) -> tuple[list[Row], list[str]]:
    """Time whole UNet calls with guidance, on inputs recorded from the model's own sampler.

    Args:
        folder: checkpoint, or float model that is quantized on the fly.
        bits: weight bits for a float model, default 4; a checkpoint has its own.
        repeats: timed calls of each system.
        memory: also measure each system's peak memory in a process of its own.
        device: where to run.

    Returns:
        The rows and what to know about them.

    Raises:
        DgqError: the model cannot be loaded.
    """
    header = read_header(folder)
    notes: list[str] = []
    float_folder: Path | None = folder
    if header is not None:
        try:
            float_folder = resolve(header.base_model or "")
        except DgqError:
            float_folder = None
            notes.append(
                f"the float model {header.base_model!r} is not at hand: the float systems run with random weights "
                f"(their speed is the same), and the error of {header.recipe.label} was not measured"
            )
    calls = _record(float_folder or folder, device)
    with tempfile.TemporaryDirectory() as temporary:
        if header is None:
            recipe = Recipe(wbits=bits or 4, rounding="nearest", channels="none")
            label = f"dgq W{recipe.wbits}A8"
            notes.append(
                f"{label} was quantized on the fly, to nearest and without calibration: speed does not depend on the "
                "rounding, but `dgq calibrate` gives smaller errors and may treat outlier channels at a small cost"
            )
        else:
            recipe = header.recipe
            label = f"dgq {recipe.label.removeprefix('integer ')}"
        systems = _load_systems(folder, float_folder, label, recipe, header, device, progress)
        rows = _measure(systems, calls, label, repeats, device, notes, progress)
        if memory:
            quantized_folder = folder
            if header is None:
                quantized_folder = Path(temporary) / "quantized"
                made = Header(recipe, _plans(systems.unets[label]), AttentionPlan.for_activations(8))
                write_checkpoint(folder, systems.unets[label], made, quantized_folder)
            places = {system: quantized_folder if system == label else float_folder for system in systems.unets}
            dtypes = systems.dtypes
            del systems
            rows = _with_memory(rows, places, dtypes, device, notes, progress)
    if recipe.name == "paper":
        notes.append("the paper recipe is simulated in float: it is never faster than the float model")
    flags = isa_flags()
    if device.type == "cpu" and "avx2" in flags and not {"avx512_bf16", "amx_bf16"} & set(flags):
        notes.append("this CPU has no bfloat16 instructions: bfloat16 is emulated")
    return rows, [*notes, *verdicts(rows, device)]


@torch.no_grad()
def bench_architecture(
    name: str, bits: Sequence[int], repeats: int, device: torch.device, progress: Progress = silent
) -> tuple[list[Row], list[str]]:
    """Time whole UNet calls of a well-known architecture with random weights, at 512 pixels.

    Args:
        name: of `architectures.ARCHITECTURES`.
        bits: weight bits of the quantized systems.
        repeats: timed calls of each system.
        device: where to run.

    Returns:
        The rows and what to know about them.

    Raises:
        DgqError: no such architecture, or too little memory for the systems side by side.
    """
    parameters = architectures.architecture(name).parameters
    # float32, half precision, and for each quantized system what is stored and what the engine keeps
    needed = parameters * (4 + 2 + sum(width / 8 + 1 for width in bits)) + 2 * 2**30
    available = doctor.memory()["available"] if device.type == "cpu" else None
    if available is not None and needed > available:
        advice = "give --bits 4 or 8 to compare one" if len(bits) > 1 else "run it on a larger machine"
        raise DgqError(f"{name} takes {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free", advice)
    half = half_dtype(device)
    base = architectures.fill(architectures.skeleton(name), device)
    lower = nn.Module.to(copy.deepcopy(base), half)
    # torch's stubs do not know `to` with nothing but a memory format
    last = lower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unets = {"float32": base, f"{_name(half)} channels-last": last}
    for wbits in bits:
        # layer by layer from the float model: no second float32 copy exists
        quantized = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        quantize_nearest(quantized, Recipe(wbits=wbits, rounding="nearest", channels="none"), progress, absmax_weight)
        for parameter_name, parameter in list(quantized.named_parameters()):
            module, _, leaf = parameter_name.rpartition(".")
            copied = nn.Parameter(parameter.to(half), requires_grad=False)
            setattr(quantized.get_submodule(module), leaf, copied)
        unets[f"dgq W{wbits}A8"] = quantized
    dtypes = {system: torch.float32 if system == "float32" else half for system in unets}
    disk = {system: _stored_bytes(unet) for system, unet in unets.items() if system.startswith("dgq")}
    notes = [
        f"{name} has random weights: speed and memory are the model's, errors are not",
        f"the dgq systems take and return {_name(half)} activations",
    ]
    systems = _Systems(unets, dtypes, disk, True)
    calls = [architectures.call(name, torch.float32, device)]
    rows = _measure(systems, calls, "", repeats, device, notes, progress)
    rows = [dataclasses.replace(row, case=f"{name} step") for row in rows]
    return rows, [*notes, *verdicts(rows, device)]


def _plans(unet: nn.Module) -> dict[str, LayerPlan]:
    return {name: module.plan for name, module in unet.named_modules() if isinstance(module, IntegerLayer)}


def _record(folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """The UNet calls of one picture of `RECORDED_STEPS` steps."""
    pipe = load(folder, device=device, dtype=torch.float32)
    settings = Settings(RECORDED_STEPS).resolved(folder)
    settings = dataclasses.replace(settings, guidance=max(settings.guidance or 0, 1.5))
    prompts = evaluation_prompts(folder, 1)
    (calls,) = record_inputs(lambda prompt, _: generate(pipe, [prompt], settings), pipe.unet, prompts)
    return calls


def _load_systems(
    folder: Path, float_folder: Path | None, label: str, recipe: Recipe, header: Header | None, device: torch.device,
    progress: Progress,
) -> _Systems:  # fmt: skip
    half = half_dtype(device)
    if float_folder is None:
        base = float_skeleton(folder).to_empty(device=device)
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.02)
    else:
        base = load(float_folder, device=device, dtype=torch.float32).unet.eval()
    # nn.Module's own `to`: diffusers' warns of modules that are better kept in float32, and lists none
    lower = nn.Module.to(copy.deepcopy(base), half)
    work = half if device.type == "cuda" else torch.float32
    if header is None:
        quantized = copy.deepcopy(base)
        quantize_nearest(quantized, recipe, progress)
        nn.Module.to(quantized, work)
        stored = _stored_bytes(quantized)
    else:
        quantized = load(folder, device=device, dtype=work).unet.eval()
        stored = unet_bytes(folder)
    float_names = ["float32", "float32 channels-last", _name(half)]
    on_disk = {} if float_folder is None else dict.fromkeys(float_names, unet_bytes(float_folder))
    last = copy.deepcopy(base).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Systems(
        dict(zip([*float_names, label], (base, last, lower, quantized), strict=True)),
        dict(zip([*float_names, label], (torch.float32, torch.float32, half, work), strict=True)),
        {**on_disk, label: stored}, float_folder is not None,
    )  # fmt: skip


def _measure(
    systems: _Systems, calls: Sequence[dict[str, Any]], label: str, repeats: int, device: torch.device,
    notes: list[str], progress: Progress,
) -> list[Row]:  # fmt: skip
    inputs: dict[str, list[dict[str, Any]]] = {}
    for system, dtype in systems.dtypes.items():
        inputs[system] = [{key: _cast(value, dtype, device) for key, value in call.items()} for call in calls]
        if system.endswith("channels-last"):
            for call in inputs[system]:
                call["sample"] = call["sample"].contiguous(memory_format=torch.channels_last)
    outputs = {
        system: torch.stack([_output(unet, call) for call in inputs[system]]).float()
        for system, unet in systems.unets.items()
    }
    middle = len(calls) // 2
    runs = {system: functools.partial(_output, unet, inputs[system][middle]) for system, unet in systems.unets.items()}
    times = interleaved(runs, repeats, device, lambda done, total: progress("step", done, total, ""))
    rows = []
    for row in make_rows("UNet step", times, "step"):
        comparable = systems.has_float_weights or row.system != label
        error = relative_error(outputs[row.system], outputs["float32"]) if comparable else None
        if error == float("inf"):
            error = None
            notes.append(f"the output of {row.system} holds values that are not finite")
        stored = systems.disk.get(row.system)
        rows.append(dataclasses.replace(
            row, relative_error=error, disk_mib=None if stored is None else stored / 2**20,
            weights_mib=weight_bytes(systems.unets[row.system]) / 2**20,
        ))  # fmt: skip
    return rows


def _with_memory(
    rows: Sequence[Row], places: Mapping[str, Path | None], dtypes: Mapping[str, torch.dtype], device: torch.device,
    notes: list[str], progress: Progress,
) -> list[Row]:  # fmt: skip
    """The rows with each system's peak memory, measured one process after the other."""
    result = []
    for i, row in enumerate(rows):
        place = places[row.system]
        if place is not None:
            arguments = [str(place), _name(dtypes[row.system]), str(device), str(row.system.endswith("channels-last"))]
            child = subprocess.run(
                [sys.executable, "-m", "dgq.bench", str(torch.get_num_threads()), *arguments],
                capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
            if child.returncode == 0:
                peak = json.loads(child.stdout.splitlines()[-1])["peak_rss_bytes"]
                row = dataclasses.replace(row, peak_rss_mib=peak / 2**20)
            else:
                reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
                notes.append(f"the memory of {row.system} was not measured: {reason}")
        result.append(row)
        progress("memory", i + 1, len(rows), row.system)
    return result


def _child(threads: str, folder: str, dtype: str, device: str, channels_last: str) -> None:
    """Load a UNet, run one step on random inputs, print the process's peak memory as JSON."""
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(int(threads))
    kind: torch.dtype = getattr(torch, dtype)
    place = torch.device(device)
    unet: Any = UNet2DConditionModel.from_pretrained(
        Path(folder), subfolder="unet", dtype=kind, use_safetensors=True, local_files_only=True
    )
    unet.to(place).eval()
    if channels_last == "True":
        unet.to(memory_format=torch.channels_last)
    call = {key: _cast(value, kind, place) for key, value in _synthetic_call(Path(folder), unet, place).items()}
    with torch.no_grad():
        _output(unet, call)
    print(json.dumps({"peak_rss_bytes": _peak_rss()}))


def _peak_rss() -> int:
    """Peak resident bytes of this process. Linux counts the parent into ru_maxrss, so its own counter comes first."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def verdicts(rows: Sequence[Row], device: torch.device) -> list[str]:
    """Plain sentences on how each quantized system compares with float32 and with the fastest float system."""
    steps = [row for row in rows if row.table == "step"]
    floats = [row for row in steps if not row.system.startswith("dgq")]
    if not floats:
        return []
    best = min(floats, key=lambda row: row.p50_ms)
    _, reason = backend.describe(device)
    sentences = []
    for row in steps:
        if not row.system.startswith("dgq"):
            continue
        for other in {"float32": next(row for row in floats if row.system == "float32"), best.system: best}.values():
            slower = row.p50_ms / other.p50_ms
            if slower > 1:
                sentences.append(
                    f"{row.system} is {slower:.1f}x slower than {other.system} here: {reason}; small layers also lose "
                    "by the cost of quantizing their input (--what kernels shows each)"
                )
            else:
                sentences.append(f"{row.system} is {1 / slower:.1f}x faster than {other.system} here")
    return sentences


def kernel_verdicts(rows: Sequence[Row], device: torch.device) -> list[str]:
    """For each quantized system, in how many layer shapes it is slower than float32."""
    _, reason = backend.describe(device)
    sentences = []
    for system in dict.fromkeys(row.system for row in rows if row.table == "kernels" and row.system.startswith("dgq")):
        ratios = [row.ratio_to_float32 for row in rows if row.table == "kernels" and row.system == system]
        slower = sum(ratio > 1 for ratio in ratios)
        text = f"{system} is slower than float32 in {slower} of {len(ratios)} layer shapes here"
        sentences.append(f"{text}: {reason}" if slower else text)
    return sentences


# --- all of it ---


def bench(
    model: str | os.PathLike[str] | None = None, *, arch: str | None = None, what: str = "all",
    bits: int | None = None, repeats: int = 20, large: bool = False, memory: bool = False, threads: int | None = None,
    device: str | None = None, progress: Progress = silent,
) -> Report:  # fmt: skip
    """Measure a model on this machine.

    Args:
        model: checkpoint, float model (quantized on the fly), or None for the embedded model.
        arch: instead of a model, the step of a well-known architecture with random weights.
        what: "kernels", "step" or "all".
        bits: weight bits; default both for kernels and architectures, 4 for the step of a float model.
        repeats: timed calls of each system.
        large: kernels at Stable Diffusion's shapes too.
        memory: also each system's peak memory, in processes of their own.
        threads: CPU threads, default torch's.
        device: default CUDA where there is one, else the CPU.
        progress: told of "quantize", "kernels", "step" and "memory".

    Raises:
        DgqError: a value out of range, or the model cannot be loaded.
    """
    if what not in ("kernels", "step", "all"):
        raise DgqError(f"what {what!r} is not one of kernels, step, all")
    if bits not in (None, 4, 8):
        raise DgqError(f"bits {bits} is not one of 4, 8")
    if repeats < 1 or (threads is not None and not 1 <= threads <= 1024):
        raise DgqError(f"repeats {repeats} or threads {threads} is out of range")
    if arch is not None and (model is not None or memory or what == "kernels"):
        raise DgqError("an architecture has only a step to time", "leave out --model, --memory and --what kernels")
    folder = resolve(model)
    header = None if arch is not None else read_header(folder)
    if header is not None and bits is not None and what != "kernels":
        raise DgqError(f"{folder}: is {header.recipe.label} already", "--bits is for float models; leave it out")
    place = default_device() if device is None else torch.device(device)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        rows: list[Row] = []
        notes: list[str] = []
        if arch is not None:
            rows, notes = bench_architecture(arch, (8, 4) if bits is None else (bits,), repeats, place, progress)
        if what != "step" and arch is None:
            cases = model_cases(folder) + (large_cases() if large else [])
            rows += bench_kernels(cases, (8, 4) if bits is None else (bits,), repeats, place, progress)
            notes += kernel_verdicts(rows, place)
        if what != "kernels" and arch is None:
            steps, more = bench_step(folder, bits, repeats, memory, place, progress)
            rows += steps
            notes += more
        facts = machine(place)
    finally:
        torch.set_num_threads(before)
    # a folder's name without its path: results are meant to be shown around
    local = folder == embedded.FOLDER or Path(str(model)).is_dir()
    name = arch or (folder.name if local else str(model))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report({**facts, "date": date, "model": name}, rows, notes)


if __name__ == "__main__":
    _child(*sys.argv[1:])
