"""Write the trained model as a plain Stable Diffusion pipeline folder in half precision.

Takes the averaged weights of the newest checkpoints. Beside the pipeline's parts it writes ``manifest.json`` (what
the data was), ``concepts.json`` (what the model has seen, and which pairs were held out) and ``NOTICE``.

    python -m embedded.export --work DIR [--out dgq/data/dgq-emoji]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from embedded.captions import (
    BACKGROUNDS,
    DEFAULT_BACKGROUND,
    DEFAULT_STYLE,
    HELD_OUT_SEED,
    STYLES,
    Concept,
    background_held_out,
    caption,
    read_concepts,
    style_held_out,
)
from embedded.common import add_work_option, load_checkpoint, write_json
from embedded.parallel import Flat, Part
from embedded.train_unet import build_scheduler, build_unet

OUT = Path(__file__).resolve().parent.parent / "dgq" / "data" / "dgq-emoji"
LIMIT_BYTES = 30_000_000
NOTICE_HEAD = """dgq-emoji: a small text-to-image model trained on pictures from the packages below.

The weights were trained from scratch by the scripts in embedded/ of this project. The pictures themselves are not
included. Each package's licence applies to its pictures.
"""


def vocabulary(concepts: list[Concept]) -> dict[str, Any]:
    """What the model has seen: names, synonyms, styles, colours, and the pairs that training left out."""
    colours = [name for name in BACKGROUNDS if name != DEFAULT_BACKGROUND]
    return {
        "default_style": DEFAULT_STYLE,
        "default_background": DEFAULT_BACKGROUND,
        "styles": STYLES,
        "backgrounds": {name: list(rgb) for name, rgb in BACKGROUNDS.items()},
        "caption_example": caption("a picture of a cat", "fluent-3d", "blue"),
        "concepts": [
            {
                "name": concept.name,
                "synonyms": list(concept.phrases[1:]),
                "code": concept.code,
                "common": concept.common,
                "held_out_styles": [style for style in STYLES if style_held_out(concept, style)],
                "held_out_backgrounds": [name for name in colours if background_held_out(concept, name)],
            }
            for concept in concepts
        ],
        "held_out_seed": HELD_OUT_SEED,
    }


def notice(manifest: dict[str, Any]) -> str:
    """Who made the pictures, and under which licences."""
    lines = [NOTICE_HEAD]
    for package in manifest["packages"]:
        lines.append(f"{package['name']} {package['version']} ({package['licence']})\n  {package['attribution']}")
        if package["licence"] == "CC-BY-4.0":
            lines.append("  Licence: https://creativecommons.org/licenses/by/4.0/")
    return "\n".join(lines) + "\n"


def averaged_models(work: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, dict[str, Any]]:
    """The denoiser and text encoder with averaged weights, and how far training has come."""
    state = load_checkpoint(work / "unet-checkpoints")
    if state is None:
        raise SystemExit("embedded export: there is no checkpoint of the denoiser yet; run embedded.train_unet first")
    unet, encoder = build_unet(), CLIPTextModel.from_pretrained(work / "text_encoder")
    assign(Flat([Part(unet), Part(encoder)]), state["parallel"]["ema"])
    return unet, encoder, {"steps": state["step"], "minutes": round(state["seconds"] / 60, 1)}


def assign(flat: Flat, values: Tensor) -> None:
    """Put flat values into the parts' parameters."""
    flat.values.copy_(values)


def detached(module: nn.Module) -> nn.Module:
    """A module whose parameters own their memory, in half precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone().contiguous()
    return module.half().eval()


def build_pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """Put a pipeline together, without a safety checker (its vocabulary is a few hundred emoji)."""
    return StableDiffusionPipeline(
        vae=detached(vae),
        unet=detached(unet),
        text_encoder=detached(encoder),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_slow_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add ``vocab.json`` and ``merges.txt``, which older readers of CLIP tokenizers want."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")


def tidy_configs(folder: Path) -> None:
    """Drop the paths of this machine from the parts' configs.

    The text encoder's says float32: a reader that takes its type from there then gives it the other parts' default.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if path.parent.name == "text_encoder":
            config["dtype"] = "float32"
        write_json(path, config)


def weight_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every weight file, by its path in the folder; `dgq doctor` compares them."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_folder(pipeline: StableDiffusionPipeline, out: Path, extras: dict[str, Any], notice_text: str) -> int:
    """Write everything into a fresh folder that then takes ``out``'s place; returns its size in bytes."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    save_slow_tokenizer(pipeline.tokenizer, fresh / "tokenizer")
    tidy_configs(fresh)
    extras["manifest.json"]["sha256"] = weight_hashes(fresh)
    for name, value in extras.items():
        write_json(fresh / name, value)
    (fresh / "NOTICE").write_text(notice_text, encoding="utf-8")
    size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise SystemExit(f"embedded export: {size / 1e6:.1f} MB is over the limit of {LIMIT_BYTES / 1e6:.0f} MB")
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return size


def main() -> None:
    """Export the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    unet, encoder, progress = averaged_models(args.work)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    pipeline = build_pipeline(vae, unet, encoder, tokenizer, build_scheduler())
    manifest = json.loads((args.work / "manifest.json").read_text(encoding="utf-8")) | {"training": progress}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    extras = {"manifest.json": manifest, "concepts.json": vocabulary(read_concepts())}
    size = write_folder(pipeline, args.out, extras, notice(manifest))
    print(f"wrote {args.out.name}: {size / 1e6:.1f} MB after {progress['steps']} steps")


if __name__ == "__main__":
    main()
