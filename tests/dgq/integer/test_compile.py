"""torch.compile and torch.export of a model whose layers run on the CPU engine."""

import pytest
import torch

from dgq.pictures import pipelines
from dgq_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no CPU engine: {native.describe()}")


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
