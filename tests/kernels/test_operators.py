"""Every operator is registered as torch wants it (`torch.library.opcheck`: schema, autograd, fake tensors, compilation)
on its kernels, and returns what its fake form says on the reference too."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dgq_kernels
from dgq_kernels import native
from dgq_kernels.samples import reference, samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Their weights are oneDNN's opaque tensors, which cannot be copied: test_linear and test_conv2d trace them instead.
OPAQUE = {"linear_prepacked", "conv2d_prepacked"}


# The operators' own samples (`dgq_kernels/*/samples.py`), the last one of each.
CASES = {
    name: tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
    for name, arguments, _ in samples()
}


def engine_cases():
    """(operator, arguments) of the CPU engine's, which take what `native.Layer` has packed."""
    g = torch.Generator().manual_seed(0)

    def layer(n, k, *geometry):
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
        return native.Layer(weight, torch.rand(n, generator=g) / 100, torch.randn(n, generator=g), None, 8, *geometry)

    def parts(*layers):
        return [[getattr(one, name) for one in layers] for name in ("packed", "weight_scale", "column_sum", "bias")]

    packed = torch.randint(0, 256, (64, 16), dtype=torch.uint8, generator=g)
    stored = native.TwoLevel(packed, torch.full((64, 1), 3, dtype=torch.uint8), 32, 32)
    four_bits = native.Layer(stored, torch.rand(64, generator=g) / 100, None, None, 8)
    first, second, conv = layer(64, 32), layer(64, 32), layer(6, 288, 3, 1, 1)
    rows, image = torch.randn(5, 32, generator=g), torch.randn(2, 32, 4, 4, generator=g)
    gain, shift = torch.randn(32, generator=g), torch.randn(32, generator=g)
    yield "engine_linear", (rows, *parts(first, second), None, 8, 0, [0, 0], None, False, gain, shift, 1e-5, 0, False)
    yield "engine_linear", (rows, *parts(first), None, 8, 16, [0], torch.randn(5, 64), False, None, None, 0.0, 0, False)
    yield "engine_linear", (rows, *parts(first), None, 8, 0, [0], None, True, None, None, 0.0, 0, False)
    yield "engine_linear", (rows, *parts(first, four_bits), None, 8, 0, [0, 32], None, False, None, None, 0.0, 0, False)
    residual, bias = torch.randn(2, 6, 4, 4), torch.randn(2, 6)
    own = (one[0] for one in parts(conv))
    yield "engine_conv2d", (image, *own, None, 8, 3, 1, 1, 16, 0, residual, bias, gain, shift, 1e-5, 4, True)
    for upsampler in upsamplers():
        own = (one[0] for one in parts(upsampler))
        rest = upsampler.inv_divisor, upsampler.bits, upsampler.rotation, upsampler.group
        yield "engine_upsample", (image, *own, *rest)


def upsamplers():
    """Layers of 32 channels: codes of 16 bits, of 8 bits divided and rotated, and of 4 bits with a weight of 4."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 128), dtype=torch.int8, generator=g)
    packed = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=g)
    stored = native.TwoLevel(packed, torch.full((64, 2), 0x33, dtype=torch.uint8), 128, 32)
    scale, bias, divisor = (torch.rand(count, generator=g) + 0.1 for count in (64, 64, 32))
    yield native.Layer(weight, scale, None, None, 16, 2, 1, 1)
    yield native.Layer(weight, scale, bias, divisor, 8, 2, 1, 1, rotation=16)
    yield native.Layer(stored, scale, bias, None, 4, 2, 1, 1)


ENGINE = {"engine_linear", "engine_conv2d", "engine_upsample"}


@pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")
def test_registration_of_the_engines_operators():
    for name, arguments in engine_cases():
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.dgq, name).default, arguments, test_utils=utilities)


@pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")
def test_compiled_upsamplings_are_the_same():
    x = torch.randn(2, 32, 3, 4, generator=torch.Generator().manual_seed(0))
    for layer in upsamplers():
        compiled = torch.compile(lambda x, layer=layer: layer.upsample(x), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer.upsample(x))


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
        places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
        for left in places if len(places) > 1 else ():
            for other in ("cpu", "cuda:0"):
                mixed = [form(x, torch.device(other) if i == left else second) for i, x in enumerate(arguments)]
                with pytest.raises(ValueError, match=f"{name}.*: tensors on {other} and cuda:1"):
                    operator(*mixed)


class Divisors(TorchDispatchMode):
    """Keeps the numbers that tensors are divided by."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            by = arguments[1]
            if not isinstance(by, torch.Tensor) or (by.dim() == 0 and by.device.type == "cpu"):
                self.numbers.append(float(by))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", sorted({sample.operator for sample in samples()}))
def test_references_round_alike_on_every_device(name):
    """On CUDA torch divides by a number in multiplying by its rounded reciprocal: exact for powers of two alone."""
    for sample in samples():
        if sample.operator == name:
            with Divisors() as seen:
                reference(name)(*sample.arguments)
            assert not [number for number in seen.numbers if math.frexp(number)[0] != 0.5]
