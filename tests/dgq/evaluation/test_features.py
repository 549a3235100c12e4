"""Features of other networks: small local weights, and what is said where something is missing."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dgq.errors import DgqError
from dgq.evaluation import features
from dgq.evaluation.measures import frechet_distance


def small_clip(folder: Path) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPVisionConfig,
    )

    from embedded.tokenizer import build_tokenizer

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=598, eos_token_id=599, pad_token_id=599,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, build_tokenizer(["a cat", "a dog on a blue background"], 600)).save_pretrained(folder)
    return folder


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


def test_fid_by_local_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception with random weights from a file: FID is the Frechet distance of its features."""
    pytest.importorskip("torchmetrics")
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    weights = tmp_path / "inception.pth"
    torch.save({}, weights)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict", lambda *_: None)
        network = inception("random", ["2048"], feature_extractor_weights_path=str(weights))
    torch.save(network.state_dict(), weights)

    noise = torch.Generator().manual_seed(1)
    pictures = [
        [
            Image.fromarray((torch.rand(32, 32, 3, generator=noise) * 255 * scale).byte().numpy())
            for scale in (0.3, 0.6, 1.0)
        ]
        for _ in range(2)
    ]
    got = features.inception_distance(*pictures, weights)
    with torch.no_grad():
        rows = [torch.cat([network(features.pixels(x)[None])[0] for x in images]).double() for images in pictures]
    assert got == pytest.approx(frechet_distance(*rows), rel=1e-3)
    assert features.inception_distance(pictures[0], pictures[0], weights) == pytest.approx(0, abs=1e-3 * got)


def test_no_inception_weights(tmp_path: Path) -> None:
    file = tmp_path / "inception.pth"
    torch.save({"other": torch.zeros(1)}, file)
    pictures = [Image.new("RGB", (8, 8))] * 2
    with pytest.raises(DgqError, match=r"FID needs|cannot be read as Inception weights"):
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
