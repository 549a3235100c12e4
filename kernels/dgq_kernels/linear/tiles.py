"""Tiles of the products on CUDA: which there are, which one a shape gets, and, when asked for, which one is fastest.

The table and the choice are plain Python, so they can be tested, and compiled ahead of time, without a GPU.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A tile.

    Attributes:
        rows, channels: of the output.
        half: of the reduction's length in a step.
        warps, stages: as Triton takes them.
        whole: a step is one product, otherwise two of `half`. Not with shift classes.
        resident: programs that are to share a multiprocessor, which bounds their `registers`; 0 leaves it to the
            compiler.
    """

    rows: int
    channels: int
    half: int
    warps: int
    stages: int
    whole: bool = False
    resident: int = 0

    @property
    def registers(self) -> int:
        """The most registers a thread may have for `resident` programs: of 65536, handed out by eights."""
        return min(255, 65536 // (self.resident * self.warps * 32) // 8 * 8)


class Tiling(NamedTuple):
    """A tile, and the number of programs that share the reduction of one."""

    config: Config
    splits: int = 1


class Machine(NamedTuple):
    """What the choice of a tile depends on.

    Attributes:
        capability: e.g. (8, 9).
        multiprocessors: how many.
        cache: bytes of the second-level cache.
        memory: bytes per clock that a multiprocessor gets from memory when all of them ask.
    """

    capability: tuple[int, int]
    multiprocessors: int
    cache: int
    memory: float

    def holds(self, size: int) -> bool:
        """Whether so many bytes that one kernel writes are still in the cache when the next one reads them."""
        return size <= self.cache // 2


# Read once: looking into the environment takes the host a microsecond or two.
AUTOTUNE = os.environ.get("DGQ_AUTOTUNE") == "1"

# Kind of product -> major compute capability -> tiles, the largest first. Chosen by the compile table
# (../aot.csv): fewest instructions per product, no spill under any release; 8.6, 8.9 and 12.0 have 99 KiB of
# shared memory. "shifted" has shift classes; "int4" serves both sizes of groups. int8 on 9.0: of fifteen tiles that an
# H100 was given, those that are fastest for some shape of real models.
TILES: dict[str, dict[int, tuple[Config, ...]]] = {
    "int8": {
        8: (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 2), Config(64, 64, 64, 4, 2)),
        9: (
            Config(128, 128, 64, 4, 3, True, 2),
            Config(128, 64, 64, 4, 3, True, 3),
            Config(64, 128, 64, 4, 4, True, 2),
            Config(64, 64, 64, 4, 5, True, 2),
            Config(64, 32, 128, 4, 4, True, 2),
        ),
        10: (Config(128, 128, 64, 8, 4), Config(64, 128, 64, 8, 3), Config(64, 64, 64, 4, 3)),
        12: (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 3), Config(64, 64, 64, 4, 3)),
    },
    "shifted": {
        8: (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 2), Config(64, 64, 32, 4, 4)),
        9: (Config(128, 128, 64, 8, 4), Config(128, 64, 64, 4, 3), Config(64, 64, 64, 4, 3)),
        10: (Config(128, 128, 32, 8, 4), Config(64, 128, 64, 8, 3), Config(64, 64, 64, 4, 3)),
        12: (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 3), Config(64, 64, 32, 4, 4)),
    },
    "int4": {  # tall: a weight that was unpacked once serves many rows
        8: (Config(256, 64, 64, 8, 3), Config(128, 64, 64, 8, 2), Config(64, 64, 32, 4, 4)),
        9: (
            Config(128, 128, 64, 8, 3, True, 1),
            Config(128, 64, 64, 4, 3, True, 2),
            Config(64, 64, 64, 4, 4, True, 4),
            Config(64, 32, 64, 4, 4, True, 4),
        ),
        10: (Config(256, 64, 64, 8, 3), Config(128, 64, 64, 8, 3), Config(64, 64, 32, 4, 4)),
        12: (Config(256, 64, 64, 8, 3), Config(128, 64, 64, 8, 2), Config(64, 64, 32, 4, 4)),
    },
}
# Two accumulators, int32 and float: half the tile, on every device. Groups have few steps of the reduction.
FLOAT_GROUPS = Config(64, 64, 32, 4, 3)
# The interpreter's cost is per tile.
INTERPRETER = Config(128, 128, 256, 4, 1)

# Figures of the model in `clocks`. Dense int8 multiply-adds per clock and multiprocessor, from the data sheets; clocks
# to unpack an int4 weight, from the compile table; bytes per clock that a multiprocessor gets from L2 alone, and when
# all of them ask; clocks to start and to end a tile, and of a further launch. The last four are estimates, good for
# ranking tiles, not for telling times.
_MACS = {(8, 0): 2048, 9: 4096, 10: 8192}
_MACS_OTHERS = 1024
_UNPACK_CLOCKS = 0.01
_L2_BYTES = 64
_L2_BYTES_SHARED = 13
_TILE_CLOCKS = 1500
_LAUNCH_CLOCKS = 1500
# Figures of `_resident_clocks`, fitted to 80 times of int8 products on an H100 (they are in
# tests/kernels/test_triton_tiles.py; the error's root mean square is 7.5%): clocks of a launch with the start and the
# end of a tile; clocks of a step beyond products and bytes, as a product to int32 is waited for; bytes per clock that a
# multiprocessor moves; how many times a code counts among them (why more than a weight is not known), and a weight;
# bytes per clock and multiprocessor from L2 when all of them ask, and to the output. A further launch: 2.5 us from the
# end of one small kernel to that of the next, measured in a CUDA graph. In the convolutions of an SD v1.4 step on that
# H100, splits took 5.7 us beyond the modelled product for each megabyte of their sums (seven shapes); why is not known.
# What an int4 weight counts is an estimate: it is read, unpacked and written again.
_START_CLOCKS = 4200
_STEP_CLOCKS = 75
_STEP_BYTES = 170
_CODE_COUNTS = 2.3
_WEIGHT_COUNTS = {"int8": 1.0, "int4": 3.5}
_FETCHED_BYTES = 39
_STORED_BYTES = 13
_FURTHER_LAUNCH_CLOCKS = 5000
_SUM_CLOCKS = 0.0113
_SPLITS = (1, 2, 4, 8, 16)
# Of a split product, that a measurement makes: 512 MiB. Larger ones have tiles enough for any device.
_MOST_SUMS = 2**27


def tiles_of(kind: str, major: int) -> tuple[Config, ...]:
    """The tiles for a compute capability: those of the newest entry that is not newer."""
    table = TILES[kind]
    return table[max((known for known in table if known <= major), default=min(table))]


def tilings(kind: str, major: int, length: int) -> Iterator[Tiling]:
    """Every tile and split that is worth a try.

    Args:
        kind: of `TILES`; major: of the compute capability.
        length: of what is split: the reduction, or the input channels of a convolution with shift classes.
    """
    for config in tiles_of(kind, major):
        for splits in _SPLITS:
            if splits == 1 or length >= splits * 4 * config.half:  # at least two steps each
                yield Tiling(config, splits)


def clocks(tiling: Tiling, kind: str, rows: int, channels: int, reduction: int, machine: Machine) -> float:
    """Modelled clocks of a product of (rows, reduction) and (channels, reduction); a rank, not a prediction.

    `_resident_clocks` where the tile tells how many programs share a multiprocessor. Otherwise tiles are handed out in
    waves, and an idle multiprocessor in the last wave costs as much as a busy one. Tiles of four warps count in pairs,
    as one alone does not fill a multiprocessor.
    """
    config, splits = tiling
    if config.resident:
        return _resident_clocks(tiling, kind, rows, channels, reduction, machine)
    multiprocessors = machine.multiprocessors
    macs = _MACS.get(machine.capability, _MACS.get(machine.capability[0], _MACS_OTHERS))
    programs = math.ceil(rows / config.rows) * math.ceil(channels / config.channels) * splits
    together = max(1, 8 // config.warps)
    waves = math.ceil(programs / (multiprocessors * together))
    weight_bytes, unpack = (0.5, _UNPACK_CLOCKS) if kind == "int4" else (1.0, 0.0)
    loaded = config.rows + config.channels * weight_bytes
    step = 2 * config.half
    length = math.ceil(reduction / splits / step) * step
    tile = length * (config.rows * config.channels / macs + config.channels * unpack + loaded / _L2_BYTES)
    total = waves * (together * tile + _TILE_CLOCKS)
    if splits > 1:  # int32 sums are written, read and added by a second kernel
        sums = 4 * splits * rows * channels
        rate = _L2_BYTES_SHARED if machine.holds(sums) else min(_L2_BYTES_SHARED, machine.memory)
        total += _LAUNCH_CLOCKS + 2 * sums / (rate * multiprocessors)
    return total


def _resident_clocks(tiling: Tiling, kind: str, rows: int, channels: int, reduction: int, machine: Machine) -> float:
    """`clocks` on 9.0, from measured times of int8 products.

    Three things may take most: the programs that follow each other in one place, each of which waits for its steps; the
    work of the programs of one multiprocessor, which overlap; and what all of them move.
    """
    config, splits = tiling
    multiprocessors = machine.multiprocessors
    step = 2 * config.half
    length = reduction / splits
    steps = math.ceil(length / step)
    programs = math.ceil(rows / config.rows) * math.ceil(channels / config.channels) * splits
    fetched = (config.rows + config.channels * (0.5 if kind == "int4" else 1.0)) * length
    stored = config.rows * config.channels * (2 if splits == 1 else 4)
    products = config.rows * config.channels * step / _MACS[9]
    moved = (config.rows * _CODE_COUNTS + config.channels * _WEIGHT_COUNTS[kind]) * step / _STEP_BYTES
    waves = math.ceil(programs / (multiprocessors * config.resident))
    most = math.ceil(programs / multiprocessors)
    waiting = waves * (_START_CLOCKS + steps * (_STEP_CLOCKS + products + moved) + stored / _STORED_BYTES)
    working = _START_CLOCKS + most * (steps * max(products, moved) + stored / _STORED_BYTES)
    moving = _START_CLOCKS + programs / multiprocessors * (fetched / _FETCHED_BYTES + stored / _STORED_BYTES)
    total = (waiting**4 + working**4 + moving**4) ** 0.25  # a maximum, but neither hides the next one wholly
    if splits > 1:  # int32 sums are written, read and added by a second kernel
        total += _FURTHER_LAUNCH_CLOCKS + 4 * splits * rows * channels * _SUM_CLOCKS
    return total


@functools.cache
def choose(kind: str, rows: int, channels: int, reduction: int, length: int, machine: Machine) -> Tiling:
    """The tiling with the fewest modelled `clocks`; of equals the larger tile and the fewer splits.

    On 9.0 no tile of 128 x 128 whose last one is half empty: convolutions to 320 channels took 1.7 to 2 times the model
    in it on an H100 (8192 x 320 x 2880: 45 us for 22), for reasons that are not known.

    Args:
        rows, channels, reduction: of the product.
        length, kind: as in `tilings`.
    """

    def whole(tiling: Tiling) -> bool:
        config = tiling.config
        return not config.resident or config.rows * config.channels < 128 * 128 or channels % config.channels == 0

    return min(
        filter(whole, tilings(kind, machine.capability[0], length)),
        key=lambda tiling: clocks(tiling, kind, rows, channels, reduction, machine),
    )


_measured: dict[tuple[object, ...], Tiling] = {}


def fastest(key: tuple[object, ...], candidates: Iterator[Tiling], time: Callable[[Tiling], float]) -> Tiling:
    """The candidate with the least time(candidate), measured once per key and process."""
    if key not in _measured:
        _measured[key] = min(candidates, key=time)
    return _measured[key]


def pick(
    kind: str,
    rows: int,
    channels: int,
    reduction: int,
    length: int,
    device: torch.device,
    kernel: str,
    run: Callable[[Tiling], None],
) -> Tiling:
    """The tiling for a product on this device.

    DGQ_AUTOTUNE=1 in the environment measures every candidate at a shape's first call, `kernel` and `run` being the
    call; not while a CUDA graph is captured, where nothing can be measured. Otherwise `choose`.
    """
    import triton

    if triton.knobs.runtime.interpret:
        return Tiling(INTERPRETER)
    machine = _machine(device)
    if AUTOTUNE and not torch.cuda.is_current_stream_capturing():
        key = (kernel, kind, rows, channels, reduction, length, device)
        every = tilings(kind, machine.capability[0], length)
        candidates = (t for t in every if t.splits == 1 or t.splits * rows * channels <= _MOST_SUMS)
        return fastest(key, candidates, lambda t: _milliseconds(run, t))
    return choose(kind, rows, channels, reduction, length, machine)


def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has."""
    return _machine(device).multiprocessors


@functools.cache
def _machine(device: torch.device) -> Machine:
    found = torch.cuda.get_device_properties(device)
    clock = getattr(found, "clock_rate", 0)  # older torch does not tell
    memory: float = _L2_BYTES_SHARED
    told = clock and found.memory_clock_rate * found.memory_bus_width  # 0 where a driver does not know
    if told:  # two transfers a clock of the memory
        memory = told / 4 / (clock * found.multi_processor_count)
    return Machine((found.major, found.minor), found.multi_processor_count, found.L2_cache_size, memory)


def _milliseconds(run: Callable[[Tiling], None], tiling: Tiling) -> float:
    from triton.testing import do_bench

    return float(do_bench(lambda: run(tiling)))
