"""Well-known architectures: their sizes, and that a step of one is timed."""

from dataclasses import replace

import pytest
import torch

from dgq import architectures, bench, doctor
from dgq.architectures import ARCHITECTURES
from dgq.errors import DgqError
from dgq.layers import IntegerLayer
from dgq.recipe import LayerPlan

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_number_of_parameters_is_the_models(name):
    unet = architectures.skeleton(name)
    assert sum(parameter.numel() for parameter in unet.parameters()) == ARCHITECTURES[name].parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_call_fits_the_model(name):
    arguments = architectures.call(name, torch.float32, torch.device("meta"))
    output = architectures.skeleton(name)(**arguments).sample
    assert output.shape == (ARCHITECTURES[name].batch, 4, 64, 64)


def small(monkeypatch):
    """Stable Diffusion's blocks at a width that a test can afford."""
    config = {
        "sample_size": 16, "block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
    }  # fmt: skip
    monkeypatch.setitem(ARCHITECTURES, "small", replace(ARCHITECTURES["sd-v1.4"], config=config, parameters=10**6))


def test_rows_of_an_architecture(monkeypatch):
    small(monkeypatch)
    report = bench.bench(arch="small", repeats=1, device="cpu")
    systems = [row.system for row in report.rows]
    assert systems == ["float32", "bfloat16 channels-last", "dgq W8A8", "dgq W4A8"]
    assert report.machine["model"] == "small"
    errors = [row.relative_error for row in report.rows]
    assert errors[0] == 0
    assert 0 < errors[2] < 0.2
    assert errors[2] < errors[3] < 1
    assert report.rows[3].disk_mib < report.rows[2].disk_mib


def test_the_float_systems_keep_their_weights(monkeypatch):
    """The quantized copies share the float model's parameters while they are made, and must leave them alone."""
    small(monkeypatch)
    base = architectures.fill(architectures.skeleton("small"), CPU)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    monkeypatch.setattr(architectures, "fill", lambda unet, device: base)
    bench.bench(arch="small", bits=4, repeats=1, device="cpu")
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wbits", [4, 8])
def test_absmax_weights_are_as_near_as_their_steps(wbits):
    plan = LayerPlan("linear", 70, 9, wbits, 8, True, class_ends=[70])
    matrix = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    weight = bench.absmax_weight(matrix, plan)
    step = weight.scale[:, None]
    if weight.subscales is not None:
        step = step * weight.subscales.repeat_interleave(32, 1)[:, :70]
    assert bool(((weight.dequantize() - matrix).abs() <= 0.5001 * step).all())
    IntegerLayer.from_quantized(plan, weight, bench.no_groups(70), torch.zeros(9))


def test_what_an_architecture_refuses(monkeypatch):
    with pytest.raises(DgqError, match=r"not one of sd-v1\.4, sdxl-turbo"):
        bench.bench(arch="sd-v9", device="cpu")
    with pytest.raises(DgqError, match="only a step"):
        bench.bench(arch="sd-v1.4", memory=True, device="cpu")
    monkeypatch.setattr(doctor, "memory", lambda: {"total": 2**30, "available": 2**30})
    with pytest.raises(DgqError, match=r"sd-v1\.4 takes .* GiB, 1 GiB are free"):
        bench.bench(arch="sd-v1.4", device="cpu")
