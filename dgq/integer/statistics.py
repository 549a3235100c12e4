"""Second moments and samples of what the layers of a float model read."""

from __future__ import annotations

import itertools
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


# Height and width of the samples that are taken of larger pictures.
WINDOW = 64

# Rows (tokens, or pixels with their taps) that second moments are summed up of, for each value of one, and the fewest:
# drawn evenly from all calls, they tell what more of the same pictures would (docs/studies.md).
ROWS_PER_VALUE = 8
FEWEST_ROWS = 4096

# Rows of the second moments that are summed up together, from the diagonal on: the rest is symmetric.
MOMENT_ROWS = 512


def wanted_rows(reduction: int) -> int:
    """Of how many rows second moments are made where there are so many, each of `reduction` values."""
    return max(ROWS_PER_VALUE * reduction, FEWEST_ROWS)


def moment_rows(reduction: int, rows: int) -> int:
    """How many of an input's rows its second moments are made of."""
    return min(rows, wanted_rows(reduction))


class Quota:
    """How many of what each of so many calls offers is drawn, so that there are so many in all."""

    def __init__(self, total: int, calls: int) -> None:
        self._total, self._calls = total, calls
        self._seen = self._drawn = 0

    def draw(self, offered: int, generator: torch.Generator) -> Tensor:
        """Which are drawn, int64, in order."""
        self._seen += 1
        take = min(self._total * self._seen // self._calls - self._drawn, offered)
        self._drawn += take
        if take == offered:
            return torch.arange(offered)
        return torch.randperm(offered, generator=generator)[:take].sort().values


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
        self._sampled = Quota(SAMPLE_PICTURES if plan.kind == "conv2d" else SAMPLE_ROWS, calls)
        self._summed = Quota(wanted_rows(k), calls)
        self._samples: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Add one call's input: (..., C) for a linear layer, (B, C, H, W) otherwise."""
        plan = self.plan
        x = x.detach()
        # (..., C)
        channels = x if plan.kind == "linear" else x.permute(0, 2, 3, 1)
        size = torch.linalg.vector_norm(channels, dim=tuple(range(channels.dim() - 1)), dtype=torch.float32)
        self._squares = self._squares.to(x.device) + size.square()
        self._channel_count += channels.numel() // plan.in_features
        offered = self._window(x) if plan.kind == "conv2d" else channels.reshape(-1, plan.in_features)
        self._samples.append(offered[self._sampled.draw(len(offered), self._generator).to(x.device)].float())
        if not self._triangle:
            return
        if plan.kind == "conv2d":
            columns = self._columns(channels)
        else:
            columns = offered[self._summed.draw(len(offered), self._generator).to(x.device)].float()
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

    def _columns(self, x: Tensor) -> Tensor:
        """What some of a convolution's outputs read of pictures (B, H, W, C): rows (R, K) in the order (kh, kw, C) of
        `to_matrix`."""
        plan = self.plan
        sizes = x.shape[1:3]
        across = [(size + 2 * plan.padding - plan.kernel_size) // plan.stride + 1 for size in sizes]
        drawn = self._summed.draw(len(x) * across[0] * across[1], self._generator).to(x.device)
        picture, corners = drawn // (across[0] * across[1]), (drawn // across[1] % across[0], drawn % across[1])
        taps = []
        for offsets in itertools.product(range(plan.kernel_size), repeat=2):
            places = [at * plan.stride - plan.padding + by for at, by in zip(corners, offsets, strict=True)]
            inside = [(at >= 0) & (at < size) for at, size in zip(places, sizes, strict=True)]
            rows, columns = (at.clamp(0, size - 1) for at, size in zip(places, sizes, strict=True))
            taps.append(x[picture, rows, columns].float() * (inside[0] & inside[1])[:, None])
        return torch.cat(taps, 1)

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
    """The first of the layers that read one input, for each input, in the order of the layers."""
    first: dict[str, Layer] = {}
    for layer in layers:
        first.setdefault(layer.input, layer)
    return list(first.values())


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
