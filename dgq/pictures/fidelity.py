"""How far a quantized model's pictures are from the float model's, at equal seeds and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .generation import Picture


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures of one size, in dB; inf where they are equal."""
    x, y = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (a, b))
    error = float(((x - y) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def spread(values: Sequence[float], higher_is_better: bool) -> dict[str, float]:
    """What a mean hides of values, one a picture: the median, and worst_tenth, the mean of the worst tenth of them,
    rounded down but one at least."""
    worst = sorted(values, reverse=not higher_is_better)[: max(1, len(values) // 10)]
    return {"median": float(np.median(values)), "worst_tenth": float(np.mean(worst))}


def compare(reference: Sequence[Picture], pictures: Sequence[Picture]) -> dict[str, float]:
    """Fidelity over pictures of equal prompts and seeds.

    Returns:
        prompts: how many; psnr_db, psnr_median_db, psnr_worst_tenth_db: mean PSNR, its median and the mean of the worst
        tenth, rounded down but one at least (equal pictures count as 99 dB); latent_mse: mean squared error of the
        final latents; latent_sqnr_db: signal to noise of the latents over all pictures.
    """
    latents = [(a.latents.float().cpu(), b.latents.float().cpu()) for a, b in zip(reference, pictures, strict=True)]
    noise = sum(float((a - b).square().sum()) for a, b in latents)
    signal = sum(float(a.square().sum()) for a, _ in latents)
    ratios = [min(99.0, psnr(a.image, b.image)) for a, b in zip(reference, pictures, strict=True)]
    hidden = spread(ratios, higher_is_better=True)
    return {
        "prompts": len(latents),
        "psnr_db": float(np.mean(ratios)),
        "psnr_median_db": hidden["median"],
        "psnr_worst_tenth_db": hidden["worst_tenth"],
        "latent_mse": float(np.mean([float(torch.mean((a - b) ** 2)) for a, b in latents])),
        "latent_sqnr_db": 10 * float(np.log10(signal / max(noise, 1e-20))),
    }
