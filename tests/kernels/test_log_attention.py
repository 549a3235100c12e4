"""Fractional-log attention: every backend against the definition, and the definition against float attention."""

import math

import pytest
import torch
from comparing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import dgq_kernels
from dgq_kernels import log_attention, native
from dgq_kernels.log_attention import cpu, reference
from dgq_kernels.log_attention import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"cpu": cpu.log_attention, "triton": kernels.log_attention}


def operands(rows, keys, width, heads=(1, 2), spread=1.0, seed=0, dtype=torch.float32):
    """Random q, k, v; keys with a common offset, which the mean removes."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(*heads, rows, width, generator=g) * spread
    k = torch.randn(*heads, keys, width, generator=g) + torch.randn(*heads, 1, width, generator=g)
    v = torch.randn(*heads, keys, width, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(backend, q, k, v, *arguments):
    """A backend's output; the kernel writes to a buffer full of NaN."""
    if backend == "cpu":
        return cpu.log_attention(q, k, v, *arguments)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    return kernels.log_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), *arguments, out=out).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "keys", "width", "start", "bits", "fraction"),
    [
        (42, 77, 40, True, 8, 4),
        (123, 123, 16, False, 6, 3),
        (6, 431, 160, False, 8, 4),
        (431, 6, 80, True, 6, 3),
        (1, 1, 64, False, 8, 0),
        (42, 2, 32, True, 8, 5),
        (130, 129, 123, True, 4, 2),
    ],
)
def test_equals_the_reference(backend, rows, keys, width, start, bits, fraction):
    q, k, v = operands(rows, keys, width)
    arguments = (width**-0.5, bits, fraction, start, 8, 8)
    assert_close("output", run(backend, q, k, v, *arguments), reference.log_attention(q, k, v, *arguments), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "fraction"), [(8, 4), (6, 3), (8, 0)])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_codes_are_the_references_bit_for_bit(backend, bits, fraction, spread):
    """With v a multiple of the identity an output channel is one key's p over their sum, so bytes can be read off."""
    width = keys = 160
    q, k, _ = operands(123, keys, width, spread=spread, seed=1)
    v = (127 * torch.eye(keys)).expand(1, 2, keys, width).contiguous()
    codes, _ = reference.log_codes(reference.quantize_operands(q, k, v, width**-0.5, fraction, False, 8, 8), bits)
    p = torch.tensor(reference.probability_bytes(bits, fraction))[codes]
    got = run(backend, q, k, v, width**-0.5, bits, fraction, False, 8, 8).double() / 127 * p.sum(-1, keepdim=True)
    torch.testing.assert_close(got, p.double(), atol=1e-3, rtol=0)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 140),
    keys=st.integers(2, 200),
    width=st.integers(16, 160),
    start=st.booleans(),
    fraction=st.integers(0, 5),
    bits=st.integers(5, 8),
    qk_bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, rows, keys, width, start, fraction, bits, qk_bits, seed):
    q, k, v = operands(rows, keys, width, heads=(1, 1), spread=2.0, seed=seed)
    k = (k * 64).round() / 64  # whose sums are exact: no code of a key, which all rows read, lies on a border
    arguments = (width**-0.5, bits, fraction, start, qk_bits, 8)
    expected = reference.log_attention(q, k, v, *arguments)
    off = (run(backend, q, k, v, *arguments) - expected).norm(dim=-1) / expected.norm(dim=-1)
    # a logit on the border of two codes may fall to either side: in few rows, by one step of one probability
    assert int((off > 1e-4).sum()) <= 1 + rows // 50
    assert float(off.max()) < 2 ** (1 / 2**fraction) - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    # Triton's interpreter cuts bfloat16 off instead of rounding it: one unit in the last place.
    ("dtype", "tolerance"),
    [(torch.float16, 5e-4), (torch.bfloat16, 8e-3)],
)
def test_half_precision_inputs_and_strides(backend, dtype, tolerance):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands(42, 77, 40, dtype=dtype))
    arguments = (40**-0.5, 8, 4, True, 8, 8)
    out = run(backend, q, k, v, *arguments)
    assert out.dtype == dtype
    expected = reference.log_attention(q.float(), k.float(), v.float(), *arguments)
    assert_close("output", out.float(), expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend):
    """Zero rows, constant keys (all codes 0), a start token 1000 octaves above or below, huge and tiny values."""
    q, k, v = operands(42, 77, 40)
    q[:, :, 0] = 0
    k[:, 0] = 1.5
    for start_key in (1e4, -1e4):
        k[:, :, 0] = q.mean(2) * start_key
        arguments = (40**-0.5, 8, 4, True, 8, 8)
        out = run(backend, q, k, v, *arguments)
        assert out.isfinite().all()
        assert_close("out", out, reference.log_attention(q, k, v, *arguments), 1e-5)
    for factor in (1e-20, 1e15):
        arguments = (40**-0.5, 8, 4, False, 8, 8)
        scaled = (q * factor, k / factor, v)
        assert_close("output", run(backend, *scaled, *arguments), reference.log_attention(*scaled, *arguments), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_sums(backend):
    """All p 255 and all v 127 over thousands of keys: far above what float32 holds exactly, within int32."""
    keys = 4160
    q, k, v = torch.zeros(1, 1, 6, 32), torch.zeros(1, 1, keys, 32), torch.ones(1, 1, keys, 32)
    out = run(backend, q, k, v, 1.0, 8, 4, False, 8, 8)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fraction", range(6))
def test_kernels_cubic_is_the_table(fraction):
    """The integer cubic that the kernel evaluates gives every code's byte."""
    table = reference.probability_bytes(8, fraction)
    cubic = kernels._CUBIC.value
    for code in range(255):
        step = (code % 2**fraction) << (5 - fraction)
        octave = min(code >> fraction, 31)
        fine = sum(coefficient * step**power for power, coefficient in enumerate(cubic))
        assert fine < 2**31
        assert ((fine >> octave) + 2**19) >> 20 == table[code], code


def test_scalar_loop():
    """The reference against the definition written out for one row."""
    q, k, v = operands(1, 5, 16, heads=(1, 1))
    got = reference.log_attention(q, k, v, 0.25, 6, 3, True, 0, 0)[0, 0, 0]
    centred = (k - k[:, :, 1:].mean(2, keepdim=True))[0, 0].double()
    logits = (centred @ q[0, 0, 0].double()) * 0.25 * math.log2(math.e)
    largest = max(logits[1:].tolist())
    total, out = 0.0, torch.zeros(16, dtype=torch.float64)
    for key, logit in enumerate(logits.tolist()):
        if key == 0:
            p = 255 * 2 ** (logit - largest)
        else:
            code = min(round((largest - logit) * 8), 63)
            p = 0 if code == 63 else reference.probability_bytes(6, 3)[code]
        total += p
        out += p * v[0, 0, key].double()
    torch.testing.assert_close(got.double(), out / total, rtol=1e-5, atol=1e-6)


def signal_to_noise(exact, got):
    return float(10 * torch.log10(exact.pow(2).sum() / (exact - got).pow(2).sum()))


def published(q, k, v, scale, bits, start):
    """The DGQ paper's quantizer: base-2 codes below one maximum for the tensor, q, k and v in float."""
    first = int(start)
    p = torch.softmax(q @ k.mT * scale, -1)
    largest = p[..., first:].max()
    codes = (-torch.log2(p[..., first:] / largest)).round().clamp(0, 2**bits - 1)
    return p[..., :first] @ v[..., :first, :] + (largest * 2.0**-codes) @ v[..., first:, :]


@pytest.mark.parametrize(
    # (keys, start, spread of the logits, bits, f, least SQNR, least gain over the published quantizer), in dB;
    # integers throughout, q, k and v int8.
    ("keys", "start", "spread", "bits", "fraction", "least", "gain"),
    [
        (1024, False, 0.3, 8, 4, 35, 20),
        (1024, False, 0.3, 6, 3, 30, 16),
        (1024, False, 1.0, 8, 4, 31, 17),
        (1024, False, 1.0, 6, 3, 26, 12),
        (77, True, 0.3, 8, 4, 36, 20),
        (77, True, 1.0, 8, 4, 34, 18),
        (77, True, 1.0, 6, 3, 29, 13),
    ],
)
def test_beats_the_published_quantizer(keys, start, spread, bits, fraction, least, gain):
    q, k, v = operands(256, keys, 40, heads=(2, 4), spread=spread)
    scale = 40**-0.5
    exact = torch.softmax(q @ k.mT * scale, -1) @ v
    ours = signal_to_noise(exact, reference.log_attention(q, k, v, scale, bits, fraction, start, 8, 8))
    theirs = signal_to_noise(exact, published(q, k, v, scale, bits, start))
    assert ours >= least
    assert ours - theirs >= gain


def test_an_image_does_not_depend_on_its_batch():
    q, k, v = operands(42, 77, 40, heads=(3, 2))
    together = log_attention(q, k, v, 40**-0.5, 8, 4, True)
    alone = log_attention(q[1:2], k[1:2], v[1:2], 40**-0.5, 8, 4, True)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)


def test_chunks_do_not_show(monkeypatch):
    q, k, v = operands(50, 40, 16, heads=(2, 3))
    arguments = (0.25, 8, 4, True, 8, 8)
    whole = cpu.log_attention(q, k, v, *arguments)
    for chunk in (1, 100, 2500, 5000):
        monkeypatch.setattr(cpu, "CHUNK", chunk)
        torch.testing.assert_close(cpu.log_attention(q, k, v, *arguments), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("qk_bits", "v_bits"), [(0, 0), (8, 0), (0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float_operands(backend, qk_bits, v_bits):
    q, k, v = operands(42, 77, 40)
    arguments = (40**-0.5, 8, 4, True, qk_bits, v_bits)
    # A float logit may round to the other code: a bound on the share of such codes rather than bit equality.
    assert_close("output", run(backend, q, k, v, *arguments), reference.log_attention(q, k, v, *arguments), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(dtype):
    q, k, v = operands(6, 7, 16, dtype=dtype)
    torch.library.opcheck(log_attention, (q, k, v, 0.25, 8, 4, True, 8, 8))


def test_refuses_nonsense():
    q, k, v = operands(4, 4, 16)
    for arguments, message in (
        ((q, k[:, :, :1], v[:, :, :1], 1.0, 8, 4, True), "keys"),
        ((q, k, v[:, :, :3], 1.0, 8, 4, True), "expected"),
        ((q, k, v, -1.0, 8, 4, True), "scale"),
        ((q, k, v, 1.0, 9, 4, True), "bits"),
        ((q, k, v, 1.0, 8, 6, True), "fraction"),
        ((q, k, v, 1.0, 8, 4, True, 9), "qk_bits"),
    ):
        with pytest.raises(ValueError, match=message):
            log_attention(*arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtypes", ["q wide", "q narrow", "three", "double"])
@pytest.mark.parametrize("form", ["op", "eager", "running", "base2"])
def test_operands_of_different_dtypes(backend, dtypes, form, monkeypatch):
    """All are taken in the widest dtype: nothing is rounded, and nothing read in another's width."""
    monkeypatch.setenv("DGQ_BACKEND", backend)
    kinds = {
        "q wide": (torch.float32, torch.bfloat16, torch.bfloat16),
        "q narrow": (torch.bfloat16, *[torch.float32] * 2),
        "three": (torch.float32, torch.bfloat16, torch.float16),
        "double": (torch.float32, *[torch.float64] * 2),
    }[dtypes]
    mixed = [x.to(DEVICE, kind) for x, kind in zip(operands(20, 30, 16), kinds, strict=True)]
    op, numbers = {
        "op": (dgq_kernels.log_attention, (0.25, 8, 4, True)),
        "eager": (dgq_kernels.log_attention_eager, (0.25, 8, 4, True)),
        "running": (dgq_kernels.log_attention_running, (0.25, 8, 4)),
        "base2": (dgq_kernels.log_attention_base2, (0.25, 8, True)),
    }[form]
    got = op(*mixed, *numbers)
    assert got.dtype == kinds[0]
    assert torch.equal(got, op(*(x.float() for x in mixed), *numbers).to(kinds[0]))


@pytest.mark.parametrize("other", [torch.int32, "meta"])
def test_operands_that_are_no_floats_or_elsewhere_are_refused(other):
    if other == "meta" and not native.available():
        pytest.skip("without the engine torch's dispatcher takes them for shapes alone")
    q, k, v = operands(4, 5, 8)
    with pytest.raises(ValueError, match="floats on one device expected"):
        dgq_kernels.log_attention_eager(q, k.to(other), v, 0.3, 8, 4, False)
