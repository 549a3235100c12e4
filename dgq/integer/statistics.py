"""Second moments and samples of what the layers of a float model read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..progress import silent
from ..recipe import LayerPlan
from ..replay import replay
from .plan import GPTQ_MAX_REDUCTION, SAMPLE_PICTURES, SAMPLE_ROWS

if TYPE_CHECKING:
    from ..progress import Progress
    from .plan import Layer


class Statistics:
    """Streamed statistics of one layer's input.

    Attributes:
        moment: float32 (K, K), sum of x x^T in the order of `to_matrix`, or None where K is too long.
        mean_square: float32 (C,), of the input channels.
        samples: (M, C) or (B, C, H, W), evenly drawn from the calls.
    """

    def __init__(self, plan: LayerPlan, calls: int) -> None:
        self.plan = plan
        k = plan.reduction
        self.moment = torch.zeros(k, k) if k <= GPTQ_MAX_REDUCTION else None
        self._squares = torch.zeros(plan.in_features)
        self._channel_count = 0
        self.count = 0
        per_call = (SAMPLE_PICTURES if plan.kind == "conv2d" else SAMPLE_ROWS) / calls
        self._quota, self._per_call = 0.0, per_call
        self._samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Add one call's input: (..., C) for a linear layer, (B, C, H, W) otherwise."""
        plan = self.plan
        if plan.kind == "pointwise":
            x = x.permute(0, 2, 3, 1)
        x = x.detach().float()
        if plan.kind != "conv2d":
            x = x.reshape(-1, plan.in_features)
        self._draw(x)
        channels = x if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(0, 2)
        self._squares = self._squares.to(x.device) + channels.square().sum(0)
        self._channel_count += channels.shape[0]
        columns = x if x.dim() == 2 else self._columns(x)
        self.count += columns.shape[0]
        if self.moment is not None:
            self.moment = self.moment.to(x.device).addmm_(columns.t(), columns)

    def _columns(self, x: Tensor) -> Tensor:
        """im2col rows (B * Ho * Wo, K) in the order (kh, kw, C) of `to_matrix`."""
        plan = self.plan
        unfolded = nn.functional.unfold(x, plan.kernel_size, padding=plan.padding, stride=plan.stride)
        batch, _, pixels = unfolded.shape
        taps = unfolded.view(batch, plan.in_features, -1, pixels).permute(0, 3, 2, 1)
        return taps.reshape(batch * pixels, -1)

    def _draw(self, x: Tensor) -> None:
        self._quota += self._per_call
        take = min(int(self._quota), x.shape[0])
        if take:
            self._quota -= take
            index = torch.randperm(x.shape[0], generator=self._generator)[:take]
            self._samples.append(x[index.to(x.device)].clone())

    @property
    def samples(self) -> Tensor:
        return torch.cat(self._samples)

    @property
    def mean_square(self) -> Tensor:
        return self._squares / self._channel_count


def gather(
    unet: nn.Module, layers: Iterable[Layer], calls: Sequence[dict[str, Any]], progress: Progress = silent
) -> dict[str, Statistics]:
    """Replay recorded calls, on any device, through the float UNet and gather the statistics of some layers."""
    gathered = {layer.name: Statistics(layer.plan, len(calls)) for layer in layers}

    def hook(layer: Layer) -> Any:
        return layer.module.register_forward_pre_hook(lambda _, args: gathered[layer.name].add(layer.own(args[0])))

    told: Any = lambda done, total: progress("statistics", done, total, f"call {done}")  # noqa: E731
    replay(unet, calls, map(hook, layers), told)
    return gathered
