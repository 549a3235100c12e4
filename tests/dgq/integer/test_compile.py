"""torch.compile and torch.export of a model whose layers run on the CPU engine."""

import pytest
import torch
from comparing import assert_close

from dgq.pictures import pipelines
from dgq_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_compiles_as_it_was_loaded(tiny_checkpoint, dtype):
    """Without a call before; under Inductor too, whose copies into another layout are not to be had in bfloat16."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint, subfolder="unet", dtype=dtype)
    call = (torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor(500), torch.randn(2, 24, 32, dtype=dtype))
    traced = torch.compile(unet, fullgraph=True, backend="aot_eager")(*call).sample
    assert torch.equal(traced, unet(*call).sample)
    torch._dynamo.reset()
    block = unet.down_blocks[0].resnets[0]
    time = torch.randn(2, 128, dtype=dtype)

    def step(x, time):
        return block(unet.conv_in(x), time)

    got, expected = torch.compile(step, fullgraph=True)(call[0], time), step(call[0], time)
    assert bool(torch.isfinite(got).all())
    assert_close("output", got, expected, 0.05)


@torch.no_grad()
def test_a_block_compiles_without_a_break(tiny_checkpoint):
    unet = pipelines.load(tiny_checkpoint, device="cpu").unet
    block = next(module for module in unet.modules() if type(module).__name__ == "FusedTransformerBlock")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 64), (3, 20)):
        x, context = torch.randn(batch, tokens, block.norm1.weight.shape[0]), torch.randn(batch, 24, 32)
        expected = block(x, encoder_hidden_states=context)
        assert torch.equal(compiled(x, encoder_hidden_states=context), expected)
    exported = torch.export.export(block, (x,), {"encoder_hidden_states": context}).module()
    assert torch.equal(exported(x, encoder_hidden_states=context), expected)


@torch.no_grad()
def test_a_model_is_exported_for_every_batch_and_size(tiny_checkpoint):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint, subfolder="unet")
    batch, half = (torch.export.Dim(name, min=2, max=16) for name in ("batch", "half"))
    text = torch.randn(3, 24, 32)
    shapes = ({0: batch, 2: 2 * half, 3: 2 * half}, None, {0: batch})
    made = torch.export.export(unet, (torch.randn(2, 4, 8, 8), torch.tensor(500), text[:2]), dynamic_shapes=shapes)
    sample = torch.randn(3, 4, 12, 12)
    expected = unet(sample, torch.tensor(500), text).sample
    assert torch.equal(made.module()(sample, torch.tensor(500), text).sample, expected)
