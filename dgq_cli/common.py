"""What the commands share: consoles, JSON, progress, and options of one meaning everywhere.

Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Nothing is markup: prompts, paths and names may hold square brackets and colons.
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

# How an interrupted command can be gone on with, for the line that says so.
going_on: list[str] = []

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Checkpoint folder or hub id; the embedded model if left out."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of the first picture; drawn and printed if left out.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; CUDA where there is one.")
]


def _dtype(name: str | None) -> str | None:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{name!r} is not float32, bfloat16 or float16")
    return name


DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of all that is not quantized: float32, bfloat16 or float16; default float16 on CUDA, else float32.",
        callback=_dtype,
    ),
]


GraphOption = Annotated[
    bool, typer.Option("--graph/--no-graph", help="On CUDA, replay the network's steps from a CUDA graph.")
]
OffloadOption = Annotated[
    bool, typer.Option("--offload", help="On the GPU only what draws at the moment; the rest waits in memory.")
]


def loading(device: str | None, dtype: str | None, graph: bool, offload: bool, verify: bool) -> dict[str, Any]:
    """What these options are to `dgq.load`."""
    return {
        "device": device,
        "dtype": dtype,
        "graph": None if graph else False,
        "offload": offload,
        "verify": verify,
    }


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def finite(value: float | None) -> float | None:
    """A number option's value: ranges let NaN through, and where they are open infinity too."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def prompt_count(text: str, most: int = 1_000_000) -> int | None:
    """The number that --prompts says, or None where it names something else."""
    if not re.fullmatch(r"-?[0-9]+", text):
        return None
    if len(text) > 9 or not 1 <= int(text) <= most:
        raise typer.BadParameter(f"--prompts {text} is not a number from 1 to {most}, nor a file")
    return int(text)


def mib(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class StageProgress:
    """Progress bars with an ETA, one a stage, on a terminal; a line every few seconds elsewhere.

    An instance is the progress callback of the library: progress(stage, done, total, detail).
    """

    QUIET_SECONDS = 15.0

    def __init__(self, titles: dict[str, str]) -> None:
        self._titles = titles
        self._bars = Progress(
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=err,
        )
        self._tasks: dict[str, Any] = {}
        self._runs: dict[str, tuple[float, int, int]] = {}  # when a stage began, at which part, and where it is
        self._last = 0.0

    def __enter__(self) -> StageProgress:
        if err.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if err.is_terminal:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        title = self._titles.get(stage, stage)
        now = time.monotonic()
        started, first, before = self._runs.get(stage, (now, done, 0))
        again = done < before  # another pass over the same calls
        if again:
            started, first = now, done
        self._runs[stage] = started, first, done
        if not err.is_terminal:
            if now - self._last > self.QUIET_SECONDS or done == total:
                self._last = now
                left = ""
                if done > first:
                    left = f", about {duration((now - started) / (done - first) * (total - done))} left"
                err.print(f"{title} {done}/{total}{left}  {detail}".rstrip(), soft_wrap=True)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(title, total=total, detail="")
        elif again:
            self._bars.reset(self._tasks[stage], total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total, detail=detail[:60])
