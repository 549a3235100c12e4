"""Packing is exact in both directions and keeps the documented nibble order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgq_kernels import packing


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from(packing.GROUP_SIZES), st.integers(0, 2**31))
def test_int4_round_trip(n, k, group, seed):
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack_int4(codes, group)
    assert packed.shape == (n, packing.padded_length(k, group) // 2)
    assert torch.equal(packing.unpack_int4(packed, k, group), codes)


def test_every_byte_unpacks_to_its_two_nibbles():
    packed = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    values = packing.unpack_int4(packed, 512, 32)[0].tolist()
    for byte in range(256):
        group, j = divmod(byte, 16)
        signed = [((nibble + 8) % 16) - 8 for nibble in (byte & 15, byte >> 4)]
        assert [values[group * 32 + j], values[group * 32 + 16 + j]] == signed


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 17), st.integers(0, 2**31))
def test_subscale_round_trip(n, groups, seed):
    m = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packing.unpack_subscales(packing.pack_subscales(m), groups), m)


@pytest.mark.parametrize("k", [32, 42, 123])
def test_expand_is_code_times_subscale(k):
    codes = torch.randint(-8, 8, (3, k), dtype=torch.int8)
    codes[0] = -8
    groups = packing.padded_length(k, 32) // 32
    m = torch.randint(1, 16, (3, groups), dtype=torch.uint8)
    m[0] = 15
    weight = packing.expand_two_level(packing.pack_int4(codes), packing.pack_subscales(m), k, 32)
    for row in range(3):
        for column in range(k):
            assert int(weight[row, column]) == int(codes[row, column]) * int(m[row, column // 32])


def test_out_of_range_values_are_refused():
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        packing.pack_int4(torch.full((1, 4), 8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"0\.\.15"):
        packing.pack_subscales(torch.full((1, 4), 16, dtype=torch.uint8))


@pytest.mark.parametrize("k, group", [(64, 32), (70, 32), (33, 16)])
def test_two_level_weights_pack_again(k, group):
    g = torch.Generator().manual_seed(0)
    groups = packing.padded_length(k, group) // group
    codes = torch.randint(-8, 8, (5, k), generator=g).to(torch.int8)
    m = torch.randint(1, 16, (5, groups), generator=g).to(torch.uint8)
    packed, subscales = packing.pack_int4(codes, group), packing.pack_subscales(m)
    weight = packing.expand_two_level(packed, subscales, k, group)
    assert torch.equal(packing.pack_two_level(weight, subscales, group), packed)
    m[0, 0] = 7
    weight[0, :group] = 5  # no multiple of 7
    with pytest.raises(ValueError, match="product"):
        packing.pack_two_level(weight, packing.pack_subscales(m), group)
