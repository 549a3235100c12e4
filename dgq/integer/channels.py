"""Where a group is formed: outliers among input channels, handled layer by layer (docs/method.md, item 2).

One of these; that of least measured error of the layer's output, the last left aside, unless one is asked for:
- none: channels stay as they are; the row-wise scale alone carries outliers.
- smooth: x[k] / c[k] and W[:, k] * c[k] with c = max(1, rms / median rms)^0.5, before weights are quantized.
- rotate: not by channel but by blocks of them: x and the rows of W times one orthogonal matrix, which spreads what
  is large in one channel over its block (a regular Hadamard matrix, as ConvRot has it, arXiv 2512.03673). After
  "smooth" has divided; alone where it is asked for.
- shift: c[k] = 2^e[k], e = round(log2(rms / median rms)) in 0..2; the channels of one e form one DGQ group.
  With int8 weights the grid of W is untouched and a group's products are shifted by e in the accumulator; with int4
  weights W * 2^e is quantized with the channels sorted by e, so that no sub-scale serves two groups.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dgq_kernels.quantize_activation.reference import quantize_rows, sample_codes
from dgq_kernels.rotation import BLOCKS, rotate

from ..recipe import LayerPlan

MAX_EXPONENT = 2


@dataclass
class ChannelGroups:
    """How a layer treats its input channels.

    Attributes:
        mode: "none", "smooth" or "shift"; "none" and "smooth" also before a rotation.
        divisor: float32 (C,), x is divided by it.
        order: int64 (C,), the stored order of channels (sorted by exponent for "shift"), or None.
        class_ends: ends of the shift classes in stored order where the accumulator shifts, else [C].
        rotation: channels of a block that is rotated after the division, 0 for none; without an order.
    """

    mode: Literal["none", "smooth", "shift"]
    divisor: Tensor
    order: Tensor | None
    class_ends: list[int]
    rotation: int = 0

    @property
    def shifts_accumulator(self) -> bool:
        """Whether weights keep their own grid and the products are shifted (int8 weights)."""
        return len(self.class_ends) > 1

    @property
    def folded(self) -> Tensor:
        """What multiplies the weight's channels before rounding, float32 (C,): ones where the accumulator shifts."""
        return torch.ones_like(self.divisor) if self.shifts_accumulator else self.divisor

    @property
    def stored_order(self) -> Tensor:
        """The channel stored at each place, int64 (C,)."""
        return torch.arange(self.class_ends[-1]) if self.order is None else self.order

    def fold(self, weight: Tensor) -> Tensor:
        """The matrix (N, K) that is rounded: the weight, divisor and rotation folded in, channels in stored order."""
        folded = weight * _along_channels(self.folded, weight)
        return to_matrix(rotate_channels(folded, self.rotation)[:, self.stored_order])

    def unfold(self, matrix: Tensor, plan: LayerPlan) -> Tensor:
        """Inverse of `fold`: the float weight that a rounded matrix (N, K) stands for."""
        stored = from_matrix(matrix, plan)
        natural = torch.empty_like(stored)
        natural[:, self.stored_order] = stored
        natural = rotate_channels(natural, self.rotation)
        return natural / _along_channels(self.folded, natural)

    def class_of(self) -> Tensor:
        """The shift class int64 (C,) of each channel in stored order."""
        result = torch.zeros(self.class_ends[-1], dtype=torch.int64)
        for end in self.class_ends[:-1]:
            result[end:] += 1
        return result


def _along_channels(values: Tensor, weight: Tensor) -> Tensor:
    """values (C,) shaped to broadcast over the input channels of a weight (N, C) or (N, C, kh, kw)."""
    return values.view([1, -1] + [1] * (weight.dim() - 2))


def rotate_channels(x: Tensor, block: int, axis: int = 1) -> Tensor:
    """An axis of x rotated in blocks, 0 for none; its own inverse. Differentiable."""
    return x if not block else rotate(x.movedim(axis, -1), block).movedim(-1, axis)


def rotation_block(channels: int) -> int:
    """The largest block that a number of channels can be rotated in; 0 where there is none."""
    return next((block for block in reversed(BLOCKS) if channels % block == 0), 0)


def no_groups(channels: int) -> ChannelGroups:
    """Channels as they are."""
    return ChannelGroups("none", torch.ones(channels), None, [channels])


def form_groups(mode: str, rms: Tensor, wbits: int, largest: int = MAX_EXPONENT) -> ChannelGroups:
    """Form the groups of one mode from the channels' root mean square, float32 (C,); exponents go up to `largest`."""
    channels = rms.shape[0]
    if mode == "none":
        return no_groups(channels)
    positive = rms[rms > 0]
    median = positive.median() if positive.numel() else torch.tensor(1.0)
    ratio = rms / median
    if mode == "smooth":
        return ChannelGroups("smooth", ratio.clamp(min=1).sqrt(), None, [channels])
    exponent = ratio.clamp(min=1e-6).log2().round().clamp(0, largest).long()
    if not exponent.any():
        return no_groups(channels)
    order = torch.argsort(exponent, stable=True)
    ends = [int((exponent <= e).sum()) for e in range(largest + 1)] if wbits == 8 else [channels]
    return ChannelGroups("shift", 2.0**exponent, order, ends)


def to_matrix(weight: Tensor) -> Tensor:
    """A layer's weight as (N, K): (N, C) as it is, (N, C, kh, kw) as (N, kh * kw * C)."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def from_matrix(matrix: Tensor, plan: LayerPlan) -> Tensor:
    """Inverse of `to_matrix` for a planned layer: (N, C), or (N, C, kh, kw) for a convolution with taps."""
    if plan.kind != "conv2d":
        return matrix
    k = plan.kernel_size
    return matrix.view(plan.out_features, k, k, plan.in_features).permute(0, 3, 1, 2)


def apply_layer(x: Tensor, weight: Tensor, plan: LayerPlan) -> Tensor:
    """The float layer without its bias: x (M, C) and weight (N, C), or x (B, C, H, W) and weight (N, C, kh, kw)."""
    if plan.kind != "conv2d":
        return x @ weight.t()
    return torch.nn.functional.conv2d(x, weight, stride=plan.stride, padding=plan.padding)


def fake_quantize_input(x: Tensor, bits: int, divisor: Tensor, rotation: int = 0) -> Tensor:
    """x after the run-time quantizer and back: rows of (M, C), samples of (B, C, H, W)."""
    x = rotate_channels(x * _along_channels(1 / divisor, x), rotation)
    quantized = quantize_rows(x, bits, None) if x.dim() == 2 else sample_codes(x.float(), bits)
    codes, scale, zero = quantized[0].float(), *(one.view(-1, *[1] * (x.dim() - 1)) for one in quantized[1:])
    return rotate_channels((codes - zero) * scale, rotation) * _along_channels(divisor, x)


def worth(groups: ChannelGroups) -> float:
    """The share of the output error that a handling has to take away, for what it costs at run time: a multiplication
    and eight additions a value at most."""
    return 0.0 if groups.mode == "none" and not groups.rotation else 0.05


def candidates(mode: str, rms: Tensor, wbits: int) -> list[ChannelGroups]:
    """The groups to choose from: for "auto" the channels as they are, "smooth", and a rotation after "smooth" where a
    block divides them; else the one mode, or the channels as they are.

    Args:
        mode: "auto" or one mode.
        rms: float32 (C,), root mean square of the input channels.
        wbits: bits of the weight.
    """
    plain, block = no_groups(len(rms)), rotation_block(len(rms))
    if mode == "rotate":
        return [dataclasses.replace(plain, rotation=block)]
    if mode != "auto":
        return [form_groups(mode, rms, wbits)]
    smooth = form_groups("smooth", rms, wbits)
    return [plain, smooth, *([dataclasses.replace(smooth, rotation=block)] if block else [])]
