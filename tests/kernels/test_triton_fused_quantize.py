"""Quantization of samples, and fused with norms and GEGLU: bit for bit where only exact operations precede it, else
codes at most one step apart in few places (sums of floats in another order move a value across a rounding boundary)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dgq_kernels
from dgq_kernels.codes import unsigned
from dgq_kernels.quantize_activation import reference
from dgq_kernels.quantize_activation import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # SiLU of a large negative number: 0


class Noted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def move(*values):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values]


def rubbish(codes):
    """Output buffers full of rubbish in the shape of the reference's, and the guard behind the codes."""
    guarded = torch.full((codes[0].numel() + 64,), -91, dtype=torch.int8, device=DEVICE)
    body = guarded[: codes[0].numel()]
    if codes[0].dim() == 4:
        b, c, h, w = codes[0].shape
        body = body.view(b, h, w, c).permute(0, 3, 1, 2)
    else:
        body = body.view(codes[0].shape)
    scale = torch.full(codes[1].shape, float("nan"), device=DEVICE)
    return (body, scale, torch.full(codes[2].shape, -12345, dtype=torch.int32, device=DEVICE)), guarded[-64:]


def check(name, *arguments, exact=False):
    expected = getattr(reference, name)(*arguments)
    out, guard = rubbish(expected)
    getattr(kernels, name)(*move(*arguments), out=out)
    codes, scale, zero_point = (unsigned(x.cpu()) for x in out)
    assert (guard == -91).all()
    if exact:
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])
        assert torch.equal(zero_point, expected[2])
        return
    torch.testing.assert_close(scale, expected[1], rtol=2e-5, atol=0)
    assert (zero_point - expected[2]).abs().max() <= 1
    apart = (
        (codes.int() - zero_point_of(codes, zero_point)) - (expected[0].int() - zero_point_of(*expected[::2]))
    ).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 2e-3 or (apart != 0).sum() <= 2


def zero_point_of(codes, zero_point):
    return zero_point.view(-1, *[1] * (codes.dim() - 1))


def place(channels, seed=0):
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def image(batch, channels, height, width, seed=0, offset=0.5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=g)
    return (x * torch.rand(channels, 1, 1, generator=g) * 5 + offset).contiguous(memory_format=torch.channels_last)


def gains(channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(channels, generator=g) + 1, torch.randn(channels, generator=g)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "channels"), [(6, 42), (123, 431), (2, 9000)])
def test_rows_are_stored_in_place(rows, channels, bits):
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    divisor = torch.rand(channels, generator=torch.Generator().manual_seed(2)) + 0.5
    check("quantize_rows", x, bits, divisor, place(channels), exact=True)
    natural = reference.quantize_rows(x, bits, divisor)[0]
    placed = unsigned(kernels.quantize_rows(*move(x, bits, divisor, place(channels)))[0].cpu())
    assert torch.equal(placed[:, place(channels).long()], natural)


@pytest.mark.parametrize(("batch", "channels", "height", "width"), [(2, 6, 5, 7), (1, 42, 12, 13), (3, 123, 3, 2)])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("placed", [False, True])
def test_samples_bit_exact(batch, channels, height, width, padding, placed):
    x = image(batch, channels, height, width)
    divisor = torch.rand(channels, generator=torch.Generator().manual_seed(2)) + 0.5
    check("quantize_samples", x, 8, divisor, padding, place(channels) if placed else None, exact=True)


@pytest.mark.parametrize(
    ("rows", "channels", "block"), [(1, 16, 16), (5, 80, 16), (70, 192, 64), (3, 768, 256), (2, 8960, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divide", [False, True])
def test_rotated_rows_and_samples_bit_exact(rows, channels, block, dtype, divide):
    g = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, channels, generator=g) * 10 ** torch.randn(rows, 1, generator=g)).to(dtype)
    x[0, 0], x[-1, -1] = 0.0, -0.0
    divisor = torch.rand(channels, generator=g) + 0.5 if divide else None
    check("quantize_rows", x, 8, divisor, None, block, exact=True)
    strided = torch.zeros(rows, 2 * channels, dtype=dtype)[:, ::2].copy_(x)
    check("quantize_rows", strided, 4, divisor, None, block, exact=True)
    if channels < 1000:
        check("quantize_samples", image(2, channels, 5, 3).to(dtype), 8, divisor, 1, None, block, exact=True)


@pytest.mark.parametrize(("channels", "block"), [(48, 16), (320, 64), (512, 256), (8448, 256)])
def test_rotated_behind_norms_and_activations(channels, block):
    x = torch.randn(5, 2 * channels, generator=torch.Generator().manual_seed(channels)) * 3
    weight, bias = gains(channels)
    last = (torch.rand(channels) + 0.5, None, block)
    check("geglu_quantize_rows", x, 8, *last)
    check("silu_quantize_rows", x[:, :channels], 8, *last)
    check("layer_norm_quantize_rows", x[:, :channels] + 1, weight, bias, 1e-5, 8, *last)
    pixels = image(2, channels, 4, 3)
    check("group_norm_quantize_rows", pixels, 4, weight, bias, 1e-5, 8, *last)
    if channels < 1000:
        divided = (last[0], 1, None, torch.randn(2, channels), block)
        check("group_norm_quantize_samples", pixels, 4, weight, bias, 1e-5, True, 8, *divided)


def test_samples_of_other_layouts_and_extremes():
    x = image(2, 10, 5, 6)
    check("quantize_samples", x.contiguous(), 8, None, 1, None, exact=True)
    check("quantize_samples", x.half(), 6, None, 1, None, exact=True)
    extremes = torch.stack((torch.zeros(4, 3, 3), torch.full((4, 3, 3), 3.0), torch.full((4, 3, 3), -3.0)))
    for factor in (1.0, 1e-35, 1e30):
        check("quantize_samples", extremes * factor, 8, None, 1, None, exact=True)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_fused_shape(data):
    channels = data.draw(st.integers(1, 150))
    rows = data.draw(st.integers(1, 70))
    bits = data.draw(st.integers(2, 8))
    position = place(channels) if data.draw(st.booleans()) else None
    height, width = data.draw(st.integers(1, 14)), data.draw(st.integers(2, 14))
    # two values are normalized to 1 and -1, whose codes are ties: gains part them
    tied = channels == 2 or height * width == 2
    weight, bias = gains(channels) if tied or data.draw(st.booleans()) else (None, None)
    divisor = torch.rand(channels) + 0.5 if data.draw(st.booleans()) else None
    x = torch.randn(rows, 2 * channels, generator=torch.Generator().manual_seed(channels)) * 3
    check("geglu_quantize_rows", x, bits, divisor, position)
    check("silu_quantize_rows", x[:, :channels], bits, divisor, position)
    check("layer_norm_quantize_rows", x[:, :channels] + 1, weight, bias, 1e-5, bits, divisor, position)
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 5, 8, channels) if channels % g == 0]))
    silu, padding = data.draw(st.booleans()), data.draw(st.integers(0, 2))
    arguments = (groups, weight, bias, 1e-5, silu, bits, divisor, padding, position)
    offset = torch.randn(2, channels) * 3 if data.draw(st.booleans()) else None
    check("group_norm_quantize_samples", image(2, channels, height, width), *arguments, offset)
    arguments = (groups, weight, bias, 1e-5, bits, divisor, position)
    check("group_norm_quantize_rows", image(2, channels, height, width), *arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    x = torch.randn(42, 84, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, bias = (v.to(dtype) for v in gains(84))
    check("layer_norm_quantize_rows", x, weight, bias, 1e-5, 8, None, None)
    check("geglu_quantize_rows", x, 8, None, None)
    check("silu_quantize_rows", x, 8, None, None)
    check("group_norm_quantize_samples", image(1, 84, 4, 4).to(dtype), 4, weight, bias, 1e-5, True, 8, None, 1, None)
    check("group_norm_quantize_rows", image(1, 84, 4, 4).to(dtype), 4, weight, bias, 1e-5, 8, None, None)


def test_norms_of_large_means_and_constant_inputs():
    """A mean a thousand times the deviation keeps its digits; constant rows and images give zero codes, not NaN."""
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) + 1000
    check("layer_norm_quantize_rows", x, None, None, 1e-5, 4, None, None)
    check("group_norm_quantize_samples", image(1, 8, 9, 9, offset=1000.0), 2, None, None, 1e-5, False, 4, None, 1, None)
    constant = torch.full((3, 50), 7.0)
    check("layer_norm_quantize_rows", constant, *gains(50), 1e-5, 8, None, None)
    check("group_norm_quantize_samples", torch.full((1, 4, 5, 5), 7.0), 2, None, None, 1e-5, True, 8, None, 1, None)


@pytest.mark.parametrize(("batch", "groups", "parts"), [(1, 2, 16), (2, 16, 4)])
@pytest.mark.parametrize("spread", [0.0, 300.0])
def test_statistics_of_several_parts(batch, groups, parts, spread):
    """Of images that no program holds at once, of which the last parts are ragged or empty; with means that fall from
    pixel to pixel."""
    channels, height, width = 40 * groups, 33, 37
    assert kernels.groups_for(height * width, 40, kernels.PROGRAMS // (batch * groups), True).parts == parts
    x = image(batch, channels, height, width, offset=20.0)
    x += torch.linspace(spread, 0, height * width).view(height, width)
    weight, bias = gains(channels)
    norm = (groups, weight, bias, 1e-5)
    check("group_norm_quantize_samples", x, *norm, True, 8, None, 1, None, torch.randn(batch, channels) * 3)
    if groups == 2:
        check("group_norm_quantize_rows", x, *norm, 8, None, None)
        check("group_norm_quantize_samples", x.half(), 2, None, None, 1e-5, False, 4, weight.abs() + 0.1, 0, None)


def test_kernels_of_a_norm(monkeypatch):
    """The range follows from the statistics; a pass of its own takes it where a rotation mixes groups."""
    launched = []
    statistics, merge, *rest = (
        f"{name}_kernel"
        for name in ("group_statistics", "merge_parts", "sample_range", "quantize_samples", "quantize_rows")
    )
    reach, samples, rows = rest
    for name in (statistics, merge, *rest):
        monkeypatch.setattr(kernels, name, Noted(getattr(kernels, name), name, launched))

    def of(x: torch.Tensor, rotation: int = 0) -> list[str]:
        launched.clear()
        kernels.group_norm_quantize_samples(x, 2, None, None, 1e-5, True, 8, None, 1, None, None, rotation)
        return list(launched)

    x = image(1, 80, 33, 27).to(DEVICE)
    assert of(x) == [statistics, merge, samples]
    assert of(x, 16) == [statistics, merge, reach, samples]
    assert of(x[:, :, :16]) == [statistics, samples]  # two tiles are one part
    assert of(x[:, :, :16], 16) == [statistics, reach, samples]
    launched.clear()
    kernels.group_norm_quantize_rows(x, 2, None, None, 1e-5, 8, None, None)
    assert launched == [statistics, rows]


@pytest.mark.parametrize(("size", "parts"), [((3, 7), 1), ((66, 67), 16)])
def test_the_range_of_silu_is_that_of_its_channels_ends(size, parts):
    """A channel that lies to both sides of SiLU's turn reaches down to its least value, even where no pixel has it;
    divisors, negative ones too, scale that."""
    shape = (1, 32, *size)
    assert kernels.groups_for(size[0] * size[1], 16, kernels.PROGRAMS // 2, True).parts == parts
    x = 3.0 * (-1.0) ** torch.arange(32 * size[0] * size[1]).view(shape)
    for divisor, low, high in (
        (None, reference.SILU_LEAST, 0.731),
        (torch.full((32,), 2.0), 2 * reference.SILU_LEAST, 2 * 0.731),
        (torch.full((32,), -1.0), -0.731, -reference.SILU_LEAST),
    ):
        # -1 and 1 become -2 and 1
        gain, offset = torch.full((32,), 1.5), torch.full((32,), -0.5)
        arguments = (2, gain, offset, 1e-5, True, 8, divisor, 1, None)
        check("group_norm_quantize_samples", x, *arguments)
        _, scale, zero_point = kernels.group_norm_quantize_samples(*move(x, *arguments))
        assert float(scale) == pytest.approx((high - low) / 255, rel=0.05)
        assert float(-scale * zero_point) == pytest.approx(low, abs=0.02)


def test_ranges_of_a_large_sample_are_few(monkeypatch):
    """Each program of the codes reads all of them: of every block of a large picture they would be most of its work."""
    monkeypatch.setattr(kernels, "MOST_RANGES", 2)
    read, launch = [], kernels.launch

    def noted(kernel, grid, *arguments, **constants):
        if kernel is kernels.quantize_samples_kernel:
            read.append(arguments[-1])
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", noted)
    x, norm = image(2, 80, 33, 27), (2, *gains(80), 1e-5, True, 8, None, 1, None)
    check("quantize_samples", x, 8, None, 1, None)
    check("group_norm_quantize_samples", x, *norm)
    check("group_norm_quantize_samples", x, *norm, None, 16)
    assert read == [1, 2, 1]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="runs single programs, in the interpreter")
@pytest.mark.parametrize("what", ["statistics", "range", "codes"])
def test_a_sample_of_more_than_2_to_31_values(what, monkeypatch):
    """The last program of each kernel, alone; of the memory only what it touches is taken."""
    from triton.runtime import interpreter

    side, channels, rows = 4096, 256, 64
    x = torch.empty(side, side, channels, dtype=torch.int8)
    x[-1, -rows:] = torch.randint(-100, 101, (rows, channels), generator=torch.Generator().manual_seed(0))
    last = x[-1, -rows:].float()
    program, size, builder = [0, 0, 0], [1, 1, 1], interpreter.interpreter_builder
    set_program, set_size = builder.set_grid_idx, builder.set_grid_dim
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: set_program(*program))
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: set_size(*size))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it would touch all memory
    flags = {"OFFSET": False, "SILU": False, "DIVIDE": False, "BLOCK_ROWS": rows}
    plain = {**flags, "NORM": False, "ROTATION": 0, "BLOCK_CHANNELS": channels}
    if what == "statistics":
        parts = side**2 // rows
        program[:], size[:] = (31, parts - 1, 0), (32, parts, 1)
        mean, square = torch.zeros(2, 1, parts, 32)
        low, high = torch.zeros(2, 1, parts, channels)
        kernels.group_statistics_kernel[(1, 1, 1)](
            x, *[None] * 4, mean, square, low, high, None, None, side**2, channels, 0, rows, 1e-6, 8, parts, False,
            False, RANGE=True, BLOCK_CHANNELS=8, **flags,
        )  # fmt: skip
        torch.testing.assert_close(mean[0, -1, -1], last[:, -8:].mean())
        assert torch.equal(high[0, -1, -8:], last[:, -8:].amax(0))
    elif what == "range":
        program[0], size[0] = (side**2 // rows - 1, side**2 // rows)
        below, above = torch.zeros(2, 1, side**2 // rows, dtype=torch.int32)
        kernels.sample_range_kernel[(1, 1, 1)](x, *[None] * 4, below, above, side**2, channels, **plain)
        assert (below.view(torch.float32)[0, -1], above.view(torch.float32)[0, -1]) == (-last.min(), last.max())
    else:
        pixels = (side + 2) ** 2
        codes = torch.empty(pixels, channels, dtype=torch.int8)
        scale, zero_point = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
        reach = torch.tensor([[127.5]]).view(torch.int32)
        place = side * (side + 2) + side - rows + 1  # of the picture's last pixels
        program[0], size[0] = place // rows, -(-pixels // rows)
        kernels.quantize_samples_kernel[(1, 1, 1)](
            x, *[None] * 5, reach, reach, codes, scale, zero_point, side, side, channels, 1, 1,
            PLACE=False, SMALLEST=1e-30, TOP=255, BLOCK_RANGES=256, **plain,
        )  # fmt: skip
        done = (place // rows + 1) * rows - place
        torch.testing.assert_close(codes[place : place + done].float(), last[:done], atol=1, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (16, 27), (33, 27)])
def test_an_offset_that_is_a_part_of_a_wider_tensor(size):
    """As time embeddings are that one product made: read where it lies, whoever reads it."""
    wide = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)) * 3
    x, last = image(2, 80, *size), (2, *gains(80), 1e-5, True, 8, None, 1, None)
    results = [
        kernels.group_norm_quantize_samples(*move(x, *last, offset))
        for offset in (wide[:, 50:130], wide[:, 50:130].contiguous())
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    check("group_norm_quantize_samples", x, *last, wide[:, 50:130])


def test_rows_too_long_for_registers():
    x = torch.randn(2, 2 * 8200, generator=torch.Generator().manual_seed(0))
    check("geglu_quantize_rows", x, 8, None, None)
    check("layer_norm_quantize_rows", x, None, None, 1e-5, 8, None, None)
    check("silu_quantize_rows", x[:, :8200], 8, None, None)
    check("group_norm_quantize_rows", x.view(1, -1, 1, 2), 8, None, None, 1e-5, 8, None, None)


def test_nothing_to_do_and_refusals():
    empty = kernels.quantize_samples(torch.zeros(0, 4, 3, 3, device=DEVICE), 8, None, 1)
    assert empty[0].shape == (0, 4, 5, 5)
    x = torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="int32"):
        kernels.quantize_rows(x, 8, None, torch.arange(4, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.quantize_rows(x, 8, torch.ones(8, device=DEVICE)[::2])
    with pytest.raises(ValueError, match="divide"):
        dgq_kernels.group_norm_quantize_rows(torch.zeros(1, 4, 2, 2), 3, None, None, 1e-5, 8, None, None)
    with pytest.raises(ValueError, match="divide"):
        dgq_kernels.group_norm_quantize_samples(torch.zeros(1, 4, 2, 2), 3, None, None, 1e-5, True, 8, None, 1, None)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_operators_reach_both(monkeypatch, name):
    monkeypatch.setenv("DGQ_BACKEND", name)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for op, arguments in (
        (dgq_kernels.layer_norm_quantize_rows, (x, None, None, 1e-5, 8, None, None)),
        (dgq_kernels.geglu_quantize_rows, (x, 8, None, None)),
        (dgq_kernels.silu_quantize_rows, (x, 8, None, None)),
        (dgq_kernels.group_norm_quantize_rows, (image(2, 6, 4, 4).to(DEVICE), 2, None, None, 1e-5, 8, None, None)),
        (
            dgq_kernels.group_norm_quantize_samples,
            (image(2, 6, 4, 4).to(DEVICE), 2, None, None, 1e-5, True, 8, None, 1, None),
        ),
    ):
        codes, scale, zero_point = op(*arguments)
        assert codes.dtype == (torch.int8 if name == "triton" else torch.uint8)
        assert scale.shape == zero_point.shape == codes.shape[:1]
