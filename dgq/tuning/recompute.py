"""A UNet that keeps little for its backward pass: what is cheap is always made anew, the rest where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..integer.fused_unet import attend, plain_resnet, plain_transformer_block

Run = Callable[..., Any]  # run(function, *arguments): its result

# Rows (tokens of all samples) that a feed-forward network takes at a time: its hidden layers are eight times as wide.
_ROWS = 1024


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with another forward within the block."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def _anew(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), which is called again in the backward pass: of what it makes nothing is kept. It draws no random
    numbers."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def lean(unet: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Within the block a UNet keeps less for its backward pass; results and gradients are the same bit for bit, with
    checkpointing or without.

    Args:
        unet: of diffusers, its layers quantized or not, in eval mode; the parameters of its norms take no gradient.
        checkpointing: keep nothing but the inputs of residual blocks, transformers and resamplings. Inside of a
            transformer that is made anew, attentions and feed-forward networks are made anew once more, so that no more
            than one of them is there at a time.
    """
    run: Run = _anew if checkpointing else _plainly
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and plain_resnet(module):
            forwards[module] = partial(run, partial(_resnet, module))
        elif isinstance(module, BasicTransformerBlock) and plain_transformer_block(module):
            forwards[module] = partial(_transformer_block, module, run)
        elif isinstance(module, (ResnetBlock2D, Transformer2DModel, Upsample2D, Downsample2D)):
            forwards[module] = _whole(run, module.forward)
    with replaced(forwards):
        yield


def _plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _whole(run: Run, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(partial(forward, **kwargs), *args)


def _resnet(block: Any, x: Tensor, temb: Tensor | None, *_: Any) -> Tensor:
    """`ResnetBlock2D.forward`; norms and activations are always made anew. The shortcut comes first, so that in the
    backward pass it comes last."""
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    hidden = block.conv1(_activated(x, block.norm1))
    if temb is not None and block.time_emb_proj is not None:
        embedding = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        hidden = hidden + embedding[:, :, None, None]
    result: Tensor = shortcut + block.conv2(_activated(hidden, block.norm2))
    return result


class _Activated(torch.autograd.Function):
    """silu(norm(x)), of which x alone is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(norm(x), inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = torch.nn.functional.silu(ctx.norm(x))
        return torch.autograd.grad(y, x, gradient)[0], None


def _activated(x: Tensor, norm: nn.Module) -> Tensor:
    """silu(norm(x)); the norm's own parameters take no gradient."""
    y: Tensor = _Activated.apply(x, norm)
    return y


def _transformer_block(
    block: Any,
    run: Run,
    x: Tensor,
    attention_mask: None = None,
    encoder_hidden_states: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """`BasicTransformerBlock.forward` without masks; the feed-forward network takes some tokens at a time."""
    x = run(attend, block.attn1, block.norm1, x, None)
    if block.attn2 is not None:
        x = run(attend, block.attn2, block.norm2, x, encoder_hidden_states)
    some = x.split(max(1, _ROWS // x.shape[0]), dim=1)
    done = [run(_feed_forward, block, tokens) for tokens in some]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def _feed_forward(block: Any, x: Tensor) -> Tensor:
    result: Tensor = block.ff(block.norm3(x)) + x
    return result
