"""Numbers from pictures: SSIM, Frechet distance, paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95
_WINDOW, _SIGMA = 11, 1.5


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two 8-bit pictures of one size: mean over pixels and RGB channels of Wang et
    al.'s index (2004), with their Gaussian window of 11 pixels and constants 0.01 and 0.03.

    Raises:
        ValueError: the pictures are smaller than the window, or of different sizes.
    """
    if a.size != b.size or min(a.size) < _WINDOW:
        raise ValueError(f"pictures of {a.size} and {b.size} pixels cannot be compared")
    x, y = (
        torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float64)).permute(2, 0, 1)[:, None]
        for image in (a, b)
    )
    distance = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    gauss = torch.exp(-distance.square() / (2 * _SIGMA**2))
    window = torch.outer(gauss, gauss)[None, None] / gauss.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(index.mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of two sets of features, each taken as a Gaussian.

    Args:
        a, b: (N, D) and (M, D), at least two rows each. With fewer rows than D both covariances lack rank, and the
            distance is larger than that of the populations: compare only distances of equal N and M.
    """
    x, y = a.double(), b.double()
    first, second = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, float(distance))


def bootstrap(values: Sequence[float], groups: Sequence[int], seed: int = 0) -> dict[str, float]:
    """A mean and its confidence interval by resampling whole groups (a prompt with all its seeds).

    Args:
        values: one a picture; for a paired difference, the difference of each pair.
        groups: the prompt's number of each picture.
        seed: of the resampling.

    Returns:
        mean, and low and high, the bounds of the 95 % percentile interval.
    """
    numbers = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, numbers)
    counts = np.bincount(index).astype(np.float64)
    draws: NDArray[np.int64] = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return {"mean": float(numbers.mean()), "low": float(low), "high": float(high)}
