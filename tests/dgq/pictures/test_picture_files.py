"""Pictures of every kind that people have."""

import numpy as np
import pytest
from PIL import Image

from dgq.evaluation.features import read_pictures
from dgq.pictures.files import read_picture
from dgq.tuning.pictures import read_subject


@pytest.mark.parametrize("read", [read_subject, read_pictures])
def test_sixteen_bits_of_grey_are_not_white(tmp_path, read):
    for name in "ab":
        Image.fromarray(np.full((20, 24), 32896, np.uint16)).save(tmp_path / f"{name}.png")
    images = read(tmp_path)
    assert [(image.mode, image.size, image.getpixel((5, 5))) for image in images] == [("RGB", (24, 20), (128,) * 3)] * 2


def test_turned_and_transparent(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGBA", (20, 30), (0, 0, 0, 0)).save(tmp_path / "a.png", exif=exif)
    image = read_picture(tmp_path / "a.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (30, 20), (255, 255, 255))
