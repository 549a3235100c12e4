"""Attention of the integer recipe: fractional log2 probabilities, the start token apart (docs/method.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import dgq_kernels
from dgq_kernels.log_attention import reference

from ..errors import DgqError
from .adapters import direct
from .gradient import needed
from .prepared import is_hooked
from .shared_input import project

FRACTION_BITS = {8: 4, 6: 3}


@dataclass(frozen=True)
class AttentionPlan:
    """Log attention of a model.

    Attributes:
        bits: bits of a probability's code, 8 or 6.
        fraction_bits: f, steps per octave are 2^f.
    """

    bits: int
    fraction_bits: int

    @classmethod
    def for_activations(cls, abits: int) -> AttentionPlan:
        """8-bit codes (16 octaves of 16 steps) for 7 and 8-bit activations, 6-bit ones (8 of 8) below."""
        bits = 8 if abits >= 7 else 6
        return cls(bits, FRACTION_BITS[bits])


class LogAttnProcessor:
    """A diffusers attention processor that runs `dgq_kernels.log_attention_eager`, or float attention on CPUs where
    that is the faster of the two, where gradients are wanted, and where it does not do (`_takes`).

    Cross-attention keeps column 0, the start token, apart in float: it takes most of the probability and would
    otherwise set the scale for all others. A `residual` shaped like the result is added by the last layer;
    a `norm` is applied to the hidden states first, by the layers that take them.

    Attributes:
        plan: of the codes; None of one made anew by its class: of 8 bits.
        given: attention -> (context, its keys, its values): projected before, where it is called with that context.
    """

    quantizes = True  # as measurement asks

    def __init__(self, plan: AttentionPlan | None = None) -> None:
        self.plan = plan
        self.given: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        residual: Tensor | None = None,
        norm: nn.Module | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise DgqError("log attention does not take an attention mask", "calibrate with --attention float")
        module: Any = attn
        own = hidden_states
        if module.spatial_norm is not None:
            hidden_states = module.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if module.group_norm is not None:
            hidden_states = module.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        cross = encoder_hidden_states is not None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if cross and module.norm_cross:
            context = module.norm_encoder_hidden_states(context)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (module.heads, -1)).transpose(1, 2)

        if cross:
            (query,) = project([module.to_q], hidden_states, norm)
            given = self.given.get(module) if self.given else None
            if given is not None and given[0] is context:
                _, key, value = given
            else:
                key, value = project([module.to_k, module.to_v], context)
        else:
            query, key, value = project([module.to_q, module.to_k, module.to_v], hidden_states, norm)
        q, k, v = heads(query), heads(key), heads(value)
        if module.norm_q is not None:
            q = module.norm_q(q)
        if module.norm_k is not None:
            k = module.norm_k(k)
        if dgq_kernels.log_attention_pays(q.device) and _takes(module, k.shape[2], cross) and not needed(q, k, v):
            plan = self.plan or AttentionPlan.for_activations(8)
            out = dgq_kernels.log_attention_eager(q, k, v, module.scale, plan.bits, plan.fraction_bits, cross)
        else:
            k, v = k.to(q.dtype), v.to(q.dtype)
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=module.scale)
        out = out.transpose(1, 2).flatten(2)
        plain = len(shape) == 3 and not module.residual_connection and module.rescale_output_factor == 1
        last = direct(module.to_out[0], "linear")
        if residual is not None and plain and last is not None and not is_hooked(module.to_out[1]):
            fused: Tensor = last(out, residual)
            return fused
        hidden_states = module.to_out[1](module.to_out[0](out))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if module.residual_connection:
            hidden_states = hidden_states + own
        # a division by 1 would still be a pass over memory
        if module.rescale_output_factor != 1:
            hidden_states = hidden_states / module.rescale_output_factor
        return hidden_states if residual is None else hidden_states + residual


def _takes(attention: nn.Module, keys: int, start_token: bool) -> bool:
    """Whether log attention is what is asked for: beside the start token there is a key, and no more than its sums
    hold; and no hook of diffusers is there to put the values in the place of what torch's attention gives."""
    hooks = getattr(attention.__dict__.get("_diffusers_hook"), "hooks", {})
    perturbed = any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())
    return 0 < keys - int(start_token) <= reference.MAX_KEYS and not perturbed


def text_readers(network: nn.Module, context: Tensor) -> list[Any]:
    """The cross-attentions whose keys and values `given` may hold for a context: all that depend on nothing else."""
    modules: Iterator[Any] = network.modules()
    return [
        module
        for module in modules
        if isinstance(getattr(module, "processor", None), LogAttnProcessor)
        and reads_text(module)
        and module.to_k.in_features == context.shape[-1]
    ]


def reads_text(attention: Any) -> bool:
    """Whether keys and values are projections of the text as it comes."""
    return bool(attention.is_cross_attention) and not attention.norm_cross


@contextlib.contextmanager
def given(readers: Sequence[Any], context: Tensor, projected: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Let cross-attentions that are called with a context take these as its keys and values."""
    for module, (key, value) in zip(readers, projected, strict=True):
        module.processor.given[module] = context, key, value
    try:
        yield
    finally:
        for module in readers:
            module.processor.given.clear()


def is_plain(network: nn.Module) -> bool:
    """Whether log attention computes what a network's attentions do: not of one that reads the text by layers of its
    own beside the pixels (DeepFloyd IF, Kandinsky), without a start token."""
    return not any(getattr(module, "added_kv_proj_dim", None) is not None for module in network.modules())


def use_log_attention(network: Any, plan: AttentionPlan) -> None:
    """Set the log attention processor on every attention layer of a network of diffusers."""
    network.set_attn_processor(LogAttnProcessor(plan))
