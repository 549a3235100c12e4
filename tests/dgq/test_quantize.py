"""The whole way from a float folder to a checkpoint, interruptions included."""

import pytest
from safetensors.torch import load_file

import dgq
from dgq.checkpoint import WEIGHTS_NAME, read_header, unet_bytes
from dgq.errors import DgqError
from dgq.inspection import inspect
from dgq.prompts import calibration_prompts, evaluation_prompts, read_prompts
from dgq.quantize import Options, calibrate, estimate
from dgq.recipe import Recipe

FAST = {"prompts": ["a cat", "a dog"], "steps": 2, "evaluate": 0}


def weights(folder):
    return load_file(folder / "unet" / WEIGHTS_NAME)


def test_same_seed_same_file(tiny_pipeline, tmp_path):
    for name in ("a", "b"):
        calibrate(tiny_pipeline, tmp_path / name, Recipe(), Options(**FAST))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(bool((a[name] == b[name]).all()) for name in a)


def test_interrupted_and_resumed_gives_the_same_file(tiny_pipeline, tmp_path):
    calibrate(tiny_pipeline, tmp_path / "whole", Recipe(), Options(**FAST))

    def interrupt(stage, done, total, detail):
        if stage == "quantize" and done == total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, out, Recipe(), Options(**FAST), interrupt)
    assert not out.exists()
    with pytest.raises(DgqError, match="other settings"):
        calibrate(tiny_pipeline, out, Recipe(wbits=8), Options(**FAST, resume=True))
    stages = []
    calibrate(tiny_pipeline, out, Recipe(), Options(**FAST, resume=True), lambda stage, *_: stages.append(stage))
    assert "record" not in stages
    assert 0 < stages.count("quantize") < 60
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(bool((a[name] == b[name]).all()) for name in a)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("wbits, ratio", [(4, 0.40), (8, 0.62)])
def test_estimate_agrees_with_the_file(tiny_pipeline, tmp_path, wbits, ratio):
    recipe = Recipe(wbits=wbits, channels="none", rounding="nearest")
    before = estimate(tiny_pipeline, recipe, Options(**FAST))
    calibrate(tiny_pipeline, tmp_path / "out", recipe, Options(**FAST))
    size = unet_bytes(tmp_path / "out")
    assert before.packed_bytes <= size < before.packed_bytes + 100_000  # the difference is the file's own header
    assert before.packed_bytes < ratio * before.float16_bytes
    assert before.seconds > 0


def test_overrides_and_float_attention_reach_the_file(tiny_pipeline, tmp_path):
    recipe = Recipe(attention="float", overrides=(("mid_block.*", 8), ("*.to_q", 0)))
    header = calibrate(tiny_pipeline, tmp_path / "out", recipe, Options(**FAST))
    assert header == read_header(tmp_path / "out")
    assert header.attention is None
    assert not any(name.endswith("to_q") for name in header.layers)
    assert {plan.wbits for name, plan in header.layers.items() if name.startswith("mid_block")} == {8}
    dgq.load(tmp_path / "out")


@pytest.mark.parametrize("groups", [1, 16])
def test_paper_recipe_makes_a_checkpoint(tiny_pipeline, tmp_path, groups):
    header = calibrate(tiny_pipeline, tmp_path / "out", Recipe(name="paper", groups=groups), Options(**FAST))
    assert header.paper is not None
    pipe = dgq.load(tmp_path / "out")
    pipe("a cat", num_inference_steps=2)
    shown = [layer.channels for layer in inspect(tmp_path / "out").layers if layer.kind == "attention"]
    assert len(shown) == 8
    assert all(channels.endswith(" p:tensorx1") == (groups == 1) for channels in shown)


def test_bad_sources(tiny_checkpoint, tiny_pipeline, tmp_path):
    with pytest.raises(DgqError, match="quantized already"):
        calibrate(tiny_checkpoint, tmp_path / "out", Recipe())
    with pytest.raises(DgqError, match="already exists"):
        calibrate(tiny_pipeline, tiny_checkpoint, Recipe())
    with pytest.raises(DgqError, match="no such folder"):
        calibrate("no/such/folder", tmp_path / "out", Recipe())
    with pytest.raises(DgqError, match="no calibration prompts"):
        calibrate(tiny_pipeline, tmp_path / "out", Recipe(), Options(prompts=[]))


def test_calibration_and_evaluation_prompts_never_meet(tiny_pipeline, tmp_path):
    (tmp_path / "plain").mkdir()
    for folder in (tmp_path / "plain", tiny_pipeline):
        chosen, others = calibration_prompts(folder, 10_000), evaluation_prompts(folder, 10_000)
        assert chosen
        assert others
        assert not set(chosen) & set(others)
        assert calibration_prompts(folder, 2) == calibration_prompts(folder, 2)
    assert len(calibration_prompts(tmp_path / "plain", 64)) == 64


def test_prompt_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n\na cat\n  a dog \n")
    assert read_prompts(file) == ["a cat", "a dog"]
    file.write_text("#\n")
    with pytest.raises(DgqError, match="no prompt"):
        read_prompts(file)
    with pytest.raises(DgqError, match="cannot be read"):
        read_prompts(tmp_path / "nosuch.txt")
