"""An interrupted run's state, kept beside the file to be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import DgqError
from ..outputs import atomic_file, atomic_path, discard, leftovers, save_tensors
from ..pictures.generation import write_png
from ..progress import Progress

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW


class State:
    """Scales, momentum and class pictures of a run, for another one to go on from.

    Args:
        folder: the `outputs.workplace` of the file, which outlives an interrupted run.
        progress: told of "resume", where something there is damaged.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        self.file, self.mark = folder / "state.safetensors", folder / "fingerprint"

    def start(self, fingerprint: str, resume: bool) -> None:
        """Begin a run of this fingerprint; without `resume` what is there is removed.

        Raises:
            DgqError: what is there belongs to another run.
        """
        if not resume:
            self.remove()
        elif self.mark.is_file() and self.mark.read_text(errors="replace") != fingerprint:
            raise DgqError(
                f"{self.folder}: belongs to a run on another checkpoint, other pictures or with other settings",
                "repeat them, or leave out --resume",
            )
        with atomic_file(self.mark) as handle:
            handle.write(fingerprint.encode())

    def store(self, step: int, vectors: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Keep the state after a step."""
        tensors = {"vectors": torch.stack([vector.detach().cpu() for vector in vectors])}
        for i, vector in enumerate(vectors):
            for name, value in optimizer.state.get(vector, {}).items():
                tensors[f"{i}.{name}"] = value.detach().cpu().reshape(-1).contiguous()
        with atomic_path(self.file) as temporary:
            save_tensors(tensors, temporary, {"step": json.dumps(step)})

    def load(self, vectors: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Take over the stored state; the steps it has done, 0 where there is none that can be used."""
        if not self.file.is_file():
            return 0
        try:
            with safe_open(str(self.file), framework="pt") as handle:
                step = int(json.loads(handle.metadata()["step"]))
                tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            stored = tensors["vectors"]
            if stored.shape != (len(vectors), len(vectors[0])):
                raise ValueError("its scales are others")
            moments = [_moments(tensors, i, vector) for i, vector in enumerate(vectors)]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.progress("resume", 1, 1, f"{self.file.name} cannot be used, the run begins anew: {reason}")
            return 0
        for vector, value, own in zip(vectors, stored, moments, strict=True):
            vector.data.copy_(value)
            if own:
                optimizer.state[vector] = own
        return step

    def class_picture(self, number: int) -> Image.Image | None:
        """A class picture that an earlier run drew."""
        file = self.folder / f"class-{number}.png"
        try:
            with Image.open(file) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError):
            return None

    def store_class_picture(self, number: int, image: Image.Image) -> None:
        """Keep a class picture."""
        write_png(image, self.folder / f"class-{number}.png")

    def remove(self) -> None:
        """Forget everything."""
        for file in (self.file, self.mark, *self.folder.glob("class-*.png"), *leftovers(self.folder)):
            discard(file)


def _moments(tensors: Mapping[str, Tensor], i: int, vector: Tensor) -> dict[str, Tensor]:
    """AdamW's stored state of scales number i; empty where no step has changed them yet.

    Raises:
        ValueError: it is not whole.
    """
    found = {name: tensors[key] for name in _MOMENTS if (key := f"{i}.{name}") in tensors}
    if not found:
        return {}
    sizes = [value.numel() for value in found.values()]
    if len(found) < len(_MOMENTS) or sizes != [len(vector), len(vector), 1]:
        raise ValueError("its momentum is not whole")
    step = found.pop("step").reshape(())  # AdamW keeps it on the CPU
    return {name: value.to(vector.device) for name, value in found.items()} | {"step": step}
