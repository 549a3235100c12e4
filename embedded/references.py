"""Real pictures of what the prompts of `dgq eval` name, for its Frechet distances.

Each prompt's concept is rendered in the style and on the background that it asks for. Where it asks for none, half of
the pictures show noto's design and the others any, as for training's captions, on white.

    python -m embedded.references --work DIR --out PICTURES [--prompts 200]
    dgq eval CKPT --prompts 200 --reference PICTURES
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from PIL import Image

from dgq.evaluation.items import Item, labelled
from dgq.pictures import embedded as model
from embedded import images
from embedded.captions import Concept, read_concepts
from embedded.common import add_work_option

SEED = 1
USUAL_STYLE = "noto"  # of every concept


def masters_of(wanted: list[Item], concepts: list[Concept], masters: images.Masters, rng: random.Random) -> list[int]:
    """The row of a master for each prompt."""
    index_of = {concept.name: index for index, concept in enumerate(concepts)}
    available = masters.available()
    rows = []
    for item in wanted:
        assert item.concept is not None
        index = index_of[item.concept]
        any_style = USUAL_STYLE if rng.random() < 0.5 else rng.choice(available[index])
        rows.append(masters.row[index, item.style or any_style])
    return rows


def main() -> None:
    """Render and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_work_option(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--prompts", type=int, default=200, help="as dgq eval --prompts (default 200)")
    args = parser.parse_args()
    concepts = read_concepts()
    masters, rng = images.Masters(args.work, concepts), random.Random(SEED)
    wanted = labelled(model.FOLDER, args.prompts)
    rows = masters_of(wanted, concepts, masters, rng)
    backgrounds = images.background_rgb([item.background or "white" for item in wanted])
    flip = torch.tensor([concepts[masters.keys[row][0]].flip and rng.random() < 0.5 for row in rows])
    generator = torch.Generator().manual_seed(SEED)
    pictures = images.to_uint8(images.render(masters.rgba[rows], backgrounds, flip, images.NARROW, generator))
    args.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(args.out / f"{number:04}.png")
    print(f"wrote {len(pictures)} pictures to {args.out}")


if __name__ == "__main__":
    main()
