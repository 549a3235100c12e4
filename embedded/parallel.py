"""Data-parallel training on a few CPU cores, one single-threaded process per core.

Two threads inside every operator stall each other whenever something else wants a core; processes that meet a few
times a step do not. All trained parameters live in one flat tensor in shared memory, as do the gradients of each
process, Adam's moments and the averaged weights. In a step every process runs its share of the batch backward,
then averages and applies the gradients of its share of the parameters. For a given number of workers the result
does not depend on timing.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

BARRIER_SECONDS = 900.0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A module to train, with its learning rate relative to the others'."""

    module: nn.Module
    lr_scale: float = 1.0


@dataclass
class AdamOptions:
    """What AdamW and the average need besides the learning rate."""

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999


@dataclass
class Flat:
    """The trained parameters of some parts, moved into one flat shared tensor."""

    parts: Sequence[Part]
    values: Tensor = field(init=False)
    segments: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.segments, start = [], 0
        for part in self.parts:
            end = start + sum(p.numel() for p in self.trained(part))
            self.segments.append((start, end))
            start = end
        self.values = torch.empty(start).share_memory_()
        with torch.no_grad():
            for parameter, view in zip(self.all_trained(), self.views(self.values), strict=True):
                view.copy_(parameter)
                parameter.data = view

    @staticmethod
    def trained(part: Part) -> list[nn.Parameter]:
        """The parameters of a part that want gradients."""
        return [p for p in part.module.parameters() if p.requires_grad]

    def all_trained(self) -> list[nn.Parameter]:
        """The trained parameters of all parts, in order."""
        return [p for part in self.parts for p in self.trained(part)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor cut into the parameters' shapes."""
        views, start = [], 0
        for parameter in self.all_trained():
            views.append(flat[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
        return views


class Parallel:
    """Runs training steps over worker processes; this process is worker 0."""

    def __init__(
        self,
        parts: Sequence[Part],
        loss: Callable[[Batch], Tensor],
        example: Batch,
        workers: int,
        options: AdamOptions | None = None,
    ) -> None:
        """``loss`` maps a share of a batch to a mean loss; ``example`` has a whole batch's shapes and types."""
        self.options = options or AdamOptions()
        self.loss, self.workers = loss, workers
        self.flat = Flat(parts)
        size = self.flat.values.numel()
        self.batch = {name: value.clone().share_memory_() for name, value in example.items()}
        self.grads = torch.zeros(workers, size).share_memory_()
        self.first = torch.zeros(size).share_memory_()
        self.second = torch.zeros(size).share_memory_()
        self.ema = self.flat.values.clone().share_memory_()
        self.sums = torch.zeros(2, workers, dtype=torch.float64).share_memory_()
        self.control = torch.zeros(3, dtype=torch.float64).share_memory_()
        self.active = torch.ones(len(parts), dtype=torch.bool).share_memory_()
        self.steps = 0
        self.context = mp.get_context("fork")
        self.barrier = self.context.Barrier(workers)
        self.processes: list[mp.Process] = []
        self._bind(0)

    def _start(self) -> None:
        """Fork the workers; they see everything this process holds now, and share its tensors from then on."""
        self.processes = [
            self.context.Process(target=self._serve, args=(worker,), daemon=True) for worker in range(1, self.workers)
        ]
        for process in self.processes:
            process.start()

    def _bind(self, worker: int) -> None:
        """Let backward write into this worker's row of the shared gradients."""
        for parameter, view in zip(self.flat.all_trained(), self.flat.views(self.grads[worker]), strict=True):
            parameter.grad = view

    def _serve(self, worker: int) -> None:
        """A worker process: steps until told to stop, or until the others are gone."""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        torch.set_num_threads(1)
        self._bind(worker)
        while True:
            self._wait()
            if self.control[0] < 0:
                os._exit(0)
            self._work(worker)

    def _wait(self) -> None:
        self.barrier.wait(BARRIER_SECONDS)

    def _share(self, worker: int) -> Batch:
        """This worker's rows of the batch."""
        return {name: value.chunk(self.workers)[worker] for name, value in self.batch.items()}

    def _slices(self, worker: int) -> list[tuple[slice, float]]:
        """The parameters this worker updates, with their learning-rate scales."""
        slices = []
        for (start, end), part, active in zip(self.flat.segments, self.flat.parts, self.active, strict=True):
            if active:
                width = -(-(end - start) // self.workers)
                low = min(end, start + worker * width)
                slices.append((slice(low, min(end, low + width)), part.lr_scale))
        return slices

    def _work(self, worker: int) -> None:
        """One worker's part of one step."""
        self.grads[worker].zero_()
        loss = self.loss(self._share(worker))
        loss.backward()
        self.sums[0, worker] = loss.detach()
        self._wait()
        square = 0.0
        for part, _ in self._slices(worker):
            mean = self.grads[0, part]
            for other in range(1, self.workers):
                mean += self.grads[other, part]
            mean /= self.workers
            square += float(mean.square().sum())
        self.sums[1, worker] = square
        self._wait()
        factor = min(1.0, self.options.clip / (math.sqrt(float(self.sums[1].sum())) + 1e-6))
        for part, lr_scale in self._slices(worker):
            self._adam(part, factor, float(self.control[1]) * lr_scale, int(self.control[2]))
        self._wait()

    @torch.no_grad()
    def _adam(self, part: slice, factor: float, lr: float, step: int) -> None:
        """AdamW and the average, on a slice of the parameters."""
        options = self.options
        gradient = self.grads[0, part].mul_(factor)
        first, second, values = self.first[part], self.second[part], self.flat.values[part]
        first.lerp_(gradient, 1 - options.betas[0])
        second.mul_(options.betas[1]).addcmul_(gradient, gradient, value=1 - options.betas[1])
        values.mul_(1 - lr * options.weight_decay)
        denominator = (second / (1 - options.betas[1] ** step)).sqrt_().add_(options.eps)
        values.addcdiv_(first, denominator, value=-lr / (1 - options.betas[0] ** step))
        decay = min(options.ema, (1 + step) / (10 + step))
        self.ema[part].lerp_(values, 1 - decay)

    def step(self, batch: Batch, lr: float) -> float:
        """Train on one batch (its size divisible by the number of workers); returns the mean loss."""
        if not self.processes:
            self._start()
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.steps += 1
        self.control.copy_(torch.tensor([0.0, lr, float(self.steps)]))
        self._wait()
        self._work(0)
        return float(self.sums[0].mean())

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        names = ("first", "second", "ema")
        return {"values": self.flat.values.clone(), "steps": self.steps} | {n: getattr(self, n).clone() for n in names}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` returned."""
        self.flat.values.copy_(state["values"])
        for name in ("first", "second", "ema"):
            getattr(self, name).copy_(state[name])
        self.steps = state["steps"]

    def averaged(self, part: int) -> dict[str, Tensor]:
        """The state dict of a part, with averaged values where it is trained."""
        module = self.flat.parts[part].module
        averages = dict(zip(map(id, self.flat.all_trained()), self.flat.views(self.ema), strict=True))
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            if id(parameter) in averages:
                state[name] = averages[id(parameter)].clone()
        return state

    def close(self) -> None:
        """End the worker processes."""
        self.control[0] = -1.0
        if self.processes:
            self._wait()
        for process in self.processes:
            process.join()
