"""Modules of a diffusers UNet that hand their neighbours' work to quantized layers: norms, residuals, GEGLU.

The layers can normalize and activate while they quantize, and gate their output or add a residual while the sums are
still in the cache (on the CPU a time embedding too); diffusers' modules do each as a pass over memory of its own.
`fuse` changes the class of the modules that can do better, and nothing of their parameters: names, state_dict and
results stay (results up to the rounding of what is no longer stored between).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from .attention import LogAttnProcessor
from .layer import is_direct


class FusedGEGLU(GEGLU):
    """GEGLU whose projection gates its own output, and normalizes its input."""

    def forward(self, hidden_states: Tensor, *args: Any, norm: nn.Module | None = None, **kwargs: Any) -> Tensor:
        layer: Any = self.proj
        if not is_direct(layer, "linear"):
            plain: Any = super()
            result: Tensor = plain.forward(hidden_states if norm is None else norm(hidden_states))
            return result
        gated: Tensor = layer.gated(hidden_states, norm)
        return gated


class FusedTransformerBlock(BasicTransformerBlock):
    """A transformer block whose first layers normalize and whose last ones add the residuals."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        special = (attention_mask, encoder_attention_mask, cross_attention_kwargs or None, self._chunk_size)
        if self.training or any(value is not None for value in special):
            plain: Any = super()
            result: Tensor = plain.forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
            return result
        x = _attend(self.attn1, self.norm1, hidden_states, None)
        if self.attn2 is not None:
            x = _attend(self.attn2, self.norm2, x, encoder_hidden_states)
        first, *middle, last = (module for module in self.ff.net if not isinstance(module, nn.Dropout))
        hidden = first(x, norm=self.norm3) if isinstance(first, FusedGEGLU) else first(self.norm3(x))
        for module in middle:
            hidden = module(hidden)
        out: Tensor = last(hidden, x) if is_direct(last, "linear") else last(hidden) + x
        return out


def _attend(attention: Any, norm: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    if isinstance(attention.processor, LogAttnProcessor):
        return attention.processor(attention, x, context, residual=x, norm=norm)
    result: Tensor = attention(norm(x), encoder_hidden_states=context)
    return result + x


class FusedTransformer(Transformer2DModel):
    """A transformer over pixels whose projections normalize and add the residual; pixels stay channels-last."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        layer: Any = self.proj_in
        if not is_direct(layer):
            plain: Any = super()
            result: tuple[Tensor, int] = plain._operate_on_continuous_inputs(hidden_states)
            return result
        return layer.over_pixels(hidden_states, self.norm).flatten(1, 2), layer.out_features

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        pixels = hidden_states.reshape(batch_size, height, width, -1)
        if not is_direct(self.proj_out):
            plain: Any = super()
            shape = (batch_size, height, width, inner_dim)
            result: Tensor = plain._get_output_for_continuous_inputs(hidden_states, residual, *shape)
            return result
        if not self.use_linear_projection:
            projected: Tensor = self.proj_out(pixels.permute(0, 3, 1, 2), residual)
            return projected
        moved: Tensor = self.proj_out(pixels, residual.permute(0, 2, 3, 1))
        return moved.permute(0, 3, 1, 2)


class FusedResnetBlock(ResnetBlock2D):
    """A residual block whose convolutions normalize, and add the time embedding and the residual."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.training or not (is_direct(self.conv1, "conv2d") and is_direct(self.conv2, "conv2d")):
            plain: Any = super()
            result: Tensor = plain.forward(input_tensor, temb, *args, **kwargs)
            return result
        embedding = None
        if temb is not None and self.time_emb_proj is not None:
            embedding = self._embed(temb)
        # the CPU engine adds the embedding to its sums, the ops of the second norm to the mean that they subtract
        second: Any = self.conv2
        later = second.fuses(input_tensor.device)
        x = self.conv1(input_tensor, None, None if later else embedding, self.norm1, "silu")
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        out: Tensor = second(x, shortcut, None, self.norm2, "silu", embedding if later else None)
        return out

    def _embed(self, temb: Tensor) -> Tensor:
        layer: Any = self.time_emb_proj
        if self.skip_time_act or not is_direct(layer, "linear"):
            plain: Tensor = layer(temb if self.skip_time_act else self.nonlinearity(temb))
            return plain
        embedding: Tensor = layer(temb, activation="silu")
        return embedding


class FusedTimestepEmbedding(TimestepEmbedding):
    """An embedding of the time whose second layer activates its input."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        first: Any = self.linear_1
        last: Any = self.linear_2
        post: Any = self.post_act
        if self.training or condition is not None or not is_direct(last, "linear"):
            plain: Any = super()
            result: Tensor = plain.forward(sample, condition)
            return result
        out: Tensor = last(first(sample), activation="silu")
        return out if post is None else post(out)


def _fused_class(module: Any) -> type[nn.Module] | None:
    """The class to change to. Exact types only: a subclass has a forward of its own."""
    kind = type(module)
    if kind is GEGLU and is_direct(module.proj, "linear"):
        return FusedGEGLU
    if kind is TimestepEmbedding and type(module.act) is nn.SiLU and is_direct(module.linear_2, "linear"):
        return FusedTimestepEmbedding
    if kind is BasicTransformerBlock:
        plain = module.norm_type == "layer_norm" and module.pos_embed is None and not module.only_cross_attention
        layers = [x for x in module.ff.net if not isinstance(x, nn.Dropout)] if type(module.ff) is FeedForward else []
        return FusedTransformerBlock if plain and layers and is_direct(layers[-1], "linear") else None
    if kind is Transformer2DModel:
        return FusedTransformer if module.is_input_continuous and is_direct(module.proj_out) else None
    if kind is ResnetBlock2D:
        plain = (
            module.time_embedding_norm == "default" and module.output_scale_factor == 1
            and module.upsample is None and module.downsample is None and type(module.nonlinearity) is nn.SiLU
        )  # fmt: skip
        both = is_direct(module.conv1, "conv2d") and is_direct(module.conv2, "conv2d")
        return FusedResnetBlock if plain and both else None
    return None


def fuse(unet: nn.Module) -> None:
    """Change the class of every module of a quantized UNet that can leave work to its quantized layers, in place."""
    for module in unet.modules():
        fused = _fused_class(module)
        if fused is not None:
            module.__class__ = fused
