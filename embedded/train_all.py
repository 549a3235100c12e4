"""Run or resume every stage: data, tokenizer, autoencoder, text encoder, latents, denoiser, export, scorer.

A stage whose result is in the work folder is skipped; the denoiser goes on from its newest checkpoint for
``--minutes`` more. ``--init-from`` starts on a fresh machine from an exported folder: its autoencoder, tokenizer
and text encoder are taken over, and the denoiser goes on from its weights.

    python -m embedded.train_all --work DIR [--minutes M] [--init-from FOLDER]
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from embedded.common import add_work_option, checkpoints


@dataclass(frozen=True)
class Stage:
    """A script to run unless its result exists."""

    script: str
    result: str | None
    options: tuple[str, ...] = ()


def stages(args: argparse.Namespace) -> list[Stage]:
    """All stages, with the time budgets of this run."""
    minutes = ("--minutes", str(args.minutes))
    init = ("--init-from", str(args.init_from)) if args.init_from is not None else ()
    return [
        Stage("build_data", "masters.npz"),
        Stage("tokenizer", "tokenizer"),
        Stage("train_vae", "vae", ("--steps", str(args.vae_steps), *minutes)),
        Stage("train_text", "text_encoder"),
        Stage("cache_latents", "latents.pt", ("--white", "4", "--colour", "1")),
        Stage("train_unet", None, (*minutes, *init, "--decay-steps", str(args.decay_steps))),
        Stage("export", None),
        Stage("train_scorer", "scorer-checkpoints"),
    ]


def run_stage(stage: Stage, work: Path) -> None:
    """Run one stage, passing a request to stop on to it; its failure, or an unfinished result, ends the run."""
    command = [sys.executable, "-m", f"embedded.{stage.script}", "--work", str(work), *stage.options]
    process = subprocess.Popen(command)
    stopped = False

    def forward(number: int, _: object) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = process.wait()
    if code != 0:
        raise SystemExit(f"embedded: {stage.script} failed with exit status {code}")
    if stopped or (stage.result is not None and not (work / stage.result).exists()):
        raise SystemExit(f"embedded: {stage.script} stopped with a checkpoint; run again to go on")


def take_over(exported: Path, work: Path) -> None:
    """Put an exported folder's autoencoder, tokenizer and text encoder into the work folder, in single precision."""
    if not (work / "vae").exists():
        vae = AutoencoderKL.from_pretrained(exported, subfolder="vae", torch_dtype=torch.float32)
        vae.save_pretrained(work / "vae")
    if not (work / "tokenizer").exists():
        shutil.copytree(exported / "tokenizer", work / "tokenizer")
    if not (work / "text_encoder").exists():
        encoder = CLIPTextModel.from_pretrained(exported, subfolder="text_encoder", dtype=torch.float32)
        encoder.save_pretrained(work / "text_encoder")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    parser.add_argument("--minutes", type=float, default=math.inf, help="time for each training stage in this run")
    parser.add_argument("--vae-steps", type=int, default=12000)
    parser.add_argument("--decay-steps", type=int, default=0, help="end with a decay of the denoiser's learning rate")
    parser.add_argument("--init-from", type=Path, help="an exported folder to start from")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.init_from is not None and not checkpoints(args.work / "unet-checkpoints"):
        take_over(args.init_from, args.work)
    for stage in stages(args):
        if stage.result is None or not (args.work / stage.result).exists():
            print(f"== {stage.script}", flush=True)
            run_stage(stage, args.work)


if __name__ == "__main__":
    main()
