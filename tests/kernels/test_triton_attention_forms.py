"""Attention's other forms: one pass over the keys, and the quantizer as published, each against its own reference."""

import pytest
import torch
from comparing import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgq_kernels import log_attention_running
from dgq_kernels.log_attention import reference
from dgq_kernels.log_attention import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(rows, keys, width, heads=(1, 2), spread=1.0, seed=0, dtype=torch.float32):
    """q, k, v; the keys are multiples of 2^-10, whose sums float32 holds exactly, so that their mean, and with it each
    code, is the same in any order of summation: one code of a key can move a whole octave of p where f is 0."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(*heads, rows, width, generator=g) * spread
    k = torch.randn(*heads, keys, width, generator=g) + torch.randn(*heads, 1, width, generator=g)
    k = (k * 1024).round() / 1024
    return q.to(dtype), k.to(dtype), torch.randn(*heads, keys, width, generator=g).to(dtype)


def run(name, q, k, v, *arguments):
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    return getattr(kernels, name)(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), *arguments, out=out).cpu()


def decibels(exact, got):
    return float(10 * torch.log10(exact.pow(2).sum() / (exact - got).pow(2).sum()))


def rising(rows, keys, width):
    """Keys whose logits grow along the sequence, so that the running maximum rises in every block."""
    q, k, v = operands(rows, keys, width)
    return q + 1, k + torch.linspace(-3, 3, keys)[:, None], v


@pytest.mark.parametrize(
    ("rows", "keys", "width", "bits", "fraction", "block"),
    [(42, 123, 16, 6, 3, 32), (6, 431, 128, 8, 4, 64), (1, 1, 64, 8, 0, 64), (130, 129, 40, 4, 2, 128)],
)
@pytest.mark.parametrize("make", [operands, rising])
def test_one_pass_equals_its_reference(rows, keys, width, bits, fraction, block, make):
    q, k, v = make(rows, keys, width)
    arguments = (width**-0.5, bits, fraction, block)
    expected = reference.log_attention_running(q, k, v, *arguments)
    assert_close("output", run("log_attention_running", q, k, v, *arguments), expected, 1e-6)


def test_more_heads_than_a_grid_has(monkeypatch):
    """CUDA takes 65535 programs along the second axis; AnimateDiff's attention over frames has 8192 samples of 8 heads
    for a video of 512 x 512 pixels with guidance."""
    grids, launch = [], kernels.launch

    def noted(kernel, grid, *arguments, **constants):
        grids.append(grid)
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", noted)
    q, k, v = operands(6, 9, 16, (5, 2))
    calls = {
        "log_attention": (0.25, 8, 4, True, 8, 8),
        "log_attention_running": (0.25, 8, 4, 64),
        "log_attention_base2": (0.25, 8, False),
    }
    for name, arguments in calls.items():
        expected = run(name, q, k, v, *arguments)
        grids.clear()
        monkeypatch.setattr(kernels, "MOST_HEADS", 5)
        assert torch.equal(run(name, q, k, v, *arguments), expected)
        assert torch.equal(getattr(kernels, name)(*(x.to(DEVICE) for x in (q, k, v)), *arguments).cpu(), expected)
        assert max(grid[1] for grid in grids) == 4
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "launch", noted)


@settings(max_examples=6, deadline=None)
@example(rows=90, keys=178, width=44, fraction=1, bits=5, seed=59, spread=0.3)  # a key's code at a tie
@given(
    rows=st.integers(1, 140),
    keys=st.integers(1, 200),
    width=st.integers(16, 128),
    fraction=st.integers(0, 5),
    bits=st.integers(5, 8),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.3, 3.0, 30.0]),
)
def test_one_pass_any_shape(rows, keys, width, fraction, bits, seed, spread):
    q, k, v = operands(rows, keys, width, heads=(1, 1), spread=spread, seed=seed)
    arguments = (width**-0.5, bits, min(fraction, bits - 1), 64)
    expected = reference.log_attention_running(q, k, v, *arguments)
    assert_close("output", run("log_attention_running", q, k, v, *arguments), expected, 1e-6)


def test_one_pass_extremes():
    """Zero rows, equal keys, huge and tiny values: finite, and as the reference."""
    q, k, v = operands(42, 77, 40)
    q[:, :, 0] = 0
    k[:, 0] = 1.5
    for factor in (1.0, 1e-20, 1e15):
        arguments = (q * factor, k, v, 40**-0.5, 8, 4, 32)
        out = run("log_attention_running", *arguments)
        assert out.isfinite().all()
        assert_close("out", out, reference.log_attention_running(*arguments), 1e-6)
    ones = torch.ones(1, 1, 4160, 32)
    out = run("log_attention_running", torch.zeros(1, 1, 6, 32), 0 * ones, ones, 1.0, 8, 4, 64)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("spread", "bits", "fraction", "least"), [(0.3, 8, 4, 35), (1.0, 8, 4, 30), (1.0, 6, 3, 25)])
@pytest.mark.parametrize("make", ["random", "rising", "falling"])
def test_one_pass_costs_little_accuracy(spread, bits, fraction, least, make):
    """Against float attention at most 2.5 dB below two passes, in any order of the keys."""
    q, k, v = operands(64, 1024, 40, spread=spread)
    if make != "random":
        order = ((q @ k.mT).mean(2).argsort(-1, descending=make == "falling"))[..., None].expand_as(k)
        k, v = k.gather(2, order), v.gather(2, order)
    scale = 40**-0.5
    exact = torch.softmax(q @ k.mT * scale, -1) @ v
    one = decibels(exact, reference.log_attention_running(q, k, v, scale, bits, fraction, 64))
    two = decibels(exact, reference.log_attention(q, k, v, scale, bits, fraction, False, 8, 8))
    assert one >= least
    assert one >= two - 2.5


@pytest.mark.parametrize(
    ("rows", "keys", "width", "start", "bits"),
    [
        (42, 77, 40, True, 8),
        (123, 123, 16, False, 4),
        (6, 431, 160, False, 8),
        (33, 2, 64, True, 6),
        (1, 1, 8, False, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_published_form(rows, keys, width, start, bits, dtype):
    q, k, v = operands(rows, keys, width, heads=(2, 2), dtype=dtype)
    q[1] *= 3  # another maximum per sample
    arguments = (width**-0.5, bits, start)
    expected = reference.log_attention_base2(q.float(), k.float(), v.float(), *arguments)
    got = run("log_attention_base2", q, k, v, *arguments).float()
    # a logit in the last digit of a rounding boundary may take the other code: a factor of two for that key
    assert_close("output", got, expected, 2e-3 if dtype is torch.float16 else 1e-3)
    for sample in range(2):
        alone = run("log_attention_base2", *(x[sample : sample + 1] for x in (q, k, v)), *arguments)
        torch.testing.assert_close(alone.float(), got[sample : sample + 1], rtol=1e-5, atol=1e-6)


def test_the_published_form_with_a_dominant_start_token():
    q, k, v = operands(20, 77, 40)
    for sign in (1e3, -1e3):
        k[:, :, 0] = q.mean(2) * sign
        got = run("log_attention_base2", q, k, v, 40**-0.5, 8, True)
        assert got.isfinite().all()
        assert_close("output", got, reference.log_attention_base2(q, k, v, 40**-0.5, 8, True), 1e-3)


def test_refusals():
    q, k, v = operands(6, 9, 16)
    with pytest.raises(ValueError, match="two octaves"):
        log_attention_running(q, k, v, 0.25, 5, 5)
    with pytest.raises(ValueError, match="block"):
        log_attention_running(q, k, v, 0.25, 8, 4, 48)
