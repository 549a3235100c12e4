"""NaN and infinity in front of a quantized layer stay: the layer's result is NaN in their row (linear), sample
(convolution) or head (attention), and is what it was everywhere else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dgq_kernels
from dgq_kernels import native
from dgq_kernels.codes import unsigned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# NaN of both signs, infinities, and what is infinite in float16
VALUES = st.sampled_from([float("nan"), -float("nan"), float("inf"), -float("inf"), 2.0**16, -(2.0**16)])

pytestmark = [
    pytest.mark.parametrize("backend", ["reference", "cpu", "triton"]),
    # what the interpreter's NumPy says of the floats in question
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered in (add|sub|mult|div)"),
    pytest.mark.filterwarnings("error:invalid value encountered in cast"),
]


def drawn(data, *size):
    """(values float16 of this size, one of them not finite; its place)."""
    x = torch.randn(*size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    at = tuple(data.draw(st.integers(0, extent - 1)) for extent in size)
    x[at] = data.draw(VALUES)
    assert not x.half()[at].isfinite()
    return x.half().to(DEVICE), at


def run(backend, op, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGQ_BACKEND", backend)
        patch.setattr(native, "available", lambda: False)  # torch's products on the CPU
        return getattr(dgq_kernels, op)(*arguments)


def check_codes(backend, op, x, affected, *arguments):
    """Codes of x: a NaN scale exactly where `affected` (rows or samples) says, and elsewhere as without the value."""
    codes, scale, zero_point = run(backend, op, x, *arguments)
    assert torch.equal(scale.isnan(), affected)
    assert scale[~affected].isfinite().all()
    top = 2 ** next(value for value in arguments if type(value) is int and value in (4, 8)) - 1
    assert unsigned(codes).max() <= top
    assert ((zero_point >= 0) & (zero_point <= top)).all()
    clean = run(backend, op, x.nan_to_num(0, 1, -1), *arguments)
    for got, expected in zip((codes, scale, zero_point), clean, strict=True):
        assert torch.equal(got[~affected], expected[~affected])
    return codes, scale, zero_point


def only(count, index):
    return torch.arange(count, device=DEVICE) == index


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_rows(backend, data):
    rows, channels, bits = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([2, 6, 42, 200])), 8
    x, (row, _) = drawn(data, rows, channels)
    gain = torch.rand(channels, device=DEVICE) + 0.5 if data.draw(st.booleans()) else None
    position = torch.randperm(channels).to(torch.int32).to(DEVICE) if data.draw(st.booleans()) else None
    affected = only(rows, row)
    for op, arguments in (
        ("quantize_rows", (bits, gain, position)),
        ("layer_norm_quantize_rows", (gain, gain, 1e-5, bits, gain, position)),
        ("silu_quantize_rows", (bits, gain, position)),
    ):
        codes, scale, zero_point = check_codes(backend, op, x, affected, *arguments)
    check_codes(backend, "geglu_quantize_rows", x, affected, bits, None, None)

    weight = torch.randint(-9, 9, (6, channels), dtype=torch.int8, device=DEVICE)
    sums, ones = weight.sum(1, dtype=torch.int32), torch.ones(6, device=DEVICE)
    y = run(backend, "linear_int8", codes, scale, zero_point, weight, ones, sums, ones, torch.float16, [channels])
    assert torch.equal(y.isnan(), affected[:, None].expand(-1, 6))


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_rows_too_long_for_registers(backend, data):
    x, (row, _) = drawn(data, 2, 2 * 8200)
    for op, arguments in (
        ("quantize_rows", ()),
        ("silu_quantize_rows", (None,)),
        ("geglu_quantize_rows", (None,)),
    ):
        check_codes(backend, op, x, only(2, row), 8, None, *arguments)
    check_codes(backend, "layer_norm_quantize_rows", x, only(2, row), None, None, 1e-5, 8, None, None)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_samples(backend, data):
    batch, channels, groups = data.draw(st.integers(1, 3)), 6, data.draw(st.sampled_from([1, 2, 3, 6]))
    x, (sample, *_) = drawn(data, batch, channels, data.draw(st.integers(2, 13)), data.draw(st.integers(2, 13)))
    affected, silu = only(batch, sample), data.draw(st.booleans())
    gain = torch.rand(channels, device=DEVICE) + 0.5 if data.draw(st.booleans()) else None
    norm = (groups, gain, gain, 1e-5)
    check_codes(backend, "quantize_samples", x, affected, 4, gain, 1)
    codes = check_codes(backend, "group_norm_quantize_samples", x, affected, *norm, silu, 8, gain, 1, None)
    rows = affected.repeat_interleave(x.shape[2] * x.shape[3])
    check_codes(backend, "group_norm_quantize_rows", x, rows, *norm, 8, gain, None)

    weight = torch.randint(-9, 9, (5, channels, 3, 3), dtype=torch.int8, device=DEVICE)
    sums, ones = weight.sum((1, 2, 3), dtype=torch.int32), torch.ones(5, device=DEVICE)
    y = run(backend, "conv2d", *codes, weight, ones, sums, ones, 1, torch.float16, [channels])
    assert torch.equal(y.isnan(), affected[:, None, None, None].expand_as(y))


@pytest.mark.parametrize("pixel", [(0, 3), (32, 26)])
def test_a_norm_of_several_parts(backend, pixel):
    """Where no kernel holds a group's pixels at once."""
    x = torch.randn(2, 80, 33, 27, device=DEVICE)
    x[1, 50, *pixel] = float("inf")
    arguments = (2, None, None, 1e-5, True, 8, None, 1, None)
    _, scale, _ = run(backend, "group_norm_quantize_samples", x, *arguments)
    assert scale.isnan().tolist() == [False, True]


def test_an_added_embedding(backend):
    x, offset = torch.randn(2, 6, 4, 4, device=DEVICE), torch.zeros(2, 6, device=DEVICE)
    offset[1, 4] = float("inf")
    arguments = (3, None, None, 1e-5, True, 8, None, 1, None)
    _, scale, _ = run(backend, "group_norm_quantize_samples", x, *arguments, offset)
    assert scale.isnan().tolist() == [False, True]


def test_a_norm_that_overflows(backend):
    """All inputs are finite; what a gain or a divisor makes of them is not."""
    x, gain = torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    gain[2], x[1, 2] = 3e38, 1e3
    x[0, 2] = x[2, 2] = 0.01
    _, scale, _ = run(backend, "quantize_rows", x, 8, gain)
    assert scale.isnan().tolist() == [False, True, False]
    gain[2] = float("inf")
    assert run(backend, "layer_norm_quantize_rows", x, gain, None, 1e-5, 8, None, None)[1].isnan().all()


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_attention(backend, data):
    rows, keys, start = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 70)), data.draw(st.booleans())
    operands = [torch.randn(2, 2, n, 20).half().to(DEVICE) for n in (rows, keys, keys)]
    clean = [x.clone() for x in operands]
    which = data.draw(st.integers(0, 2))
    operands[which], at = drawn(data, *operands[which].shape)
    clean[which] = operands[which].nan_to_num(0, 1, -1)
    affected = torch.zeros(2, 2, rows, dtype=torch.bool, device=DEVICE)
    affected[at[:3] if which == 0 else at[:2]] = True
    for op, arguments in (
        ("log_attention", (0.25, 8, 4, start)),
        ("log_attention", (0.25, 8, 4, start, 0, 0)),
        *([] if start else [("log_attention_running", (0.25, 8, 4))]),
    ):
        got = run(backend, op, *operands, *arguments)
        assert torch.equal(got.isnan(), affected[..., None].expand_as(got)), op
        assert torch.equal(got[~affected], run(backend, op, *clean, *arguments)[~affected])


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_published_attention(backend, data):
    """One maximum for a sample: a NaN makes the sample's NaN."""
    q, (sample, *_) = drawn(data, 2, 2, 5, 20)
    k, v = (torch.randn(2, 2, 7, 20).half().to(DEVICE) for _ in range(2))
    got = run(backend, "log_attention_base2", q, k, v, 0.25, 8, data.draw(st.booleans()))
    assert torch.equal(got.isnan().flatten(1).all(1), only(2, sample))
    assert torch.equal(got.isnan().flatten(1).any(1), only(2, sample))
