"""Modules of a diffusers UNet that hand their neighbours' work to quantized layers: norms, residuals, GEGLU.

The layers can normalize and activate while they quantize, and gate their output or add a residual while the sums are
still in the cache (on the CPU a time embedding too); diffusers' modules do each as a pass over memory of its own.
`skeleton.fuse` changes the class of the modules that can do better, by `FUSED`, and nothing of their parameters:
names, state_dict and results stay (results up to the rounding of what is no longer stored between). `after_norm` of a
class are the layers that take in the norm or the activation before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from .adapters import Adapted, direct
from .attention import LogAttnProcessor
from .halves import half, repeated, twice
from .layer import IntegerLayer, is_direct
from .prepared import hooks_within, is_hooked


class FusedGEGLU(GEGLU):
    """GEGLU whose projection gates its own output, and normalizes its input."""

    after_norm = ("proj",)

    def forward(self, hidden_states: Tensor, *args: Any, norm: nn.Module | None = None, **kwargs: Any) -> Tensor:
        layer = direct(self.proj, "linear")
        if layer is None:
            plain: Any = super()
            result: Tensor = plain.forward(hidden_states if norm is None else norm(hidden_states))
            return result
        return layer.gated(hidden_states, norm)


class FusedTransformerBlock(BasicTransformerBlock):
    """A transformer block whose first layers normalize and whose last ones add the residuals."""

    after_norm = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ff.net.2")

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
        net = list(self.ff.net)
        passed_by = hooks_within(self, "attn1", "attn2", "ff") or is_hooked(
            *[module for module in net if isinstance(module, nn.Dropout)]
        )
        if self.training or passed_by or any(value is not None for value in special):
            plain: Any = super()
            result: Tensor = plain.forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return result
        x = attend(self.attn1, self.norm1, hidden_states, None)
        if self.attn2 is not None:
            x = attend(self.attn2, self.norm2, x, encoder_hidden_states)
        first, *middle, last = (module for module in net if not isinstance(module, nn.Dropout))
        # a hook of offloading around the projection would move the norm too
        fused = isinstance(first, FusedGEGLU) and not is_hooked(first) and direct(first.proj, "linear") is not None
        hidden = first(x, norm=self.norm3) if fused else first(self.norm3(x))
        for module in middle:
            hidden = module(hidden)
        layer = direct(last, "linear")
        out: Tensor = last(hidden) + x if layer is None else layer(hidden, x)
        return out


def attend(attention: Any, norm: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """x plus the attention of its norm, to the context or to itself."""
    if isinstance(attention.processor, LogAttnProcessor) and not is_hooked(attention):
        if context is None and repeated(x) and not _hooked_inside(attention, norm):
            return twice(attention.processor(attention, half(x), residual=half(x), norm=norm))
        return attention.processor(attention, x, context, residual=x, norm=norm)
    result: Tensor = attention(norm(x), encoder_hidden_states=context)
    return result + x


def _hooked_inside(attention: Any, norm: nn.Module) -> bool:
    return hooks_within(attention, "to_q", "to_k", "to_v") or is_hooked(norm, *attention.to_out)


class FusedTransformer(Transformer2DModel):
    """A transformer over pixels whose projections normalize and add the residual; pixels stay channels-last."""

    after_norm = ("proj_in",)

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        layer = direct(self.proj_in)
        if layer is None:
            plain: Any = super()
            result: tuple[Tensor, int] = plain._operate_on_continuous_inputs(hidden_states)
            return result
        if repeated(hidden_states) and not hooks_within(self, "norm"):
            projected = twice(layer.over_pixels(half(hidden_states), self.norm))
        else:
            projected = layer.over_pixels(hidden_states, self.norm)
        return projected.flatten(1, 2), self.proj_in.out_features

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        pixels = hidden_states.reshape(batch_size, height, width, -1)
        layer = direct(self.proj_out)
        if layer is None:
            plain: Any = super()
            shape = (batch_size, height, width, inner_dim)
            result: Tensor = plain._get_output_for_continuous_inputs(hidden_states, residual, *shape)
            return result
        if not self.use_linear_projection:
            projected: Tensor = layer(pixels.permute(0, 3, 1, 2), residual)
            return projected
        moved: Tensor = layer(pixels, residual.permute(0, 2, 3, 1))
        return moved.permute(0, 3, 1, 2)


class FusedResnetBlock(ResnetBlock2D):
    """A residual block whose convolutions normalize, and add the time embedding and the residual."""

    after_norm = ("conv1", "conv2", "time_emb_proj")

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        layers = self.layers()
        if layers is None:
            plain: Any = super()
            result: Tensor = plain.forward(input_tensor, temb, *args, **kwargs)
            return result
        first, second = layers
        embedding = None
        if temb is not None and self.time_emb_proj is not None:
            embedding = self._embed(temb)
        once = repeated(input_tensor, embedding)
        if once:
            input_tensor, embedding = half(input_tensor), None if embedding is None else half(embedding)
        # the CPU engine adds the embedding to its sums, the ops of the second norm to the mean that they subtract
        later = second.fuses(input_tensor.device)
        hidden, residual = self.begin(first, input_tensor, None if later else embedding)
        result = self.finish(second, hidden, residual, embedding if later else None)
        return twice(result) if once else result

    def layers(self) -> tuple[IntegerLayer | Adapted, IntegerLayer | Adapted] | None:
        """The two convolutions where the block leaves its work to them."""
        if self.training or hooks_within(self, "norm1", "norm2", "nonlinearity", "dropout", "conv_shortcut"):
            return None
        first, second = direct(self.conv1, "conv2d"), direct(self.conv2, "conv2d")
        return None if first is None or second is None else (first, second)

    def begin(
        self,
        first: IntegerLayer | Adapted,
        x: Tensor,
        embedding: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The first convolution's result, with `in_place` in the memory of x where it fits, and the residual, which may
        be x, and then stays."""
        residual: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return first(x, None, embedding, self.norm1, "silu", in_place=in_place and residual is not x), residual

    def finish(
        self,
        second: IntegerLayer | Adapted,
        hidden: Tensor,
        residual: Tensor,
        offset: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """The block's result of what `begin` gave, with `in_place` in the memory of the residual."""
        return second(hidden, residual, None, self.norm2, "silu", offset, in_place)

    def _embed(self, temb: Tensor) -> Tensor:
        layer = direct(self.time_emb_proj, "linear")
        if self.skip_time_act or layer is None:
            known: Any = self.time_emb_proj
            plain: Tensor = known(temb if self.skip_time_act else self.nonlinearity(temb))
            return plain
        return layer(temb, activation="silu")


class FoldedUpsample(Upsample2D):
    """A 3x3 convolution of a picture twice as large as its input: four 2x2 ones of the input itself, one for each place
    in a square of equal pixels, in which taps that meet the same pixel are one. 16 products where there were 36."""

    after_norm = ()

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self.conv
        if is_direct(conv):
            upsampled: Tensor = conv.upsample(hidden_states, output_size)
            return upsampled
        # what is around a layer is given what the float one is
        plain: Any = super()
        result: Tensor = plain.forward(hidden_states, output_size, *args, **kwargs)
        return result


class FusedTimestepEmbedding(TimestepEmbedding):
    """An embedding of the time whose second layer activates its input."""

    after_norm = ("linear_2",)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        first: Any = self.linear_1
        last = direct(self.linear_2, "linear")
        post: Any = self.post_act
        if self.training or condition is not None or last is None or is_hooked(self.act):
            plain: Any = super()
            result: Tensor = plain.forward(sample, condition)
            return result
        out: Tensor = last(first(sample), activation="silu")
        return out if post is None else post(out)


def upsampled(network: nn.Module) -> set[str]:
    """The convolutions of a float network that `FoldedUpsample` may run: `Family.upsampled`."""
    return {f"{name}.conv" for name, module in network.named_modules() if type(module) is Upsample2D and folds(module)}


def folds(module: Any) -> bool:
    """Whether an Upsample2D is a nearest upsampling and a 3x3 convolution, which is a float one or upsamples itself."""
    conv = module.conv if module.name == "conv" else None
    if isinstance(conv, IntegerLayer):
        return conv.plan.upsampled
    plain = type(conv) is nn.Conv2d and (conv.kernel_size, conv.padding) == ((3, 3), (1, 1))
    return plain and module.interpolate and module.norm is None


def _timestep_embedding(module: Any) -> bool:
    return type(module.act) is nn.SiLU and is_direct(module.linear_2, "linear")


def plain_transformer_block(module: Any) -> bool:
    """Whether a BasicTransformerBlock is two attentions and a feed-forward network, a LayerNorm before each."""
    return module.norm_type == "layer_norm" and module.pos_embed is None and not module.only_cross_attention


def _transformer_block(module: Any) -> bool:
    layers = [x for x in module.ff.net if not isinstance(x, nn.Dropout)] if type(module.ff) is FeedForward else []
    return plain_transformer_block(module) and bool(layers) and is_direct(layers[-1], "linear")


def plain_resnet(module: Any) -> bool:
    """Whether a ResnetBlock2D is twice norm, SiLU and convolution, with the time's embedding added between them where
    there is one."""
    # where there is none, a VAE's blocks call what they would do with it by another name
    embedded = module.time_embedding_norm == "default" or module.time_emb_proj is None
    return (
        embedded
        and module.output_scale_factor == 1
        and module.upsample is None
        and module.downsample is None
        and type(module.nonlinearity) is nn.SiLU
    )


def _resnet_block(module: Any) -> bool:
    return plain_resnet(module) and is_direct(module.conv1, "conv2d") and is_direct(module.conv2, "conv2d")


# diffusers' class -> (whether a module can leave work to its quantized layers, the class that does)
FUSED: dict[type[nn.Module], tuple[Callable[[Any], bool], Any]] = {
    GEGLU: (lambda module: is_direct(module.proj, "linear"), FusedGEGLU),
    TimestepEmbedding: (_timestep_embedding, FusedTimestepEmbedding),
    BasicTransformerBlock: (_transformer_block, FusedTransformerBlock),
    Transformer2DModel: (
        lambda module: module.is_input_continuous and is_direct(module.proj_out),
        FusedTransformer,
    ),
    ResnetBlock2D: (_resnet_block, FusedResnetBlock),
    Upsample2D: (lambda module: folds(module) and isinstance(module.conv, IntegerLayer), FoldedUpsample),
}
