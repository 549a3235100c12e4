"""SSIM, Frechet distance and bootstrap against plain computations."""

import numpy as np
import pytest
import torch
from PIL import Image

from dgq.evaluation.measures import bootstrap, frechet_distance, ssim


def picture(seed: int, size: int = 16) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_ssim_of_one_window_is_the_formula() -> None:
    a, b = picture(0, 11), picture(1, 11)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for channel in range(3):
        x, y = (np.asarray(image, dtype=np.float64)[:, :, channel] for image in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        vxy = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = 6.5025, 58.5225
        values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_orders_pictures() -> None:
    a = picture(0)
    near = Image.fromarray((np.asarray(a) // 2 + 60).astype(np.uint8))
    assert ssim(a, a) == pytest.approx(1)
    assert 1 > ssim(a, near) > ssim(a, picture(1))


def test_ssim_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(picture(0, 16), picture(0, 17))
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(picture(0, 10), picture(1, 10))


def test_frechet_distance_of_independent_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = x * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, -1.0])
    # one dimension at a time, where the distance is that of means and of deviations
    expected = sum(
        float((x[:, i].mean() - y[:, i].mean()) ** 2 + (x[:, i].std() - y[:, i].std()) ** 2) for i in range(3)
    )
    found = sum(frechet_distance(x[:, i : i + 1], y[:, i : i + 1]) for i in range(3))
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)


def test_frechet_distance_with_few_rows() -> None:
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + 1) == pytest.approx(30, rel=1e-5)


def test_bootstrap_holds_the_mean_and_narrows() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(3, 1, 20), rng.normal(3, 1, 2000)
    wide, narrow = (bootstrap(list(v), range(len(v))) for v in (few, many))
    assert wide["low"] < wide["mean"] < wide["high"]
    assert narrow["high"] - narrow["low"] < (wide["high"] - wide["low"]) / 3
    # the normal interval of the mean
    assert narrow["high"] - narrow["low"] == pytest.approx(2 * 1.96 * many.std() / 2000**0.5, rel=0.1)
    assert bootstrap(list(few), range(20)) == wide


def test_bootstrap_resamples_groups() -> None:
    values = [0.0, 0.0, 1.0, 1.0] * 10
    alone = bootstrap(values, range(40))
    together = bootstrap(values, [i // 2 for i in range(40)])
    assert together["high"] - together["low"] > 1.2 * (alone["high"] - alone["low"])
