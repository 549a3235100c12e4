"""The static model of a step on GPUs: its sums, and the roofline rows computed by hand for the design."""

import pytest
from typer.testing import CliRunner

from dgq import predict
from dgq.errors import DgqError
from dgq_cli.main import app


@pytest.mark.parametrize(("name", "gmacs"), [("sd-v1.4", 803), ("sdxl-turbo", 794)])
def test_counts_every_product(name, gmacs):
    assert round(sum(work.macs for work in predict.works(name)) / 1e9) == gmacs


@pytest.mark.parametrize(
    # ms by hand: fp16, W8A8 with attention in fp16
    ("device", "fp16", "integer"),
    [("a6000", 12.4, 7.8), ("rtx4090", 11.1, 5.3), ("a100", 5.8, 3.55), ("h100", 2.2, 1.45)],
)
def test_reproduces_the_roofline(device, fp16, integer):
    (item,) = predict.predict("sd-v1.4", [device])
    assert item.ideal["fp16"] == pytest.approx(fp16, rel=0.12)
    assert item.ideal["W8A8 fp16-attention"] == pytest.approx(integer, rel=0.12)


def test_a_bound_by_hand():
    device = predict.Device(100, 200, 1000, 10, 1.0, "80")
    work = predict.Work("linear", 1280, 1000, 128, 1_280_000, 128_000, 163_840)
    fp16, int8 = (
        predict.bound(work, system, device, {("80", "linear_int8_kernel"): 3.0}) for system in ("fp16", "W8A8")
    )
    assert fp16.tensor == pytest.approx(2 * 1280 * 1000 * 128 / 100e12 * 1e3)
    assert int8.tensor == pytest.approx(fp16.tensor / 2)
    assert int8.memory == pytest.approx((1_280_000 + 128_000 + 2 * 163_840) / 1e12 * 1e3)
    assert int8.waves == pytest.approx(int8.tensor)  # 10 tiles on 10 multiprocessors
    assert int8.issue == pytest.approx(1280 * 1000 * 128 / 4096 * 3 / (10 * 4 * 1e9) * 1e3)
    assert int8.total >= int8.ideal


def test_refusals_and_labels():
    with pytest.raises(DgqError, match="device"):
        predict.predict("sd-v1.4", ["abacus"])
    with pytest.raises(DgqError, match="architecture"):
        predict.works("sd-9")
    result = CliRunner().invoke(app, ["bench", "--predict", "sd-v1.4"])
    assert result.exit_code == 0
    assert all("predicted" in line.lower() for line in result.stdout.splitlines())
