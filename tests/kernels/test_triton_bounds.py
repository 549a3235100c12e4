"""No kernel reads or writes outside its tensors: operands lie in larger buffers full of poison, results must not show
it, and the poison must still be there afterwards. (In the interpreter an access out of bounds raises nothing.)"""

import pytest
import torch

from dgq_kernels import packing
from dgq_kernels.codes import centred, unsigned
from dgq_kernels.conv2d import reference as conv_reference
from dgq_kernels.conv2d import triton as conv_kernels
from dgq_kernels.linear import reference as linear_reference
from dgq_kernels.linear import triton as linear_kernels
from dgq_kernels.log_attention import reference as attention_reference
from dgq_kernels.log_attention import triton as attention_kernels
from dgq_kernels.quantize_activation import reference as quantize_reference
from dgq_kernels.quantize_activation import triton as quantize_kernels
from dgq_kernels.scaled_product import reference as scaled_reference
from dgq_kernels.scaled_product import triton as scaled_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096
POISON = {torch.uint8: 0xA5, torch.int8: -91, torch.int32: -1234567}


class Poisoned:
    """Copies of tensors inside poisoned buffers."""

    def __init__(self):
        self.buffers = []

    def __call__(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        poison = POISON.get(x.dtype, float("nan"))
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        dense = x.permute(0, 2, 3, 1) if channels_last else x.contiguous()
        buffer = torch.full((x.numel() + 2 * GUARD,), poison, dtype=x.dtype, device=DEVICE)
        inner = buffer[GUARD : GUARD + x.numel()].view(dense.shape)
        inner.copy_(dense)
        self.buffers.append((buffer, buffer.clone()))
        return inner.permute(0, 3, 1, 2) if channels_last else inner

    def check(self):
        for buffer, before in self.buffers:
            for part in (slice(0, GUARD), slice(-GUARD, None)):
                assert torch.equal(buffer[part].view(torch.uint8), before[part].view(torch.uint8))


def generator():
    return torch.Generator().manual_seed(0)


def linear_inputs(m, k, n):
    g = generator()
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    return (
        torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=g),
        torch.rand(m, generator=g),
        torch.randint(0, 256, (m,), dtype=torch.int32, generator=g),
        weight,
        torch.rand(n, generator=g) / 100,
        weight.sum(1, dtype=torch.int32),
        torch.randn(n, generator=g),
    )


def compare(run, expected, arguments):
    poisoned = Poisoned()
    first, *rest = arguments  # codes or floats; of codes those that the kernel reads
    first = centred(first) if first.dtype == torch.uint8 else first
    got = run(*(poisoned(x) for x in (first, *rest)))
    poisoned.check()
    for one, other in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
        torch.testing.assert_close(unsigned(one.cpu()), other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ends", [[131], [50, 131]])
def test_linear_int8(ends):
    codes, scale, zero, weight, weight_scale, _, bias = linear_inputs(7, 131, 13)
    sums = linear_reference.accumulate(torch.ones(1, 131, dtype=torch.uint8), weight, ends).flatten().int()
    arguments = (codes, scale, zero, weight, weight_scale, sums, bias, torch.float32, ends, torch.randn(7, 13))
    compare(linear_kernels.linear_int8, linear_reference.linear_int8(*arguments), arguments)


@pytest.mark.parametrize("group", packing.GROUP_SIZES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_int4(group, kernel):
    codes, scale, zero, weight, weight_scale, _, bias = linear_inputs(7, 70 * kernel**2, 13)
    groups = packing.padded_length(weight.shape[1], group) // group
    subscales = packing.pack_subscales(torch.full((13, groups), 3, dtype=torch.uint8))
    head = (packing.pack_int4(weight >> 4, group), subscales, weight_scale, (3 * (weight >> 4)).sum(1).int(), bias)
    if kernel == 1:
        arguments = (codes, scale, zero, *head, torch.float32, group)
        compare(linear_kernels.linear_int4, linear_reference.linear_int4(*arguments), arguments)
    else:
        image = torch.randint(0, 256, (1, 5, 6, 70), dtype=torch.uint8, generator=generator()).permute(0, 3, 1, 2)
        arguments = (image, scale[:1], zero[:1], *head, 3, 1, torch.float32, group)
        compare(conv_kernels.conv2d_int4, conv_reference.conv2d_int4(*arguments), arguments)


@pytest.mark.parametrize("ends", [[70], [30, 70]])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_int8(ends, stride):
    g = generator()
    image = torch.randint(0, 256, (2, 7, 6, 70), dtype=torch.uint8, generator=g).permute(0, 3, 1, 2)
    weight = torch.randint(-128, 128, (13, 3, 3, 70), dtype=torch.int8, generator=g).permute(0, 3, 1, 2)
    sums = conv_reference.accumulate(torch.ones(1, 70, 3, 3, dtype=torch.uint8), weight, 1, ends).flatten().int()
    _, scale, zero, _, weight_scale, _, bias = linear_inputs(2, 8, 13)
    arguments = (image, scale, zero, weight, weight_scale, sums, bias, stride, torch.float32, ends)
    compare(conv_kernels.conv2d, conv_reference.conv2d(*arguments), arguments)


@pytest.mark.parametrize("channels", [43, 8200])
def test_quantize(channels):
    x = torch.randn(3, channels, generator=generator())
    position = torch.randperm(channels, generator=generator()).int()
    arguments = (x, 8, torch.rand(channels, generator=generator()) + 0.5, position)
    compare(quantize_kernels.quantize_rows, quantize_reference.quantize_rows(*arguments), arguments)


def test_quantize_samples():
    x = torch.randn(2, 5, 6, 43, generator=generator()).permute(0, 3, 1, 2)
    arguments = (x, 8, torch.rand(43, generator=generator()) + 0.5, 1, torch.randperm(43, generator=generator()).int())
    compare(quantize_kernels.quantize_samples, quantize_reference.quantize_samples(*arguments), arguments)


@pytest.mark.parametrize("name", ["log_attention", "log_attention_running", "log_attention_base2"])
def test_attention(name):
    g = generator()
    q, k, v = (torch.randn(1, 2, n, 40, generator=g) for n in (13, 70, 70))
    more = {"log_attention": (8, 4, True, 8, 8), "log_attention_running": (8, 4, 32), "log_attention_base2": (8, True)}
    arguments = (q, k, v, 40**-0.5, *more[name])
    compare(getattr(attention_kernels, name), getattr(attention_reference, name)(*arguments), arguments)


@pytest.mark.parametrize("group", [0, *packing.GROUP_SIZES])
@pytest.mark.parametrize(
    "size, window", [((1, 1, 7, 131), (1, 1, 0)), ((2, 5, 4, 64), (3, 2, 1)), ((1, 3, 3, 5), (3, 1, 1))]
)
def test_unscaled_product(size, window, group):
    g, reduction = generator(), window[0] ** 2 * size[3]
    weight = torch.randint(-8, 8, (13, reduction), dtype=torch.int8, generator=g)
    stored = weight, None, 0
    if group:
        groups = packing.padded_length(reduction, group) // group
        subscales = packing.pack_subscales(torch.full((13, groups), 3, dtype=torch.uint8))
        stored = packing.pack_int4(weight, group), subscales, group
    arguments = (torch.randn(size, generator=g), *stored, *window)
    y = scaled_reference.unscaled_product(*arguments)
    compare(scaled_kernels.unscaled_product, y, arguments)
    arguments = (torch.randn(y.shape, generator=g), *stored, list(size), *window)
    compare(scaled_kernels.unscaled_product_input, scaled_reference.unscaled_product_input(*arguments), arguments)


@pytest.mark.parametrize("kernels", [linear_kernels, conv_kernels, scaled_kernels])
def test_int4_weights_lie_at_multiples_of_16_bytes(kernels, monkeypatch):
    """Others are copied: of a compiled kernel their results would be wrong, which the interpreter does not show."""
    g, group, k = generator(), 32, 64
    weight = torch.randint(-8, 8, (13, k), dtype=torch.int8, generator=g)
    subscales = packing.pack_subscales(torch.randint(0, 16, (13, 2), dtype=torch.uint8, generator=g))
    packed = packing.pack_int4(weight, group)
    sums = packing.expand_two_level(packed, subscales, k, group).sum(1, dtype=torch.int32)
    rows = torch.randn(6, k, generator=g)
    codes, scale, zero_point = quantize_reference.quantize_rows(rows, 8, None)
    after = (subscales, torch.ones(13), sums, None)
    if kernels is linear_kernels:
        run, reference = kernels.linear_int4, linear_reference.linear_int4
        first, more = (codes, scale, zero_point), (*after, torch.float32, group)
    elif kernels is conv_kernels:
        run, reference = kernels.conv2d_int4, conv_reference.conv2d_int4
        first, more = (codes[:, :, None, None], scale, zero_point), (*after, 1, 1, torch.float32, group)
    else:
        run, reference = kernels.unscaled_product, scaled_reference.unscaled_product
        first, more = (rows[None, None],), (subscales, group, 1, 1, 0)
    expected = reference(*first, packed, *more)
    launched = []
    module = scaled_kernels if kernels is scaled_kernels else linear_kernels
    launch = module.launch

    def watched(kernel, grid, *arguments, **constants):
        launched.extend(x.data_ptr() % 16 for x in arguments if isinstance(x, torch.Tensor) and x.shape == packed.shape)
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(module, "launch", watched)
    anywhere = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(packed.shape).copy_(packed)
    arguments = (*first, anywhere, *more)
    y = run(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments))
    assert launched == [0]
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-3)
