"""Layers of the ``paper`` recipe: the DGQ paper's quantization (section 1 of docs/method.md), *simulated*.

Values are rounded to the published codes and back, and the products are float: this is slower than the float
model, and only its stored weights are small. It is the oracle that the ``integer`` recipe is compared with.

A layer is described by a plan, a JSON-able dict, from which it can be built with empty buffers (on the meta
device too) and filled from a state dict:

    linear     {"kind", "in_features", "out_features", "bias", "wbits", "abits", "input"}
    conv2d     {"kind", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                "conv_groups", "bias", "wbits", "abits", "input"}
    attention  {"kind", "cross", "abits", "query", "key", "value"}, and with one group "probabilities"

where input, query, key, value and probabilities are {"axis", "groups", "size"}: "channel", "pixel" or "tensor",
and how many groups and indices it has. Attention without "probabilities" rounds them to powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dgq.errors import DgqError
from dgq.family import family_of
from dgq.paper.quantizers import (
    AXIS_DIMS,
    Grouping,
    QuantizedWeight,
    dequantize_weight,
    fake_quantize,
    log2_quantize,
    pack_nibbles,
    quantize_weight,
    unpack_nibbles,
)
from dgq.range_search import SMALLEST_SCALE

Plan = dict[str, Any]


Device = torch.device | str | None


ATTENTION_PARTS = ("query", "key", "value")


PROBABILITIES = "probabilities"


class StepState:
    """The sampler step that all layers of one model are at, as an index into their scale sets.

    A step is found by its timestep (the nearest calibrated one) rather than by counting calls, so nothing has
    to be reset between images and another number of steps works. Calls at one timestep (PNDM repeats one)
    share a set.

    Args:
        timesteps: the calibrated timesteps, one per scale set.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(float(t) for t in timesteps)
        self.index: int | None = None

    def set_timestep(self, timestep: Tensor | float) -> None:
        """Go to the calibrated step nearest to a timestep: a number, or a tensor () or (B,) of one value.

        Raises:
            DgqError: the samples of a batch are at different timesteps.
        """
        values = torch.as_tensor(timestep).flatten().tolist()
        if any(value != values[0] for value in values):
            raise DgqError(
                f"one batch holds several timesteps: {sorted(set(values))}",
                hint="per-step scales need one timestep a batch; use --recipe integer",
            )
        self.index = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - values[0]))

    def before_network(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook (with kwargs) of a diffusers network: reads the call's ``timestep``."""
        named = dict(zip(family_of(network).arguments, args, strict=False)) | kwargs
        self.set_timestep(named["timestep"])


class _Float32Buffers(nn.Module):
    """Keeps the named buffers in float32 whatever the model is cast to: rounded, they quantize otherwise."""

    _float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32Buffers:
        before = {name: getattr(self, name) for name in self._float32_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


def activation_plan(grouping: Grouping) -> Plan:
    """{"axis", "groups", "size"} of a calibrated activation."""
    return {"axis": grouping.axis, "groups": grouping.scale.shape[1], "size": len(grouping.index)}


class PaperActivation(_Float32Buffers):
    """Fake-quantizes an activation by its calibrated groups, with the scales of the current step.

    Buffers: ``index`` uint8 (size,), the group of each index of the axis; ``scale`` and ``zero_point``,
    float32 (steps, groups).
    """

    _float32_buffers = ("scale", "zero_point")
    index: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, plan: Plan, bits: int, name: str, state: StepState, device: Device = None) -> None:
        super().__init__()
        if plan["axis"] not in ("channel", "pixel", "tensor") or bits not in range(2, 9):
            raise DgqError(f"{name}: unusable activation plan: {bits} bits, {plan}")
        self.axis: str = plan["axis"]
        self.bits = bits
        self.name = name
        self.state = state
        steps, groups = len(state.timesteps), plan["groups"]
        self.register_buffer("index", torch.zeros(plan["size"], dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(steps, groups, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.zeros(steps, groups, dtype=torch.float32, device=device))

    def load(self, grouping: Grouping) -> None:
        """Fill the buffers."""
        self.index.copy_(grouping.index)
        self.scale.copy_(grouping.scale)
        self.zero_point.copy_(grouping.zero_point)

    def value_checks(self) -> Iterator[tuple[str, Tensor, str]]:
        """As of `checkpoint.values`: (buffer, where it is right, what it is elsewhere)."""
        yield "index", self.index < self.scale.shape[1], "a group that there is not"
        yield "scale", self.scale >= SMALLEST_SCALE, "a scale that is not positive"
        yield "zero_point", self.zero_point == self.zero_point.round(), "a zero point that is no whole number"

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, (B, C) or (..., pixels or tokens, channels), any float dtype.

        Raises:
            DgqError: the current step was never set; or pixels are grouped and x has another number of them.
        """
        if self.state.index is None:
            raise DgqError(f"{self.name}: the sampler step is not set", hint="call the network as a whole")
        dim = AXIS_DIMS.get(self.axis, -1)
        if self.axis == "pixel" and x.shape[dim] != len(self.index):
            raise DgqError(
                f"{self.name}: calibrated for {len(self.index)} pixels or tokens, but got {x.shape[dim]}",
                hint="calibrate at this size or use --recipe integer",
            )
        index = self.index.long()
        scale, zero_point = self.scale[self.state.index][index], self.zero_point[self.state.index][index]
        return fake_quantize(x, scale, zero_point, self.bits, dim)


def layer_geometry(module: nn.Linear | nn.Conv2d | Attention, name: str) -> Plan:
    """The part of a float layer's plan that its architecture fixes.

    Raises:
        DgqError: a convolution whose padding is not explicit zeros, or an attention layer that
            PlainAttnProcessor would not compute as diffusers does.
    """
    if isinstance(module, Attention):
        for feature in ("spatial_norm", "norm_q", "norm_k", "added_kv_proj_dim"):
            if getattr(module, feature) is not None:
                raise DgqError(f"{name}: the paper recipe does not support attention with {feature}")
        if module.inner_kv_dim != module.inner_dim or module.fused_projections or module.is_causal:
            raise DgqError(f"{name}: the paper recipe does not support grouped, fused or causal attention")
        return {"kind": "attention", "cross": module.is_cross_attention}
    if isinstance(module, nn.Linear):
        return {
            "kind": "linear",
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
        }
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise DgqError(f"{name}: the paper recipe supports only convolutions with explicit zero padding")
    return {
        "kind": "conv2d",
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": list(module.kernel_size),
        "stride": list(module.stride),
        "padding": list(module.padding),
        "dilation": list(module.dilation),
        "conv_groups": module.groups,
        "bias": module.bias is not None,
    }


class _PaperWeighted(_Float32Buffers):
    """What PaperLinear and PaperConv2d share: a quantized weight, a bias and a quantized input.

    Buffers: ``weight`` uint8 (N, K) with K = weight elements per output channel, or (N, ceil(K / 2)) where
    4-bit codes are packed in pairs (``pack_nibbles``); ``weight_scale`` and ``weight_zero_point`` float32
    (N,); ``bias`` (N,) or None; ``input.*``, see PaperActivation.

    Args:
        plan: see the module's docstring.
        name: of the layer in its model, for error messages.
        state: the model's step.
        device: of the empty buffers.
    """

    _float32_buffers = ("weight_scale", "weight_zero_point")
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, plan: Plan, name: str, state: StepState, device: Device = None) -> None:
        super().__init__()
        self.wbits: int = plan["wbits"]
        if self.wbits not in (4, 8):
            raise DgqError(f"{name}: {self.wbits!r} is no weight width of the paper recipe (4 or 8)")
        self.weight_shape = self._weight_shape(plan)
        channels, elements = self.weight_shape[0], torch.Size(self.weight_shape[1:]).numel()
        columns = (elements + 1) // 2 if self.wbits == 4 else elements
        self.register_buffer("weight", torch.zeros(channels, columns, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(channels, dtype=torch.float32, device=device))
        self.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(channels, device=device) if plan["bias"] else None)
        self.input = PaperActivation(plan["input"], plan["abits"], name, state, device)

    @staticmethod
    def _weight_shape(plan: Plan) -> tuple[int, ...]:
        raise NotImplementedError

    @classmethod
    def from_float(
        cls,
        module: nn.Linear | nn.Conv2d,
        plan: Plan,
        grouping: Grouping,
        name: str,
        state: StepState,
        weight: QuantizedWeight | None = None,
    ) -> Self:
        """Quantize a float layer by its plan and its input's calibrated grouping; the bias keeps its dtype.

        The weight is rounded to nearest where it is not given.

        Raises:
            DgqError: the weight is not finite.
        """
        if not module.weight.isfinite().all():
            raise DgqError(f"{name}: the weight holds NaN or infinity")
        layer = cls(plan, name, state, module.weight.device)
        codes, scale, zero_point = weight or quantize_weight(module.weight.detach(), layer.wbits)
        codes = codes.flatten(1)
        layer.weight.copy_(pack_nibbles(codes) if layer.wbits == 4 else codes)
        layer.weight_scale.copy_(scale)
        layer.weight_zero_point.copy_(zero_point)
        if module.bias is not None:
            layer.bias = module.bias.detach().clone()
        layer.input.load(grouping)
        return layer

    def value_checks(self) -> Iterator[tuple[str, Tensor, str]]:
        """As of `PaperActivation`."""
        zero_point = self.weight_zero_point
        yield "weight_scale", self.weight_scale >= SMALLEST_SCALE, "a scale that is not positive"
        yield "weight_zero_point", zero_point == zero_point.round(), "a zero point that is no whole number"

    def float_weight(self) -> Tensor:
        """W^, float32 (weight_shape)."""
        elements = torch.Size(self.weight_shape[1:]).numel()
        codes = unpack_nibbles(self.weight, elements) if self.wbits == 4 else self.weight
        return dequantize_weight(codes, self.weight_scale, self.weight_zero_point).view(self.weight_shape)


class PaperLinear(_PaperWeighted):
    """A Linear with the published quantization, simulated: a float product of rounded values."""

    @staticmethod
    def _weight_shape(plan: Plan) -> tuple[int, ...]:
        return plan["out_features"], plan["in_features"]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features), any float dtype -> (..., out_features) of that dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.input(x), self.float_weight().to(x.dtype), bias)


class PaperConv2d(_PaperWeighted):
    """A Conv2d with the published quantization, simulated: a float convolution of rounded values.

    It differs from the published code, which materialises im2col (9 times the activation for a 3x3 kernel)
    and groups its rows or columns. Its rows (c, kh, kw) see channel c shifted by a pixel or two, so their
    ranges are channel c's but for the borders: here the channel axis is the input channel. Its columns are
    output positions, each a window of inputs: here the pixel axis is the input position. In both, the zero
    padding is added after the rounding and stays exactly zero.
    """

    def __init__(self, plan: Plan, name: str, state: StepState, device: Device = None) -> None:
        super().__init__(plan, name, state, device)
        self.stride = tuple(plan["stride"])
        self.padding = tuple(plan["padding"])
        self.dilation = tuple(plan["dilation"])
        self.conv_groups: int = plan["conv_groups"]

    @staticmethod
    def _weight_shape(plan: Plan) -> tuple[int, ...]:
        return plan["out_channels"], plan["in_channels"] // plan["conv_groups"], *plan["kernel_size"]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W), any float dtype -> (B, out_channels, H', W') of that dtype."""
        rounded = pixels_last_to_image(self.input(image_to_pixels_last(x)), x.shape[-2:])
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.float_weight().to(x.dtype)
        return F.conv2d(rounded, weight, bias, self.stride, self.padding, self.dilation, self.conv_groups)


LAYER_TYPES: dict[str, type[_PaperWeighted]] = {"linear": PaperLinear, "conv2d": PaperConv2d}


def image_to_pixels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), the layout of activation quantizers; a view."""
    return x.flatten(2).transpose(1, 2)


def pixels_last_to_image(x: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of ``image_to_pixels_last``: (B, H*W, C) -> (B, C, H, W)."""
    return x.transpose(1, 2).unflatten(2, size)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d); a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class PlainAttnProcessor(nn.Module):
    """diffusers attention processor that computes the probabilities as a tensor, float32, and can change them.

    What it computes is what diffusers' own processor does; subclasses round ``inputs`` and ``probabilities``.

    Args:
        name: of the attention layer, for error messages.
        cross: whether it is cross-attention.
    """

    def __init__(self, name: str, cross: bool) -> None:
        super().__init__()
        self.name = name
        self.cross = cross

    def round_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, float32 (B, heads, T, d), as the products get them."""
        return query, key, value

    def round_probabilities(self, probabilities: Tensor) -> Tensor:
        """One sample's probabilities, float32 (1, heads, queries, keys), as the product with v gets them."""
        return probabilities

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention as diffusers' own processor computes it, but for the rounding.

        Args:
            attn: the layer that calls.
            hidden_states: (B, T, C) or (B, C, H, W).
            encoder_hidden_states: (B, S, C') in cross-attention, else None.
            attention_mask: added to the logits; as ``Attention.prepare_attention_mask`` takes it.
            temb: unused (it serves spatial norms, which are not supported).

        Raises:
            DgqError: cross-attention without text states, or self-attention with them.
        """
        if self.cross != (encoder_hidden_states is not None):
            expected = "needs" if self.cross else "takes no"
            raise DgqError(f"{self.name}: this attention layer {expected} encoder_hidden_states")
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = image_to_pixels_last(hidden_states)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.cross and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)

        query, key, value = (
            split_heads(project(x), attn.heads).float()
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        batch, _, tokens, _ = key.shape
        query, key, value = self.round_inputs(query, key, value)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, tokens).float()

        output = torch.empty_like(query)
        for i in range(batch):  # one sample at a time: the probabilities are the largest tensor of a network
            logits = query[i] @ key[i].transpose(-1, -2) * attn.scale
            if attention_mask is not None:
                logits = logits + attention_mask[i]
            output[i] = self.round_probabilities(logits.softmax(dim=-1)[None])[0] @ value[i]

        output = output.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if residual.ndim == 4:
            output = pixels_last_to_image(output, residual.shape[-2:])
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


class PaperAttnProcessor(PlainAttnProcessor):
    """diffusers attention processor of the ``paper`` recipe, simulated: float products of rounded values.

    q, k and v are fake-quantized by their calibrated groups, and the softmax is float32. Its result is rounded to
    ``d * 2^-q`` with d per sample (``log2_quantize``), and in cross-attention the start token stays apart:
    ``A[:, 0] V^[0] + A^[:, 1:] V^[1:]``, and row 0 of k stays float (DGQ paper). Where the plan has
    "probabilities", as it does with one group, they are rounded in equal steps over their calibrated range
    instead, and the start token is a token like others.

    Args:
        plan: see the module's docstring.
        name: of the attention layer, for error messages.
        state: the model's step.
        device: of the empty buffers.

    Raises:
        DgqError: made without a plan, as diffusers does by the class of a layer's processor.
    """

    quantizes = True  # as measurement asks
    query: PaperActivation
    key: PaperActivation
    value: PaperActivation
    probabilities: PaperActivation | None

    def __init__(
        self, plan: Plan | None = None, name: str = "", state: StepState | None = None, device: Device = None
    ) -> None:
        if plan is None or state is None:
            raise DgqError(
                "attention of the paper recipe is rounded by calibrated ranges, which no other attention has",
                "IP-Adapters and others that exchange it work with checkpoints of the integer recipe",
            )
        super().__init__(name, plan["cross"])
        self.bits: int = plan["abits"]
        for part in ATTENTION_PARTS:
            setattr(self, part, PaperActivation(plan[part], self.bits, f"{name}.{part}", state, device))
        linear = plan.get(PROBABILITIES)
        label = f"{name}.{PROBABILITIES}"
        self.probabilities = None if linear is None else PaperActivation(linear, self.bits, label, state, device)

    @classmethod
    def from_float(
        cls, attn: Attention, plan: Plan, groupings: dict[str, Grouping], name: str, state: StepState
    ) -> Self:
        """The processor of a float attention layer, by the calibrated groupings of the plan's parts."""
        processor = cls(plan, name, state, attn.to_q.weight.device)
        for part, grouping in groupings.items():
            getattr(processor, part).load(grouping)
        return processor

    def round_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fake-quantized; the start token's key is not where log codes keep the token apart."""
        first = int(self.cross and self.probabilities is None)
        key = torch.cat([key[:, :, :first], self.key(key[:, :, first:])], dim=2)
        return self.query(query), key, self.value(value)

    def round_probabilities(self, probabilities: Tensor) -> Tensor:
        """Rounded in equal steps over the calibrated range, or to powers of two."""
        if self.probabilities is not None:
            return self.probabilities(probabilities)
        return log2_quantize(probabilities, self.bits, self.cross)
