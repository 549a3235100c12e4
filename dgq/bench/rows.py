"""Rows of a benchmark, the CSV they are kept in, and the turns in which they are measured."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dgq_kernels import backend

from ..errors import DgqError
from ..graphs import Pool, capture
from ..outputs import check_output, refusal

WARM_UP = 2
GRAPH_CALLS = 20
FACTS = ("date", "model", "dgq", "torch", "cpu", "cores", "threads", "isa", "device", "backend")

Table = Literal["kernels", "step", "picture", "part"]


@dataclass(frozen=True)
class Row:
    """One system on one case. None means that it was not measured.

    Attributes:
        system: "float32", "bfloat16" ("float16" on CUDA), "dgq W4A8" and the like.
        case: the layer's shape, or the model and "step", "picture", or a part of a picture.
        p20_ms, p50_ms, p80_ms: percentiles of the time of one call, in ms.
        ratio_to_float32: p50_ms over float32's p50_ms in the same turns; below 1 is faster than float32.
        relative_error: norm of the output's difference to float32 over the norm of float32's output.
        disk_mib: the weight files that were loaded: the network's, for a picture all of the pipeline's.
        peak_rss_mib: peak resident memory of a process that only loads the network and runs steps, or the pipeline and
            draws; on CUDA what it took of the device's.
        weights_mib: the weights in memory, with what a backend keeps beside them: the network's, or all.
        gops: 10^9 operations a second (2 a multiply-accumulate) at p50_ms.
        peak_fraction: of an int8 product: gops over the machine's int8 peak (`layers.int8_peak`).
        packages: names and versions of what ran it beside torch and dgq.
        table: "kernels", "step", "picture" (from prompt to PNG), or "part" (of a picture; or loading, measured once).
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
    peak_fraction: float | None = None
    packages: str = ""
    table: Table = "kernels"


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

        What two processes append at once is all kept, and a disk that fills up leaves the file as it was.

        Raises:
            DgqError: the file cannot be written, or has other columns.
        """
        check_csv(path)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        for row in self.rows:
            writer.writerow([*(self.machine[name] for name in FACTS), *dataclasses.astuple(row)])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            regular = not path.exists() or path.is_file()
            with open(path, "ab" if regular else "wb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                data = (("" if size else ",".join(COLUMNS) + "\r\n") + text.getvalue()).encode()
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    if regular:
                        file.truncate(size)
                    raise
        except OSError as error:
            raise refusal(path, error) from None


COLUMNS = (*FACTS, *(item.name for item in dataclasses.fields(Row)))


def check_csv(path: Path) -> None:
    """Refuse, before anything is measured, a file to which `Report.append_csv` could not append.

    Raises:
        DgqError: it cannot be written, or has other columns.
    """
    check_output(path)
    try:
        if path.is_file() and path.stat().st_size:
            with open(path, newline="", encoding="utf-8") as file:
                if next(csv.reader(file)) != list(COLUMNS):
                    raise DgqError(f"{path}: has other columns", "name another --csv file")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DgqError(f"{path}: cannot be read as CSV ({error})") from None


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: by events on the stream on CUDA, else by the clock."""
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


def timer(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """What tells the milliseconds of one call; on CUDA of one among `GRAPH_CALLS` in a graph, where no launch waits for
    the host, with operands as warm as the caches keep them."""
    if device.type != "cuda":
        return functools.partial(timed, run, device)
    run()  # what is compiled or packed at a first call cannot be captured
    with torch.cuda.device(device):
        replay, _ = capture(lambda: [run() for _ in range(GRAPH_CALLS)], Pool())
    return lambda: timed(replay, device) / GRAPH_CALLS


def interleaved(
    timers: Mapping[str, Callable[[], float]],
    repeats: int,
    warm_up: int = WARM_UP,
    on_call: Callable[[int, int], None] = lambda done, total: None,
    on_failure: Callable[[str, DgqError], None] | None = None,
) -> dict[str, list[float]]:
    """Call every timer `repeats` times in turns (A B C A B C ...), after `warm_up` turns that do not count.

    Args:
        timers: each runs its system once and returns the milliseconds it took.
        on_call: on_call(done, total) after every turn that counts.
        on_failure: told of a timer that raised DgqError, which then has no more turns; by default the error is raised.

    Returns:
        The times of every timer that never failed.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(-warm_up, repeats):
        for name in list(times):
            try:
                milliseconds = timers[name]()
            except DgqError as error:
                if on_failure is None:
                    raise
                on_failure(name, error)
                del times[name]
                continue
            if i >= 0:
                times[name].append(milliseconds)
        if i >= 0:
            on_call((i + 1) * len(times), repeats * len(times))
    return times


def make_rows(case: str, times: Mapping[str, Sequence[float]], table: Table) -> list[Row]:
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


def dtype_name(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def verdicts(rows: Sequence[Row], device: torch.device) -> list[str]:
    """Plain sentences on how each dgq system compares with float32 and with the fastest other system."""
    steps = [row for row in rows if row.table in ("step", "picture")]
    others = {row.system: row for row in steps if not row.system.startswith("dgq")}
    if "float32" not in others:
        return []
    best = min(others.values(), key=lambda row: row.ratio_to_float32)
    _, reason = backend.describe(device)
    sentences = []
    for row in steps:
        if row.system in others:
            continue
        for other in {"float32": others["float32"], best.system: best}.values():
            # of the ratios, as systems that ran in different turns have only those in common
            slower = row.ratio_to_float32 / other.ratio_to_float32
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
