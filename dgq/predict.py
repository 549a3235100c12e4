"""Lower bounds of a UNet step on GPUs that are not at hand: bytes, tensor-core work, issue slots, waves, launches.

Everything here is predicted from published figures and the compile table (kernels/aot.csv), never measured.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .architectures import architecture, call, skeleton
from .errors import DgqError

SYSTEMS = ("fp16", "W8A8 fp16-attention", "W8A8", "W4A8")
# CUDA graphs aside, a launch costs 3 to 6 microseconds of the host; in a graph about 1.
LAUNCH_US = 1.0
TABLE = Path(__file__).resolve().parent.parent / "kernels" / "aot.csv"


@dataclass(frozen=True)
class Device:
    """Published figures of a GPU, dense (without sparsity).

    Attributes:
        fp16: tensor TFLOP/s with float32 accumulation; int8: tensor TOP/s.
        bandwidth: GB/s of its memory.
        multiprocessors, clock: count and boost clock in GHz.
        target: of the compile table.
    """

    fp16: float
    int8: float
    bandwidth: float
    multiprocessors: int
    clock: float
    target: str


DEVICES = {
    "a100": Device(312, 624, 2039, 108, 1.41, "80"),  # NVIDIA A100 datasheet, SXM 80 GB
    "rtx3090": Device(71, 284, 936, 82, 1.695, "86"),  # GA102 whitepaper, appendix
    "a6000": Device(154.8, 309.7, 768, 84, 1.80, "86"),  # RTX A6000 datasheet, GA102 whitepaper
    "rtx4090": Device(165.2, 660.6, 1008, 128, 2.52, "89"),  # Ada whitepaper, appendix A
    "l40s": Device(362, 733, 864, 142, 2.52, "89"),  # L40S datasheet
    "h100": Device(989, 1979, 3350, 132, 1.83, "90"),  # H100 SXM datasheet
    "b200": Device(2250, 4500, 8000, 148, 1.85, "100"),  # HGX B200 datasheet, per GPU
}


@dataclass(frozen=True)
class Work:
    """One product, or one pass over memory, of a step.

    Attributes:
        kind: "linear", "conv2d", "self-attention" or "cross-attention"; "norm", "geglu" or "add" for passes that only
            move values.
        rows, reduction, channels: of the product; for attention queries, 2 x head width and keys.
        inputs, weights, outputs: numbers of values moved.
        count: heads times samples for attention, else 1.
    """

    kind: str
    rows: int
    reduction: int
    channels: int
    inputs: int
    weights: int
    outputs: int
    count: int = 1

    @property
    def macs(self) -> int:
        return self.rows * self.reduction * self.channels * self.count

    @property
    def label(self) -> str:
        return f"{self.kind} {self.rows}x{self.reduction}x{self.channels}" + (
            f" x{self.count}" if self.count > 1 else ""
        )


@dataclass(frozen=True)
class Bound:
    """A prediction in milliseconds; `total` is the largest of the first four, plus the launches.

    Attributes:
        memory, tensor, issue: from bytes, tensor-core operations and instructions of the main loop.
        waves: tensor time with idle multiprocessors in the last wave of tiles.
        launches: one each; quantization counts with the norm or activation that it is fused with.
        ideal: max(memory, tensor), the roofline.
    """

    memory: float
    tensor: float
    issue: float
    waves: float
    launches: float

    @property
    def ideal(self) -> float:
        return max(self.memory, self.tensor)

    @property
    def total(self) -> float:
        return max(self.memory, self.tensor, self.issue, self.waves) + self.launches


def works(name: str) -> list[Work]:
    """The products of one UNet call at 512 pixels, from its modules' shapes on the meta device (nothing is computed).

    Raises:
        DgqError: no such architecture.
    """
    known = architecture(name)
    unet: Any = skeleton(known.config)
    found: list[Work] = []

    def weighted(module: Any, arguments: tuple[Any, ...], y: torch.Tensor) -> None:
        x, n, k = arguments[0], module.weight.shape[0], module.weight[0].numel()
        kind = "linear" if isinstance(module, torch.nn.Linear) else "conv2d"
        found.append(Work(kind, y.numel() // n, k, n, x.numel(), n * k, y.numel()))

    def attention(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], y: torch.Tensor) -> None:
        x, context = arguments[0], keywords.get("encoder_hidden_states")
        batch, queries, _ = x.shape
        keys = queries if context is None else context.shape[1]
        width = module.to_q.out_features // module.heads
        values = batch * module.heads * width
        kind = "self-attention" if context is None else "cross-attention"
        found.append(
            Work(kind, queries, 2 * width, keys, values * (queries + 2 * keys), 0, values * queries,
                 batch * module.heads)
        )  # fmt: skip

    def passes(kind: str, read: int) -> Any:
        """A hook for a pass that reads `read` values and writes one for each of its outputs."""

        def hook(_module: Any, _arguments: Any, y: Any) -> None:
            size = (y if isinstance(y, torch.Tensor) else y[0]).numel()
            found.append(Work(kind, 0, 0, 0, read * size, 0, size))

        return hook

    for module in unet.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(weighted)
        elif isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_hook(passes("norm", 1))
        elif type(module).__name__ == "GEGLU":
            module.register_forward_hook(passes("geglu", 2))
        elif type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
            module.register_forward_hook(passes("add", 2))
        elif type(module).__name__ == "BasicTransformerBlock":
            for _ in range(3):
                module.register_forward_hook(passes("add", 2))
        elif hasattr(module, "to_q"):
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        unet(**call(unet, known.batch, torch.device("meta")))
    return found


def issue_ratios(path: Path = TABLE) -> dict[tuple[str, str], float]:
    """(target, kernel) -> instructions per tensor-core instruction of the main loop, the best configuration's."""
    ratios: dict[tuple[str, str], float] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["mma"].startswith("IMMA") and int(row["loop_mma"]):
                    key = (row["target"], row["kernel"])
                    ratios[key] = min(ratios.get(key, math.inf), int(row["loop"]) / int(row["loop_mma"]))
    return ratios


def bound(work: Work, system: str, device: Device, ratios: dict[tuple[str, str], float]) -> Bound:
    """The prediction for one product; system as in SYSTEMS."""
    if work.kind in ("norm", "geglu", "add"):  # quantized norms and activations write codes; fused adds only read
        written = 2 if system == "fp16" else {"norm": 1, "geglu": 1, "add": 0}[work.kind]
        read = work.inputs * 2 if system == "fp16" or work.kind != "add" else work.outputs * 2
        memory = 1e3 * (read + work.outputs * written) / (device.bandwidth * 1e9)
        launched = 0.0 if work.kind == "add" and system != "fp16" else 1e-3 * LAUNCH_US
        return Bound(memory, 0.0, 0.0, 0.0, launched)
    attention = work.kind.endswith("attention")
    integer = system != "fp16" and not (attention and system == "W8A8 fp16-attention")
    peak = (device.int8 if integer else device.fp16) * 1e12
    weight_bytes = {"fp16": 2.0, "W4A8": 0.5 + 4 / 8 / 32}.get(system, 1.0)  # and 4 bits per 32 weights
    moved = work.inputs * (1 if integer else 2) + work.weights * weight_bytes + work.outputs * 2
    memory = moved / (device.bandwidth * 1e9)
    tensor = 2 * work.macs / peak
    tiles = math.ceil(work.rows / 128) * math.ceil(work.channels / 128) * work.count
    small = math.ceil(work.rows / 64) * math.ceil(work.channels / 64) * work.count
    if attention:
        tiles = small = math.ceil(work.rows / 128) * work.count
    waste = min(
        math.ceil(count / device.multiprocessors) * device.multiprocessors / count
        for count in (tiles, small)
    )  # fmt: skip
    kernel = {"linear": "linear", "conv2d": "conv2d"}.get(work.kind)
    issue = 0.0
    if integer and kernel:
        ratio = ratios.get((device.target, f"{kernel}_int{4 if system == 'W4A8' else 8}_kernel"), 0.0)
        instructions = work.macs / (16 * 8 * 32) * ratio  # of mma.m16n8k32, one warp each
        issue = instructions / (device.multiprocessors * 4 * device.clock * 1e9)
    launches = LAUNCH_US * 1e-6
    return Bound(*(1e3 * value for value in (memory, tensor, issue, tensor * waste, launches)))


@dataclass(frozen=True)
class Prediction:
    """Bounds of a step: per distinct product (label, how often, system -> Bound) and in all (system -> ms)."""

    architecture: str
    device: str
    products: list[tuple[str, int, dict[str, Bound]]]
    ideal: dict[str, float]
    total: dict[str, float]


def predict(architecture: str, devices: Iterable[str] = DEVICES) -> list[Prediction]:
    """The predictions for one architecture.

    Raises:
        DgqError: no such architecture or device.
    """
    counted = Counter(works(architecture))
    ratios = issue_ratios()
    result = []
    for name in devices:
        if name not in DEVICES:
            raise DgqError(f"device {name!r} is not one of {', '.join(DEVICES)}")
        products = [
            (work.label, times, {system: bound(work, system, DEVICES[name], ratios) for system in SYSTEMS})
            for work, times in counted.items()
        ]
        sums = {
            kind: {s: sum(times * getattr(bounds[s], kind) for _, times, bounds in products) for s in SYSTEMS}
            for kind in ("ideal", "total")
        }
        result.append(Prediction(architecture, name, products, sums["ideal"], sums["total"]))
    return result


def text(predictions: list[Prediction], *, products: bool = False) -> str:
    """A table in which every line says that it is predicted."""
    lines = ["PREDICTED lower bounds in ms from published figures, not measured on any device"]
    for item in predictions:
        for kind in ("ideal", "total"):
            values = getattr(item, kind)
            cells = "  ".join(f"{s} {values[s]:6.2f} ({values[s] / values['fp16']:.2f}x)" for s in SYSTEMS)
            lines.append(f"predicted {item.architecture} {item.device:<8} {kind:<6} {cells}")
        if products:
            ordered = sorted(item.products, key=lambda entry: -entry[1] * entry[2]["fp16"].total)
            for label, times, bounds in ordered:
                cells = "  ".join(f"{s} {times * bounds[s].total:7.3f}" for s in SYSTEMS)
                lines.append(f"predicted   {times:3} x {label:<40} {cells}")
    return "\n".join(lines)


def to_dict(predictions: list[Prediction]) -> dict[str, Any]:
    """For JSON: milliseconds, each under a key that says predicted."""
    return {
        "predicted": [
            {"architecture": item.architecture, "device": item.device, "predicted_ideal_ms": item.ideal,
             "predicted_total_ms": item.total}
            for item in predictions
        ],
    }  # fmt: skip
