"""What the stages of a report share: the device, the file of results, and timing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("cuda", "cpu", "pretend")

# Weight bits and handling of channels of the quantized networks.
RECIPES = ((8, "none"), (4, "none"), (8, "rotate"))


def label(wbits: int, channels: str) -> str:
    """A row of `RECIPES` as reports call it."""
    return f"W{wbits}A8" + (" rotated" if channels == "rotate" else "")


@dataclass
class Session:
    """One report, as one of its processes sees it.

    Attributes:
        out: folder of report.jsonl and the other files.
        kind: "cuda"; "cpu" runs a tiny UNet in Triton's interpreter; "pretend" compiles and launches nothing.
        shard: "i/n", the part of the kernels that a process of the stage `compile` takes.
        only: texts with commas between, one of which the labels of the networks hold that the stages look at.
        checkpoints: folder of checkpoints of the embedded model that the stage `model` draws with; "": it makes some.
        cache: folder of Triton's cache; "": its own choice.
        card: the device that a process of the stage `compile` compiles for, JSON of `tiles.Machine` and of the shared
            memory of a block; "": a Hopper GPU.
        since: bytes of report.jsonl that were there before: the results of other runs.
    """

    out: Path
    kind: str
    shard: str = "0/1"
    only: str = ""
    checkpoints: str = ""
    cache: str = ""
    card: str = ""
    since: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the networks whose steps are measured."""
        return ("tiny",) if self.kind == "cpu" else ("sd-v1.4", "sdxl-turbo")

    @property
    def labels(self) -> list[str]:
        """What `only` may name: these, and the embedded model, of which kernels are compiled."""
        names = self.names if self.kind == "cpu" else (*self.names, "embedded")
        return [f"{name} {label(*recipe)}" for name in names for recipe in RECIPES]

    def chosen(self) -> list[str]:
        """The names of those of which `only` names a recipe at least; ends the process where there are none."""
        found = [name for name in self.names if any(self.wants(f"{name} {label(*recipe)}") for recipe in RECIPES)]
        if not found:
            sys.exit(f"--only {self.only}: names no network whose steps are measured ({', '.join(self.names)})")
        return found

    def wants(self, label: str) -> bool:
        """Whether `only` names a network."""
        return any(text in label for text in self.only.split(","))

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def half(self) -> Any:
        """float16, which Triton's interpreter is too slow for: float32 there."""
        import torch

        return torch.float16 if self.cuda else torch.float32

    def say(self, stage: str, **facts: Any) -> None:
        """One result: a line of report.jsonl, at once, and of the log."""
        line = json.dumps({"stage": stage, **facts}, default=str)
        print(line, flush=True)
        with open(self.out / "report.jsonl", "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"  # a process was ended within its row
            file.write(f"{line}\n".encode())

    def size(self) -> int:
        """Bytes of report.jsonl so far."""
        path = self.out / "report.jsonl"
        return path.stat().st_size if path.exists() else 0

    def said(self, stage: str) -> list[dict[str, Any]]:
        """The results of a stage so far, without those of other runs."""
        path = self.out / "report.jsonl"
        lines = path.read_bytes()[self.since :].decode().splitlines() if path.exists() else []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a row that was cut
                rows.append(json.loads(line))
        return [row for row in rows if row["stage"] == stage]

    def command(self, stage: str, *more: str) -> list[str]:
        """The command line of a process that runs one stage of this report."""
        script = Path(__file__).with_name("report.py").resolve()
        where = ["--out", str(self.out), "--device", self.kind, "--only", self.only]
        where += ["--checkpoints", self.checkpoints, "--cache", self.cache, "--since", str(self.since)]
        return [sys.executable, str(script), "--run", stage, *where, *more]

    def timed(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        from dgq.bench.rows import timed

        return timed(run, self.device)

    def graphed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Replays of a CUDA graph of a call; the call itself where there is no CUDA."""
        if not self.cuda:
            return run
        import torch

        from dgq.graphs import Pool, capture

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        again, kept = capture(run, Pool())

        def replay() -> Any:
            again()
            return kept

        return replay

    def microseconds(self, run: Callable[[], Any], cold: bool = False) -> float:
        """Of a call among many in one graph: no gaps of the host, operands as warm as the caches keep them. Cold: a
        pass over twice what any card's caches hold comes before each call, and its own time is taken off."""
        import torch

        calls, times = (20, 6) if self.cuda else (1, 1)

        def took(once: Callable[[], Any]) -> float:
            replay = self.graphed(lambda: [once() for _ in range(calls)])
            found = [self.timed(replay) for _ in range(times)]
            return 1000 * statistics.median(found[self.cuda :]) / calls

        if not cold:
            return took(run)
        other = torch.empty(2**28 if self.cuda else 2**20, dtype=torch.uint8, device=self.device)
        return took(lambda: (other.zero_(), run())) - took(other.zero_)

    def forget(self) -> None:
        """Give the device's unused memory back."""
        if self.cuda:
            import torch

            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:300]}"


def clocks() -> str:
    """Clocks, power and temperature as the driver tells them, with the card's name."""
    query = "name,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"
    if not shutil.which("nvidia-smi"):
        return "no GPU"
    ask = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(ask, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout.strip()
