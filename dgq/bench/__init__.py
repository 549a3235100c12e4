"""Speed, memory and error of quantized layers and of a whole step against float, on this machine.

The systems of a table run interleaved (A B C A B C ...), so that a machine that slows down slows all of them, and the
median is reported with the 20th and 80th percentile. Nothing is predicted: a number that was not measured is None.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import torch

from ..devices import check_device
from ..errors import DgqError
from ..machine import machine
from ..pictures.pipelines import find_model
from ..progress import Progress, silent
from .layers import Case, bench_kernels, int8_peak, large_cases, model_cases
from .rows import Report, Row, interleaved, kernel_verdicts, make_rows, verdicts
from .steps import Options, bench_architecture, bench_step
from .systems import PEERS, Size, System, chosen_peers, measure

__all__ = [
    "PEERS",
    "Case",
    "Options",
    "Report",
    "Row",
    "Size",
    "System",
    "bench",
    "bench_architecture",
    "bench_kernels",
    "bench_step",
    "chosen_peers",
    "int8_peak",
    "interleaved",
    "kernel_verdicts",
    "large_cases",
    "make_rows",
    "measure",
    "model_cases",
    "verdicts",
]


def bench(
    model: str | os.PathLike[str] | None = None,
    *,
    arch: str | None = None,
    pixels: int | None = None,
    what: str = "all",
    bits: int | None = None,
    repeats: int = 20,
    large: bool = False,
    peers: str | None = None,
    compiled: bool | None = None,
    work: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Measure a model on this machine.

    Args:
        model: checkpoint, float model (quantized on the fly), or None for the embedded model.
        arch: instead of a model, the step of a well-known architecture, or of a network's config.json, random weights.
        pixels: height and width of the architecture's picture; None for its own.
        what: "kernels", "step" or "all".
        bits: weight bits; default both for kernels and architectures, 4 for the step of a float model.
        repeats: timed calls of each system.
        large: kernels at Stable Diffusion's shapes too.
        peers: other libraries beside the step, comma-separated names of `PEERS`, or "all".
        compiled: torch.compile beside the step; by default for architectures only, as it takes minutes.
        work: folder in which an architecture's files are kept for a later run.
        threads: CPU threads, default torch's.
        device: default CUDA where there is one, else the CPU.
        progress: told of "kernels", "files", "load" and "step".

    Raises:
        DgqError: a value out of range, a package that is not installed, or the model cannot be loaded.
    """
    if what not in ("kernels", "step", "all"):
        raise DgqError(f"what {what!r} is not one of kernels, step, all")
    if bits not in (None, 4, 8):
        raise DgqError(f"bits {bits} is not one of 4, 8")
    if repeats < 1 or (threads is not None and not 1 <= threads <= 1024):
        raise DgqError(f"repeats {repeats} or threads {threads} is out of range")
    if arch is not None and (model is not None or what == "kernels"):
        raise DgqError("an architecture has only a step to time", "leave out --model and --what kernels")
    if arch is None and work is not None:
        raise DgqError("only an architecture's files are kept", "leave out --work, or give --arch")
    if arch is None and pixels is not None:
        raise DgqError("a model has its own size", "leave out --pixels, or give --arch")
    chosen = chosen_peers(peers)
    if what == "kernels" and (chosen or compiled):
        raise DgqError("other systems are set beside steps, not layers", "leave out --with and --compile")
    place = check_device(device)
    found = find_model(model) if arch is None else None
    if found and found.header and bits is not None and what != "kernels":
        raise DgqError(f"{found.folder}: is {found.label} already", "--bits is for float models; leave it out")
    if place.type != "cpu" and "openvino" in chosen:
        raise DgqError("openvino is measured on the CPU", "pass --device cpu")
    options = Options(repeats, place, chosen, arch is not None if compiled is None else compiled, work)
    both = (8, 4) if bits is None else (bits,)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        rows: list[Row] = []
        notes: list[str] = []
        if found is None:
            assert arch is not None
            rows, notes = bench_architecture(arch, both, options, progress, pixels)
        else:
            if what != "step":
                cases = model_cases(found.folder) + (large_cases() if large else [])
                rows += bench_kernels(cases, both, repeats, place, progress)
                notes += kernel_verdicts(rows, place)
            if what != "kernels":
                steps, more = bench_step(found.folder, bits, options, progress)
                rows += steps
                notes += more
        facts = machine(place)
    finally:
        torch.set_num_threads(before)
    # a folder's name without its path: results are meant to be shown around
    if found is None:
        name = Path(str(arch)).name
    else:
        name = found.folder.name if found.embedded or Path(found.name).is_dir() else found.name
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report({**facts, "date": date, "model": name}, rows, notes)
