"""Integer layers in the place of a float model's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..family import family_of
from ..recipe import LayerPlan
from .layer import IntegerLayer
from .plan import own_columns
from .stored import stored_shapes

# Where a network of diffusers names the classes of its blocks.
BLOCK_NAMES = ("_repeated_blocks", "_no_split_modules")


class SplitLayer(nn.ModuleList):
    """A linear layer or 1x1 convolution over joined tensors, one integer layer for each: y is the sum of their results.

    A shortcut in the up path of a UNet reads the hidden state and the skip side by side, the last layer of a parallel
    block the attention's and the MLP's result. Where their sizes differ by an order of magnitude, one scale a row would
    round the smaller one away (docs/method.md, item 4).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., C) -> (..., N), or (B, C, H, W) -> (B, N, H, W)."""
        y = residual
        for part in self.parts:
            y = part(own_columns(x, part.plan), y)
        assert y is not None
        return y

    @property
    def parts(self) -> list[IntegerLayer]:
        """In the order of their channels."""
        return list(self)  # type: ignore[arg-type]


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """`set_submodule`, on the device of the module it replaces."""
    root.set_submodule(name, module.to(next(root.get_submodule(name).parameters()).device))


def place(network: nn.Module, layers: dict[str, IntegerLayer]) -> None:
    """Swap layers of a float model for integer layers, in place; the parts of one layer come in their order.

    Raises:
        DgqError: the parts of a layer are not its input channels.
    """
    joined: dict[str, list[IntegerLayer]] = {}
    for name, layer in layers.items():
        if layer.plan.columns:
            joined.setdefault(layer.plan.owner(name), []).append(layer)
        else:
            _replace(network, name, layer)
    for owner, parts in joined.items():
        ends = [0, *(part.plan.columns[1] for part in parts)]
        starts = [part.plan.columns[0] for part in parts]
        channels = getattr(network.get_submodule(owner), "weight", torch.empty(0, 0)).shape[1]
        if starts != ends[:-1] or ends[-1] != channels or any(part.plan.kind == "conv2d" for part in parts):
            raise DgqError(f"{owner}: parts that end at {ends[1:]} are not its {channels} input channels")
        _replace(network, owner, SplitLayer(parts))


def build_skeleton(network: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Swap the planned layers of a float model for empty integer layers, in place.

    Raises:
        DgqError: as `place`.
    """
    place(network, {name: IntegerLayer(plan) for name, plan in plans.items()})


def fuse(network: nn.Module) -> None:
    """Change the class of every module of a quantized network that can leave work to its quantized layers, in place.

    Exact types only: a subclass has a forward of its own. diffusers finds blocks (to compile them, or to keep them on
    one device) by the names of their classes, and is told the new ones.
    """
    known = family_of(network).fused
    for attribute in BLOCK_NAMES:
        if names := getattr(network, attribute, None):
            added = [fused.__name__ for kind, (_, fused) in known.items() if kind.__name__ in names]
            setattr(network, attribute, [*names, *added])
    for module in network.modules():
        if type(module) in known:
            leaves_work, fused = known[type(module)]
            if leaves_work(module):
                module.__class__ = fused


def stored_names(network: nn.Module) -> set[str]:
    """Names, in the state_dict, of the tensors that integer layers store. They keep their dtypes whatever the model is
    cast to."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, IntegerLayer)]
    return {f"{name}.{leaf}" for name, module in layers for leaf in stored_shapes(module.plan)}
