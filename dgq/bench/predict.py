"""Lower bounds of a step on GPUs that are not at hand: bytes, tensor-core work, issue slots, waves, launches.

Everything here is predicted from published figures and the compile table (aot.csv of dgq_kernels). Where a card was
measured (`Reached`), totals are of what it reached of its figures; the prediction itself is never a measurement.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch.overrides import TorchFunctionMode

import dgq_kernels
from dgq_kernels.linear.tiles import Config, Machine, Tiling, choose, clocks
from dgq_kernels.quantize_activation.groups import PROGRAMS, groups_for

from ..architectures import architecture, call, network
from ..errors import DgqError
from ..family import family_of
from ..integer.attention import reads_text
from ..integer.plan import shared_inputs

SYSTEMS = ("fp16", "W8A8 fp16-attention", "W8A8", "W4A8")


TABLE = Path(dgq_kernels.__file__).with_name("aot.csv")


@dataclass(frozen=True)
class Reached:
    """What a card reached in CUDA graphs of a real step: shares of its published figures beyond the launches.

    Attributes:
        launch: microseconds of a launch in a graph.
        products: of the tensor cores' rate, waves counted: float products.
        passes: of the memory's rate: norms, activations, additions, quantization.
        attention, log_attention: of the tensor cores' rate, waves counted.
    """

    launch: float = 1.0
    products: float = 1.0
    passes: float = 1.0
    attention: float = 1.0
    log_attention: float = 1.0


# benchmarks/gpu/2026-11-26-H100, SD v1.4 in float16 and W8A8. Launch: from the end of one small kernel to that of the
# next. Float products took 3.61 ms, 0.71 of them launches, for 1.61; norms of torch's 2.48 (0.54) for 0.27; its
# attention 1.10 (0.04) for 0.30, the logarithmic one 2.20 (0.24) for 0.17.
_H100 = Reached(launch=2.5, products=0.55, passes=0.14, attention=0.28, log_attention=0.09)


@dataclass(frozen=True)
class Device:
    """Published figures of a GPU, dense (without sparsity).

    Attributes:
        fp16: tensor TFLOP/s with float32 accumulation; int8: tensor TOP/s.
        bandwidth: GB/s of its memory; cache: MB of its second-level cache.
        multiprocessors, clock: count and boost clock in GHz.
        target: of the compile table.
        reached: what it was measured to reach of them; all of them where it was not.
    """

    fp16: float
    int8: float
    bandwidth: float
    multiprocessors: int
    clock: float
    target: str
    cache: float = 0.0
    reached: Reached = Reached()

    @property
    def machine(self) -> Machine:
        """What the kernels choose their tiles by."""
        memory = self.bandwidth / (self.multiprocessors * self.clock)
        capability = int(self.target[:-1]), int(self.target[-1])
        return Machine(capability, self.multiprocessors, int(self.cache * 1e6), memory)


DEVICES = {
    "a100": Device(312, 624, 2039, 108, 1.41, "80", 40),  # NVIDIA A100 datasheet, SXM 80 GB
    "rtx3090": Device(71, 284, 936, 82, 1.695, "86", 6),  # GA102 whitepaper, appendix
    "a6000": Device(154.8, 309.7, 768, 84, 1.80, "86", 6),  # RTX A6000 datasheet, GA102 whitepaper
    "rtx4090": Device(165.2, 660.6, 1008, 128, 2.52, "89", 72),  # Ada whitepaper, appendix A
    "l40s": Device(362, 733, 864, 142, 2.52, "89", 96),  # L40S datasheet
    "h100": Device(989, 1979, 3350, 132, 1.83, "90", 50, _H100),  # H100 SXM datasheet
    "b200": Device(2250, 4500, 8000, 148, 1.85, "100", 126),  # HGX B200 datasheet, per GPU
}


@dataclass(frozen=True)
class Work:
    """One product, or one pass over memory, of a step.

    Attributes:
        kind: "linear", "conv2d", "self-attention" or "cross-attention"; for passes "group norm", "layer norm",
            "activation", "geglu", "add".
        rows, reduction, channels: of the product; for attention queries, 2 x head width and keys.
        inputs, weights, outputs: numbers of values moved.
        count: heads times samples for attention, else 1.
        parts: products of this size on the same input, which the quantized system joins into one.
        layers: float layers that the quantized system joins into this product, whose channels it has in all.
        goes_on: in float a part of the product before, whose input is two tensors side by side.
        quantize: launches of a quantization of the input alone, or of what only a SiLU makes of it.
        rereads: whether the quantizing op reads a norm's input once more.
        merges: whether it makes the statistics of several programs one, a launch more.
        silu: of a norm: a SiLU follows, a pass of its own in float.
        gated: a product whose epilogue, in the quantized system, makes one value of two; or the pass after it.
        of_text: keys and values of the text alone, which the quantized system's graph is given (`Graphs`): it projects
            a prompt once, before its steps.
        quantized: False for what stays float in every system.
        folded_rows: of a convolution behind an upsampling, the rows of the one that takes the place of both in the
            quantized system (`FoldedUpsample`), else 0.
    """

    kind: str
    rows: int
    reduction: int
    channels: int
    inputs: int
    weights: int
    outputs: int
    count: int = 1
    parts: int = 1
    layers: int = 1
    goes_on: bool = False
    quantize: int = 0
    rereads: bool = False
    merges: bool = False
    silu: bool = False
    gated: bool = False
    of_text: bool = False
    quantized: bool = True
    folded_rows: int = 0

    @property
    def folded(self) -> Work:
        """What the quantized system multiplies, by `folded_rows`: all four places, of which each has 2x2 taps."""
        channels, weights = 4 * self.channels, self.weights * 16 // 9
        return replace(
            self, rows=self.folded_rows, reduction=self.reduction * 4 // 9, channels=channels,
            inputs=self.inputs // 4, weights=weights, outputs=self.folded_rows * channels,
        )  # fmt: skip

    @property
    def macs(self) -> int:
        return self.rows * self.reduction * self.channels * self.count * self.parts

    @property
    def label(self) -> str:
        if not self.rows:
            return f"{self.kind} of {self.outputs} values"
        times = self.count * self.parts
        return f"{self.kind} {self.rows}x{self.reduction}x{self.channels}" + (f" x{times}" if times > 1 else "")


@dataclass(frozen=True)
class Cost:
    """What a work takes on one device in one system.

    Attributes:
        bytes: to and from memory, every operand once; for "add" 0, since any stack can do it in an epilogue.
        more_bytes: what the kernels as they are move beyond that: quantization of an input alone, residuals, and inputs
            read again that the cache does not hold.
        operations: tensor-core operations, two for each multiply and add.
        issue_slots: instructions of the main loops, per warp; 0 where the compile table does not tell.
        waves: tiles per multiprocessor, rounded up; fill: the part of the last wave's and all others' places in use.
        launches: kernels.
        clocks: of an integer product with its launches, by the model of tiles that was fitted to measured times; 0 on
            other cards.
    """

    bytes: float = 0.0
    more_bytes: float = 0.0
    operations: float = 0.0
    issue_slots: float = 0.0
    waves: int = 0
    fill: float = 1.0
    launches: int = 0
    clocks: float = 0.0


@dataclass(frozen=True)
class Bound:
    """A prediction in milliseconds.

    Attributes:
        memory, tensor, issue: from bytes, tensor-core operations and instructions of the main loop.
        waves: tensor time with idle multiprocessors in the last wave of tiles, at the rate that was reached.
        traffic: memory time with the bytes that the kernels move beyond the least, at the rate that was reached.
        launches: one each, but for those that `waves` holds already.
        cost: what these come from.
        ideal: max(memory, tensor), the roofline.
        total: the largest of traffic, tensor, issue and waves, plus the launches.
    """

    memory: float
    tensor: float
    issue: float
    waves: float
    launches: float
    traffic: float = 0.0
    cost: Cost = field(default_factory=Cost)

    @property
    def ideal(self) -> float:
        return max(self.memory, self.tensor)

    @property
    def total(self) -> float:
        return max(self.memory, self.traffic, self.tensor, self.issue, self.waves) + self.launches


def works(name: str, pixels: int | None = None) -> list[Work]:
    """The products and passes of one call of a network, from its modules' shapes on the meta device (nothing is
    computed).

    Args:
        name: of an architecture (`architectures.architecture`).
        pixels: height and width of the picture; the architecture's own where None.

    Raises:
        DgqError: no such architecture, or a size that it cannot have.
    """
    known = architecture(name, pixels)
    net: Any = network(known)
    family = family_of(net)
    split, upsampled = family.joined_inputs(net), family.upsampled(net)
    after_silu = {
        path for path, _ in net.named_modules() if path.rpartition(".")[2] in (*family.time_layers, "linear_2")
    }
    after_norm = family.after_norm(net) - after_silu
    found: list[Work] = []
    of_time: list[Work] = []
    first_of = {name: names[0] for names in shared_inputs(net) for name in names}
    of_input: dict[str, list[Work]] = {}
    gated = {f"{path}.proj" for path, module in net.named_modules() if type(module).__name__ == "GEGLU"}
    readers = [path for path, module in net.named_modules() if isinstance(module, Attention) and reads_text(module)]
    of_text = {f"{path}.{name}" for path in readers for name in ("to_k", "to_v") if family.start_token}

    def weighted(path: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], y: torch.Tensor) -> None:
            x, n, k = arguments[0], module.weight.shape[0], module.weight[0].numel()
            kind = "linear" if isinstance(module, torch.nn.Linear) else "conv2d"
            per_sample = kind == "conv2d" and module.kernel_size != (1, 1)
            sides = [side // 2 + 1 for side in x.shape[2:]] if path in upsampled else [0]
            work = Work(
                kind,
                y.numel() // n,
                k,
                n,
                x.numel(),
                n * k,
                y.numel(),
                quantize=0 if path in after_norm else 2 if per_sample else 1,
                gated=path in gated and bool(family.fused),
                of_text=path in of_text,
                quantized=not family.kept(path),
                folded_rows=math.prod(sides) * len(x),
            )
            if path.rpartition(".")[2] in family.time_layers and work.quantized:
                of_time.append(work)
            elif path in split and work.quantized:
                found.extend(_halves(work, split[path]))
            elif path in first_of and work.quantized:
                of_input.setdefault(first_of[path], []).append(work)
            else:
                found.append(work)

        return hook

    class Attentions(TorchFunctionMode):
        """Notes every attention, whatever module it is of, and products of two activations (linear attention)."""

        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            y = function(*arguments, **(keywords or {}))
            if function is torch.nn.functional.scaled_dot_product_attention:
                query, key = arguments[:2] if arguments else (keywords["query"], keywords["key"])
                queries, keys, width = query.shape[2], key.shape[2], query.shape[3]
                kind = "self-attention" if queries == keys else "cross-attention"
                found.append(
                    Work(
                        kind,
                        queries,
                        2 * width,
                        keys,
                        y.numel() + 2 * key.numel(),
                        0,
                        y.numel(),
                        query.shape[:2].numel(),
                        quantized=family.start_token,
                    )
                )
            elif function in (torch.matmul, torch.Tensor.__matmul__) and arguments[1].dim() > 2:
                a, b = arguments
                found.append(
                    Work(
                        "linear attention",
                        a.shape[-2],
                        a.shape[-1],
                        b.shape[-1],
                        a.numel() + b.numel(),
                        0,
                        y.numel(),
                        y.shape[:-2].numel(),
                        quantized=False,
                    )
                )
            return y

    def passes(kind: str, read: int, quantized: bool = True, resnet: bool = False) -> Any:
        """A hook for a pass that reads `read` values and writes one for each of its outputs."""

        def hook(module: Any, _arguments: Any, y: Any) -> None:
            size = (y if isinstance(y, torch.Tensor) else y[0]).numel()
            of_groups = kind == "group norm"  # statistics and codes read it
            found.append(
                Work(
                    kind,
                    0,
                    0,
                    0,
                    read * size,
                    0,
                    size,
                    rereads=of_groups,
                    merges=of_groups and resnet and _merges(y, module.num_groups),
                    silu=resnet,
                    gated=kind == "geglu",
                    quantized=quantized and bool(family.fused),
                )
            )

        return hook

    for path, module in net.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(weighted(path))
        elif isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(passes("group norm", 1, path != "conv_norm_out", ".resnets." in path))
        elif isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(passes("layer norm", 1, quantized=path != "norm_out"))
        elif kind == "GEGLU":
            module.register_forward_hook(passes("geglu", 2))
        elif kind == "GELU" and hasattr(module, "proj"):
            module.register_forward_hook(passes("activation", 1))
        elif kind in ("ResnetBlock2D", "Transformer2DModel"):
            module.register_forward_hook(passes("add", 2))
        elif kind == "BasicTransformerBlock":
            for _ in range(3):
                module.register_forward_hook(passes("add", 2))
    with torch.no_grad(), Attentions():
        net(**call(net, known.batch, torch.device("meta"), tokens=known.tokens, pixels=known.pixels))
    for reduction in dict.fromkeys(work.reduction for work in of_time):
        found.append(_one([work for work in of_time if work.reduction == reduction]))
    for together in of_input.values():
        alike = len({work.channels for work in together}) == 1
        found.append(replace(together[0], parts=len(together)) if alike else _one(together))
    return found


def _halves(work: Work, first: int) -> list[Work]:
    """A product over two tensors side by side, of so many channels the first: the second adds to the first's result."""

    def half(reduction: int, goes_on: bool) -> Work:
        inputs, weights = work.rows * reduction, work.channels * reduction
        return replace(work, reduction=reduction, inputs=inputs, weights=weights, goes_on=goes_on)

    return [half(first, False), half(work.reduction - first, True)]


def _one(works: list[Work]) -> Work:
    """Products of one input as one."""
    channels, weights, outputs = (
        sum(getattr(work, name) for work in works) for name in ("channels", "weights", "outputs")
    )
    return replace(works[0], channels=channels, weights=weights, outputs=outputs, layers=len(works))


def _merges(x: torch.Tensor, groups: int) -> bool:
    """Whether several programs share the statistics of a norm's group."""
    most = max(1, PROGRAMS // (len(x) * groups))
    return groups_for(x[0, 0].numel(), x.shape[1] // groups, most, ranges=True).parts > 1


@dataclass(frozen=True)
class Tile:
    """A configuration of a product kernel: rows and channels of a tile, and instructions of its main loop, of all
    warps, for each multiply and add (0 where the table does not tell)."""

    rows: int
    channels: int
    slots: float = 0.0


# Of float products.
_FLOAT_TILES = (Tile(128, 128), Tile(64, 64))


_MMA_SIZE = re.compile(r"IGMMA\.(\d+)x(\d+)x(\d+)")


@functools.cache
def tiles(path: Path = TABLE) -> dict[tuple[str, str], tuple[Tile, ...]]:
    """(target, kernel) -> configurations of its int8 products without shift classes, or of groups of 32 weights, under
    the newest release in the compile table.

    Raises:
        DgqError: the table is not there.
    """
    found: dict[tuple[str, str], dict[str, list[Tile]]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DgqError(f"{path}: the compile table cannot be read ({error.strerror})", "install dgq again") from None
    for row in csv.DictReader(text.splitlines()):
        config, _, note = row["config"].partition(" ")
        sizes = config.split("x")
        if note not in ("classes=1", "group=32") or not all(size.isdigit() for size in sizes):
            continue
        size = _MMA_SIZE.match(row["mma"])
        slots = 0.0
        if int(row["loop_mma"]) and row["mma"].startswith("IMMA.16832"):
            slots = int(row["loop"]) / int(row["loop_mma"]) / (16 * 8 * 32)
        elif int(row["loop_mma"]) and size:  # one instruction of four warps
            slots = 4 * int(row["loop"]) / int(row["loop_mma"]) / math.prod(map(int, size.groups()))
        releases = found.setdefault((row["target"], row["kernel"]), {})
        releases.setdefault(row["triton"], []).append(Tile(int(sizes[0]), int(sizes[1]), slots))
    newest = {key: max(releases, key=lambda text: [int(x) for x in text.split(".")]) for key, releases in found.items()}
    return {key: tuple(releases[newest[key]]) for key, releases in found.items()}


Tiles = dict[tuple[str, str], tuple[Tile, ...]]


def _pass(work: Work, system: str, device: Device) -> Cost:
    """What a pass that only moves values costs."""
    quantized = system != "fp16" and work.quantized
    if work.kind == "add":  # in the epilogue of a quantized layer, which reads the residual; torch's fp16 makes a pass
        more, launches = (2 * work.outputs, 0) if quantized else (2 * (work.inputs + work.outputs), 1)
        return Cost(more_bytes=more, launches=launches)
    read = 2 * (work.outputs if quantized and work.gated else work.inputs)
    again = read if read > device.cache * 1e6 else 0
    if quantized:
        return Cost(read + work.outputs, work.rereads * again, launches=1 + work.rereads + work.merges)
    # torch: a norm's statistics apart, SiLU after those of residual blocks and GEGLU's product as passes of their own
    launches = {"group norm": 2 + work.silu, "geglu": 2}.get(work.kind, 1)
    more = (again if work.rereads else 0) + (4 * work.outputs if work.silu else 0)
    more += 4 * work.outputs if work.kind == "geglu" else 0
    return Cost(read + 2 * work.outputs, more, launches=launches)


def cost(work: Work, system: str, device: Device, table: Tiles) -> tuple[Cost, bool]:
    """What the work takes, and whether its products are int8; system as in SYSTEMS."""
    if not work.rows:
        return _pass(work, system, device), False
    attention = work.kind.endswith("attention")
    integer = system != "fp16" and work.quantized and not (attention and system == "W8A8 fp16-attention")
    if integer and work.of_text:
        return Cost(), True
    folds, whole = integer and work.folded_rows > 0, work.outputs
    work = work.folded if folds else work
    weight_bytes = {"fp16": 2.0, "W4A8": 0.5 + 4 / 8 / 32}.get(system if integer else "fp16", 1.0)  # 4 bits per 32
    inputs = work.inputs * (1 if integer else 2 * work.parts * work.layers)
    operations = 2.0 * work.macs
    outputs = work.outputs // 2 if integer and work.gated else work.outputs
    written = 0 if work.goes_on and not integer else 2 * outputs
    moved = inputs + work.parts * (work.weights * weight_bytes + written)
    joined = work.parts if integer else 1  # products in one launch
    channels = work.channels * joined
    processors = device.multiprocessors
    launches = work.parts // joined * (1 if integer else 0 if work.goes_on else work.layers)
    more, slots, modelled = 0.0, 0.0, 0.0
    if attention:
        tiles_in_all = math.ceil(work.rows / 128) * work.count
        if integer:
            more, launches = 3 * (work.inputs - work.outputs), 3
    elif integer:
        tiling = _tiling(work, channels, system, device)
        tiles_in_all = tiling.splits * _tiles(work.rows, channels, tiling.config)
        known = table.get((device.target, f"{work.kind}_int{4 if system == 'W4A8' else 8}_kernel"), ())
        mine = (tile.slots for tile in known if (tile.rows, tile.channels) == tiling.config[:2])
        slots = work.macs * next(mine, 0.0)
        if work.goes_on:  # the sum so far, read again
            more += 2 * work.outputs
        if work.quantize:
            more += 3 * work.inputs
            launches += work.quantize
        if tiling.splits > 1:  # int32 sums, written and read by the kernel that adds them
            sums = 4 * tiling.splits * work.rows * channels
            more += 0 if device.machine.holds(sums) else 2 * sums
            launches += 1
        if tiling.config.resident:
            kind = "int4" if system == "W4A8" else "int8"
            modelled = clocks(tiling, kind, work.rows, channels, work.reduction, device.machine)
    else:
        tiles_in_all = max(_float_tilings(work, channels), key=lambda many: many / math.ceil(many / processors))
    if work.folded_rows:  # torch's own: results of four places are brought together; in float the upsampling
        more += 4 * whole if folds else 2.5 * work.inputs
    waves_in_all = math.ceil(tiles_in_all / processors)
    fill = tiles_in_all / (waves_in_all * processors)
    return Cost(moved, more, operations, slots, waves_in_all, fill, launches, modelled), integer


def _tiling(work: Work, channels: int, system: str, device: Device) -> Tiling:
    """What the kernels would run for a product without shift classes on the device."""
    kind = "int4" if system == "W4A8" else "int8"
    return choose(kind, work.rows, channels, work.reduction, work.reduction, device.machine)


def _float_tilings(work: Work, channels: int) -> Iterator[int]:
    """Programs of a float product in each way to cut it; splitting a reduction is free here, to its favour."""
    for tile in _FLOAT_TILES:
        for splits in (1, 2, 4, 8, 16):
            if splits == 1 or work.reduction >= 256 * splits:
                yield splits * _tiles(work.rows, channels, tile)


def _tiles(rows: int, channels: int, tile: Tile | Config) -> int:
    return math.ceil(rows / tile.rows) * math.ceil(channels / tile.channels)


def bound(work: Work, system: str, device: Device, table: Tiles) -> Bound:
    """The prediction for one work; system as in SYSTEMS."""
    what, integer = cost(work, system, device, table)
    bandwidth = device.bandwidth * 1e9
    tensor = what.operations / ((device.int8 if integer else device.fp16) * 1e12)
    issue = what.issue_slots / (device.multiprocessors * 4 * device.clock * 1e9)
    reached, launches = device.reached, what.launches
    of_memory = of_tensor = 1.0
    if not work.rows:
        of_memory = reached.passes
    elif work.kind.endswith("attention"):
        of_tensor = of_memory = reached.log_attention if integer else reached.attention
    elif not integer:
        of_tensor = reached.products
    waves = tensor / what.fill / of_tensor
    if what.clocks:
        waves, launches = what.clocks / (device.clock * 1e9), work.quantize
    return Bound(
        memory=1e3 * what.bytes / bandwidth,
        tensor=1e3 * tensor,
        issue=1e3 * issue,
        waves=1e3 * waves,
        launches=1e-3 * launches * reached.launch,
        traffic=1e3 * (what.bytes + what.more_bytes) / bandwidth / of_memory,
        cost=what,
    )


@dataclass(frozen=True)
class Prediction:
    """Bounds of a step: per distinct work (label, how often, system -> Bound) and in all (system -> ms; system ->
    Cost, its waves summed over the works)."""

    architecture: str
    device: str
    products: list[tuple[str, int, dict[str, Bound]]]
    ideal: dict[str, float]
    total: dict[str, float]
    step: dict[str, Cost]


def predict_step(architecture: str, devices: Iterable[str] = DEVICES, pixels: int | None = None) -> list[Prediction]:
    """The predictions for one architecture, at a picture's height and width (its own where None).

    Raises:
        DgqError: no such architecture or device, or a size that it cannot have.
    """
    counted = Counter(works(architecture, pixels))
    name_at = architecture if pixels is None else f"{architecture} {pixels}px"
    table = tiles()
    result = []
    for name in devices:
        if name not in DEVICES:
            raise DgqError(f"device {name!r} is not one of {', '.join(DEVICES)}")
        products = [
            (work.label, times, {system: bound(work, system, DEVICES[name], table) for system in SYSTEMS})
            for work, times in counted.items()
        ]
        sums = {
            kind: {s: sum(times * getattr(bounds[s], kind) for _, times, bounds in products) for s in SYSTEMS}
            for kind in ("ideal", "total")
        }
        step = {s: _sum((times, bounds[s].cost) for _, times, bounds in products) for s in SYSTEMS}
        result.append(Prediction(name_at, name, products, sums["ideal"], sums["total"], step))
    return result


def _sum(costs: Iterable[tuple[int, Cost]]) -> Cost:
    total = Cost()
    for times, one in costs:
        added = {
            name: getattr(total, name) + times * getattr(one, name)
            for name in ("bytes", "more_bytes", "operations", "issue_slots", "waves", "launches")
        }
        total = replace(total, **added)
    return total


def _figures(one: Cost) -> str:
    return (
        f"{(one.bytes + one.more_bytes) / 1e6:8.1f} MB {one.operations / 1e9:8.1f} Gop "
        f"{one.issue_slots / 1e6:8.1f} Mslots {one.waves:5} waves {one.launches:5} launches"
    )


def text(predictions: list[Prediction], *, products: bool = False) -> str:
    """A table in which every line says that it is predicted."""
    lines = ["PREDICTED ms, not measured: bounds of published figures; totals of an h100, of what one reached of them"]
    for item in predictions:
        for kind in ("ideal", "total"):
            values = getattr(item, kind)
            cells = "  ".join(f"{s} {values[s]:6.2f} ({values[s] / values['fp16']:.2f}x)" for s in SYSTEMS)
            lines.append(f"predicted {item.architecture} {item.device:<8} {kind:<6} {cells}")
        lines += [f"predicted {item.architecture} {item.device:<8} {s:<19} {_figures(item.step[s])}" for s in SYSTEMS]
        if products:
            ordered = sorted(item.products, key=lambda entry: -entry[1] * entry[2]["fp16"].total)
            for label, times, bounds in ordered:
                cells = "  ".join(f"{s} {times * bounds[s].total:7.3f}" for s in SYSTEMS)
                each = f"each in W8A8: {_figures(bounds['W8A8'].cost)}"
                lines.append(f"predicted   {times:3} x {label:<40} {cells}  {each}")
    return "\n".join(lines)


def to_dict(predictions: list[Prediction]) -> dict[str, Any]:
    """For JSON: milliseconds and what they come from, each under a key that says predicted."""

    def figures(one: Cost) -> dict[str, float]:
        return {
            "bytes": one.bytes + one.more_bytes,
            "tensor_operations": one.operations,
            "issue_slots": one.issue_slots,
            "waves": one.waves,
            "launches": one.launches,
        }

    def kernels(item: Prediction) -> list[dict[str, Any]]:
        return [
            {
                "kernel": label,
                "times": times,
                "predicted_each": {s: {"total_ms": b.total, **figures(b.cost)} for s, b in bounds.items()},
            }
            for label, times, bounds in item.products
        ]

    return {
        "predicted": [
            {
                "architecture": item.architecture,
                "device": item.device,
                "predicted_ideal_ms": item.ideal,
                "predicted_total_ms": item.total,
                "predicted_step": {s: figures(one) for s, one in item.step.items()},
                "predicted_kernels": kernels(item),
            }
            for item in predictions
        ],
    }
