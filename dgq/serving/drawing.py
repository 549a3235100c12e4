"""Orders for pictures, drawn one picture at a time in the order they came in."""

from __future__ import annotations

import copy
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DgqError
from ..family import family_of, network_of
from ..pictures.generation import Settings, check_prompts, check_size, file_name, generate
from ..pictures.pipelines import Model
from ..pictures.samplers import available, config_of
from ..progress import Progress, silent

MOST = 10  # pictures of an order
LARGEST = 1024  # pixels of a side, unless the model's own pictures are larger


class RefusedError(DgqError):
    """An order that is not drawn, or not to its end.

    Args:
        status: of the HTTP answer.
        code: one word for it.
        message: why.
        retry_after: in so many seconds another try may do.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class _StoppedError(Exception):
    """Ends a picture between two steps."""


@dataclass(frozen=True)
class Order:
    """What is to be drawn, checked: picture i has seed `settings.seed` + i.

    Attributes:
        prompt: what to draw.
        settings: with nothing left open.
        count: pictures.
        beside: whether the other model draws each too.
    """

    prompt: str
    settings: Settings
    count: int = 1
    beside: bool = False


@dataclass(frozen=True)
class Drawn:
    """A picture.

    Attributes:
        png: its file, as `dgq generate` writes it.
        name: and what that calls it.
        seed: its own.
        parameters: the text in the file.
        seconds: what it took.
        beside: the other model's file, where it was asked for.
    """

    png: bytes
    name: str
    seed: int
    parameters: str
    seconds: float
    beside: bytes | None = None


@dataclass(eq=False)
class Job:
    """An order in the queue.

    Attributes:
        order: what is drawn.
        on_step: told from the drawing thread of steps done and steps of the picture.
        result: the pictures; fewer than ordered where it was interrupted.
        number: pictures that are done.
        step, steps: of the picture in hand.
        started: when drawing began, by time.monotonic; 0 before.
        stopped: why it has to end at its next step, or "".
    """

    order: Order
    on_step: Callable[[int, int], None]
    result: Future[list[Drawn]] = field(default_factory=Future)
    number: int = 0
    step: int = 0
    steps: int = 1
    started: float = 0.0
    stopped: str = ""

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        return (self.number + self.step / self.steps) / self.order.count

    @property
    def left(self) -> float | None:
        """Seconds that the rest of it takes at the pace so far; None before there is one."""
        share = self.share
        return (time.monotonic() - self.started) * (1 - share) / share if self.started and share else None


class Drawer:
    """A pipeline, the thread that alone draws with it, and the queue before it.

    Args:
        pipe: of `dgq.load`.
        model: what it was loaded from.
        fields: of the pictures' metadata, beside `generate`'s own.
        beside: a pipeline that draws the same picture for comparison, its label, and its `fields`.
        waiting: orders that may wait beside the one in hand.
        max_side: pixels of the largest side.
        progress: told of every step as stage "generate".

    Attributes:
        closing: asked before each picture; where it says so, no further one is begun.
        on_picture: told of each picture's seconds.
        samplers: names of those that it draws with, the model's own first.
        size: width and height in pixels of the model's own pictures.
        settings: the model's own.
    """

    def __init__(
        self,
        pipe: Any,
        model: Model,
        *,
        fields: Mapping[str, str] | None = None,
        beside: tuple[Any, str, Mapping[str, str]] | None = None,
        waiting: int = 16,
        max_side: int | None = None,
        progress: Progress = silent,
    ) -> None:
        self.pipe, self.model, self.beside, self.waiting = pipe, model, beside, waiting
        self.fields, self.progress = fields or {}, progress
        self.closing: Callable[[], bool] = lambda: False
        self.on_picture: Callable[[float], None] = lambda seconds: None
        # a tokenizer must not be asked in two threads at once
        self._asked = copy.copy(pipe)
        for name, part in pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                setattr(self._asked, name, copy.deepcopy(part))
        self.size = check_size(pipe, Settings())
        self.max_side = max_side or max(LARGEST, *self.size)
        self.settings = Settings().resolved(model)
        self.samplers = list(available(config_of(pipe)))
        self._jobs: list[Job] = []  # the first one is in hand, or will be at once
        self._changed = threading.Condition()
        self._ended = False
        self._seconds = 1.0  # of the last picture
        self._thread = threading.Thread(target=self._work, name="dgq-drawer", daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """What clients call the model."""
        local = not self.model.embedded and os.path.isdir(self.model.name)
        return self.model.folder.resolve().name if local else self.model.name

    @property
    def label(self) -> str:
        """Its quantization, and what is drawn with."""
        return ", ".join([self.model.label, *(f"{key} {files}" for key, files in self.fields.items())])

    @property
    def sampler(self) -> str:
        """The model's own."""
        return self.samplers[0]

    def order(
        self,
        prompt: str,
        *,
        count: int = 1,
        seed: int | None = None,
        beside: bool = False,
        **settings: Any,
    ) -> Order:
        """Check an order.

        Args:
            prompt: what to draw.
            count: pictures.
            seed: of the first one; None for any.
            beside: whether the other model draws too.
            settings: of `Settings`; None leaves a choice to the model.

        Raises:
            DgqError: it cannot be drawn.
        """
        chosen = secrets.randbelow(2**32) if seed is None else seed
        if not 1 <= count <= MOST:
            raise DgqError(f"{count} pictures are out of range (1 to {MOST})")
        found = Settings(**settings, seed=chosen).resolved(self.model, count)
        if beside and self.beside is None:
            raise DgqError("there is no float model to draw beside", "start with --against float")
        check_prompts(self._asked, [prompt], found.negative)
        family_of(network_of(self._asked)).pipeline_arguments([prompt], found.negative, found.guidance or 0.0)
        width, height = check_size(self._asked, found)
        if max(width, height) > self.max_side:
            raise DgqError(f"size {width}x{height} is over {self.max_side} pixels a side")
        return Order(prompt, replace(found, width=width, height=height), count, beside)

    def submit(self, order: Order, on_step: Callable[[int, int], None] = lambda step, steps: None) -> Job:
        """Put an order in the queue; whoever did so calls `leave` in the end.

        Raises:
            RefusedError: the queue is full, or the server ends.
        """
        job = Job(order, on_step)
        with self._changed:
            if self._ended or self.closing():
                raise RefusedError(503, "closing", "the server is shutting down")
            if len(self._jobs) > self.waiting:
                first = self._jobs[0]
                left = self._seconds * first.order.count if first.left is None else first.left
                raise RefusedError(429, "queue_full", f"{self.waiting} orders wait already", max(1, math.ceil(left)))
            self._jobs.append(job)
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for a job any more: a place in the queue is free at once, a picture ends at its next step."""
        with self._changed:
            if job.result.cancel():
                self._remove(job)
        job.stopped = job.stopped or "nobody waits for it"

    def ahead(self, job: Job) -> int:
        """Orders before a job; 0 for one that is in hand or done."""
        with self._changed:
            return self._jobs.index(job) if job in self._jobs else 0

    @property
    def current(self) -> Job | None:
        """The job in hand."""
        with self._changed:
            return self._jobs[0] if self._jobs and self._jobs[0].started else None

    @property
    def queued(self) -> int:
        """Orders that wait."""
        with self._changed:
            return sum(not job.started for job in self._jobs)

    def interrupt(self) -> None:
        """End the order in hand at its next step; it gets the pictures that are done."""
        if job := self.current:
            job.stopped = "the order was interrupted"

    def stop(self) -> None:
        """Draw no more, not even to the end of the picture in hand; its order gets what is done."""
        with self._changed:
            self._ended = True
            for job in self._jobs:
                job.stopped = "the server is shutting down"
            self._changed.notify()

    def end(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        self._thread.join()

    def _remove(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._ended)
                if not self._jobs:
                    return
                job = self._jobs[0]
                if not job.result.set_running_or_notify_cancel():
                    self._remove(job)
                    continue
                job.started = time.monotonic()
            try:
                pictures, error = self._draw(job), None
            except RefusedError as refused:
                pictures, error = [], refused
            except Exception as failure:  # whatever a picture fails by, the next one may do
                reason = (str(failure).strip().splitlines() or [""])[0]
                kind = "" if isinstance(failure, DgqError) else f"{type(failure).__name__}: "
                pictures, error = [], RefusedError(500, "failed", f"the picture cannot be drawn ({kind}{reason})")
            with self._changed:
                self._remove(job)
            if error is None:
                job.result.set_result(pictures)
            else:
                job.result.set_exception(error)

    def _draw(self, job: Job) -> list[Drawn]:
        drawn: list[Drawn] = []
        for number in range(job.order.count):
            if self.closing() and not job.stopped:
                job.stopped = "the server is shutting down"
            if job.stopped:
                break
            job.number, job.step = number, 0
            try:
                drawn.append(self._picture(job, job.order.settings.seed + number))
            except _StoppedError:
                break
            job.number, job.step = number + 1, 0
        if not drawn:
            status, code = (503, "closing") if self._ended or self.closing() else (409, "interrupted")
            raise RefusedError(status, code, job.stopped)
        return drawn

    def _picture(self, job: Job, seed: int) -> Drawn:
        order, started = job.order, time.monotonic()
        settings = replace(order.settings, seed=seed)
        assert settings.steps is not None
        parts = [(self.pipe, self.model.label, self.fields)]
        if order.beside and self.beside:
            parts.append(self.beside)
        files, parameters = [], ""
        for number, (pipe, label, fields) in enumerate(parts):

            def on_step(done: int, total: int, first: int = number) -> None:
                job.step, job.steps = first * total + done, len(parts) * total
                waiting = f", {self.queued} waiting" if self.queued else ""
                self.progress("generate", job.step, job.steps, f"seed {seed}{waiting}")
                job.on_step(job.step, job.steps)
                if job.stopped:
                    raise _StoppedError

            (picture,) = generate(
                pipe,
                [order.prompt],
                settings,
                label=label,
                name=self.model.base,
                fields=fields,
                progress=on_step,
            )
            files.append(picture.png())
            parameters = parameters or picture.parameters
        self._seconds = time.monotonic() - started
        self.on_picture(self._seconds)
        return Drawn(
            files[0], file_name(order.prompt, seed), seed, parameters, self._seconds, files[1] if files[1:] else None
        )
