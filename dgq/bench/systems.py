"""Whole steps, or pictures, of several systems: every one in a process of its own, all of them asked in turns.

One process would give the systems one allocator and several pools of threads that get in each other's way, and tell
no system's own peak memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import doctor
from ..checkpoint.reading import components, network_bytes, weight_files
from ..errors import DgqError
from ..progress import Progress, silent
from ..self_test import relative_error
from .drawing import PARTS
from .files import CHILD, OPENVINO, child_environment
from .rows import Row, Table, interleaved, make_rows
from .worker import Spec, as_json

# What `--with` takes, and the packages each needs.
PEERS = {"openvino": ("openvino", "nncf"), "torchao": ("torchao",), "sdnq": ("sdnq",)}
# Part of the free memory that systems may take.
USABLE = 0.95
# Peak bytes of a process before any weights, and per parameter by kind and dtype. Generous: a system that does not fit
# beside others costs one more turn of float32, one that was let in too early ends them all.
OVERHEAD = 2**30
BYTES = {
    ("torch", "float32"): 4.0,
    ("torch", "float16"): 2.0,
    ("torch", "bfloat16"): 2.0,
    ("graph", "float32"): 4.0,
    ("graph", "float16"): 2.0,
    ("graph", "bfloat16"): 2.0,
    ("compile", "float32"): 10.0,
    ("compile", "float16"): 5.0,
    ("compile", "bfloat16"): 5.0,
    ("autotune", "float16"): 5.0,
    ("torchao", "float32"): 10.0,
    ("torchao", "float16"): 5.5,
    ("torchao", "bfloat16"): 5.5,
    ("sdnq", "float32"): 6.0,
    ("sdnq", "float16"): 4.0,
    ("sdnq", "bfloat16"): 4.0,
    ("openvino", "float32"): 8.5,
    ("openvino", "bfloat16"): 4.0,
    ("openvino", ""): 2.25,
}
# Threads of the system before wait for work in a busy loop for a few milliseconds.
PAUSE = 0.02


@dataclass(frozen=True)
class Size:
    """Parameters: all, and those of convolutions that float systems copy to lay them out channels-last; and bytes of
    what is computed beside them."""

    parameters: int
    convolutions: int = 0
    computed: float = 0.0

    @classmethod
    def of(cls, *networks: nn.Module) -> Size:
        """That of models, which may be on the meta device."""
        values = [value for network in networks for value in network.parameters()]
        copied = (value for value in values if value.dim() == 4 and value.shape[2:].numel() > 1)
        return cls(sum(value.numel() for value in values), sum(value.numel() for value in copied))


@dataclass(frozen=True)
class System:
    """One row of a table of steps, or of pictures.

    Attributes:
        name: of the row; with several specs, the chosen dtype is added.
        specs: one, or one for each float dtype, of which the dtype that ran faster uncompiled is taken.
        comparable: whether its weights are those of float32, so that an error means something.
        packages: distributions that run it.
        bytes_per_parameter: of its peak memory, where `BYTES` does not tell.
    """

    name: str
    specs: tuple[Spec, ...]
    comparable: bool = True
    packages: tuple[str, ...] = ()
    bytes_per_parameter: float | None = None

    def chosen(self, fastest: str) -> System:
        """With one spec: that of dtype `fastest` of several."""
        if len(self.specs) == 1:
            return self
        spec = next(spec for spec in self.specs if spec.dtype == fastest)
        return dataclasses.replace(self, name=f"{self.name} ({fastest})", specs=(spec,))

    def needed(self, size: Size) -> float:
        """Bytes of memory its process may take, loading included."""
        spec = self.specs[0]
        if self.bytes_per_parameter is not None:
            return OVERHEAD + size.computed + self.bytes_per_parameter * size.parameters
        copied = 0 if spec.kind == "openvino" else getattr(torch, spec.dtype).itemsize * size.convolutions
        return OVERHEAD + size.computed + BYTES[spec.kind, spec.dtype] * size.parameters + copied

    @property
    def stored_bytes(self) -> int:
        """The weight files that it loads: the network's, for a picture all of the pipeline's."""
        spec = self.specs[0]
        folder = Path(spec.folder)
        if spec.kind == "openvino":
            return sum(file.stat().st_size for file in folder.rglob(str(OPENVINO.with_suffix(".bin"))))
        if spec.picture is None:
            return network_bytes(folder)
        return sum(file.stat().st_size for name in components(folder) for file in weight_files(folder / name))

    @property
    def versions(self) -> str:
        """As in "openvino 2026.4.1, nncf 3.4.0"."""
        return ", ".join(f"{name} {metadata.version(name)}" for name in self.packages)


def chosen_peers(text: str | None) -> list[str]:
    """The peers named by `--with`: comma-separated names of `PEERS`, or "all".

    Raises:
        DgqError: an unknown name, or a package that is not installed.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if "all" in names:
        names = list(PEERS)
    for name in names:
        if name not in PEERS:
            raise DgqError(f"{name!r} is not one of {', '.join(PEERS)}, all")
    packages = [package for name in PEERS if name in names for package in PEERS[name]]
    lost = [package for package in packages if importlib.util.find_spec(package) is None]
    if lost:
        raise DgqError(f"{' and '.join(lost)} not installed: pip install {' '.join(lost)}")
    return [name for name in PEERS if name in names]


class Worker:
    """The process of a system, loaded and warm.

    Raises:
        DgqError: it could not be loaded, or its process ended.
    """

    def __init__(self, spec: Spec) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output.npy"
            self._child = subprocess.Popen(
                [*CHILD, "work", as_json(spec), str(output)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=child_environment(),
            )
            try:
                facts = self._answer()["load"]
                self.output = torch.from_numpy(np.load(output))
            except BaseException:
                self.close()
                raise
        self.warm_ms: float = facts["ms"]
        self.load_ms: float = facts.get("load_ms", math.nan)  # of a picture's pipeline
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}  # milliseconds in each picture drawn
        self.weight_bytes: int | None = facts["weight_bytes"]
        self.peak_rss_bytes: int = facts["peak_rss_bytes"]

    def run(self) -> float:
        """Milliseconds of one step or picture.

        Raises:
            DgqError: it failed, or the process ended.
        """
        time.sleep(PAUSE)
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer, or the lack of one, tells why
            self._child.stdin.write("\n")
            self._child.stdin.flush()
        facts = self._answer()
        self.peak_rss_bytes = facts["peak_rss_bytes"]
        for part, ms in facts.get("parts", {}).items():
            self.parts[part].append(ms)
        return float(facts["ms"])

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if line:
            facts: dict[str, Any] = json.loads(line)
            if "error" in facts:
                raise DgqError(facts["error"])
            return facts
        code = self._child.wait()
        if code < 0:
            reason = f"its process was ended by {signal.Signals(-code).name}"
            raise DgqError(f"{reason}, perhaps for lack of memory" if code == -signal.SIGKILL else reason)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raise DgqError(lines[-1] if lines else f"its process ended with {code}")

    def close(self) -> None:
        """End the process and wait until its memory is free."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


# The bytes of memory that are left beside loaded workers.
Free = Callable[[Sequence[Worker]], float]


def free_memory(device: torch.device) -> Free:
    """Of what systems on a device may take. CUDA is asked each time: contexts and caches of processes take a part that
    their peaks do not tell."""
    if device.type == "cuda":

        def left(loaded: Sequence[Worker]) -> float:
            torch.cuda.empty_cache()  # this process's own
            return USABLE * torch.cuda.mem_get_info(device)[0]

        return left
    free = USABLE * doctor.memory()["available"]
    return lambda loaded: free - sum(worker.peak_rss_bytes for worker in loaded)


def measure(
    systems: Sequence[System],
    case: str,
    size: Size,
    repeats: int,
    free: Free = lambda loaded: math.inf,
    progress: Progress = silent,
    table: Table = "step",
) -> tuple[list[Row], list[str]]:
    """Time a step or a picture of every system, interleaved; in groups, each with float32, where not all fit into
    memory, and after float32 what does not fit beside it.

    Args:
        systems: the first is "float32", the others are set beside it.
        case: of the rows.
        size: of the network, or of all that draws.
        repeats: steps or pictures of each system that count.
        free: tells the bytes of memory that are left beside loaded workers.
        progress: told of "load" and of the table.
        table: "step" or "picture"; a picture's rows are followed by those of its parts.

    Returns:
        The rows, in the order of `systems`, and what to know about them: systems that failed or did not fit, groups,
        those that took no turns with float32.

    Raises:
        DgqError: float32 failed.
    """
    base, *waiting = systems
    rows: dict[str, list[Row]] = {}
    notes: list[str] = []
    groups: list[list[str]] = []
    warm: dict[str, float] = {}  # dtype -> ms, uncompiled
    order = {system.name: i for i, system in enumerate(systems)}
    first: list[float] = []  # milliseconds of float32 in its first group

    def load(system: System, stack: contextlib.ExitStack) -> Worker | None:
        try:
            return stack.enter_context(Worker(system.specs[0]))
        except DgqError as error:
            notes.append(f"{system.name} failed: {error.message}")
            return None
        finally:
            progress("load", loaded, len(systems) - 1, system.name)

    def take_turns(group: Mapping[str, tuple[System, Worker]]) -> dict[str, list[float]]:
        def lost(name: str, error: DgqError) -> None:
            if name == base.name:
                raise DgqError(f"{name} failed: {error.message}", error.hint)
            notes.append(f"{name} failed: {error.message}")

        timers = {name: worker.run for name, (_, worker) in group.items()}
        # the workers are warm
        return interleaved(timers, repeats, 0, lambda done, total: progress(table, done, total, ""), lost)

    loaded = 0
    alone: list[System] = []
    with contextlib.ExitStack() as stack:
        try:
            reference = stack.enter_context(Worker(base.specs[0]))
        except DgqError as error:
            raise DgqError(f"{base.name} failed: {error.message}", error.hint) from None
        warm[base.specs[0].dtype] = reference.warm_ms
        while waiting or not rows:
            with contextlib.ExitStack() as others:
                group: dict[str, tuple[System, Worker]] = {base.name: (base, reference)}
                for pending in list(waiting):
                    system = pending.chosen(min(warm, key=lambda dtype: warm[dtype]))
                    order.setdefault(system.name, order[pending.name])
                    if system.needed(size) > free([worker for _, worker in group.values()]):
                        if len(group) == 1:
                            waiting.remove(pending)
                            alone.append(system)
                        continue
                    waiting.remove(pending)
                    loaded += 1
                    worker = load(system, others)
                    if worker is None:
                        continue
                    group[system.name] = (system, worker)
                    if system.specs[0].kind == "torch" and not system.name.startswith("dgq"):
                        warm[system.specs[0].dtype] = worker.warm_ms
                if len(group) == 1 and rows:
                    continue  # all failed: float32 has its row already
                times = take_turns(group)
                first = first or times[base.name]
                found = _rows(group, times, case, repeats, reference, notes, table)
                rows = {**found, **rows}  # float32's row is that of the first group
                groups.append([name for name in found if name != base.name])
    late: list[str] = []
    for system in alone:
        if system.needed(size) > (room := free([])):
            notes.append(
                f"{system.name} was left out: it may take {system.needed(size) / 2**30:.1f} GiB, "
                f"{room / 2**30:.1f} GiB are free"
            )
            continue
        with contextlib.ExitStack() as others:
            loaded += 1
            worker = load(system, others)
            times = {} if worker is None else take_turns({system.name: (system, worker)})
            if worker is not None and times:
                group = {base.name: (base, reference), system.name: (system, worker)}
                found = _rows(group, {base.name: first, **times}, case, repeats, reference, notes, table)
                rows[system.name] = found[system.name]
                late.append(system.name)
    if late:
        notes.append(f"did not fit into memory beside float32, and ran after it, not in turns: {', '.join(late)}")
    groups = [names for names in groups if names]
    if len(groups) > 1:
        text = "; ".join(", ".join(names) for names in groups)
        notes.append(f"memory did not suffice for all systems at once: {text} ran in turns, each group with float32")
    return [row for system in sorted(rows, key=lambda name: order[name]) for row in rows[system]], notes


def _rows(
    group: Mapping[str, tuple[System, Worker]],
    times: Mapping[str, Sequence[float]],
    case: str,
    repeats: int,
    reference: Worker,
    notes: list[str],
    table: Table,
) -> dict[str, list[Row]]:
    """The rows of systems that ran so many milliseconds, by system; workers may have ended since."""
    rows: dict[str, list[Row]] = {}
    for row in make_rows(case, times, table):
        system, worker = group[row.system]
        error = relative_error(worker.output, reference.output) if system.comparable else None
        if error == math.inf:
            error = None
            notes.append(f"the output of {row.system} holds values that are not finite")
        row = dataclasses.replace(
            row,
            relative_error=error,
            disk_mib=system.stored_bytes / 2**20,
            peak_rss_mib=worker.peak_rss_bytes / 2**20,
            packages=system.versions,
            weights_mib=None if worker.weight_bytes is None else worker.weight_bytes / 2**20,
        )
        rows[row.system] = [row]
    if table == "picture":
        workers = {name: group[name][1] for name in times}
        parts = {part: {name: worker.parts[part][-repeats:] for name, worker in workers.items()} for part in PARTS}
        parts["load"] = {name: [worker.load_ms] for name, worker in workers.items()}
        for part, own in parts.items():
            for row in make_rows(f"{case}: {part}", own, "part"):
                rows[row.system].append(row)
    return rows
