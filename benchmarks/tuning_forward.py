"""Tuning scales by forward passes alone, beside `dgq tune`: what it reaches in the same time (docs/tuning.md).

    python benchmarks/tuning_forward.py --checkpoint DIR --out build/tuning [--seconds 98] [--rate 1e-3]

Simultaneous perturbation (Spall 1992; MeZO, arXiv 2305.17333): two passes of the integer network with all scales
moved by +z and -z, z from a seed, and a step along z by the difference of the losses over its running size. Objective,
batches and noise are `dgq tune`'s. With --rate 0 it is `dgq tune` itself that is judged.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from subjects import write_training
from tuning import ASKED, Judge, Networks, draw, mean, prompt_of

from dgq.pictures.generation import Settings, check_size
from dgq.pictures.pipelines import load
from dgq.tuning.apply import attach, load_tuned, unload_tuned
from dgq.tuning.file import Base, Description, Subject, Tuned
from dgq.tuning.layout import Layout
from dgq.tuning.objective import Objective, encode_pictures, encode_texts
from dgq.tuning.pictures import read_subject
from dgq.tuning.train import Options, batch_of, generator, tune

PERTURBATION = 0.01  # of a scale
PROBES = 8  # batches of the loss that is told, which no step sees


class Forward:
    """The loss of a pipeline as a function of the changes of its scales, by its integer network."""

    def __init__(self, pipe: Any, folder: Path, prompt: str) -> None:
        width, height = check_size(pipe, Settings())
        self.pipe = pipe
        self.objective = Objective(pipe, encode_texts(pipe, [prompt], width, height), None, 1.0)
        self.items = encode_pictures(pipe, read_subject(folder), 0, width, height)
        self.layout = Layout.of(pipe.unet, True)
        subject = Subject(prompt, len(self.items), "", 0)
        steps = self.objective.timesteps
        self.about = Description(Base("", "", ""), 1, steps, True, [subject], 1, {})

    def put_on(self, changes: torch.Tensor) -> None:
        """Draw with changes float32 (scales,)."""
        if hasattr(self.pipe.unet, "_dgq_tuned"):
            unload_tuned(self.pipe)
        attach(self.pipe, "forward", Tuned(self.about, changes[None]))

    def loss(self, number: int, batch: int, seed: int) -> float:
        """Of a batch, with the scales that are on."""
        chosen = batch_of(self.items, number, batch, seed, 0)
        return float(self.objective.loss(chosen, batch, *self.objective.draw(chosen, generator(seed, 2, number))))

    def probe(self) -> float:
        """Of all probes, a sample a call: an expert is chosen for a call."""
        total = 0.0
        for number in range(PROBES):
            chosen = batch_of(self.items, number, len(self.items), 99, 0)
            latents, noise, times = self.objective.draw(chosen, generator(99, 2, number))
            for i, item in enumerate(chosen):
                part = slice(i, i + 1)
                total += float(self.objective.loss([item], 1, latents[part], noise[part], times[part])) / len(chosen)
        return total / PROBES


def train(forward: Forward, seconds: float, rate: float) -> int:
    """Steps for so many seconds of processor time; how many there were."""
    changes, size, step, begin = torch.zeros(forward.layout.size), 0.0, 0, time.process_time()
    while time.process_time() - begin < seconds:
        z = torch.randn(len(changes), generator=generator(0, 3, step))
        losses = []
        for sign in (1, -1):
            forward.put_on(changes + sign * PERTURBATION * z)
            losses.append(forward.loss(step, Options().batch, 0))
        slope = (losses[0] - losses[1]) / (2 * PERTURBATION)
        size = 0.99 * size + 0.01 * slope**2
        changes -= rate * slope / (size / (1 - 0.99 ** (step + 1))) ** 0.5 * z
        step += 1
    forward.put_on(changes)
    return step


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=98)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    name = "blob"
    folder, prompt = write_training(name, arguments.out), prompt_of(name)
    pipe = load(arguments.checkpoint, device="cpu", dtype=torch.float32)
    forward = Forward(pipe, folder, prompt)
    before, steps, begin = forward.probe(), 0, time.process_time()
    if arguments.rate:
        steps = train(forward, arguments.seconds, arguments.rate)
    else:
        file = arguments.out / f"{name}-backward.safetensors"
        with torch.enable_grad():
            steps = tune(arguments.checkpoint, [(folder, prompt)], file, Options(overwrite=True)).steps
        load_tuned(pipe, file)
    row = {"rate": arguments.rate, "steps": steps, "cpu_seconds": round(time.process_time() - begin), "before": before}
    prompts = [f"{prompt} {words}" for words, _, _ in ASKED]
    found = Judge(name, Networks())(draw(pipe, prompts, 4), prompts * 4, ASKED * 4)
    told = {key: mean(found[key]) for key in ("scorer", "background")}
    print(json.dumps({**row, "after": forward.probe(), **told}))


if __name__ == "__main__":
    main()
