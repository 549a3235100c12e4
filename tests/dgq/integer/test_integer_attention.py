"""The attention processor against diffusers' own."""

import pytest
import torch
from comparing import assert_close
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import dgq_kernels
from dgq.errors import DgqError
from dgq.integer.attention import AttentionPlan, LogAttnProcessor
from dgq_kernels import native
from dgq_kernels.log_attention import reference


@pytest.fixture(autouse=True)
def log_attention_everywhere(request, monkeypatch):
    """Whatever this CPU would choose."""
    if "pays" not in request.node.name:
        monkeypatch.setattr(native, "attention_pays", lambda: True)


def attention(**options):
    torch.manual_seed(0)
    return Attention(query_dim=32, heads=4, dim_head=8, bias=True, **options).eval()


@pytest.mark.parametrize("bits, floor", [(8, 27), (6, 22)])
@pytest.mark.parametrize("cross", [False, True])
@torch.no_grad()
def test_close_to_float_attention(bits, floor, cross):
    module = attention(cross_attention_dim=24 if cross else None)
    x = torch.randn(2, 50, 32)
    context = torch.randn(2, 24, 24) if cross else None
    module.set_processor(AttnProcessor2_0())
    expected = module(x, context)
    module.set_processor(LogAttnProcessor(AttentionPlan.for_activations(bits)))
    got = module(x, context)
    assert float(20 * torch.log10(expected.norm() / (got - expected).norm())) > floor


@torch.no_grad()
def test_picture_input_norm_and_residual():
    module = attention(norm_num_groups=8, residual_connection=True, rescale_output_factor=2.0)
    x = torch.randn(2, 32, 5, 7)
    module.set_processor(AttnProcessor2_0())
    expected = module(x)
    module.set_processor(LogAttnProcessor(AttentionPlan(8, 4)))
    got = module(x)
    assert got.shape == x.shape
    assert_close("output", got, expected, 0.02)


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
def test_where_log_attention_does_not_pay_attention_is_float(monkeypatch, cross):
    module = attention(cross_attention_dim=24 if cross else None)
    x, context = torch.randn(2, 50, 32), torch.randn(2, 24, 24) if cross else None
    module.set_processor(AttnProcessor2_0())
    expected = module(x, context)
    module.set_processor(LogAttnProcessor(AttentionPlan(8, 4)))
    monkeypatch.setattr(native, "attention_pays", lambda: False)
    torch.testing.assert_close(module(x, context), expected)
    monkeypatch.setenv("DGQ_BACKEND", "reference")  # the choice is the CPU engine's only
    assert not torch.allclose(module(x, context), expected, atol=1e-6)


@pytest.mark.skipif(not native.available(), reason="the CPU engine is not built")
def test_log_attention_pays_where_its_products_do():
    before = native.describe()
    try:
        for isa in native.supported():
            native.use(isa)
            assert native.attention_pays() == (isa in ("avx512", "avx512-vnni", "avx512-vbmi", "amx"))
            assert dgq_kernels.log_attention_pays(torch.device("meta"))
    finally:
        native.use(before)


def test_masks_are_refused():
    module = attention()
    module.set_processor(LogAttnProcessor(AttentionPlan(8, 4)))
    with pytest.raises(DgqError, match="mask"):
        module(torch.randn(1, 4, 32), attention_mask=torch.zeros(1, 4, 4))


@pytest.mark.parametrize("cross", [False, True])
@torch.no_grad()
def test_of_too_few_or_too_many_keys_attention_is_float(cross, monkeypatch):
    """A text of one token is its start token alone; sums of very large pictures' keys would overflow."""
    module, x = attention(cross_attention_dim=24 if cross else None), torch.randn(2, 50, 32)
    context = torch.randn(2, 1, 24) if cross else None
    module.set_processor(AttnProcessor2_0())
    expected = module(x, context)
    module.set_processor(LogAttnProcessor())
    if not cross:
        monkeypatch.setattr(reference, "MAX_KEYS", 49)
    for backend in ("cpu", "reference", "triton") if cross else ("cpu", "reference"):
        monkeypatch.setenv("DGQ_BACKEND", backend)
        assert torch.equal(module(x, context), expected), backend
