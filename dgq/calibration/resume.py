"""An interrupted calibration's finished parts, kept beside the checkpoint to be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.reading import component_at, weight_files
from ..checkpoint.writing import copied_files
from ..errors import DgqError
from ..method import Method
from ..outputs import atomic_file, atomic_path, discard, leftovers, save_tensors
from ..pictures.generation import Settings
from ..progress import Progress, silent
from ..recipe import Recipe
from ..replay import pack_calls, unpack_calls
from ..version import __version__


class Partial:
    """Finished layers and recorded calls of a calibration, for another run to go on from.

    Args:
        folder: the `writing.workplace` of the checkpoint, which outlives an interrupted run.
        fingerprint: of everything that the calls and layers depend on.
        resume: go on from what is there; else it is removed.
        progress: told of "resume", where something there is damaged.

    Raises:
        DgqError: what is there belongs to a calibration of other settings.
    """

    def __init__(self, folder: Path, fingerprint: str, resume: bool, progress: Progress = silent) -> None:
        self.folder, self.fingerprint, self.progress = folder, fingerprint, progress
        mark = folder / "fingerprint"
        if not resume:
            self.remove()
        elif mark.is_file() and mark.read_text(errors="replace") != fingerprint:
            raise DgqError(
                f"{folder}: belongs to a calibration of another model or with other settings",
                "repeat them, or leave out --resume",
            )

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        mark = self.folder / "fingerprint"
        if not mark.exists():
            with atomic_file(mark) as handle:
                handle.write(self.fingerprint.encode())
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_tensors({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)

    def _drop(self, file: Path, error: Exception) -> None:
        """Remove a file that cannot be used, and say so."""
        discard(file)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.progress("resume", 1, 1, f"{file.name} cannot be used and is made again: {reason}")

    def store(self, name: str, method: Method, result: Any) -> None:
        """Keep one finished layer, or whatever the method finishes at one time."""
        tensors, rest = method.pack(result)
        self._write(f"layer-{name}", tensors, {"layer": json.dumps({"name": name, **rest})})

    def layers(self, plans: Mapping[str, tuple[Method, Any]]) -> dict[str, Any]:
        """The finished ones of the layers to quantize, whose methods and plans before calibration are given by name;
        files that are damaged or of other layers are dropped."""
        done = {}
        for file in sorted(self.folder.glob("layer-*.safetensors")):
            try:
                with safe_open(str(file), framework="pt") as handle:
                    rest = json.loads(handle.metadata()["layer"])
                name = rest.pop("name")
                if file.stem != f"layer-{name}":
                    raise DgqError("its layer is another one")
                method, plan = plans[name]
                done[name] = method.unpack(plan, load_file(str(file)), rest)
            except _DAMAGED as error:
                self._drop(file, error)
        return done

    def store_calls(self, recorded: list[list[dict[str, Any]]], name: str = "calls") -> None:
        """Keep the recorded calls (their tensors; the rest is the pipeline's constants) in a file of this name."""
        tensors = {f"{i}/{name}": one for i, calls in enumerate(recorded) for name, one in pack_calls(calls).items()}
        self._write(name, tensors, {})

    def calls(self, name: str = "calls") -> list[list[dict[str, Any]]] | None:
        """The recorded calls in a file of this name, or None; a damaged file is dropped. They are in memory, aligned as
        what was recorded: on some CPUs products of less aligned rows, as files have them, differ in the last bit."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        prompts: dict[int, dict[str, Tensor]] = {}
        try:
            for path, tensor in load_file(str(file)).items():
                number, _, name = path.partition("/")
                prompts.setdefault(int(number), {})[name] = tensor.clone()
            return [unpack_calls(prompts[i]) for i in sorted(prompts)]
        except _DAMAGED as error:
            self._drop(file, error)
            return None

    def remove(self) -> None:
        """Forget everything."""
        results = (*self.folder.glob("layer-*"), *self.folder.glob("calls*"), self.folder / "fingerprint")
        for file in (*results, *leftovers(self.folder)):
            discard(file)


# What reading a file of `Partial` that was cut, or is another's, may raise.
_DAMAGED = (SafetensorError, OSError, DgqError, KeyError, TypeError, ValueError, RuntimeError)


def fingerprint_of(
    folder: Path,
    recipe: Recipe,
    prompts: Sequence[str],
    settings: Settings,
    calls: int,
    beside: Mapping[str, Recipe],
) -> str:
    """Of everything that recorded calls and quantized layers depend on, the content of the model's files included;
    `beside` has the recipes of what is quantized with the network."""
    own = component_at(folder)
    contents = {}
    for file in (*copied_files(folder).values(), own / "config.json", *weight_files(own)):
        with open(file, "rb") as handle:
            contents[str(file.relative_to(folder))] = hashlib.file_digest(handle, "sha256").hexdigest()
    parts = [
        __version__,
        contents,
        recipe.to_dict(),
        list(prompts),
        dataclasses.asdict(settings),
        calls,
        {name: one.to_dict() for name, one in beside.items()},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
