"""Draw a sheet of samples, from the work folder's newest checkpoint or from an exported folder.

python -m embedded.sample --work DIR --out samples.png [--model FOLDER] [PROMPT ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from embedded.common import add_work_option
from embedded.export import averaged_models
from embedded.images import grid_of
from embedded.train_unet import build_scheduler

PROMPTS = (
    "a cat",
    "a dog",
    "a red heart",
    "a pizza",
    "a smiling face with sunglasses",
    "a house",
    "a car",
    "a tree",
    "the sun",
    "a moon",
    "a star",
    "a rose",
    "an apple",
    "a banana",
    "a fish",
    "a rocket",
    "a cat in 3d style",
    "a cat on a blue background",
    "a pizza in flat style on a green background",
    "a crying face on a pink background",
    "a penguin",
    "a snowman",
    "a blue heart on a yellow background",
    "a ghost",
)


def work_pipeline(work: Path) -> StableDiffusionPipeline:
    """A full-precision pipeline of the newest checkpoint's averaged weights."""
    unet, encoder, _ = averaged_models(work)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        unet=unet.eval(),
        text_encoder=encoder.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int, guidance: float) -> np.ndarray:
    """One picture for each prompt, each from its own seed: uint8 (B, 64, 64, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    output = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
    )
    return (output.images * 255).round().astype(np.uint8)


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", type=Path, help="an exported folder; default: the newest checkpoint")
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--zoom", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        pipeline = work_pipeline(args.work)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    sheet = grid_of(sample(pipeline, list(args.prompts), args.seed, args.steps, args.guidance), args.columns)
    picture = Image.fromarray(sheet)
    picture.resize((picture.width * args.zoom, picture.height * args.zoom), Image.Resampling.NEAREST).save(args.out)


if __name__ == "__main__":
    main()
