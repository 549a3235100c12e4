"""Features of other networks: small local weights, and what is said where something is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import small_clip

from dgq.errors import DgqError
from dgq.evaluation import features
from dgq.evaluation.measures import frechet_distance


def test_clip_score_is_the_cosine(tmp_path: Path) -> None:
    folder = small_clip(tmp_path / "clip")
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white")]
    prompts = ["a cat", "a dog", "a cat"]
    scores = features.clip_score(pictures, prompts, folder)
    from transformers import AutoProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    for score, picture, prompt in zip(scores, pictures, prompts, strict=True):
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            expected = float(model(**inputs).logits_per_image / model.logit_scale.exp()) * 100
        assert score == pytest.approx(max(0.0, expected), abs=1e-3)


def test_no_clip_model(tmp_path: Path) -> None:
    with pytest.raises(DgqError, match="cannot be loaded as a CLIP model"):
        features.clip_score([Image.new("RGB", (8, 8))], ["a"], tmp_path)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(file, class): random weights of Inception as torch-fidelity stores them."""
    pytest.importorskip("torchmetrics")
    kind = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    file = tmp_path / "inception.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        network = kind("random", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(network.state_dict(), file)
    return file, kind


def noise(count: int, seed: int) -> list[Image.Image]:
    g = torch.Generator().manual_seed(seed)
    return [
        Image.fromarray((torch.rand(32, 32, 3, generator=g) * 255 * (i + 1) / count).byte().numpy())
        for i in range(count)
    ]


class Backbone(torch.nn.Module):
    """Random features of a picture's coarse pixels, in place of Inception's."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(3 * 4 * 4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return self.project(torch.nn.functional.adaptive_avg_pool2d(x / 255, 4).flatten(1))


@torch.no_grad()
def test_fid_is_the_frechet_distance_of_a_networks_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small random backbone, against the formula with the square root of the product of the covariances."""
    network = Backbone(5)
    monkeypatch.setattr(features, "_inception", lambda *_: network)
    a, b = noise(12, 1), noise(12, 2)
    x, y = (torch.cat([network(features.pixels(image)[None]) for image in part]).double() for part in (a, b))
    root = torch.linalg.eigvals(torch.cov(x.T) @ torch.cov(y.T)).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
    assert features.inception_distance(a, b, Path("w")) == pytest.approx(float(expected), rel=1e-6)
    assert features.inception_distance(a, a, Path("w")) == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_the_inception_score_is_that_of_a_networks_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pictures in each of ten splits; where a split is one picture the score is 1."""
    network = Backbone(4)
    network.project.weight *= 20
    monkeypatch.setattr(features, "_inception", lambda *_: network)
    pictures = noise(30, 1)
    assert features.inception_score(pictures[:10], Path("w")) == pytest.approx(1)
    p = torch.cat([network(features.pixels(image)[None]) for image in pictures]).double().softmax(1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    scores = []
    for part in p[order].split(3):
        mean = part.mean(0)
        scores.append(float(torch.exp(sum((row * (row / mean).log()).sum() for row in part) / 3)))
    assert features.inception_score(pictures, Path("w")) == pytest.approx(sum(scores) / 10, rel=1e-6)
    assert sum(scores) / 10 > 1.01


@torch.no_grad()
def test_fid_is_the_distance_of_inceptions_features(inception: Any) -> None:
    file, kind = inception
    network = kind("same", ["2048"], feature_extractor_weights_path=str(file))
    a, b = noise(3, 1), noise(3, 2)
    got = features.inception_distance(a, b, file)
    rows = [torch.cat([network(features.pixels(x)[None])[0] for x in images]).double() for images in (a, b)]
    assert got == pytest.approx(frechet_distance(*rows), rel=1e-3)
    assert features.inception_distance(a, a, file) == pytest.approx(0, abs=1e-3 * got)


@torch.no_grad()
def test_the_inception_score_is_that_of_the_logits(inception: Any) -> None:
    """Of three pictures in three splits, each is the mean of its own split, and the score 1; of twelve it is more."""
    file, kind = inception
    pictures = noise(12, 1)
    pooled = kind("pooled", ["2048"], feature_extractor_weights_path=str(file))
    mean = torch.cat([pooled(features.pixels(x)[None])[0] for x in pictures]).mean(0)
    state = torch.load(file)
    classes = state["fc.weight"]  # as they are, random logits of all pictures are alike
    classes -= torch.outer(classes @ mean, mean) / mean.square().sum()
    classes *= 3 / (classes @ pooled(features.pixels(pictures[0])[None])[0][0]).std()
    torch.save(state, file)

    assert features.inception_score(pictures[:3], file) == pytest.approx(1)
    got = features.inception_score(pictures, file)
    from torchmetrics.image.fid import NoTrainInceptionV3  # torch-fidelity's, but for how it resamples

    network = NoTrainInceptionV3("logits", ["logits_unbiased"], str(file))
    logits = torch.cat([network(features.pixels(x)[None]) for x in pictures])
    torch.manual_seed(0)
    scores = []
    for part in logits[torch.randperm(12)].chunk(10):
        p = part.softmax(1)
        scores.append((p * (p.log() - p.mean(0, keepdim=True).log())).sum(1).mean().exp())
    assert got == pytest.approx(float(torch.stack(scores).mean()), rel=1e-5)
    assert got > 1.01


def test_no_inception_weights(tmp_path: Path) -> None:
    file = tmp_path / "inception.pth"
    torch.save({"other": torch.zeros(1)}, file)
    pictures = [Image.new("RGB", (8, 8))] * 2
    with pytest.raises(DgqError, match=r"FID and the inception score need|cannot be read as Inception weights"):
        features.inception_distance(pictures, pictures, file)


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b" / "x.png")
    Image.new("L", (9, 8)).save(tmp_path / "a.jpg")
    assert [image.size for image in features.read_pictures(tmp_path)] == [(9, 8), (8, 8)]
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(DgqError, match=r"c\.png: is not a readable picture"):
        features.read_pictures(tmp_path)
    with pytest.raises(DgqError, match="fewer than two"):
        features.read_pictures(tmp_path / "b")


def test_efficientnet() -> None:
    if not features.efficientnet_available():
        with pytest.raises(DgqError, match="EfficientNet-lite0 is not installed"):
            features.efficientnet_features([Image.new("RGB", (64, 64))])
        return
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    values = features.efficientnet_features(images)
    assert values.shape == (2, 1280)
    assert torch.equal(values[1:], features.efficientnet_features(images[1:]))
    assert not torch.allclose(values[0], values[1], atol=1e-2)
