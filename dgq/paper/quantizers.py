"""The quantizers of the DGQ paper (section 1 of docs/method.md), as functions of tensors.

Weights: asymmetric codes per output channel. Activations: K-means groups along the channel or the
pixel/token axis. Attention probabilities: powers of two below a maximum taken at run time, the start token's
column apart; with one group, the published baseline, an activation like others.

One difference from the published code: a layer keeps one axis and one grouping for all sampler steps, and
only the ranges of its groups change from step to step; published, the axis and the groups are chosen anew at
every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgq.errors import DgqError
from dgq.range_search import affine_parameters, search_asymmetric

# Where an axis lies in an activation laid out as (..., pixels or tokens, channels).
AXIS_DIMS = {"channel": -1, "pixel": -2}


_KMEANS_ITERATIONS = 100


QuantizedWeight = tuple[Tensor, Tensor, Tensor]  # codes, scale and zero point, as `quantize_weight` gives them


def weight_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point per output channel, over the range found by ``search_asymmetric``.

    Args:
        weight: (N, ...), a Linear's or a convolution's weight, any float dtype.
        bits: code width, at most 8.

    Returns:
        scale float32 (N,), zero_point float32 (N,) holding whole numbers.
    """
    return affine_parameters(*search_asymmetric(weight.flatten(1), bits), bits)


def quantize_weight(weight: Tensor, bits: int) -> QuantizedWeight:
    """Asymmetric codes per output channel on the ``weight_grid``, rounded to nearest.

    Args:
        weight: (N, ...), a Linear's or a convolution's weight, any float dtype.
        bits: code width, at most 8.

    Returns:
        codes uint8 of weight's shape, scale float32 (N,), zero_point float32 (N,) holding whole numbers.
    """
    rows = weight.float().flatten(1)
    scale, zero_point = weight_grid(rows, bits)
    codes = rows.div(scale[:, None]).round_().add_(zero_point[:, None]).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8).view(weight.shape), scale, zero_point


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(codes - zero_point) * scale per output channel: codes (N, ...), scale and zero_point (N,); float32."""
    shape = (-1,) + (1,) * (codes.ndim - 1)
    return (codes - zero_point.view(shape)) * scale.view(shape)


class AxisRanges:
    """Running minimum and maximum of one activation, per sampler step and per index of its candidate axes.

    Activations are (..., pixels or tokens, channels) and get the axes ``channel`` and ``pixel``; 2-D ones
    (batch, channels), those of the time embedding, have neither and get the axis ``tensor`` of one index.

    Args:
        name: the layer's, for error messages.
        steps: number of sampler steps.
        ragged: take inputs of other sizes too, such as texts; every step has to see the largest.
    """

    def __init__(self, name: str, steps: int, ragged: bool = False) -> None:
        self.name, self.steps, self.ragged = name, steps, ragged
        self.low: dict[str, Tensor] = {}  # axis -> float32 (steps, size)
        self.high: dict[str, Tensor] = {}

    def update(self, step: int, x: Tensor) -> None:
        """Fold in x, (B, C) or (..., P, C), seen at a step.

        Raises:
            DgqError: x has another number of pixels or channels than before.
        """
        if x.ndim == 2:
            self._fold("tensor", step, *(bound.view(1) for bound in torch.aminmax(x)))
            return
        for axis, dim in AXIS_DIMS.items():
            others = tuple(d for d in range(x.ndim) if d != x.ndim + dim)
            self._fold(axis, step, x.amin(dim=others), x.amax(dim=others))

    def _fold(self, axis: str, step: int, low: Tensor, high: Tensor) -> None:
        if axis not in self.low:
            empty = torch.full((self.steps, len(low)), torch.inf, device=low.device)
            self.low[axis], self.high[axis] = empty, -empty
        if self.ragged:
            size = max(len(low), self.low[axis].shape[1])
            low, self.low[axis] = (_grown(one, size, torch.inf) for one in (low, self.low[axis]))
            high, self.high[axis] = (_grown(one, size, -torch.inf) for one in (high, self.high[axis]))
        elif len(low) != self.low[axis].shape[1]:
            raise DgqError(
                f"{self.name}: calibration inputs differ in size along the {axis} axis "
                f"({self.low[axis].shape[1]} and {len(low)})",
                hint="record every prompt at one image size",
            )
        self.low[axis][step] = torch.minimum(self.low[axis][step], low.float())
        self.high[axis][step] = torch.maximum(self.high[axis][step], high.float())


def _grown(bounds: Tensor, size: int, value: float) -> Tensor:
    """Bounds (..., P) of `size` indices, those that are not there yet with a value."""
    return nn.functional.pad(bounds, (0, size - bounds.shape[-1]), value=value)


@dataclass(frozen=True)
class Grouping:
    """How one activation is quantized.

    Attributes:
        axis: "channel", "pixel" or "tensor" (one index, one group).
        index: int64 (size,), the group of each index of the axis, 0 .. groups - 1, every group in use.
        scale, zero_point: float32 (steps, groups).
    """

    axis: str
    index: Tensor
    scale: Tensor
    zero_point: Tensor


def axis_spread(low: Tensor, high: Tensor) -> float:
    """How much the ranges (m_i, M_i) differ along an axis: (max M - min M) + (max m - min m) (DGQ paper).

    Summed over the steps, because here an axis is chosen once. low, high: float32 (steps, size).
    """
    return float(sum((bound.amax(dim=1) - bound.amin(dim=1)).sum() for bound in (low, high)))


def kmeans(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Lloyd's K-means from a seeded k-means++ start: the same labels for the same points and seed.

    Args:
        points: (n, features), any float dtype; computed in float64 on the CPU.
        clusters: how many at most; fewer come back where fewer points are distinct.
        seed: of the k-means++ draw.

    Returns:
        int64 (n,) on points' device: labels 0 .. found - 1, each in use.
    """
    data = points.double().cpu()
    centres = _spread_out_points(data, clusters, torch.Generator().manual_seed(seed))
    labels = torch.full((len(data),), -1)
    for _ in range(_KMEANS_ITERATIONS):
        # Exact distances: the matrix-product form would lose the small ones beside an outlier.
        nearest = torch.cdist(data, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        members = torch.bincount(labels, minlength=len(centres))[:, None]
        means = torch.zeros_like(centres).index_add_(0, labels, data) / members
        centres = torch.where(members > 0, means, centres)
    return labels.unique(return_inverse=True)[1].to(points.device)


def _spread_out_points(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is drawn in proportion to its squared distance from those already drawn."""
    chosen = [int(torch.randint(len(data), (1,), generator=generator))]
    distance = (data - data[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count and distance.max() > 0:
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, (data - data[chosen[-1]]).square().sum(dim=1))
    return data[chosen]


def group_activation(ranges: AxisRanges, bits: int, groups: int, seed: int = 0) -> Grouping:
    """Choose the axis, group its indices and set the groups' scales per step.

    The axis is the one of larger ``axis_spread``. K-means runs on one point per index, its (m_i, M_i) at
    every step side by side, so that the one grouping serves all steps; a group's range at a step runs from
    the least m_i to the greatest M_i of its members. ``groups = 1`` is the per-tensor baseline.

    Args:
        ranges: what calibration saw.
        bits: activation code width.
        groups: number of groups at most.
        seed: of K-means.

    Raises:
        DgqError: a step saw no input, or one that is not finite.
    """
    for bound in (*ranges.low.values(), *ranges.high.values()):
        if not bound.isfinite().all():
            step = int((~bound.isfinite()).any(dim=1).nonzero()[0])
            raise DgqError(
                f"{ranges.name}: no finite range at calibration step {step}",
                hint="the layer did not run at that step, or its input overflowed: calibrate in float32",
            )
    if not ranges.low:
        raise DgqError(f"{ranges.name}: the layer never ran during calibration")
    axis = max(ranges.low, key=lambda name: axis_spread(ranges.low[name], ranges.high[name]))
    low, high = ranges.low[axis], ranges.high[axis]
    if groups == 1:
        index = torch.zeros(low.shape[1], dtype=torch.int64, device=low.device)
    else:
        index = kmeans(torch.cat([low, high]).T, groups, seed)
    if index.max() == 0:  # one group: which axis it runs along no longer matters, nor does that axis's size
        axis, index = "tensor", index[:1]
        low, high = low.amin(dim=1, keepdim=True), high.amax(dim=1, keepdim=True)
    found = int(index.max()) + 1
    group_low = torch.stack([low[:, index == g].amin(dim=1) for g in range(found)], dim=1)
    group_high = torch.stack([high[:, index == g].amax(dim=1) for g in range(found)], dim=1)
    scale, zero_point = affine_parameters(group_low, group_high, bits)
    return Grouping(axis, index, scale, zero_point)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dim: int) -> Tensor:
    """Round x to its codes and back: ``q = clamp(round(x / s) + z, 0, 2^bits - 1)``, ``x^ = (q - z) * s``.

    Args:
        x: any float dtype; computed in float32.
        scale, zero_point: float32 (size,) along x's dimension ``dim``, or (1,) for the whole tensor.
        bits: code width.

    Returns:
        x^, of x's shape and dtype.
    """
    shape = [1] * x.ndim
    shape[dim] = -1
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    codes = (x.float() / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def log2_codes(probabilities: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the base-2 logarithmic quantizer: ``q = clamp(round(-log2(A / d)), 0, 2^bits - 1)``.

    d, the largest probability, is taken per sample at run time (DGQ paper, which takes it over the whole
    batch: an image then depends on the others made with it). A probability of 0 gets the top code.

    Args:
        probabilities: A, float32 (B, ...).
        bits: code width, at most 8.

    Returns:
        codes uint8 of A's shape, d float32 (B,).
    """
    largest = probabilities.flatten(1).amax(dim=1)
    safe = torch.where(largest > 0, largest, 1.0).view((-1,) + (1,) * (probabilities.ndim - 1))
    codes = (probabilities / safe).log2_().neg_().round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), largest


def log2_quantize(probabilities: Tensor, bits: int, start_token: bool) -> Tensor:
    """Attention probabilities rounded to ``d * 2^-q`` (``log2_codes``), for a float product (DGQ paper).

    Args:
        probabilities: A, float32 (B, heads, queries, keys).
        bits: code width, at most 8.
        start_token: True in cross-attention: column 0 stays as it is, and d is taken over the others.

    Returns:
        A^, float32 of A's shape.
    """
    first = int(start_token)
    codes, largest = log2_codes(probabilities[..., first:], bits)
    quantized = codes.float().neg_().exp2_().mul_(largest.view(-1, 1, 1, 1))
    return torch.cat([probabilities[..., :1], quantized], dim=-1) if start_token else quantized


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the earlier in the low nibble: uint8 (N, K) -> uint8 (N, ceil(K / 2))."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, length: int) -> Tensor:
    """The inverse of ``pack_nibbles``: uint8 (N, ceil(length / 2)) -> uint8 (N, length)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :length]
