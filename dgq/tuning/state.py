"""An interrupted run's state, kept beside the file to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import DgqError
from ..outputs import atomic_file, discard, leftovers, save_tensors
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
        with atomic_file(self.file) as handle:
            save_tensors(tensors, Path(handle.name), {"step": json.dumps(step)})

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
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.progress("resume", 1, 1, f"{self.file.name} cannot be used, the run begins anew: {reason}")
            return 0
        for i, vector in enumerate(vectors):
            vector.data.copy_(stored[i])
            if f"{i}.step" in tensors:
                moments = {name: tensors[f"{i}.{name}"].to(vector.device) for name in _MOMENTS}
                moments["step"] = tensors[f"{i}.step"].reshape(())  # AdamW keeps it on the CPU
                optimizer.state[vector] = moments
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
