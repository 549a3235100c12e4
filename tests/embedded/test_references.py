"""Real pictures of what an evaluation's prompts name."""

import sys

import pytest
import torch
from PIL import Image

from dgq.evaluation.items import labelled
from dgq.pictures import embedded as model
from embedded import images, references
from embedded.captions import BACKGROUNDS, STYLES, read_concepts


class Pretended(images.Masters):
    """A master for every concept and style: opaque in its middle, in a grey that tells the style."""

    def __init__(self, work, concepts):
        self.keys = [(index, style) for index in range(len(concepts)) for style in STYLES]
        self.row = {key: row for row, key in enumerate(self.keys)}
        grey = torch.tensor([40 * (1 + list(STYLES).index(style)) for _, style in self.keys], dtype=torch.uint8)
        self.rgba = torch.zeros(len(self.keys), 4, 8, 8, dtype=torch.uint8)
        self.rgba[:, :3, 2:6, 2:6] = grey[:, None, None, None]
        self.rgba[:, 3, 2:6, 2:6] = 255
        self.rgba = self.rgba.repeat_interleave(16, 2).repeat_interleave(16, 3)


def test_pictures_show_what_the_prompts_ask_for(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "Masters", Pretended)
    monkeypatch.setattr(
        sys, "argv", ["references", "--work", str(tmp_path), "--out", str(tmp_path / "a"), "--prompts", "16"]
    )
    references.main()
    wanted = labelled(model.FOLDER, 16)
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == len(wanted)
    styles = list(STYLES)
    for file, item in zip(files, wanted, strict=True):
        with Image.open(file) as picture:
            assert picture.size == (64, 64)
            corner, middle = picture.getpixel((1, 1)), picture.getpixel((32, 32))
        assert corner == pytest.approx(BACKGROUNDS[item.background or "white"], abs=1)
        if item.style:
            assert middle == pytest.approx((40 * (1 + styles.index(item.style)),) * 3, abs=1)


def test_designs_are_those_of_the_concepts():
    import random

    concepts = read_concepts()
    masters = Pretended(None, concepts)
    wanted = labelled(model.FOLDER, 40)
    rows = references.masters_of(wanted, concepts, masters, random.Random(0))
    assert [concepts[masters.keys[row][0]].name for row in rows] == [item.concept for item in wanted]
    free = [masters.keys[row][1] for row, item in zip(rows, wanted, strict=True) if not item.style]
    assert 0.3 < free.count("noto") / len(free) < 0.9
