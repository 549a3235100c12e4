"""Whole steps, of a model folder or of a well-known architecture: which systems run, and on which files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import architectures
from ..checkpoint.reading import family_at, network_config, read_header
from ..errors import DgqError
from ..family import family_of, network_of
from ..machine import isa_flags
from ..pictures.generation import Settings, generate
from ..pictures.pipelines import load, resolve
from ..pictures.prompts import evaluation_prompts
from ..progress import Progress, silent
from ..replay import record_inputs
from ..version import __version__
from .drawing import Subject
from .files import Call, save_calls, write
from .rows import Row, dtype_name, half_dtype, verdicts
from .systems import PEERS, Free, Size, System, free_memory, measure
from .worker import Spec

# Sampler steps run to get real inputs; the calls of all of them measure the error.
RECORDED_STEPS = 4
# Random calls, and their timesteps, that int8 ranges are calibrated on; others than the one measured.
CALIBRATION_TIMESTEPS = (100, 300, 600, 900)
DGQ_BYTES = {8: 2.75, 4: 2.25}  # peak, per parameter


@dataclass(frozen=True)
class Options:
    """How steps are measured.

    Attributes:
        repeats: timed steps of each system.
        device: where.
        peers: of `systems.PEERS`.
        compiled: also torch.compile of the faster float system; on CUDA that of float16 with max-autotune, too.
        work: folder that written models are kept in and found again, or None for a temporary one.
    """

    repeats: int
    device: torch.device
    peers: Sequence[str] = ()
    compiled: bool = True
    work: Path | None = None


@dataclass
class Plan:
    """The systems to measure and the files still to be written for them.

    Attributes:
        root: folder of what is written.
        device: where the systems run.
        subject: the picture that they draw; None for steps.
        systems: in the order of the rows.
        tasks: (path below root, bytes per parameter, what `files.write` takes); a path that exists is not written
            again.
    """

    root: Path
    device: torch.device
    subject: Subject | None = None
    systems: list[System] = field(default_factory=list)
    tasks: list[tuple[Path, float, str, dict[str, Any]]] = field(default_factory=list)

    def file(self, path: str, stored: float, task: str, **arguments: Any) -> Path:
        """A folder below root that a task writes, of so many bytes per parameter."""
        target = self.root / path
        self.tasks.append((target, stored, task, arguments))
        return target

    def spec(self, kind: str, folder: Path, dtype: str) -> Spec:
        """A spec on the measured calls, or picture."""
        calls, device = str(self.root / "calls.safetensors"), str(self.device)
        return Spec(kind, str(folder), dtype, calls, device, torch.get_num_threads(), self.subject)

    @property
    def loaded(self) -> str:
        """The kind of a dgq system: as `dgq.load` makes it."""
        return "graph" if self.device.type == "cuda" else "torch"

    def floats(self, full: Path, half: Path, options: Options) -> None:
        """The float systems, and those that quantize a float model by themselves."""
        lower = dtype_name(half_dtype(self.device))
        folders = {"float32": full, lower: half}
        both = {
            kind: tuple(self.spec(kind, folder, dtype) for dtype, folder in folders.items())
            for kind in ("torch", "compile", "torchao", "sdnq")
        }
        self.systems += [System(spec.dtype, (spec,)) for spec in both["torch"]]
        if self.device.type == "cuda":
            self.systems.append(System(f"{lower} in a CUDA graph", (self.spec("graph", half, lower),)))
        if options.compiled:
            self.systems.append(System("torch.compile", both["compile"]))
            if self.device.type == "cuda":
                tuned = self.spec("autotune", half, lower)
                self.systems.append(System(f"torch.compile max-autotune ({lower})", (tuned,)))
        if "torchao" in options.peers:
            self.systems.append(System("torchao int8", both["torchao"], packages=PEERS["torchao"]))
        if "sdnq" in options.peers:
            self.systems.append(System("sdnq int8", both["sdnq"], packages=PEERS["sdnq"]))
        if "openvino" in options.peers:
            single, double, int8 = self._openvino(full)
            runtime, quantizer = PEERS["openvino"]
            for name, folder, dtype, packages in (
                ("OpenVINO float32", single, "float32", (runtime,)),
                ("OpenVINO bfloat16", double, "bfloat16", (runtime,)),
                ("OpenVINO NNCF int8", int8, "", (runtime, quantizer)),
            ):
                self.systems.append(System(name, (self.spec("openvino", folder, dtype),), packages=packages))

    def _openvino(self, full: Path) -> tuple[Path, Path, Path]:
        """OpenVINO's models of a float one: for float32, for bfloat16, in int8."""
        if self.subject is not None:  # of each part one, from which both float types run
            settings = self.subject.settings
            other = {**settings, "steps": min(RECORDED_STEPS, settings["steps"]), "seed": settings["seed"] + 1}
            kind = "-".join(str(other[name]) for name in ("width", "height", "steps", "guidance"))
            made = self.file(
                f"openvino-{kind}",
                2.0,
                "OpenVINO pipeline",
                source=full,
                settings=other,
                prompt=self.subject.prompt,
                dtype=dtype_name(half_dtype(self.device)),
            )
            return made, made, self.file(f"nncf-{kind}", 1.1, "NNCF pipeline", source=made)
        calls, calibration = self.root / "calls.safetensors", self.root / "calibration.safetensors"
        made = self.file("openvino", 6.0, "OpenVINO", source=full, calls=calls)
        int8 = self.file("nncf", 1.1, "NNCF", source=made / "float32", calls=calibration)
        return made / "float32", made / "float16", int8

    def write(self, progress: Progress) -> list[str]:
        """Write what is missing; a system whose files failed is dropped. Returns what to know about it.

        Raises:
            DgqError: the files of float32 or of a dgq system failed.
        """
        notes: list[str] = []
        for i, (target, _, task, arguments) in enumerate(self.tasks):
            if not target.exists():
                try:
                    write(task, target=target, **arguments)
                except DgqError as error:
                    if not task.startswith(("OpenVINO", "NNCF")):
                        raise
                    notes.append(f"{task} failed: {error.message}")
                    self.systems = [
                        system for system in self.systems if not Path(system.specs[0].folder).is_relative_to(target)
                    ]
            progress("files", i + 1, len(self.tasks), task)
        return notes

    def check(self, size: Size, name: str) -> Free:
        """What tells the memory that is left.

        Raises:
            DgqError: not even float32 fits into memory, or the files do not fit on the disk.
        """
        free = free_memory(self.device)
        needed, room = self.systems[0].needed(size), free([])
        if needed > room:
            raise DgqError(
                f"{name} takes {needed / 2**30:.1f} GiB in float32, {room / 2**30:.1f} GiB are free",
                "run it on a larger machine",
            )
        stored = size.parameters * sum(each for target, each, _, _ in self.tasks if not target.exists())
        room = shutil.disk_usage(self.root).free
        if stored > room:
            raise DgqError(
                f"the models take {stored / 2**30:.1f} GiB on disk, {room / 2**30:.1f} GiB are free below {self.root}",
                "name another folder by --work, or set TMPDIR",
            )
        return free


@contextlib.contextmanager
def work_folder(work: Path | None, name: str) -> Iterator[Path]:
    """A temporary folder, or one below `work` that stays."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="dgq-bench-") as temporary:
            yield Path(temporary)
        return
    try:
        (work / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DgqError(f"{work}: cannot be written ({error.strerror})") from None
    yield work / name


def bench_architecture(
    name: str, bits: Sequence[int], options: Options, progress: Progress = silent, pixels: int | None = None
) -> tuple[list[Row], list[str]]:
    """Time whole calls of an architecture with random weights.

    Args:
        name: of `architectures.ARCHITECTURES`, or a network's config.json.
        bits: weight bits of the dgq systems.
        options: how.
        progress: told of "files", "load" and "step".
        pixels: height and width of the picture; None for its own.

    Returns:
        The rows and what to know about them.

    Raises:
        DgqError: no such architecture, too little memory or disk, or float32 or the files of a dgq system failed.
    """
    which = architectures.architecture(name, pixels)
    network = architectures.network(which)
    size = Size.of(network)
    half = dtype_name(half_dtype(options.device))
    host = torch.device("cpu")
    guided = which.batch == 2

    def call(timestep: int, seed: int) -> Call:
        made = architectures.call(
            network, which.batch, host, tokens=which.tokens, timestep=timestep, seed=seed, pixels=which.pixels
        )
        if guided:
            sample = made[family_of(network).arguments[0]]
            sample[1].copy_(sample[0])
        return made

    content = json.dumps([__version__, which.config, which.batch], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    with work_folder(options.work, f"{Path(name).stem}-{digest}") as root:
        plan = Plan(root, options.device)
        config = {**which.config, "_class_name": which.network}
        full, lower = (
            plan.file(dtype, getattr(torch, dtype).itemsize, "random", config=config, dtype=dtype)
            for dtype in ("float32", half)
        )
        plan.floats(full, lower, options)
        for wbits in bits:
            folder = plan.file(f"dgq-w{wbits}a8", wbits / 8 + 0.1, "dgq", source=full, wbits=wbits)
            spec = plan.spec(plan.loaded, folder, half)
            plan.systems.append(System(f"dgq W{wbits}A8", (spec,), bytes_per_parameter=DGQ_BYTES[wbits]))
        free = plan.check(size, name)
        save_calls([call(500, 0)], root / "calls.safetensors")
        calibration = [call(timestep, i + 1) for i, timestep in enumerate(CALIBRATION_TIMESTEPS)]
        save_calls(calibration, root / "calibration.safetensors")
        notes = [
            f"{Path(name).name} has random weights: speed and memory are the model's, errors are not",
            f"float32 and {half} are channels-last; the dgq systems take and return {half} activations",
            "peak memory counts the pages of weight files that were read, also those no longer needed",
            *(["both samples of a call are one picture with two texts, as guidance has them"] if guided else []),
            *peer_notes(options.peers),
            *plan.write(progress),
        ]
        case = f"{Path(name).name} step"
        rows, more = measure(plan.systems, case, size, options.repeats, free, progress)
    return rows, [*notes, *more, *cpu_notes(options.device), *verdicts(rows, options.device)]


def bench_step(
    folder: Path, bits: int | None, options: Options, progress: Progress = silent
) -> tuple[list[Row], list[str]]:
    """Time whole calls with the model's own guidance, on inputs recorded from the model's own sampler.

    Args:
        folder: checkpoint, or float model that is quantized on the fly.
        bits: weight bits for a float model, default 4; a checkpoint has its own.
        options: how; nothing is kept in its `work`.
        progress: told of "files", "load" and "step".

    Returns:
        The rows and what to know about them.

    Raises:
        DgqError: the model cannot be loaded, too little memory or disk, or float32 failed.
    """
    header = read_header(folder)
    simulated = header is not None and header.method.simulated
    notes: list[str] = []
    float_folder: Path | None = folder
    if header is not None:
        try:
            float_folder = resolve(header.base_model or "")
        except DgqError:
            float_folder = None
            notes.append(
                f"the float model {header.base_model!r} is not at hand: the float systems run with random weights "
                f"(their speed is the same), and the error of {header.recipe.label} was not measured"
            )
    config = network_config(folder)
    size = Size.of(family_at(folder).skeleton(config))
    # what `dgq.load` takes by default
    work_dtype = dtype_name(half_dtype(options.device) if options.device.type == "cuda" else torch.float32)
    with work_folder(None, "") as root:
        plan = Plan(root, options.device)
        if float_folder is None:
            source = plan.file("float32", 4.0, "random", config=config, dtype="float32")
        else:
            source = float_folder
        plan.floats(source, source, options)
        if header is None:
            wbits = bits or 4
            label = f"dgq W{wbits}A8"
            quantized = plan.file("dgq", wbits / 8 + 0.1, "dgq", source=source, wbits=wbits)
            notes.append(
                f"{label} was quantized on the fly, to nearest and without calibration: speed does not depend on the "
                "rounding, but `dgq calibrate` gives smaller errors and may treat outlier channels at a small cost"
            )
        else:
            label, quantized = f"dgq {header.recipe.label.removeprefix('integer ')}", folder
        plan.systems.append(
            System(
                label,
                (plan.spec(plan.loaded, quantized, work_dtype),),
                comparable=float_folder is not None,
                bytes_per_parameter=10.0 if simulated else DGQ_BYTES[8],
            )
        )
        free = plan.check(size, str(folder))
        calls = _record(float_folder or folder, options.device)
        save_calls(calls, root / "calls.safetensors")
        save_calls(calls, root / "calibration.safetensors")
        notes += [*peer_notes(options.peers), *plan.write(progress)]
        rows, more = measure(plan.systems, f"{family_at(folder).title} step", size, options.repeats, free, progress)
    if header is not None and simulated:
        notes.append(f"the {header.recipe.name} recipe is simulated in float: it is never faster than the float model")
    return rows, [*notes, *more, *cpu_notes(options.device), *verdicts(rows, options.device)]


def _record(folder: Path, device: torch.device) -> list[Call]:
    """The network's calls of one picture of `RECORDED_STEPS` steps."""
    pipe = load(folder, device=device, dtype=torch.float32, graph=False)
    settings = Settings(RECORDED_STEPS).resolved(folder)
    prompts = evaluation_prompts(folder, 1)
    run: Callable[[str, int], Any] = lambda prompt, _: generate(pipe, [prompt], settings)  # noqa: E731
    (calls,) = record_inputs(run, network_of(pipe), prompts)
    return calls


def peer_notes(peers: Sequence[str]) -> list[str]:
    notes = []
    if "torchao" in peers or "sdnq" in peers:
        notes.append("torchao and sdnq quantize the float files while they load: disk and peak memory are those")
    if "openvino" in peers:
        notes.append("OpenVINO NNCF int8 runs in the precision OpenVINO chooses where it is not quantized")
    return notes


def cpu_notes(device: torch.device) -> list[str]:
    flags = isa_flags()
    if device.type == "cpu" and "avx2" in flags and not {"avx512_bf16", "amx_bf16"} & set(flags):
        return ["this CPU has no bfloat16 instructions: bfloat16 is emulated"]
    return []
