"""Pictures: checked input, seeds that do not depend on the batch, metadata."""

import dataclasses
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from comparing import assert_close
from PIL import Image
from torch.overrides import TorchFunctionMode

import dgq
from dgq.errors import DgqError
from dgq.pictures.fidelity import compare, psnr
from dgq.pictures.generation import Settings, generate, grid, write_png
from dgq_kernels import native

FAST = Settings(steps=2, guidance=3.0, seed=7)


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return dgq.load(tiny_checkpoint)


def test_same_seed_same_picture_whatever_the_batch(pipe):
    prompts = ["a cat", "a dog", "a cat"]
    alone = generate(pipe, prompts, FAST)
    together = generate(pipe, prompts, dataclasses.replace(FAST, batch=3))
    assert [picture.seed for picture in alone] == [7, 8, 9]
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a.latents, b.latents, atol=1e-2)
    assert psnr(alone[0].image, alone[2].image) < 40


@pytest.mark.skipif(not native.available(), reason="there is no CPU engine")
@pytest.mark.parametrize("logarithmic", [True, False])
def test_every_instruction_set_draws_the_same_picture(tiny_checkpoint, monkeypatch, logarithmic):
    """Which attention runs is the only thing that is chosen by it."""
    monkeypatch.setattr(sys.modules["dgq_kernels.log_attention"], "FORCED", logarithmic)
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    before, drawn = native.describe(), {}
    try:
        for isa in native.supported():
            native.use(isa)
            drawn[isa] = generate(pipe, ["a cat"], FAST)[0].latents
    finally:
        native.use(before)
    first = drawn[before]
    assert {isa for isa, latents in drawn.items() if not torch.equal(latents, first)} == set()


class Drawn(TorchFunctionMode):
    """The dtypes of all that is drawn from a generator."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn:
            self.dtypes.append(kwargs["dtype"])
        return func(*args, **(kwargs or {}))


# the last three draw noise in their steps too
@pytest.mark.parametrize("name", ["DDIM", "EulerAncestralDiscrete", "DDPM", "LCM"])
def test_a_seed_is_one_picture_in_every_dtype(name, tiny_pipeline):
    """Torch draws other numbers in half precision, in some versions entirely, in others in sizes that are no multiple
    of 16."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = dgq.load(tiny_pipeline, device="cpu", dtype=dtype)
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
        with Drawn() as drawn:
            found.append(generate(pipe, ["a cat"], dataclasses.replace(FAST, guidance=1.0))[0].latents)
        assert (len(drawn.dtypes) > 1) == (name != "DDIM")
        assert set(drawn.dtypes) == {torch.float32}
        assert "step" not in vars(pipe.scheduler)
        if dtype is torch.float32:  # as diffusers draws
            run = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
            own = pipe("a cat", generator=torch.Generator().manual_seed(FAST.seed), **run).images[0]
            assert torch.equal(own, found[0])
    assert found[1].dtype == torch.float16
    for latents in found[1:]:
        assert_close("latents", latents, found[0], 0.05)


@pytest.mark.parametrize("mixed", ["autocast", "embeddings"])
def test_pictures_of_mixed_dtypes(tiny_checkpoint, mixed):
    """Text states, norms and layers meet in other dtypes than the model's."""
    pipe = dgq.load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    text = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False)[0]
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}

    def draw(text):
        return pipe(prompt_embeds=text, generator=torch.Generator().manual_seed(3), **call).images.float()

    expected = draw(text)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed == "autocast"):
        got = draw(text.bfloat16() if mixed == "embeddings" else text)
    assert bool(torch.isfinite(got).all())
    assert_close("output", got, expected, 0.25)  # one code's step is up to 3% of this model's latents


def test_metadata_is_written_or_not(pipe, tmp_path):
    settings = dataclasses.replace(FAST, negative="blue")
    picture = generate(pipe, ["a cat"], settings, label="integer W4A8", name="tiny")[0]
    picture.save(tmp_path / "with.png")
    picture.save(tmp_path / "without.png", metadata=False)
    text = Image.open(tmp_path / "with.png").text["parameters"]
    assert text.splitlines()[:2] == ["a cat", "Negative prompt: blue"]
    for part in ("Steps: 2", "Sampler: DDIM", "CFG scale: 3.0", "Seed: 7", "Size: 16x16", "Quantization: integer W4A8"):
        assert part in text
    assert "parameters" not in Image.open(tmp_path / "without.png").text


@pytest.mark.parametrize("prompt, message", [("", "empty"), ("  ", "empty"), ("cat dog " * 30, "tokens")])
def test_bad_prompts(pipe, prompt, message):
    with pytest.raises(DgqError, match=message):
        generate(pipe, ["a cat", prompt], FAST)


@pytest.mark.parametrize("size", [{"width": 17}, {"height": 3}, {"width": 8192}])
def test_bad_sizes(pipe, size):
    with pytest.raises(DgqError, match="multiple of"):
        generate(pipe, ["a cat"], dataclasses.replace(FAST, **size))


def test_other_sizes_work(pipe):
    assert generate(pipe, ["a cat"], dataclasses.replace(FAST, width=32, height=16))[0].image.size == (32, 16)


def test_the_default_size_may_have_a_height_and_a_width(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint)
    pipe.unet.register_to_config(sample_size=[8, 12])
    assert generate(pipe, ["a cat"], FAST)[0].image.size == (24, 16)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"guidance": -1}, {"batch": 0}, {"seed": -1}])
def test_settings_out_of_range(bad, tiny_checkpoint):
    with pytest.raises(DgqError, match="out of range"):
        Settings(**bad).resolved(tiny_checkpoint)


def test_defaults_come_from_the_checkpoint(tiny_checkpoint):
    assert Settings().resolved(tiny_checkpoint).steps == 3


def test_broken_pictures_are_an_error(pipe, monkeypatch):
    monkeypatch.setattr(pipe.vae, "decode", lambda x: type("Out", (), {"sample": x[:, :3] * float("nan")}))
    with pytest.raises(DgqError, match="not finite"):
        generate(pipe, ["a cat"], FAST)


def test_progress_counts_every_step(pipe):
    seen = []
    generate(pipe, ["a cat", "a dog"], FAST, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_write_png_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DgqError, match="No space"):
        write_png(Image.new("RGB", (4, 4)), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DgqError, match="cannot be written"):
        write_png(Image.new("RGB", (4, 4)), Path("/proc/nowhere/x.png"))


def test_pictures_that_are_there_are_kept_on_request(tmp_path):
    image = Image.new("RGB", (4, 4))
    names = [write_png(image, tmp_path / "x.png", keep=True).name for _ in range(3)]
    assert names == ["x.png", "x-2.png", "x-3.png"]
    assert write_png(image, tmp_path / "x.png") == tmp_path / "x.png"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_a_picture_that_cannot_be_written_leaves_no_name_taken(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DgqError, match="No space"):
        write_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", keep=True)
    assert list(tmp_path.iterdir()) == []


def test_grid_places_every_picture():
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    sheet = grid(images, columns=2, scale=2, gap=1)
    assert sheet.size == (19, 19)
    assert [sheet.getpixel(p) for p in ((1, 1), (10, 1), (1, 10))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_psnr_and_compare():
    a = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    b = Image.fromarray(np.full((4, 4, 3), 51, np.uint8))
    assert psnr(a, b) == pytest.approx(20 * np.log10(5))
    assert psnr(a, a) == float("inf")


def test_compare_of_a_model_with_itself(pipe):
    pictures = generate(pipe, ["a cat", "a dog"], FAST)
    result = compare(pictures, pictures)
    assert result["latent_mse"] == 0
    assert result["psnr_db"] == 99
