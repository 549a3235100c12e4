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
from .pictures import PictureOptions, bench_picture
from .rows import Report, Row, interleaved, kernel_verdicts, make_rows, verdicts
from .steps import Options, bench_architecture, bench_step
from .systems import PEERS, Size, System, chosen_peers, measure

__all__ = [
    "PEERS",
    "Case",
    "Options",
    "PictureOptions",
    "Report",
    "Row",
    "Size",
    "System",
    "bench",
    "bench_architecture",
    "bench_kernels",
    "bench_picture",
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
    steps: int | None = None,
    guidance: float | None = None,
    text_encoder: bool = False,
    repeats: int | None = None,
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
        arch: instead of a model, the step or picture of a well-known architecture, or of a network's config.json,
            random weights.
        pixels: height and width of the architecture's, or of any model's whole, picture; None for its own.
        what: "kernels", "step", "all" of these, or "picture": whole ones, from prompt to PNG.
        bits: weight bits; default both for kernels and the steps of architectures, 4 for a float model's step and for
            pictures.
        steps, guidance: of whole pictures; None for the model's own.
        text_encoder: whether the text encoders of whole pictures are quantized too, where the model is a float model.
        repeats: timed calls of each system, default 20, or pictures, default 3.
        large: kernels at Stable Diffusion's shapes too.
        peers: other libraries beside the step, comma-separated names of `PEERS`, or "all"; beside pictures "openvino".
        compiled: torch.compile beside the step, on CUDA also with max-autotune; by default for architectures only, as
            it takes minutes.
        work: folder in which an architecture's files are kept for a later run.
        threads: CPU threads, default torch's.
        device: default CUDA where there is one, else the CPU.
        progress: told of "kernels", "files", "load", "step" and "picture".

    Raises:
        DgqError: a value out of range, a package that is not installed, or the model cannot be loaded.
    """
    if what not in ("kernels", "step", "all", "picture"):
        raise DgqError(f"what {what!r} is not one of kernels, step, all, picture")
    if bits not in (None, 4, 8):
        raise DgqError(f"bits {bits} is not one of 4, 8")
    drawn = what == "picture"
    repeats = (3 if drawn else 20) if repeats is None else repeats
    if repeats < 1 or (threads is not None and not 1 <= threads <= 1024):
        raise DgqError(f"repeats {repeats} or threads {threads} is out of range")
    if arch is not None and (model is not None or what == "kernels"):
        raise DgqError("an architecture has only steps and pictures to time", "leave out --model and --what kernels")
    if arch is None and work is not None:
        raise DgqError("only an architecture's files are kept", "leave out --work, or give --arch")
    if arch is None and pixels is not None and not drawn:
        raise DgqError("a model has its own size", "leave out --pixels, or give --arch")
    if not drawn and (steps is not None or guidance is not None or text_encoder):
        raise DgqError("steps, guidance and text encoders are those of pictures", "say --what picture")
    chosen = chosen_peers(peers)
    if drawn and (compiled or set(chosen) - {"openvino"}):
        raise DgqError(
            "of other systems only openvino draws whole pictures", "leave out --compile and the rest of --with"
        )
    if what == "kernels" and (chosen or compiled):
        raise DgqError("other systems are set beside steps, not layers", "leave out --with and --compile")
    place = check_device(device)
    found = find_model(model) if arch is None else None
    if found and found.header and (bits is not None or text_encoder) and what != "kernels":
        raise DgqError(
            f"{found.folder}: is {found.label} already",
            "--bits and --text-encoder are for float models; leave them out",
        )
    if place.type != "cpu" and "openvino" in chosen:
        raise DgqError("openvino is measured on the CPU", "pass --device cpu")
    options = Options(repeats, place, chosen, (arch is not None and not drawn) if compiled is None else compiled, work)
    both = (8, 4) if bits is None else (bits,)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        rows: list[Row] = []
        notes: list[str] = []
        if drawn:
            picture = PictureOptions(steps, guidance, pixels, bits, text_encoder)
            rows, notes = bench_picture(found or str(arch), picture, options, progress)
        elif found is None:
            assert arch is not None
            rows, notes = bench_architecture(arch, both, options, progress, pixels)
        else:
            if what != "step":
                cases = model_cases(found.folder) + (large_cases() if large else [])
                rows += bench_kernels(cases, both, repeats, place, progress)
                notes += kernel_verdicts(rows, place)
            if what != "kernels":
                calls, more = bench_step(found.folder, bits, options, progress)
                rows += calls
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
