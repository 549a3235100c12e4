"""Single layers: the cases, float and quantized layers of random weights, and the machine's int8 peak."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dgq_kernels import native

from .. import architectures
from ..checkpoint.reading import family_at, network_config, read_json
from ..integer.layer import IntegerLayer
from ..integer.plan import Layer, plan_layers
from ..progress import Progress, silent
from ..recipe import LayerPlan, Recipe
from ..replay import replay
from .rows import Row, dtype_name, half_dtype, interleaved, make_rows, timed, timer

# Layer shapes of Stable Diffusion at 512 pixels: rows, inputs, outputs of linear layers, and 3x3 convolutions as
# channels and side of the picture.
LARGE_LINEAR = (
    (4096, 320, 320),
    (4096, 320, 2560),
    (1024, 640, 640),
    (1024, 640, 5120),
    (256, 1280, 1280),
    (256, 1280, 10240),
    (77, 768, 320),
    (64, 256, 256),
)
LARGE_CONV = ((320, 64), (640, 32), (1280, 16))
# Products whose operands stay in second-level caches (rows, inputs, outputs) and calls of each: the best is the peak.
PEAK_SHAPES = ((256, 1024, 1024), (512, 1024, 1024), (512, 2048, 512))
PEAK_CALLS = 50


@dataclass(frozen=True)
class Case:
    """One layer and the input it meets.

    Attributes:
        plan: the layer; bits are set by the systems.
        shape: of the input, (M, C) or (B, C, H, W); where the layer upsamples, of the small picture.
        dtype: of a quantized layer's input and output on the CPU, as its network hands them on.
    """

    plan: LayerPlan
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        """Rows of the product: tokens, or output pixels over the batch, where the layer upsamples of each place."""
        if len(self.shape) == 2:
            return self.shape[0]
        plan = self.plan
        batch, _, *sides = self.shape
        if plan.upsampled:
            return batch * math.prod(sides)
        height, width = ((side + 2 * plan.padding - plan.kernel_size) // plan.stride + 1 for side in sides)
        return batch * height * width

    @property
    def operations(self) -> int:
        """Two for every multiply-accumulate; where the layer upsamples, of the folded form."""
        return 2 * self.rows * self.plan.reduction * self.plan.out_features

    def __str__(self) -> str:
        plan = self.plan
        if plan.kind == "linear":
            return f"linear {self.rows}x{plan.in_features}x{plan.out_features}"
        batch, _, height, width = self.shape
        if plan.upsampled:
            return f"conv3 2x{batch}x{plan.in_features}x{height}x{width} to {plan.out_features // 4}"
        stride = f" stride {plan.stride}" if plan.stride > 1 else ""
        return f"conv{plan.kernel_size} {batch}x{plan.in_features}x{height}x{width} to {plan.out_features}{stride}"


def model_cases(folder: Path) -> list[Case]:
    """The distinct layer shapes of a model's network at its default size, two samples (guidance), largest first."""
    network = family_at(folder).skeleton(network_config(folder))
    layers, _ = plan_layers(network, Recipe())
    cases: dict[str, Case] = {}

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        plan = layer.plan

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = layer.own(args[0])
            shape = tuple(x.shape) if plan.kind != "linear" else (x.shape[:-1].numel(), plan.in_features)
            case = Case(plan, shape)
            cases[str(case)] = case

        return note

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    text = folder / "text_encoder" / "config.json"
    limit = read_json(text).get("max_position_embeddings") if text.is_file() else None
    tokens = family_at(folder).tokens
    call = architectures.call(network, 2, torch.device("meta"), tokens=min(tokens, limit or tokens))
    replay(network, [call], handles, lambda done, total: None)
    return sorted(cases.values(), key=lambda case: (case.plan.kind, -case.operations))


def large_cases() -> list[Case]:
    """Layer shapes of Stable Diffusion at 512 pixels, whose quantized layers take bfloat16 as in `--arch`."""
    half = torch.bfloat16
    cases = [Case(LayerPlan("linear", k, n, 4, 8, True, class_ends=[k]), (m, k), half) for m, k, n in LARGE_LINEAR]
    for channels, side in LARGE_CONV:
        plan = LayerPlan("conv2d", channels, channels, 4, 8, True, kernel_size=3, padding=1, class_ends=[channels])
        cases.append(Case(plan, (1, channels, side, side), half))
    return cases


def random_layer(plan: LayerPlan) -> IntegerLayer:
    """An integer layer with random weights over their whole range: its speed is that of any weights."""
    layer = IntegerLayer(plan)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in layer.named_parameters():
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
    outputs, inputs, kernel, *_ = *plan.float_shape, 1
    conv = nn.Conv2d(inputs, outputs, kernel, plan.stride, plan.padding, bias=plan.bias)
    return nn.Sequential(nn.Upsample(scale_factor=2), conv) if plan.upsampled else conv


@torch.no_grad()
def int8_peak(device: torch.device) -> float | None:
    """GOPS of the CPU engine's fastest product of operands that stay in the caches, quantization of the bfloat16 input
    included: what no layer is expected to pass here. None without the engine."""
    if device.type != "cpu" or not native.available():
        return None
    peak = 0.0
    for rows, inputs, outputs in PEAK_SHAPES:
        case = Case(LayerPlan("linear", inputs, outputs, 8, 8, True, class_ends=[inputs]), (rows, inputs))
        run = functools.partial(random_layer(case.plan), torch.randn(case.shape).to(torch.bfloat16))
        best = min(timed(run, device) for _ in range(PEAK_CALLS))
        peak = max(peak, case.operations / best / 1e6)
    return peak


@torch.no_grad()
def bench_kernels(
    cases: Sequence[Case], bits: Sequence[int], repeats: int, device: torch.device, progress: Progress = silent
) -> list[Row]:
    """Time single layers, the run-time quantization of their input included, and set them beside the int8 peak.

    A quantized convolution gets its input channels-last, as its neighbours in a quantized network hand it on; a float
    one gets torch's default layout on the CPU, channels-last on CUDA. There calls are timed in a graph (`rows.timer`).
    """
    rows: list[Row] = []
    peak = int8_peak(device)
    half = half_dtype(device)
    for i, case in enumerate(cases):
        x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(device)
        layer = float_layer(case.plan).eval().to(device)
        lower, x_half = copy.deepcopy(layer).to(half), x.to(half)
        if device.type == "cuda" and x.dim() == 4:  # the layout that float networks are fastest in there
            for one in (layer, lower):
                one.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x, x_half = (one.contiguous(memory_format=torch.channels_last) for one in (x, x_half))
        runs: dict[str, Callable[[], object]] = {
            "float32": functools.partial(layer, x),
            dtype_name(half): functools.partial(lower, x_half),
        }
        format_ = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        x_quantized = x.to(half if device.type == "cuda" else case.dtype).contiguous(memory_format=format_)
        for wbits in bits:
            quantized = random_layer(dataclasses.replace(case.plan, wbits=wbits)).to(device)
            run = quantized.upsample if case.plan.upsampled else quantized
            runs[f"dgq W{wbits}A8"] = functools.partial(run, x_quantized)
        timers = {name: timer(run, device) for name, run in runs.items()}
        for row in make_rows(str(case), interleaved(timers, repeats), "kernels"):
            gops = case.operations / row.p50_ms / 1e6
            fraction = gops / peak if peak and row.system.startswith("dgq") else None
            rows.append(dataclasses.replace(row, gops=gops, peak_fraction=fraction))
        progress("kernels", i + 1, len(cases), str(case))
    return rows
