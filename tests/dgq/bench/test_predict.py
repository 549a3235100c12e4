"""The static model of a step on GPUs: its sums, and roofline rows computed by hand."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgq.bench import predict
from dgq.errors import DgqError
from dgq_cli.main import app

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def ideal():
    """(architecture, device) -> ideal milliseconds of each system."""
    devices = ("a6000", "rtx4090", "a100", "h100")
    return {
        (name, item.device): item.ideal
        for name in ("sd-v1.4", "sdxl-turbo")
        for item in predict.predict_step(name, devices)
    }


@pytest.mark.parametrize(
    # of PixArt by hand: 28 blocks of 1024 tokens and 1152 channels, 120 text tokens, two samples
    ("name", "gmacs"),
    [("sd-v1.4", 803), ("sdxl-turbo", 794), ("pixart-alpha", 1236)],
)
def test_counts_every_product(name, gmacs):
    assert round(sum(work.macs for work in predict.works(name)) / 1e9) == gmacs


def test_pixart_by_hand():
    rows, text, width = 2 * 1024, 2 * 120, 1152
    block = rows * width * width * (4 + 2 + 8) + 2 * text * width * width + 2 * 2 * 1024 * width * (1024 + 120)
    rest = rows * (16 * width + 32 * width) + text * (4096 * width + width * width)
    rest += 2 * (256 * width + width * width + 6 * width * width)  # of the time embedding
    assert sum(work.macs for work in predict.works("pixart-alpha")) == 28 * block + rest


@pytest.fixture(scope="module")
def ungated():
    """As `ideal`, with GEGLU apart from the product and the text projected, as in the calculation by hand."""

    def sums(name, device):
        every = [dataclasses.replace(work, gated=False, of_text=False) for work in predict.works(name)]
        return {
            system: sum(predict.bound(work, system, predict.DEVICES[device], {}).ideal for work in every)
            for system in predict.SYSTEMS
        }

    return functools.cache(sums)


@pytest.mark.parametrize(
    # ms by hand: fp16; W8A8 with attention in fp16
    ("device", "fp16", "integer"),
    [("a6000", 12.4, 7.8), ("rtx4090", 11.1, 5.3), ("a100", 5.8, 3.55), ("h100", 2.2, 1.45)],
)
def test_reproduces_the_roofline_of_stable_diffusion(ungated, device, fp16, integer):
    got = ungated("sd-v1.4", device)
    assert got["fp16"] == pytest.approx(fp16, rel=0.03)
    assert got["W8A8 fp16-attention"] == pytest.approx(integer, rel=0.03)


@pytest.mark.parametrize(
    # ms by hand: fp16, W8A8, W4A8
    ("device", "fp16", "w8", "w4"),
    [("a6000", 12.3, 7.2, 6.5), ("rtx4090", 10.9, 5.1, 3.95), ("h100", 2.56, 1.53, 1.20)],
)
def test_reproduces_the_roofline_of_sdxl_turbo(ungated, device, fp16, w8, w4):
    got = ungated("sdxl-turbo", device)
    assert got["fp16"] == pytest.approx(fp16, rel=0.05)
    assert got["W8A8"] == pytest.approx(w8, rel=0.03)
    assert got["W4A8"] == pytest.approx(w4, rel=0.03)


def test_gating_saves_half_of_the_output(ideal, ungated):
    for device in ("a6000", "h100"):
        assert 0.88 < ideal["sd-v1.4", device]["W8A8"] / ungated("sd-v1.4", device)["W8A8"] < 1
        assert ideal["sd-v1.4", device]["fp16"] == pytest.approx(ungated("sd-v1.4", device)["fp16"])
    product = predict.Work("linear", 128, 64, 32, 8192, 2048, 4096, gated=True)
    after = predict.Work("geglu", 0, 0, 0, 4096, 0, 2048, gated=True)
    assert [predict.cost(work, "W8A8", DEVICE, {})[0].bytes for work in (product, after)] == [
        8192 + 2048 + 2 * 2048,
        2 * 2048 + 2048,
    ]
    assert predict.cost(after, "fp16", DEVICE, {})[0].bytes == 2 * 4096 + 2 * 2048


def test_split_reductions_cost_their_sums():
    """One tile of a long reduction on ten multiprocessors: more programs, and int32 sums to and from memory."""
    work = predict.Work("linear", 64, 8192, 64, 64 * 8192, 64 * 8192, 64 * 64)
    cost, _ = predict.cost(work, "W8A8", DEVICE, {})
    splits = predict.choose("int8", 64, 64, 8192, 8192, DEVICE.machine).splits
    assert splits > 1
    assert (cost.more_bytes, cost.launches) == (0, 2)  # the cache holds them
    small = dataclasses.replace(DEVICE, cache=0.01)
    cost, _ = predict.cost(work, "W8A8", small, {})
    splits = predict.choose("int8", 64, 64, 8192, 8192, small.machine).splits
    assert (cost.more_bytes, cost.launches) == (8 * splits * 64 * 64, 2)
    assert 1 / 10 < cost.fill <= 1


DEVICE = predict.Device(100, 200, 1000, 10, 1.0, "80", cache=1)


def test_a_bound_by_hand():
    work = predict.Work("linear", 1280, 1000, 128, 1_280_000, 128_000, 163_840)
    table = {("80", "linear_int8_kernel"): (predict.Tile(128, 128, 3 / 4096),)}
    fp16, int8 = (predict.bound(work, system, DEVICE, table) for system in ("fp16", "W8A8"))
    assert fp16.tensor == pytest.approx(2 * 1280 * 1000 * 128 / 100e12 * 1e3)
    assert int8.tensor == pytest.approx(fp16.tensor / 2)
    assert int8.memory == pytest.approx((1_280_000 + 128_000 + 2 * 163_840) / 1e12 * 1e3)
    assert int8.waves == pytest.approx(int8.tensor)  # 10 tiles on 10 multiprocessors
    assert (int8.cost.waves, int8.cost.fill, int8.cost.launches) == (1, 1, 1)
    assert int8.cost.issue_slots == pytest.approx(1280 * 1000 * 128 / 4096 * 3)
    assert int8.issue == pytest.approx(int8.cost.issue_slots / (10 * 4 * 1e9) * 1e3)
    assert int8.total >= int8.ideal
    worse = predict.bound(predict.Work("linear", 1281, 1000, 128, 1_281_000, 128_000, 163_968), "W8A8", DEVICE, table)
    assert worse.cost.waves == 2
    assert worse.waves > 1.8 * worse.tensor


def test_a_measured_card_is_taken_at_what_it_reached():
    """Launches, float products, passes and both attentions by hand; the roofline stays."""
    reached = predict.Reached(launch=3, products=0.5, passes=0.25, attention=0.2, log_attention=0.1)
    slow = dataclasses.replace(DEVICE, reached=reached)
    product = predict.Work("linear", 1280, 1000, 1280, 1_280_000, 1_280_000, 1_638_400)
    attention = predict.Work("self-attention", 1280, 80, 1280, 1, 0, 1, 1)
    passed = predict.Work("layer norm", 0, 0, 0, 1_000_000, 0, 1_000_000)
    for work, system, share in (
        (product, "fp16", 0.5),
        (product, "W8A8", 1),
        (attention, "W8A8 fp16-attention", 0.2),
        (attention, "W8A8", 0.1),
        (passed, "fp16", 0.25),
        (passed, "W8A8", 0.25),
    ):
        plain, bound = (predict.bound(work, system, device, {}) for device in (DEVICE, slow))
        assert bound.ideal == plain.ideal
        assert bound.launches == pytest.approx(3 * plain.launches)
        assert bound.total - bound.launches == pytest.approx((plain.total - plain.launches) / share)


def test_integer_products_of_a_fitted_card_take_its_models_time():
    hopper, work = predict.DEVICES["h100"], predict.Work("linear", 8192, 320, 320, 8192 * 320, 320 * 320, 8192 * 320)
    bound = predict.bound(work, "W8A8", hopper, {})
    tiling = predict.choose("int8", 8192, 320, 320, 320, hopper.machine)
    modelled = predict.clocks(tiling, "int8", 8192, 320, 320, hopper.machine) / (hopper.clock * 1e6)
    assert (bound.total, bound.launches) == (pytest.approx(modelled), 0)  # its launch is among the model's clocks
    alone = predict.bound(dataclasses.replace(work, quantize=1), "W8A8", hopper, {})
    assert alone.total == pytest.approx(modelled + 2.5e-3)


def test_the_prediction_stands_beside_what_an_h100_took():
    """Shares were taken from SD v1.4; SDXL-Turbo's float16 graph took 12.7 ms."""
    took = {"sd-v1.4": 10.6, "sdxl-turbo": 12.7}
    for name, milliseconds in took.items():
        (item,) = predict.predict_step(name, ["h100"])
        assert item.total["fp16"] == pytest.approx(milliseconds, rel=0.05)


def test_joined_products_read_their_input_once():
    three = predict.Work("linear", 128, 64, 32, 8192, 2048, 4096, parts=3)
    one = predict.Work("linear", 128, 64, 96, 8192, 3 * 2048, 3 * 4096)
    assert three.macs == one.macs
    for system, inputs, launches in (("fp16", 3 * 2 * 8192, 3), ("W8A8", 8192, 1)):
        cost, _ = predict.cost(three, system, DEVICE, {})
        assert cost.bytes == inputs + (2 if system == "fp16" else 1) * 3 * 2048 + 2 * 3 * 4096
        assert cost.launches == launches


def test_passes_by_hand():
    """A residual block's norm of 2 MB, which the cache of 1 MB does not hold."""
    norm = predict.Work("group norm", 0, 0, 0, 1_000_000, 0, 1_000_000, rereads=True, merges=True, silu=True)
    fp16, int8 = (predict.cost(norm, system, DEVICE, {})[0] for system in ("fp16", "W8A8"))
    assert (fp16.bytes, fp16.more_bytes, fp16.launches) == (4e6, 2e6 + 4e6, 3)  # statistics, norm, SiLU
    assert (int8.bytes, int8.more_bytes, int8.launches) == (3e6, 2e6, 3)
    small = predict.Work("group norm", 0, 0, 0, 1000, 0, 1000, rereads=True)
    assert predict.cost(small, "W8A8", DEVICE, {})[0].more_bytes == 0
    add = predict.Work("add", 0, 0, 0, 2000, 0, 1000)
    assert predict.bound(add, "W8A8", DEVICE, {}).ideal == 0
    assert predict.cost(add, "W8A8", DEVICE, {})[0].launches == 0
    alone = predict.Work("linear", 128, 64, 32, 8192, 2048, 4096, quantize=1)
    cost, _ = predict.cost(alone, "W8A8", DEVICE, {})
    assert (cost.more_bytes, cost.launches) == (3 * 8192, 2)


def test_reads_the_compile_table():
    """Instructions for each multiply and add, of one warp's and of four warps' products; the newest release."""
    table = predict.tiles()
    large = table["86", "linear_int8_kernel"][0]
    assert (large.rows, large.channels) == (128, 128)
    assert 2.0 < large.slots * 4096 < 4.0
    assert 0 < table["90", "linear_int8_kernel"][0].slots < large.slots
    assert table["89", "conv2d_int4_kernel"][0].slots > large.slots


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(DgqError, match=r"nosuch\.csv: the compile table cannot be read"):
        predict.tiles(tmp_path / "nosuch.csv")


def test_the_table_is_in_a_package_that_the_wheel_holds():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert any(predict.TABLE.is_relative_to(ROOT / package) for package in wheel["packages"])
    assert not any(key in part for key in ("exclude", "only-include") for part in (build, wheel))


@pytest.mark.slow
def test_an_installed_wheel_predicts_the_same(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    run = subprocess.run(
        [sys.executable, "-m", "dgq_cli", "bench", "--predict", "sd-v1.4", "--json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    expected = predict.to_dict(predict.predict_step("sd-v1.4"))
    assert json.loads(run.stdout) == json.loads(json.dumps(expected))


def test_larger_pictures():
    small, large = (sum(work.macs for work in predict.works("sd-v1.4", pixels)) for pixels in (512, 1024))
    assert small == sum(work.macs for work in predict.works("sd-v1.4"))
    assert large > 4 * small  # self-attention grows with the square
    (item,) = predict.predict_step("pixart-alpha", ["h100"], 1024)
    assert item.architecture == "pixart-alpha 1024px"


def test_refusals_and_labels():
    with pytest.raises(DgqError, match="device"):
        predict.predict_step("sd-v1.4", ["abacus"])
    with pytest.raises(DgqError, match=r"not one of sd-v1\.4, sd-turbo, sdxl-turbo, .*pixart-alpha"):
        predict.works("sd-9")
    with pytest.raises(DgqError, match="1000 pixels"):
        predict.works("sd-v1.4", 1000)
    result = CliRunner().invoke(app, ["bench", "--predict", "pixart-alpha", "--pixels", "1024"])
    assert result.exit_code == 0
    assert all("predicted" in line.lower() for line in result.stdout.splitlines())
    assert "launches" in result.stdout
    result = CliRunner().invoke(app, ["bench", "--predict", "pixart-alpha", "--json"])
    item = json.loads(result.stdout)["predicted"][0]
    assert all("predicted" in key for key in item if key not in ("architecture", "device"))
    assert item["predicted_step"]["W8A8"]["launches"] > 100
    assert CliRunner().invoke(app, ["bench", "--pixels", "1024"]).exit_code == 2
