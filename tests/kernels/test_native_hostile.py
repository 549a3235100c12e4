"""The CPU engine on what it must not trust: values that are not finite, orders and sizes that make no sense."""

import ctypes
import math

import pytest
import torch

from dgq_kernels import native, packing

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")

NAN, INF = math.nan, math.inf
HUGE = 3e38  # in float32 and bfloat16; two of them, or their difference, are infinite


@pytest.fixture(params=native.ISAS)
def isa(request):
    if request.param not in native.supported():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.use(request.param)
    yield request.param
    native.use(before)


def layer_of(n, k, divide=False, **geometry):
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    channels = k // geometry.get("kernel", 1) ** 2
    divisor = torch.rand(channels, generator=g) + 0.5 if divide else None
    return native.Layer(weight, torch.rand(n, generator=g), torch.randn(n, generator=g), divisor, 8, **geometry)


def norm_of(channels, groups=0, silu=False):
    return native.Norm(torch.ones(channels), torch.zeros(channels), 1e-5, groups, silu)


def only_bad(got, healthy, bad):
    """`got` is NaN at the indices `bad` of its first axis and equal to `healthy` elsewhere."""
    rest = [i for i in range(len(got)) if i not in bad]
    assert bool(got[bad].isnan().all())
    assert torch.equal(got[rest], healthy[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "divided", "norm", "gated", "residual", "norm and gate"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_gives_nan(isa, dtype, form, value):
    k, n = 70, 64
    layer = layer_of(n, k, divide=form == "divided")
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, k, generator=g).to(dtype)
    options = {"gated": "gate" in form, "norm": norm_of(k) if "norm" in form else None}
    if form == "residual":
        options["residual"] = torch.randn(40, n, generator=g).to(dtype)
    healthy, broken = layer.linear(x, **options), x.clone()
    broken[3, 0] = broken[20, 31] = broken[39, k - 1] = value  # in whole vectors and in the rest behind them
    only_bad(layer.linear(broken, **options), healthy, [3, 20, 39])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [7, 64])
def test_large_rows_are_numbers_where_their_range_is_one(isa, dtype, k):
    """A sum of large values may overflow where their range does not."""
    layer, x = layer_of(20, k), torch.ones(4, k, dtype=dtype)
    x[0], x[1] = HUGE, -HUGE
    x[2, 0], x[2, 1] = HUGE, -HUGE
    got = layer.linear(x / 2)  # the range of row 2 is HUGE
    assert bool(got[3].isfinite().all())
    small = layer.linear(x * 0.5 * 2.0**-100)
    assert torch.equal((small[:3] - layer.bias.to(dtype)).sign(), (got[:3] - layer.bias.to(dtype)).sign())
    got = layer.linear(x)
    assert bool(got[2].isnan().all())
    assert not bool(got[[0, 1, 3]].isnan().any())


def test_large_values_have_the_codes_of_small_ones(isa):
    """Powers of two move neither codes nor sums."""
    for k in (7, 64):
        layer = native.Layer(torch.eye(k, dtype=torch.int8), torch.ones(k), None, None, 8)
        x = torch.randn(5, k, generator=torch.Generator().manual_seed(0)).abs() + 1
        factor = 2.0**124
        assert torch.equal(layer.linear(x * factor), layer.linear(x) * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "divided", "norm", "norm and silu", "sample bias", "in place"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_picture_that_is_not_finite_gives_nan(isa, dtype, form, value):
    channels, width = (64, 16) if form == "in place" else (20, 5)
    layer = layer_of(33, 9 * channels, divide=form == "divided", kernel=3, padding=1)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, channels, 6, width, generator=g).to(dtype)
    options = {"residual": torch.randn(4, 33, 6, width, generator=g).to(dtype)}
    if "norm" in form:
        options["norm"] = norm_of(channels, 4, "silu" in form)
    if form == "sample bias":
        options["sample_bias"] = torch.randn(4, 33, generator=g)
    healthy, broken = layer.conv2d(x, **options), x.clone()
    broken[1, 0, 0, 0] = broken[3, channels - 1, 4, 2] = value
    only_bad(layer.conv2d(broken, **options), healthy, [1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "divided", "rotated", "in place", "wide"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_upsampled_picture_that_is_not_finite_gives_nan(isa, dtype, form, value):
    channels, width = (64, 16) if form == "in place" else (48, 5)
    g = torch.Generator().manual_seed(1)
    weight = torch.randint(-128, 128, (64, 4 * channels), generator=g).to(torch.int8)
    divisor = torch.rand(channels, generator=g) + 0.5 if form == "divided" else None
    bits, rotation = 16 if form == "wide" else 8, 16 if form == "rotated" else 0
    rest = torch.rand(64, generator=g), torch.randn(64, generator=g), divisor, bits
    layer = native.Layer(weight, *rest, 2, 1, 1, rotation=rotation)
    x = torch.randn(4, channels, 6, width, generator=g).to(dtype)
    healthy, broken = layer.upsample(x), x.clone()
    broken[1, 0, 0, 0] = broken[3, channels - 1, 4, 2] = value
    only_bad(layer.upsample(broken), healthy, [1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_group_that_is_not_finite_gives_nan(isa, dtype, silu, value):
    norm = norm_of(32, 4, silu)
    x = torch.randn(3, 32, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    healthy, broken = norm.over_groups(x), x.clone()
    broken[1, 9, 2, 3] = value
    got = norm.over_groups(broken)
    assert bool(got[1, 8:16].isnan().all())
    got[1, 8:16] = healthy[1, 8:16]
    assert torch.equal(got, healthy)


def test_a_picture_of_too_wide_a_range_gives_nan(isa):
    layer, x = layer_of(8, 9 * 4, kernel=3, padding=1), torch.ones(2, 4, 3, 3)
    x[0, 0, 0, 0], x[0, 1, 2, 2] = HUGE, -HUGE  # in different lines
    only_bad(layer.conv2d(x), layer.conv2d(torch.ones(2, 4, 3, 3)), [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_attention_that_is_not_finite_gives_nan(isa, dtype, start, value):
    g = torch.Generator().manual_seed(0)
    operands = [torch.randn(2, 3, tokens, 20, generator=g).to(dtype) for tokens in (40, 50, 50)]

    def attend(q, k, v):
        return native.attention(q, k, v, 0.3, 8, 4, start, 8, 8)

    healthy = attend(*operands)
    q = operands[0].clone()
    q[0, 1, 5, 3] = q[1, 2, 39, 19] = value
    only_bad(attend(q, *operands[1:]).flatten(0, 2), healthy.flatten(0, 2), [1 * 40 + 5, 5 * 40 + 39])
    for which in (1, 2):
        for token in (0, 1, 49):  # token 0 is the start token
            broken = [x.clone() for x in operands]
            broken[which][0, 2, token, 17] = value
            only_bad(attend(*broken).flatten(0, 1), healthy.flatten(0, 1), [2])


def test_tiny_values_count_as_zero(isa):
    layer = layer_of(20, 33)
    x = torch.full((3, 33), 1e-42)
    x[1], x[2] = 1e-31, -1e-45
    assert torch.equal(layer.linear(x), layer.bias.expand(3, -1))


def pack(order=None, **changes):
    g = torch.Generator().manual_seed(0)
    n, k, group = 5, 70, 32
    weight = torch.randint(-8, 8, (n, k), generator=g).to(torch.int8)
    subscales = torch.full((n, packing.padded_length(k, group) // group), 3, dtype=torch.uint8)
    packed = packing.pack_int4(weight, group)
    stored = {"packed": packed, "subscales": packing.pack_subscales(subscales), "k": k, "group": group}
    layer = {"weight_scale": torch.ones(n), "bias": torch.ones(n), "inv_divisor": None, "bits": 8, "order": order}
    for name, value in changes.items():
        (stored if name in stored else layer)[name] = value
    return native.Layer(native.TwoLevel(**stored), **layer)


@pytest.mark.parametrize("at, value", [(0, -1), (3, 70), (69, 2**31 - 1), (5, -(2**31)), (7, 8)])
def test_an_order_that_is_no_permutation_is_refused(at, value):
    order = torch.arange(70, dtype=torch.int32)
    pack(order)
    order[at] = value  # out of range, or twice
    with pytest.raises(ValueError, match="not a permutation"):
        pack(order)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"order": torch.arange(69)}, r"order.*\(70,\)"),
        ({"group": 31}, "packed"),
        ({"group": 0}, "packed"),
        ({"group": -32}, "packed"),
        ({"k": 1000}, "packed"),
        ({"k": 0}, "packed"),
        ({"packed": torch.zeros(5, 48, dtype=torch.int8)}, "packed: torch.uint8"),
        ({"packed": torch.zeros(5, 47, dtype=torch.uint8)}, r"packed.*\(5, 48\)"),
        ({"subscales": torch.zeros(5, 1, dtype=torch.uint8)}, "subscales"),
        ({"weight_scale": torch.ones(4)}, r"weight_scale.*\(5,\).*\(4,\)"),
        ({"weight_scale": torch.ones(5, dtype=torch.bfloat16)}, "weight_scale: torch.float32"),
        ({"bias": torch.ones(5, device="meta")}, "bias.*on meta"),
        ({"inv_divisor": torch.ones(1)}, r"inv_divisor.*\(70,\)"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"bits": 0}, "2 to 8 bits"),
        ({"kernel": 3}, "kernel"),
        ({"kernel": 0}, "kernel"),
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
    ],
)
def test_a_layer_of_other_sizes_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        pack(**changes)


def test_inputs_elsewhere_are_refused():
    layer, conv = layer_of(32, 32), layer_of(8, 36, kernel=3)
    x, picture = torch.zeros(2, 32), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="on meta"):
        layer.linear(x, torch.zeros(2, 32, device="meta"))
    with pytest.raises(ValueError, match="on meta"):
        conv.conv2d(picture, sample_bias=torch.zeros(1, 8, device="meta"))
    with pytest.raises(ValueError, match="norm of 32 channels"):
        layer.linear(x, norm=native.Norm(torch.ones(32).double(), torch.zeros(32), 1e-5))
    with pytest.raises(ValueError, match="kernel of 1"):
        conv.linear(torch.zeros(2, 36))
    for norm in (norm_of(4, 0), norm_of(4, 3), norm_of(4, -1)):
        with pytest.raises(ValueError, match="a norm needs"):
            conv.conv2d(picture, norm=norm)
    for norm in (norm_of(32, 4), norm_of(32, silu=True), native.Norm(torch.ones(32), torch.zeros(32), NAN)):
        with pytest.raises(ValueError, match="a norm needs"):
            layer.linear(x, norm=norm)
    with pytest.raises(ValueError, match="residual"):
        layer.linear(x, torch.zeros(2, 16), gated=True)
    wide = torch.zeros(1, 32, 4, 4)
    for other in (wide[0], wide[:, :24], torch.zeros(1, 32, 4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="floats of a multiple of 16 channels"):
            norm_of(32, 4).over_groups(other)
    with pytest.raises(ValueError, match="on meta"):
        norm_of(32, 4).over_groups(wide.to("meta"))
    with pytest.raises(ValueError, match="norm of 16 channels"):
        norm_of(32, 4).over_groups(wide[:, :16])
    for norm in (norm_of(32, 0), norm_of(32, 3), norm_of(32, -1), native.Norm(torch.ones(32), torch.zeros(32), NAN, 4)):
        with pytest.raises(ValueError, match="a norm needs"):
            norm.over_groups(wide)


def test_attention_of_mixed_operands_is_refused():
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8)
    numbers = (0.3, 8, 4, False, 8, 8)
    native.attention(q, k, k, *numbers)
    for other in (k.bfloat16(), k.double(), k.to("meta")):
        with pytest.raises(ValueError, match="one dtype on the CPU"):
            native.attention(q, other, other, *numbers)
        with pytest.raises(ValueError, match="one dtype on the CPU"):
            native.attention(q, k, other, *numbers)
    for other in (k[..., :4], k[:, :1], k[0]):
        with pytest.raises(ValueError, match="expected"):
            native.attention(q, other, other, *numbers)
    with pytest.raises(ValueError, match="keys"):
        native.attention(q, k[:, :, :1], k[:, :, :1], 0.3, 8, 4, True, 8, 8)
    for numbers in ((0.0, 8, 4), (NAN, 8, 4), (INF, 8, 4), (0.3, 9, 4), (0.3, 1, 0), (0.3, 8, 6), (0.3, 8, -1)):
        with pytest.raises(ValueError, match="expected"):
            native.attention(q, k, k, *numbers, False, 8, 8)
    for bits in ((0, 8), (8, 9), (-3, 8)):
        with pytest.raises(ValueError, match="expected"):
            native.attention(q, k, k, 0.3, 8, 4, False, *bits)


# The C interface by itself, past the checks in Python: every number that a call indexes or allocates by.
LONGS = [-1, 0, 2**40, 2**62, -(2**63), 2**63 - 1]
INTS = [-1, 0, 2**31 - 1, -(2**31)]


def address_of(layer):
    return ctypes.addressof(layer._struct)


def call(function, *arguments):
    library = native.library.loaded().library
    return library.dgq_error(getattr(library, function)(*arguments)).decode()


def linear_call(layer, **changes):
    x, y = torch.zeros(3, 32), torch.zeros(3, 32)
    pointers, outputs = (ctypes.c_void_p * 1)(ctypes.addressof(layer)), (ctypes.c_void_p * 1)(y.data_ptr())
    values = {
        "layers": ctypes.addressof(pointers),
        "count": 1,
        "x": x.data_ptr(),
        "ldx": 32,
        "m": 3,
        "dtype": 0,
        "norm": None,
        "residual": None,
        "gated": 0,
        "y": ctypes.addressof(outputs),
        "threads": 1,
    }
    return call("dgq_linear", *{**values, **changes}.values())


@pytest.mark.parametrize(
    "name, values",
    [
        ("layers", [None]),
        ("count", [0, -1, -(2**63)]),
        ("x", [None]),
        ("ldx", [-1, 2**62, -(2**63), 2**63 - 1]),
        ("m", [*LONGS[:2], *LONGS[3:]]),
        ("dtype", [-1, 2, 2**31 - 1]),
        ("y", [None]),
        ("threads", INTS),
    ],
)
def test_the_library_refuses_a_linear_call(name, values):
    layer = layer_of(32, 32)
    assert linear_call(layer._struct) == "done"
    for value in values:
        assert linear_call(layer._struct, **{name: value}) != "done", value


@pytest.mark.parametrize(
    "name, values",
    [
        ("packed", [None]),
        ("weight_scale", [None]),
        ("column_sum", [None]),
        ("n", LONGS),
        ("k", LONGS),
        ("channels", LONGS),
        ("bits", [*INTS, 1, 9, 32]),
        ("kernel", INTS),
        ("stride", [-1, 0, -(2**31)]),
        ("padding", [-1, -(2**31)]),
    ],
)
def test_the_library_refuses_a_layer(name, values):
    layer, conv = layer_of(32, 32), layer_of(8, 36, kernel=3)
    x, y = torch.zeros(1, 6, 6, 4), torch.zeros(1, 4, 4, 8)
    arguments = (x.data_ptr(), 1, 6, 6, 0, None, None, None, y.data_ptr(), 1)
    assert call("dgq_conv2d", address_of(conv), *arguments) == "done"
    for value in values:
        if (name, value) == ("n", 2**40):
            continue  # a size that could be: what lies behind the pointers cannot be seen
        for struct in (layer._struct, conv._struct):
            changed = type(struct).from_buffer_copy(struct)
            setattr(changed, name, value)
            assert call("dgq_check_layer", ctypes.addressof(changed)) != "done", value
            assert linear_call(changed) != "done", value
            assert call("dgq_conv2d", ctypes.addressof(changed), *arguments) != "done", value


@pytest.mark.parametrize(
    "name, values",
    [
        ("norm", [None]),
        ("x", [None]),
        ("batch", [-1, *LONGS[3:]]),
        ("height", [-1, *LONGS[3:]]),
        ("width", [-1, *LONGS[3:]]),
        ("channels", [0, 8, 24, *LONGS]),
        ("dtype", [-1, 2, 2**31 - 1]),
        ("y", [None]),
        ("threads", INTS),
    ],
)
def test_the_library_refuses_a_norm(name, values):
    x, y, norm = torch.zeros(1, 3, 5, 32), torch.zeros(1, 3, 5, 32), norm_of(32, 4)
    arguments = {
        "norm": norm._address(32),
        "x": x.data_ptr(),
        "batch": 1,
        "height": 3,
        "width": 5,
        "channels": 32,
        "dtype": 0,
        "y": y.data_ptr(),
        "threads": 1,
    }
    assert call("dgq_group_norm", *arguments.values()) == "done"
    for value in values:
        if (name, value) != ("channels", 2**40):  # a size that could be
            assert call("dgq_group_norm", *{**arguments, name: value}.values()) != "done", value


@pytest.mark.parametrize("name, values", [("batch", LONGS[:2]), ("height", [-1, 0, 2]), ("width", [-1, 0, 2])])
def test_the_library_refuses_a_picture(name, values):
    conv = layer_of(8, 36, kernel=3)
    x, y = torch.zeros(1, 6, 6, 4), torch.zeros(1, 4, 4, 8)
    sizes = {"batch": 1, "height": 6, "width": 6}
    for value in [*values, *LONGS[3:]]:
        changed = {**sizes, name: value}.values()
        arguments = (x.data_ptr(), *changed, 0, None, None, None, y.data_ptr(), 1)
        assert call("dgq_conv2d", address_of(conv), *arguments) != "done", value


UPSAMPLING = "an upsampling has a kernel of 2"


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": None}, "a tensor is missing"),
        ({"y": None}, "a tensor is missing"),
        ({"threads": 0}, "threads"),
        ({"dtype": 2}, "float32 or bfloat16"),
        *[({name: size}, "an input is empty") for name in ("batch", "height", "width") for size in (0, -1, 2**62)],
        ({"packed": None}, "a tensor is missing"),
        ({"n": 48}, UPSAMPLING),
        ({"n": 80}, UPSAMPLING),
        ({"kernel": 1, "channels": 64}, UPSAMPLING),
        ({"kernel": 3}, "sizes of a weight"),
        ({"stride": 2}, UPSAMPLING),
        ({"padding": 0}, UPSAMPLING),
        ({"padding": 2**31 - 1}, UPSAMPLING),
        ({"bits": 1}, "codes of 2 to 8 bits"),
        ({"bits": 9}, "codes of 2 to 8 bits"),
        ({"rotation": 64}, "a rotation of 16"),
        ({"group": 16}, "groups"),
    ],
)
def test_the_library_refuses_an_upsampling(bits, changes, message):
    layer = native.Layer(torch.ones(64, 64, dtype=torch.int8), torch.ones(64), None, None, bits, 2, 1, 1)
    x, y = torch.zeros(1, 3, 5, 16), torch.zeros(1, 6, 10, 16)
    sizes = {"batch": 1, "height": 3, "width": 5}
    arguments = {"x": x.data_ptr(), **sizes, "dtype": 0, "y": y.data_ptr(), "threads": 1}
    assert call("dgq_upsample", address_of(layer), *arguments.values()) == "done"
    struct = type(layer._struct).from_buffer_copy(layer._struct)
    for name, value in changes.items():
        if name in arguments:
            arguments[name] = value
        else:
            setattr(struct, name, value)
    assert message in call("dgq_upsample", ctypes.addressof(struct), *arguments.values())


def test_codes_of_16_bits_are_neither_divided_nor_rotated():
    x, weight = torch.zeros(1, 16, 3, 5), torch.ones(64, 64, dtype=torch.int8)
    for divisor, rotation in ((torch.ones(16), 0), (None, 16)):
        few, layer = (
            native.Layer(weight, torch.ones(64), None, divisor, bits, 2, 1, 1, rotation=rotation) for bits in (8, 16)
        )
        assert few.upsample(x).shape == (1, 16, 6, 10)
        with pytest.raises(ValueError, match="16 bits neither divisors nor a rotation"):
            layer.upsample(x)


@pytest.mark.parametrize(
    "name, values",
    [
        ("n", [-1, 0, *LONGS[3:]]),
        ("k", LONGS),
        ("channels", [-1, 0, 9, *LONGS[3:]]),
        ("group", [0, -2, 3, *LONGS[2:]]),
        ("packed", [None]),
        ("subscales", [None]),
    ],
)
def test_the_library_refuses_a_stored_weight(name, values):
    packed, subscales = torch.zeros(5, 48, dtype=torch.uint8), torch.zeros(5, 2, dtype=torch.uint8)
    library = native.library.loaded().library
    out = torch.zeros(library.dgq_packed_bytes(5, 70, 0), dtype=torch.int8)
    sums, sizes = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    order = torch.arange(70, dtype=torch.int32)
    fields = {
        "packed": packed.data_ptr(),
        "subscales": subscales.data_ptr(),
        "order": order.data_ptr(),
        "n": 5,
        "k": 70,
        "channels": 70,
        "group": 32,
    }
    results = out.data_ptr(), sums.data_ptr(), sizes.data_ptr()
    for value in [fields[name], *values]:
        struct = native.library.StoredStruct(**{**fields, name: value})
        answer = call("dgq_pack", ctypes.addressof(struct), 0, *results, 1)
        assert (answer == "done") == (value == fields[name]), value
    sizes = (-1, 5, 0), (5, 0, 0), (2**40, 2**40, 0), (1, 2**24, 0), (5, 70, 31), (5, 70, 128), (5, 70, -32)
    assert [library.dgq_packed_bytes(*size) for size in sizes] == [0] * len(sizes)


@pytest.mark.parametrize(
    "change, group", [({}, 64), ({}, 16), ({}, -32), ({"group": 96}, 96), ({"order": True}, 32), ({"weight": True}, 32)]
)
def test_the_library_packs_four_bits_of_what_has_them(change, group):
    """Of a stored weight in its own order, by the sub-scales that it has."""
    stored = torch.zeros(5, 96, dtype=torch.uint8)
    order = torch.arange(70, dtype=torch.int32)
    library = native.library.loaded().library
    out = torch.zeros(library.dgq_packed_bytes(5, 70, 32), dtype=torch.int8)
    sums, sizes = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    results = out.data_ptr(), sums.data_ptr(), sizes.data_ptr()
    fields = {"packed": stored.data_ptr(), "subscales": stored.data_ptr(), "n": 5, "k": 70, "channels": 70, "group": 32}
    good = native.library.StoredStruct(**fields)
    assert call("dgq_pack", ctypes.addressof(good), 32, *results, 1) == "done"
    places = {"order": order.data_ptr(), "weight": stored.data_ptr()}
    other = native.library.StoredStruct(
        **{**fields, **{name: places.get(name, value) for name, value in change.items()}}
    )
    assert "group" in call("dgq_pack", ctypes.addressof(other), group, *results, 1)


def test_the_library_unpacks_blocks_that_are_there():
    packed, subscales = torch.zeros(40, 64, dtype=torch.uint8), torch.zeros(40, 2, dtype=torch.uint8)
    rest = torch.ones(40), None, None, 8
    four = native.Layer(native.TwoLevel(packed, subscales, 100, 32), *rest)
    eight = native.Layer(torch.zeros(40, 100, dtype=torch.int8), *rest)
    out = torch.zeros(native.library.loaded().library.dgq_packed_bytes(64, 100, 0), dtype=torch.int8)
    for first, count in ((0, 4), (3, 1), (4, 0)):
        assert call("dgq_unpack", address_of(four), first, count, out.data_ptr(), 1) == "done"
    for first, count in ((-1, 1), (0, 5), (4, 1), (0, -1), (2**62, 2**62)):
        assert call("dgq_unpack", address_of(four), first, count, out.data_ptr(), 1) != "done", (first, count)
    assert "group" in call("dgq_unpack", address_of(eight), 0, 1, out.data_ptr(), 1)


@pytest.mark.parametrize("name", [name for name, _ in native.library.AttentionStruct._fields_ if name != "logit_scale"])
def test_the_library_refuses_attention(name):
    x = torch.zeros(1, 2, 6, 8)
    strides = [16 * 6, 8 * 6, 8] * 3
    good = native.library.AttentionStruct(
        *[x.data_ptr()] * 3, x.clone().data_ptr(), *strides, 1, 2, 6, 6, 8, 0.3, 8, 4, 0, 8, 8, 0
    )
    kind = dict(native.library.AttentionStruct._fields_)[name]
    values = {ctypes.c_void_p: [None], ctypes.c_int64: LONGS, ctypes.c_int32: [*INTS, 40]}[kind]
    for value in values:
        if value == 0 and (name.endswith(("_batch", "_head", "_token")) or name in ("dtype", "fraction_bits")):
            continue  # a stride of an expanded tensor, and numbers that may be 0
        if value == 2**40 and name.endswith(("_batch", "_head", "_token")):
            continue  # a stride that could be
        changed = native.library.AttentionStruct.from_buffer_copy(good)
        setattr(changed, name, value)
        if name == "start_token" and value == 0:
            continue
        assert call("dgq_attention", ctypes.addressof(changed), 1) != "done", value


def test_the_library_refuses_an_instruction_set_it_has_not():
    for number in (-1, len(native.ISAS), 2**31 - 1):
        assert "instruction set" in call("dgq_use", number, None)
    assert native.describe() in native.supported()


def test_a_library_of_other_structures_is_not_used(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = (*native.library.LayerStruct._fields_, ("more", ctypes.c_int64))

    monkeypatch.setattr(native.library, "STRUCTURES", (Longer, *native.library.STRUCTURES[1:]))
    engine, why = native.library.load.__wrapped__()
    assert engine is None
    assert "build it again" in why
