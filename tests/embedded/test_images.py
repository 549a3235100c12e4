"""Rendering, resampling and compositing."""

import numpy as np
import pytest
import torch
from PIL import Image

from embedded import images
from embedded.build_data import DataError, Package, fetch, plain_code, render_svg, resample, verify

STILL = images.Jitter(1.0, 1.0, 0.0)


def half_red() -> torch.Tensor:
    """A master that is opaque red on its left half and empty on its right."""
    rgba = torch.zeros(1, 4, 128, 128, dtype=torch.uint8)
    rgba[:, 0, :, :64] = 255
    rgba[:, 3, :, :64] = 255
    return rgba


def test_composite_mixes_by_alpha():
    pixel = torch.tensor([0.5, 0.0, 0.0, 0.5]).view(1, 4, 1, 1)
    mixed = images.composite(pixel, torch.tensor([[0.0, 1.0, 0.2]]))
    assert mixed.flatten().tolist() == pytest.approx([0.5, 0.5, 0.1])


def test_render_puts_background_where_the_master_is_empty():
    out = images.render(half_red(), torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([False]), STILL, torch.Generator())
    assert out.shape == (1, 3, 64, 64)
    assert out[0, :, 32, 10].tolist() == pytest.approx([1, -1, -1], abs=1e-5)
    assert out[0, :, 32, 50].tolist() == pytest.approx([-1, -1, 1], abs=1e-5)


def test_render_flips():
    blue = torch.tensor([[0.0, 0.0, 1.0]])
    plain, flipped = (
        images.render(half_red(), blue, torch.tensor([flip]), STILL, torch.Generator()) for flip in (False, True)
    )
    torch.testing.assert_close(plain, flipped.flip(-1))


def test_jitter_repeats_from_a_seed():
    args = half_red(), torch.ones(1, 3), torch.tensor([False]), images.WIDE
    first = images.render(*args, torch.Generator().manual_seed(5))
    again = images.render(*args, torch.Generator().manual_seed(5))
    other = images.render(*args, torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_resample_keeps_colour_at_transparent_edges():
    pixels = np.zeros((256, 256, 4), dtype=np.uint8)
    pixels[:, :129] = (200, 100, 50, 255)
    out = resample(Image.fromarray(pixels), 128)
    assert out[:3, 60, 64].tolist() == [200, 100, 50]
    assert out[3, 60, 64] == pytest.approx(128, abs=1)


def test_render_svg():
    out = render_svg('<rect x="0" y="0" width="8" height="16" fill="#00ff00"/>', 16, 16)
    assert out.shape == (4, 128, 128)
    assert out[:, 64, 20].tolist() == [0, 255, 0, 255]
    assert out[3, 64, 100] == 0


def test_plain_code():
    assert plain_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_hash_mismatch_is_one_clear_error(tmp_path):
    package = Package("noto", "@scope/thing", "1.0.0", "0" * 64, "MIT", "nobody")
    (tmp_path / package.tarball).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"^scope-thing-1\.0\.0\.tgz: SHA-256 is \w{64}, expected 0{64}"):
        fetch(package, tmp_path)


def test_verify_accepts_the_right_hash(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    verify(path, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


def test_grid_of_leaves_missing_cells_white():
    sheet = images.grid_of(np.zeros((3, 2, 2, 3), dtype=np.uint8), 2)
    assert sheet.shape == (4, 4, 3)
    assert sheet[2:, 2:].min() == 255
    assert sheet[:2].max() == 0
