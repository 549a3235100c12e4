"""Second moments and samples of what the layers of a float model read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..progress import silent
from ..recipe import LayerPlan
from ..replay import Enough, replay
from .plan import GPTQ_MAX_REDUCTION, SAMPLE_PICTURES, SAMPLE_ROWS

if TYPE_CHECKING:
    from ..progress import Progress
    from .plan import Layer


# Height and width of what is taken of larger pictures: those of a decoder's last layers have a hundred times as many
# pixels as second moments need, and their taps would fill the memory.
WINDOW = 64

# Rows of the second moments that are summed up together, from the diagonal on: the rest is symmetric.
MOMENT_ROWS = 512


class Statistics:
    """Streamed statistics of one input, of the layers that read it.

    Args:
        plan: of such a layer.
        calls: how often something is added.
        moments: whether second moments are summed up.

    Attributes:
        mean_square: float32 (C,), of the input channels.
        samples: (M, C) or (B, C, H, W), evenly drawn from the calls.
    """

    def __init__(self, plan: LayerPlan, calls: int, moments: bool = True) -> None:
        self.plan = plan
        k = plan.reduction
        self._whole: Tensor | None = None
        # row blocks of the upper triangle, the first of them (MOMENT_ROWS, K)
        starts = range(0, k, MOMENT_ROWS) if moments and k <= GPTQ_MAX_REDUCTION else ()
        self._triangle = [torch.zeros(min(MOMENT_ROWS, k - start), k - start) for start in starts]
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
        padding = (0, 0)
        if plan.kind != "linear":
            down, across = (plan.padding if side <= WINDOW else 0 for side in x.shape[2:])  # a window's edges have none
            padding, x = (down, across), self._window(x)
        if plan.kind == "pointwise":
            x = x.permute(0, 2, 3, 1)
        x = x.detach().float()
        if plan.kind != "conv2d":
            x = x.reshape(-1, plan.in_features)
        self._draw(x)
        channels = x if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(0, 2)
        self._squares = self._squares.to(x.device) + channels.square().sum(0)
        self._channel_count += channels.shape[0]
        columns = x if x.dim() == 2 else self._columns(x, padding)
        self.count += columns.shape[0]
        for i, block in enumerate(self._triangle):
            start = i * MOMENT_ROWS
            part = columns[:, start : start + len(block)]
            self._triangle[i] = block.to(x.device).addmm_(part.t(), columns[:, start:])

    def _window(self, x: Tensor) -> Tensor:
        """A part of pictures (B, C, H, W), at a place of chance."""
        for axis in (2, 3):
            if (spare := x.shape[axis] - WINDOW) > 0:
                x = x.narrow(axis, int(torch.randint(spare + 1, (), generator=self._generator)), WINDOW)
        return x

    def _columns(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """im2col rows (B * Ho * Wo, K) in the order (kh, kw, C) of `to_matrix`."""
        plan = self.plan
        unfolded = nn.functional.unfold(x, plan.kernel_size, padding=padding, stride=plan.stride)
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
    def moment(self) -> Tensor | None:
        """float32 (K, K), sum of x x^T in the order of `to_matrix`, on the CPU; None where there is none.

        Made when it is first asked for; nothing can be added afterwards.
        """
        if self._triangle:
            k = self.plan.reduction
            self._whole = torch.empty(k, k)
            for start in range(0, k, MOMENT_ROWS):
                block = self._triangle.pop(0)
                end = start + len(block)
                self._whole[start:end, start:] = block
                self._whole[end:, start:end] = block[:, len(block) :].t()
        return self._whole

    @property
    def samples(self) -> Tensor:
        return torch.cat(self._samples)

    @property
    def mean_square(self) -> Tensor:
        return self._squares / self._channel_count


def readers(layers: Iterable[Layer]) -> list[Layer]:
    """The first of the layers that read one input, for each input."""
    return list({layer.input: layer for layer in reversed(list(layers))}.values())


def reading_order(network: nn.Module, layers: Iterable[Layer], call: dict[str, Any]) -> list[str]:
    """The inputs that layers read in a call of the network, by `Layer.input`: in order, each as often as it is read."""
    order: list[str] = []

    def hook(layer: Layer) -> Any:
        return layer.module.register_forward_pre_hook(lambda *_: order.append(layer.input))

    replay(network, [call], map(hook, readers(layers)), lambda done, total: None)
    return order


def gather(
    network: nn.Module,
    layers: Iterable[Layer],
    calls: Sequence[dict[str, Any]],
    order: Sequence[str],
    progress: Progress = silent,
    moments: bool = True,
) -> dict[str, Statistics]:
    """Replay recorded calls, on any device, through the float network, and gather the statistics of what layers read.

    Args:
        network: the float model.
        layers: of several that read one input, the first one's is gathered.
        calls: keyword arguments; each is replayed up to the last of these inputs.
        order: the `reading_order` of a call, of these and any other layers.
        progress: told of stage "statistics".
        moments: whether second moments are summed up.

    Returns:
        By `Layer.input`.
    """
    chosen = readers(layers)
    gathered = {layer.input: Statistics(layer.plan, len(calls), moments) for layer in chosen}
    wanted = sum(name in gathered for name in order)
    seen = 0

    def hook(layer: Layer) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal seen
            gathered[layer.input].add(layer.own(args[0]))
            seen += 1
            if seen == wanted:
                raise Enough

        return layer.module.register_forward_pre_hook(add)

    def told(done: int, total: int) -> None:
        nonlocal seen
        seen = 0
        progress("statistics", done, total, f"call {done}")

    replay(network, calls, map(hook, chosen), told)
    return gathered
