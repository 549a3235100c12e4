"""The whole way from a float folder to a checkpoint, interruptions included."""

import dataclasses
import json
import math
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dgq
from dgq import architectures
from dgq.calibration import run as quantize
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.reading import family_at, network_bytes, network_config, read_header
from dgq.checkpoint.writing import WEIGHTS_NAME
from dgq.errors import DgqError
from dgq.inspection.inspect import inspect
from dgq.integer.plan import packed_bytes, plan_layers
from dgq.integer.rounding import passes
from dgq.integer.statistics import reading_order
from dgq.method import METHODS
from dgq.outputs import workplace
from dgq.pictures.pipelines import described, find_model
from dgq.pictures.prompts import calibration_prompts, evaluation_prompts, read_prompts
from dgq.recipe import Recipe
from dgq_kernels.native import library

QUICK = Recipe(rounding="nearest", channels="none")
FAST = {"prompts": ["a cat", "a dog"], "steps": 2, "evaluate": 0}


def weights(folder):
    return load_file(folder / "unet" / WEIGHTS_NAME)


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline, tmp_path_factory):
    """The checkpoint of the default recipe and FAST."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    calibrate(tiny_pipeline, out, Recipe(), Options(**FAST))
    return out


def test_same_seed_same_file(undisturbed, tiny_pipeline, tmp_path):
    calibrate(tiny_pipeline, tmp_path / "again", Recipe(), Options(**FAST))
    a, b = weights(undisturbed), weights(tmp_path / "again")
    assert a.keys() == b.keys()
    assert all(bool((a[name] == b[name]).all()) for name in a)


def test_interrupted_and_resumed_gives_the_same_file(undisturbed, tiny_pipeline, tmp_path):
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
    assert 0 < stages.count("quantize") < 85  # half of the UNet's 85 and the decoder's 16
    a, b = weights(undisturbed), weights(out)
    assert all(bool((a[name] == b[name]).all()) for name in a)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rotated_layers_are_gone_on_with(tiny_pipeline, tmp_path):
    """Which are rotated is chosen while calibrating: no plan before says so."""

    def interrupt(stage, done, total, detail):
        if stage == "save":
            raise KeyboardInterrupt

    out, recipe, told = tmp_path / "out", Recipe(rounding="nearest", channels="rotate"), []
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, out, recipe, Options(**FAST), interrupt)
    header = calibrate(tiny_pipeline, out, recipe, Options(**FAST, resume=True), lambda stage, *_: told.append(stage))
    assert any(plan.rotation for plan in header.layers.values())
    assert "resume" not in told  # nothing there was of another kind
    assert "quantize" not in told


def bits_of(header):
    """Stored bits of the quantized layers for each of the float ones' weights, as `dgq inspect` reckons them."""
    plans = header.layers.values()
    return 8 * sum(map(packed_bytes, plans)) / sum(math.prod(plan.float_shape) for plan in plans)


def test_a_budget_of_bits_is_spent_and_kept(undisturbed, tiny_pipeline, tmp_path):
    plain = read_header(undisturbed)
    bits, told = bits_of(plain) + 0.5, (("mid_block.*", 4),)
    out, stages = tmp_path / "mixed", []
    recipe, options = Recipe(overrides=told), Options(**FAST, bits=bits)
    mixed = calibrate(tiny_pipeline, out, recipe, options, lambda stage, *_: stages.append(stage))
    assert stages.count("measure") == 4  # two prompts, two steps
    assert mixed.recipe.overrides[:1] == told
    chosen = dict(mixed.recipe.overrides[1:])
    assert set(chosen.values()) == {8}
    assert not any(name.startswith("mid_block") for name in chosen)
    assert {plan.owner(name) for name, plan in mixed.layers.items() if plan.wbits == 8} == set(chosen)
    assert bits - 0.1 < bits_of(mixed) <= bits
    assert read_header(out).recipe == mixed.recipe
    # the file is that of these overrides, whoever chose them
    calibrate(tiny_pipeline, tmp_path / "again", mixed.recipe, Options(**FAST))
    a, b = weights(out), weights(tmp_path / "again")
    assert all(bool((a[name] == b[name]).all()) for name in b)


def test_a_budget_goes_on_after_an_interruption(tiny_pipeline, tmp_path):
    options = Options(**FAST, bits=8)
    calibrate(tiny_pipeline, tmp_path / "whole", QUICK, options)

    def interrupt(stage, done, total, detail):
        if stage == "save":
            raise KeyboardInterrupt

    out, told = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, out, QUICK, options, interrupt)
    calibrate(
        tiny_pipeline, out, QUICK, dataclasses.replace(options, resume=True), lambda stage, *_: told.append(stage)
    )
    assert "resume" not in told  # nothing there was of another kind
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(bool((a[name] == b[name]).all()) for name in a)


def test_budgets_that_cannot_be_kept_are_told_before_the_work(tiny_pipeline, tmp_path):
    def work(*_):
        pytest.fail("it began to work")

    for recipe, bits, message in (
        (QUICK, 4.0, r"too small: the layers take \d+\.\d\d"),
        (Recipe(wbits=8), 6.0, "there are none"),
        (Recipe(name="paper"), 6.0, "there are none"),
        (Recipe(name="paper", rounding="adaround"), 6.0, "there are none"),
    ):
        options = Options(**FAST, bits=bits)
        with pytest.raises(DgqError, match=message):
            estimate(tiny_pipeline, recipe, options)
        with pytest.raises(DgqError, match=message):
            calibrate(tiny_pipeline, tmp_path / "out", recipe, options, work)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interrupted(tiny_pipeline, tmp_path):
    """(a float model that a test may change, --out of a calibration of it that was interrupted half-way)."""
    source, out = Path(shutil.copytree(tiny_pipeline, tmp_path / "model")), tmp_path / "out"

    def interrupt(stage, done, total, detail):
        if stage == "quantize" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, out, QUICK, Options(**FAST), interrupt)
    return source, out


def change_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [f"unet/{WEIGHTS_NAME}", "text_encoder/model.safetensors", "tokenizer/*.json", "scheduler/scheduler_config.json"],
)
def test_another_model_of_equal_size_is_not_resumed(interrupted, name):
    source, out = interrupted
    (file, *_) = sorted(source.glob(name))
    size = file.stat().st_size
    if file.suffix == ".json":
        file.write_text(file.read_text().replace("\n", " ", 1))
    else:
        change_a_byte(file)
    assert file.stat().st_size == size
    with pytest.raises(DgqError, match="another model or with other settings"):
        calibrate(source, out, QUICK, Options(**FAST, resume=True))
    assert list((out.parent / ".out.partial").glob("layer-*"))


def test_damaged_files_are_made_again(interrupted, tmp_path):
    source, out = interrupted
    partial = tmp_path / ".out.partial"
    first, second, third, *_ = sorted(partial.glob("layer-*"))
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(b"")
    plan = json.dumps({"name": third.stem.removeprefix("layer-"), "plan": {}, "sqnr_db": 1})
    save_file(load_file(third), third, metadata={"layer": plan})
    (partial / "calls.safetensors").write_bytes((partial / "calls.safetensors").read_bytes()[:1000])
    for name in (".dgq-0123456789abcdef.tmp", ".tmpw6fP61"):  # as a run leaves them that is killed while it writes
        (partial / name).touch()
    told = []
    calibrate(source, out, QUICK, Options(**FAST, resume=True), lambda stage, *rest: told.append((stage, rest[-1])))
    resumed = [detail for stage, detail in told if stage == "resume"]
    assert [detail.split()[0] for detail in resumed] == [first.name, second.name, third.name, "calls.safetensors"]
    assert "record" in [stage for stage, _ in told]
    calibrate(source, tmp_path / "whole", QUICK, Options(**FAST))
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(bool((a[name] == b[name]).all()) for name in a)
    assert not partial.exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_the_place_of_a_finished_layer_is_refused(interrupted, tmp_path, resume):
    source, out = interrupted
    (file, *_) = sorted((tmp_path / ".out.partial").glob("layer-*"))
    file.unlink()
    file.mkdir()
    with pytest.raises(DgqError, match=rf"{file.name}: cannot be removed \(Is a directory\)"):
        calibrate(source, out, QUICK, Options(**FAST, resume=resume))
    file.rmdir()
    calibrate(source, out, QUICK, Options(**FAST, resume=True))


def test_a_layer_of_another_calibration_is_made_again(interrupted, tmp_path):
    source, out = interrupted
    (file, *_) = sorted((tmp_path / ".out.partial").glob("layer-*"))
    with safe_open(file, framework="pt") as handle:
        entry = json.loads(handle.metadata()["layer"])
    entry["plan"]["abits"] = 6
    save_file(load_file(file), file, metadata={"layer": json.dumps(entry)})
    told = []
    header = calibrate(
        source, out, QUICK, Options(**FAST, resume=True), lambda stage, *rest: told.append((stage, rest))
    )
    assert [rest[-1].split()[0] for stage, rest in told if stage == "resume"] == [file.name]
    assert {plan.abits for plan in header.layers.values()} == {8}


def test_two_calibrations_to_one_place(tiny_pipeline, tmp_path):
    out = tmp_path / "out"
    with workplace(out), pytest.raises(DgqError, match=r"another process.*\.out\.partial"):
        calibrate(tiny_pipeline, out, QUICK, Options(**FAST), lambda *_: pytest.fail("it began to work"))
    calibrate(tiny_pipeline, out, QUICK, Options(**FAST))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_bad_overrides_and_prompts_are_told_before_the_work(tiny_pipeline, tmp_path):
    def work(*_):
        pytest.fail("it began to work")

    with pytest.raises(DgqError, match="matches no layer"):
        calibrate(tiny_pipeline, tmp_path / "out", Recipe(overrides=(("nosuch", 8),)), Options(**FAST), work)
    with pytest.raises(DgqError, match="tokens"):
        calibrate(tiny_pipeline, tmp_path / "out", QUICK, Options(["a cat", "cat " * 40], steps=2), work)
    assert list(tmp_path.iterdir()) == []


def test_only_a_checkpoint_is_replaced_and_never_lost(tiny_pipeline, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    calibrate(tiny_pipeline, out, QUICK, Options(**FAST))
    before = weights(out)
    (out / "thesis.txt").touch()
    with pytest.raises(DgqError, match=r"thesis\.txt"):
        calibrate(tiny_pipeline, out, QUICK, Options(**FAST, overwrite=True))
    (out / "thesis.txt").unlink()
    recipe = Recipe(wbits=8, rounding="nearest", channels="none")
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "write_checkpoint", lambda *_: (_ for _ in ()).throw(DgqError("no space")))
        with pytest.raises(DgqError, match="no space"):
            calibrate(tiny_pipeline, out, recipe, Options(**FAST, overwrite=True))
    assert weights(out).keys() == before.keys()
    header = calibrate(tiny_pipeline, out, recipe, Options(**FAST, overwrite=True, resume=True))
    assert read_header(out) == header
    assert header.recipe.wbits == 8
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_source_is_never_written_over(tiny_pipeline, tmp_path):
    source = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", tmp_path, tmp_path / "link", tmp_path / "link" / "out"):
        for given in (source, tmp_path / "link"):
            with pytest.raises(DgqError, match=r"is, holds or lies in|is a link"):
                calibrate(given, out, QUICK, Options(**FAST, overwrite=True))
    assert sorted(file.name for file in source.iterdir()) == sorted(file.name for file in tiny_pipeline.iterdir())


@pytest.mark.parametrize("wbits, ratio", [(4, 0.40), (8, 0.62)])
def test_estimate_agrees_with_the_file(tiny_pipeline, tmp_path, wbits, ratio):
    recipe = Recipe(wbits=wbits, channels="none", rounding="nearest")
    before = estimate(tiny_pipeline, recipe, Options(**FAST))
    calibrate(tiny_pipeline, tmp_path / "out", recipe, Options(**FAST))
    size = network_bytes(tmp_path / "out")
    assert before.packed_bytes <= size < before.packed_bytes + 100_000  # the difference is the file's own header
    assert before.packed_bytes < ratio * before.float16_bytes
    assert before.seconds > 0


def test_estimate_counts_the_passes_that_are_run(tiny_pipeline, tmp_path):
    options = Options(**FAST, budget=2**20, vae="float")
    started = []

    def told(stage, done, total, detail):
        if stage == "statistics" and done == 1:
            started.append(total)

    calibrate(tiny_pipeline, tmp_path / "out", Recipe(), options, told)
    predicted = estimate(tiny_pipeline, Recipe(), options)
    assert predicted.passes == len(started) > 2
    assert predicted.calls == 4 + sum(started)


def test_the_estimate_calls_the_network_once(tiny_pipeline, monkeypatch):
    """A call takes most of a dry run's time, even on the meta device."""
    forward, calls = UNet2DConditionModel.forward, []
    monkeypatch.setattr(
        UNet2DConditionModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    estimate(tiny_pipeline, Recipe(), Options(**FAST))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("DGQ_BACKEND", "abacus", "is not one of reference"),
        ("DGQ_CPU_ENGINE", "abacus", "is not one of off"),
        ("DGQ_LOG_ATTENTION", "on", "is neither 0 nor 1"),
        ("DGQ_PDL", "off", "is neither 0 nor 1"),
    ],
)
def test_the_estimate_refuses_a_variable_without_meaning(tiny_pipeline, monkeypatch, name, value, message):
    library.load.cache_clear()
    monkeypatch.setenv(name, value)
    with pytest.raises(DgqError, match=f"{name}={value} {message}"):
        estimate(tiny_pipeline, QUICK, Options(**FAST))


@pytest.mark.parametrize("budget", [1, 2**20, 2**40])
def test_the_cost_has_the_passes_of_the_reading_order(tiny_pipeline, budget):
    unet = family_at(tiny_pipeline).skeleton(dict(network_config(tiny_pipeline)))
    meta = torch.device("meta")
    with meta:
        call = architectures.call(unet, 1, meta)
    cost, (layers, _) = METHODS["integer"].cost(unet, Recipe(), budget, call), plan_layers(unet, Recipe())
    with meta:
        order = reading_order(unet, layers, call)
    groups = passes(layers, Recipe(), budget, order)
    assert cost.passes == [[layer.name for layer in group] for group in groups]
    assert cost.rows.keys() == cost.layers.keys()


def test_recorded_pictures_take_steps_of_their_own(tiny_pipeline, tmp_path):
    """Few, whatever pictures will have; those are what the checkpoint draws with and is compared by."""
    options = Options(**FAST | {"steps": 3, "evaluate": 1}, record_steps=2, vae="float")
    told = []
    header = calibrate(
        tiny_pipeline, tmp_path / "out", QUICK, options, lambda stage, done, total, _: told.append((stage, total))
    )
    assert header.generation["steps"] == described(tmp_path / "out").generation["steps"] == 3
    assert header.calibration["steps"] == 2
    assert {total for stage, total in told if stage == "statistics"} == {4}  # calls of two prompts
    assert estimate(tiny_pipeline, QUICK, options).calls == 4 + 4

    def interrupt(stage, done, total, detail):
        if stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, tmp_path / "cut", QUICK, options, interrupt)
    other = dataclasses.replace(options, record_steps=1, resume=True)
    with pytest.raises(DgqError, match="other settings"):
        calibrate(tiny_pipeline, tmp_path / "cut", QUICK, other)


def test_how_many_steps_are_recorded(tiny_pipeline):
    model = find_model(tiny_pipeline)

    def steps(recipe="integer", **options):
        return quantize.recording_settings(Options(**options), model, Recipe(recipe)).steps

    assert [steps(steps=steps_given) for steps_given in (1, 5, 6, 7, 50)] == [1, 5, 6, 6, 6]
    assert [steps(steps=20, record_steps=wanted) for wanted in (1, 20, 40)] == [1, 20, 40]
    assert steps("paper", steps=50) == 50  # it learns each of them
    with pytest.raises(DgqError, match="records the steps that pictures will have"):
        steps("paper", steps=50, record_steps=50)
    with pytest.raises(DgqError, match="out of range"):
        steps(record_steps=0)


def test_the_estimate_counts_a_widened_model_beside_what_a_rounding_takes(tiny_pipeline, tmp_path):
    """A mapped one is let go of: it counts beside the statistics of the replayed calls alone."""
    half = Path(shutil.copytree(tiny_pipeline, tmp_path / "half"))
    (file,) = (half / "unet").glob("*.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    options = Options(**FAST, budget=2**40)
    mapped, widened = (estimate(folder, Recipe(), options) for folder in (tiny_pipeline, half))
    assert widened.statistics_bytes == mapped.statistics_bytes
    assert 0 < widened.memory_bytes - mapped.memory_bytes < widened.statistics_bytes


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
    assert header.table is not None
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
    file.write_bytes(b"\xef\xbb\xbfa cat\r\n")  # as Windows' editors write it
    assert read_prompts(file) == ["a cat"]


def test_prompts_from_a_pipe():
    source, sink = os.pipe()
    os.write(sink, b"a cat\n")
    os.close(sink)
    assert read_prompts(Path(f"/dev/fd/{source}")) == ["a cat"]  # as bash's <(command) names it
    os.close(source)


def test_a_huge_prompts_file_is_not_read_into_memory(tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    with pytest.raises(DgqError, match="larger than 256 MiB"):
        read_prompts(tmp_path / "huge.txt")


def test_text_encoder_and_vae_are_not_held_while_layers_are_quantized(tiny_pipeline, tmp_path, monkeypatch):
    held, seen = [], []

    def loaded(*args, **options):
        pipe = load(*args, **options)
        held.append((weakref.ref(pipe.text_encoder), weakref.ref(pipe.vae)))
        return pipe

    def told(stage, *_):
        if stage in ("statistics", "quantize"):
            seen.append([part() is None for part in held[0]])

    load = quantize.load
    monkeypatch.setattr(quantize, "load", loaded)
    calibrate(tiny_pipeline, tmp_path / "out", Recipe(), Options(**{**FAST, "evaluate": 1}), told)
    assert len(held) == 2  # they are loaded again to draw what is compared
    assert seen
    assert all(all(gone) for gone in seen)


def test_recorded_pictures_are_not_decoded(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *_, **__: pytest.fail("decoded"))
    calibrate(tiny_pipeline, tmp_path / "out", QUICK, Options(**FAST, vae="float"))


def test_size_of_calibration_pictures(tiny_pipeline, tmp_path):
    options = Options(**{**FAST, "size": 64})
    made = calibrate(tiny_pipeline, tmp_path / "out", Recipe(rounding="nearest"), options)
    assert made.calibration["size"] == 64
    assert read_header(tmp_path / "out").calibration["size"] == 64
    small, large = (estimate(tiny_pipeline, Recipe(), Options(**{**FAST, "size": size})) for size in (64, 128))
    assert large.macs_per_call > 3 * small.macs_per_call
    with pytest.raises(DgqError, match="pictures of 65 pixels cannot be drawn"):
        calibrate(tiny_pipeline, tmp_path / "other", Recipe(), Options(**{**FAST, "size": 65}))
