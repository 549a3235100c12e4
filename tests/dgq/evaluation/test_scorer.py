"""The shipped scorer, and its network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgq.errors import DgqError
from dgq.evaluation.scorer import FOLDER, Network, Scorer, to_pixels
from dgq.pictures import embedded
from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import load
from embedded.captions import BACKGROUNDS, STYLES, read_concepts


def test_labels_are_those_of_the_model() -> None:
    scorer = Scorer()
    assert scorer.concepts == [concept.name for concept in read_concepts()]
    assert scorer.styles == list(STYLES)
    assert scorer.backgrounds == list(BACKGROUNDS)
    assert scorer.facts["held_out"]["top5"] > scorer.facts["held_out"]["top1"] > 0.5
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3e6


def test_tells_backgrounds() -> None:
    scorer = Scorer()
    plain = [Image.new("RGB", (64, 64), rgb) for rgb in BACKGROUNDS.values()]
    _, _, background, features = scorer(plain)
    right = background.argmax(1) == torch.arange(len(BACKGROUNDS))
    assert right.float().mean() > 0.8
    assert features.shape == (len(BACKGROUNDS), 192)


def test_knows_the_embedded_models_pictures() -> None:
    """Right labels beat shuffled ones by far."""
    scorer = Scorer()
    names = ["a cat", "a pizza", "a red heart", "a tree", "a rocket", "a penguin"]
    pictures = generate(load(), names, Settings(steps=8, batch=6, seed=5).resolved(embedded.FOLDER))
    concept = scorer([picture.image for picture in pictures])[0]
    labels = torch.tensor([scorer.concepts.index(name) for name in names])
    assert (concept.argmax(1) == labels).sum() >= 4
    assert (concept.argmax(1) == labels.roll(1)).sum() == 0


def test_a_picture_is_scored_alone() -> None:
    scorer = Scorer()
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)) for i in range(3)]
    together, alone = scorer(images), scorer(images[1:2])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


def test_other_sizes_are_resampled() -> None:
    assert to_pixels([Image.new("RGB", (512, 256)), Image.new("L", (8, 8))]).shape == (2, 3, 64, 64)
    flat = to_pixels([Image.new("RGB", (128, 128), (255, 0, 51))])
    assert torch.allclose(flat.mean((0, 2, 3)), torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)


def test_network_shapes() -> None:
    network = Network(7, 3, 2).eval()
    concept, style, background = network(torch.zeros(2, 3, 64, 64))
    assert (concept.shape, style.shape, background.shape) == ((2, 7), (2, 3), (2, 2))


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DgqError, match="the scorer cannot be loaded"):
        Scorer(tmp_path)
    (tmp_path / "scorer.json").write_text('{"concepts": ["a"], "styles": ["b"], "backgrounds": ["c"]}')
    (tmp_path / "scorer.safetensors").write_bytes((FOLDER / "scorer.safetensors").read_bytes())
    with pytest.raises(DgqError, match="the scorer cannot be loaded"):
        Scorer(tmp_path)
