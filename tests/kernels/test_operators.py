"""Every operator is registered as torch wants it (`torch.library.opcheck`: schema, autograd, fake tensors, compilation)
on its kernels, and returns what its fake form says on the reference too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dgq_kernels
from dgq_kernels import native, packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Their weights are oneDNN's opaque tensors, which cannot be copied: test_linear and test_conv2d trace them instead.
OPAQUE = {"linear_prepacked", "conv2d_prepacked"}


def cases():
    """(operator, arguments) of small operands, with every optional tensor given."""
    g = torch.Generator().manual_seed(0)

    def floats(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    rows, image, order = floats(5, 32), floats(2, 32, 4, 4), torch.randperm(32, generator=g).to(torch.int32).to(DEVICE)
    gain, offset, divisor, embedding = floats(32), floats(32), floats(32).abs() + 0.5, floats(2, 32)
    yield "quantize_rows", (rows, 8, divisor, order)
    yield "layer_norm_quantize_rows", (rows, gain, offset, 1e-5, 8, divisor, order)
    yield "geglu_quantize_rows", (floats(5, 64), 8, divisor, order)
    yield "silu_quantize_rows", (rows, 8, divisor, order)
    yield "group_norm_quantize_rows", (image, 4, gain, offset, 1e-5, 8, divisor, order)
    yield "quantize_samples", (image, 8, divisor, 1, order)
    yield "group_norm_quantize_samples", (image, 4, gain, offset, 1e-5, True, 8, divisor, 1, order, embedding)

    codes = torch.randint(0, 256, (5, 32), dtype=torch.uint8, generator=g).to(DEVICE)
    scale, zero = floats(5).abs() / 100, torch.full((5,), 7, dtype=torch.int32, device=DEVICE)
    weight = torch.randint(-8, 8, (6, 288), dtype=torch.int8, generator=g)
    packed = packing.pack_int4(weight).to(DEVICE)
    subscales = packing.pack_subscales(torch.ones(6, 9, dtype=torch.uint8)).to(DEVICE)
    sums, weight = weight.sum(1, dtype=torch.int32).to(DEVICE), weight.to(DEVICE)
    after, half = (floats(6).abs(), sums, floats(6)), torch.float16
    small = weight[:, :32].contiguous()
    yield "linear_int8", (codes, scale, zero, small, *after, half, [10, 32], floats(5, 6))
    grouped = (codes, scale[:2], zero[:2], small, after[0], torch.stack([sums, sums]), after[2])
    yield "linear_float_groups", (*grouped, half, [10, 32])
    yield "linear_int4", (
        codes, scale, zero, packed[:, :16].contiguous(), subscales[:, :1].contiguous(), *after, half, 32, floats(5, 6),
    )  # fmt: skip
    pixels = torch.randint(0, 256, (2, 6, 6, 32), dtype=torch.uint8, generator=g).to(DEVICE).permute(0, 3, 1, 2)
    head, kernel = (pixels, scale[:2], zero[:2]), weight.view(6, 3, 3, 32).permute(0, 3, 1, 2)
    yield "conv2d", (*head, kernel, *after, 1, half, [10, 32], floats(2, 6, 4, 4))
    yield "conv2d_int4", (*head, packed, subscales, *after, 3, 1, half, 32, floats(2, 6, 4, 4))

    q, k, v = floats(1, 2, 5, 16), floats(1, 2, 7, 16), floats(1, 2, 7, 16)
    yield "log_attention", (q, k, v, 0.25, 8, 4, True)
    yield "log_attention_running", (q, k, v, 0.25, 8, 4)
    yield "log_attention_base2", (q, k, v, 0.25, 8, True)


CASES = dict(cases())


def engine_cases():
    """(operator, arguments) of the CPU engine's, which take what `native.Layer` has packed."""
    g = torch.Generator().manual_seed(0)

    def layer(n, k, *geometry):
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
        return native.Layer(weight, torch.rand(n, generator=g) / 100, torch.randn(n, generator=g), None, 8, *geometry)

    def parts(*layers):
        return [[getattr(one, name) for one in layers] for name in ("packed", "weight_scale", "column_sum", "bias")]

    first, second, conv = layer(64, 32), layer(64, 32), layer(6, 288, 3, 1, 1)
    rows, image = torch.randn(5, 32, generator=g), torch.randn(2, 32, 4, 4, generator=g)
    gain, shift = torch.randn(32, generator=g), torch.randn(32, generator=g)
    yield "engine_linear", (rows, *parts(first, second), None, 8, None, False, gain, shift, 1e-5, 0, False)
    yield "engine_linear", (rows, *parts(first), None, 8, torch.randn(5, 64), False, None, None, 0.0, 0, False)
    yield "engine_linear", (rows, *parts(first), None, 8, None, True, None, None, 0.0, 0, False)
    residual, bias = torch.randn(2, 6, 4, 4), torch.randn(2, 6)
    own = (one[0] for one in parts(conv))
    yield "engine_conv2d", (image, *own, None, 8, 3, 1, 1, residual, bias, gain, shift, 1e-5, 4, True)


ENGINE = {"engine_linear", "engine_conv2d"}


@pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")
def test_registration_of_the_engines_operators():
    for name, arguments in engine_cases():
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.dgq, name).default, arguments, test_utils=utilities)


def test_none_is_left_out():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dgq::")}
    assert registered == {*CASES, *OPAQUE, *ENGINE}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_registration(name, backend, monkeypatch):
    monkeypatch.setenv("DGQ_BACKEND", backend)
    # what backends may differ in is what they return
    utilities = ("test_faketensor",)
    if backend == "triton":
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(dgq_kernels, name), CASES[name], test_utils=utilities)


def test_rows_laid_out_by_column():
    """A picture's pixels, where it is alone in its batch: the codes are rows all the same."""
    rows = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)).t()
    torch.library.opcheck(dgq_kernels.quantize_rows, (rows, 8, None, None), test_utils=("test_faketensor",))


@pytest.mark.parametrize("name", CASES)
def test_fake_operands_are_on_one_device(name):
    """Results are where the operands are, on a second CUDA device too; an operand left on another is refused."""
    fake, second = FakeTensorMode(), torch.device("cuda:1")

    def form(x, device):
        return FakeTensor(fake, x, device) if isinstance(x, torch.Tensor) else x

    arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in CASES[name]]
    operator = getattr(dgq_kernels, name)
    with fake:
        result = operator(*(form(x, second) for x in arguments))
        for one in result if isinstance(result, tuple) else (result,):
            assert one.device == second
        for left in (i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)):
            for other in ("cpu", "cuda:0"):
                mixed = [form(x, torch.device(other) if i == left else second) for i, x in enumerate(arguments)]
                with pytest.raises(ValueError, match=f"{name}.*: tensors on {other} and cuda:1"):
                    operator(*mixed)
