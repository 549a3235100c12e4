"""What the training scripts share: options, atomic files, checkpoints, averaged weights, clean stops, schedules."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEFAULT_WORK = Path("~/.cache/dgq/embedded")
KEEP_CHECKPOINTS = 2


def add_work_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--work``, the folder for everything that stays out of the repository."""
    parser.add_argument("--work", type=lambda text: Path(text).expanduser(), default=DEFAULT_WORK.expanduser())


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options every training script takes."""
    add_work_option(parser)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end this run after so many minutes")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="one-thread processes")
    parser.add_argument("--seed", type=int, default=0)


def write_json(path: Path, value: object) -> None:
    """Write JSON through a temporary file, so that readers never see half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def save_atomic(value: object, path: Path) -> None:
    """``torch.save`` through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    temporary.replace(path)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Save a checkpoint and drop all but the last two."""
    path = folder / f"step-{step:08d}.pt"
    save_atomic(state, path)
    for old in checkpoints(folder)[:-KEEP_CHECKPOINTS]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a folder, or None."""
    found = checkpoints(folder)
    return torch.load(found[-1], weights_only=False) if found else None


class Stop:
    """Turns SIGTERM and SIGINT into a flag that the training loop looks at between steps."""

    def __init__(self) -> None:
        self.asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._handle)

    def _handle(self, *_: object) -> None:
        self.asked = True


def warm_cosine(step: int, warmup: int, total: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to zero at ``total`` steps."""
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def warm_constant(step: int, warmup: int, decay_start: int | None, decay_steps: int) -> float:
    """Learning-rate factor: linear warm-up, constant for as long as wanted, then (once started) a linear decay."""
    factor = min(1.0, (step + 1) / warmup)
    return factor if decay_start is None else factor * max(0.0, 1 - (step - decay_start) / decay_steps)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its base times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def rng_state(rng: random.Random, generator: torch.Generator) -> dict[str, Any]:
    """The random state of a run: the sampler's, and the noise generator's."""
    return {"python": rng.getstate(), "torch": generator.get_state()}


def set_rng_state(state: dict[str, Any], rng: random.Random, generator: torch.Generator) -> None:
    """Restore what ``rng_state`` returned."""
    rng.setstate(state["python"])
    generator.set_state(state["torch"])


class Log:
    """Prints a line of averages now and then."""

    def __init__(self, every: float = 30.0, emit: Callable[[str], None] | None = None) -> None:
        self.every, self.emit = every, emit or (lambda text: print(text, flush=True))
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.start, self.images, self.sums, self.count = time.monotonic(), 0, {}, 0

    def add(self, images: int, **values: float) -> None:
        """Count one step."""
        self.images += images
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def maybe(self, step: int, seconds: float) -> None:
        """Print when the window is over."""
        spent = time.monotonic() - self.start
        if spent < self.every:
            return
        means = " ".join(f"{name} {value / self.count:.4f}" for name, value in self.sums.items())
        rate = self.images / spent
        self.emit(f"{time.strftime('%H:%M:%S')} step {step} {seconds / 60:.1f} min {means} {rate:.1f} images/s")
        self.reset()
