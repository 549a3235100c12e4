"""Integer layers in the place of a float model's."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DgqError
from ..family import family_of
from ..recipe import LayerPlan
from .layer import IntegerLayer
from .plan import own_columns
from .stored import StoredWeight, stored_shapes

# Where a network of diffusers names the classes of its blocks.
BLOCK_NAMES = ("_repeated_blocks", "_no_split_modules")


class SplitLayer(nn.ModuleList):
    """A linear layer or 1x1 convolution over joined tensors, one integer layer for each: y is the sum of their results.

    A shortcut in the up path of a UNet reads the hidden state and the skip side by side, the last layer of a parallel
    block the attention's and the MLP's result. Where their sizes differ by an order of magnitude, one scale a row would
    round the smaller one away (docs/method.md, item 4).
    """

    def __init__(self, parts: list[IntegerLayer]) -> None:
        nn.Module.__init__(self)  # not nn.Linear's or nn.Conv2d's, which allocates a weight
        self.in_features, self.out_features = sum(part.in_features for part in parts), parts[0].out_features
        self.extend(parts)

    @staticmethod
    def of(parts: list[IntegerLayer]) -> SplitLayer:
        """One of the class that the parts' kind asks for."""
        return (SplitLinear if parts[0].plan.kind == "linear" else SplitConv2d)(parts)

    def __setattr__(self, name: str, value: Any) -> None:
        """What takes an adapter off sets weight and bias that it read."""
        if name not in ("weight", "bias"):
            super().__setattr__(name, value)
        elif name == "bias" and value is not self.bias:
            raise DgqError("the bias of a packed layer cannot be changed")

    @property
    def weight(self) -> Tensor:
        """int8, shaped as the float layer's weight, the parts' side by side; made when it is read."""
        shapes = [part.weight.shape for part in self.parts]
        shape = (shapes[0][0], sum(each[1] for each in shapes), *shapes[0][2:])
        return StoredWeight.of(
            shape, torch.int8, self.parts[0].stored.device, lambda: torch.cat([part.weight for part in self.parts], 1)
        )

    @property
    def bias(self) -> Tensor | None:
        """The first part's, which has it for all."""
        return self.parts[0].bias

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for, float32, shaped as the float layer's."""
        return torch.cat([part.dequantize() for part in self.parts], 1)

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """As of `IntegerLayer`."""
        return self.parts[0].stored

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., C) -> (..., N), or (B, C, H, W) -> (B, N, H, W)."""
        y = residual
        for part in self.parts:
            y = part(own_columns(input, part.plan), y)
        assert y is not None
        return y

    @property
    def parts(self) -> list[IntegerLayer]:
        """In the order of their channels."""
        return list(self)  # type: ignore[arg-type]


class SplitLinear(SplitLayer, nn.Linear):  # type: ignore[misc, override]
    """A split layer that is an `nn.Linear`."""


class SplitConv2d(SplitLayer, nn.Conv2d):  # type: ignore[override]
    """A split layer that is an `nn.Conv2d`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Adapters make float convolutions of `type(layer)`: they get them."""
        return nn.Conv2d(*args, **kwargs) if args and type(args[0]) is int else super().__new__(cls)

    def __init__(self, parts: list[IntegerLayer]) -> None:
        super().__init__(parts)
        self.in_channels, self.out_channels = self.in_features, self.out_features
        self.kernel_size = self.stride = self.dilation = (1, 1)
        self.padding, self.output_padding, self.groups = (0, 0), (0, 0), 1
        self.transposed, self.padding_mode = False, "zeros"


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
        _replace(network, owner, SplitLayer.of(parts))


def place_calibrated(network: nn.Module, layers: dict[str, IntegerLayer]) -> None:
    """`place`, and `fuse` where a layer gets its small picture by that alone (`Family.upsampled`).

    Raises:
        DgqError: as `place`.
    """
    place(network, layers)
    if any(layer.plan.upsampled for layer in layers.values()):
        fuse(network)


def build_skeleton(network: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Swap the planned layers of a float model for empty integer layers, in place.

    Raises:
        DgqError: as `place`.
    """
    place(network, {name: IntegerLayer(plan) for name, plan in plans.items()})


def fuse(network: nn.Module) -> None:
    """Change the class of every module of a quantized network that can leave work to its quantized layers, in place.

    Exact types only: a subclass has a forward of its own. diffusers finds blocks (to compile them, or to keep them on
    one device) by the names of their classes, and is told the new ones. The network also gets a `to` of its own.
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
    network.__dict__["to"] = types.MethodType(to, network)


def to(network: Any, *args: Any, **kwargs: Any) -> Any:
    """`ModelMixin.to`, which refuses every dtype, None and the model's own as well: `save_lora_adapter`, pipelines made
    of others and IP-Adapters ask for those, and a VAE is cast to be run in float32. Quantized layers keep theirs."""
    if kwargs.get("dtype", ...) is None:
        del kwargs["dtype"]
    if not args and not kwargs:
        return network
    dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
    taken = dtype is not None and (dtype == network.dtype or family_of(network).cast)
    return (nn.Module if taken else type(network)).to(network, *args, **kwargs)


def stored_names(network: nn.Module) -> set[str]:
    """Names, in the state_dict, of the tensors that integer layers store. They keep their dtypes whatever the model is
    cast to."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, IntegerLayer)]
    return {f"{name}.{leaf}" for name, module in layers for leaf in stored_shapes(module.plan)}
