"""The layers of an integer checkpoint: packed weights, run-time activation codes, one int8 product."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dgq_kernels import backend, native, packing
from dgq_kernels.scaled_product import Integers

from ..errors import DgqError
from ..recipe import LayerPlan
from .channels import ChannelGroups, to_matrix
from .folding import cut, unfold
from .gradient import float_rows, input_factor, needed, straight_through
from .prepared import Activation, Prepared, apply, form_of, gate, is_hooked, shaped
from .stored import StoredWeight, stored_shapes
from .weights import IntegerWeight

# Layers may be used from several threads, and packing takes the stored form away.
_preparing = threading.Lock()


class IntegerLayer(nn.Module):
    """A quantized linear layer or convolution (docs/method.md, "integer recipe").

    Weights stay packed integers; no float copy of them exists. The layer takes and returns the dtype of its input.
    Where the CPU engine has packed the weight, its blocks are the only copy: the stored form, which state_dict and
    moves to another device need, is made from them (`StoredWeight`).

    It is an `nn.Linear` or an `nn.Conv2d` for everything that looks for those (adapters, offloading), by the plan's
    kind; what is stored are parameters that take no gradient.

    Args:
        plan: sizes, bits and channel handling. Parameters are allocated uninitialised (on the current default device).
    """

    packed: Tensor
    subscales: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    inv_divisor: Tensor
    order: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`IntegerLayer(plan)` is of the class that the plan's kind asks for, a part of a split layer of neither: what
        looks for layers finds the whole one."""
        plan = args[0] if args else kwargs.get("plan")
        if cls is IntegerLayer and plan is not None and not plan.columns:
            cls = IntegerLinear if plan.kind == "linear" else IntegerConv2d
        return super().__new__(cls)

    def __init__(self, plan: LayerPlan) -> None:
        nn.Module.__init__(self)  # not nn.Linear's or nn.Conv2d's, which allocate a float weight
        self.plan = plan
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self._prepared: Prepared | None = None
        self._stored_name = "weight" if plan.wbits == 8 else "packed"
        self._tuned: tuple[Tensor, Tensor | None] | None = None  # what `set_scales` was given
        for name, (shape, dtype) in stored_shapes(plan).items():
            self.set_stored(name, torch.empty(shape, dtype=dtype))
        if not plan.bias:
            self.register_parameter("bias", None)

    @classmethod
    def from_quantized(
        cls, plan: LayerPlan, weight: IntegerWeight, groups: ChannelGroups, bias: Tensor | None
    ) -> IntegerLayer:
        """Pack a quantized weight matrix (N, K), its channels in the stored order of `groups`."""
        layer: IntegerLayer = cls(plan)
        tensors = {"weight_scale": weight.scale, "bias": bias, "order": groups.order, "inv_divisor": 1 / groups.divisor}
        if plan.wbits == 8:
            tensors["weight"] = weight.codes
        else:
            assert weight.subscales is not None
            tensors["packed"] = packing.pack_int4(weight.codes, plan.weight_group)
            tensors["subscales"] = packing.pack_subscales(weight.subscales)
        for name, (shape, dtype) in stored_shapes(plan).items():
            value = tensors[name]
            assert value is not None
            layer.set_stored(name, value.detach().to(dtype).contiguous())
            kept = layer.get_parameter(name)
            assert tuple(kept.shape) == shape, f"{name}: {tuple(kept.shape)} instead of {shape}"
        return layer

    def set_stored(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in the place of a stored one: shaped as `stored_shapes` has it, or the weight as a matrix
        (N, kh * kw * C), as files of format 1 have it."""
        self._prepared = None
        self._hold(name, shaped(tensor, self.plan) if name == "weight" else tensor)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _hold_made(self, stored: StoredWeight) -> None:
        # nn.Parameter would detach it, and torch imports its distributed tensors (a second) at the first operation of
        # such a tensor
        stored._is_param = True
        self._parameters[self._stored_name] = cast("nn.Parameter", stored)

    @property
    def stored(self) -> Tensor:
        """The parameter that holds the weight: `weight` (8 bits) or `packed`."""
        parameter = self._parameters[self._stored_name]
        assert parameter is not None
        return parameter

    @property
    def weight(self) -> Tensor:
        """int8, shaped as the float layer's weight, channels in stored order; made when it is read where the layer
        stores 4 bits."""
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        shape = shaped(torch.empty(self.out_features, self.plan.reduction, device="meta"), self.plan).shape
        return StoredWeight.of(shape, torch.int8, self.stored.device, lambda: shaped(self.integer_weight(), self.plan))

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """What takes an adapter off sets the weight that it read. Raises DgqError for another one."""
        if not torch.equal(value, self.weight):
            raise DgqError("a packed weight cannot be changed", "adapters stay beside it: they cannot be fused")

    def dequantize(self) -> Tensor:
        """The weight that the integers stand for, float32, shaped as the float layer's; made anew."""
        weight = shaped(float_rows(self, 0, self.out_features, input_factor(self)), self.plan)
        return unfold(weight) if self.plan.upsampled else weight

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """By this name peft knows layers to ask for `dequantize` where it needs the float weight (DoRA)."""
        return self.stored

    def integer_weight(self) -> Tensor:
        """The int8 matrix W' (N, K), channels in stored order."""
        weight, subscales = self.stored_tensor(), self.subscales if self.plan.wbits == 4 else None
        if subscales is None:
            return weight
        return packing.expand_two_level(weight, subscales, self.plan.reduction, self.plan.weight_group)

    def stored_tensor(self) -> Tensor:
        """What `stored` holds, as files have it: the int8 matrix (N, K), or packed."""
        stored = self.stored
        tensor = stored.make() if isinstance(stored, StoredWeight) else stored.detach()
        return to_matrix(tensor) if self.plan.wbits == 8 else tensor

    def restore(self) -> None:
        """Give up the backend's form of the weight; the next call makes it again."""
        if isinstance(self.stored, StoredWeight):
            self._hold(self._stored_name, self.stored.make())
        self._prepared = None

    @property
    def natural_weight(self) -> Tensor:
        """The int8 matrix W' (N, K) with the input channels in natural order."""
        return self._natural(self.integer_weight())

    def natural_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of `natural_weight`, made from the form that the weight is in; start is a multiple of
        16."""
        if self._prepared is not None and (rows := self._prepared.rows(start, stop)) is not None:
            return rows
        stored = self.stored.detach()[start:stop]
        if self.plan.wbits == 8:
            return self._natural(to_matrix(stored))
        subscales = self.subscales[start:stop]
        return self._natural(packing.expand_two_level(stored, subscales, self.plan.reduction, self.plan.weight_group))

    def integers(self) -> Integers:
        """The stored weight, for ops that multiply float activations by it."""
        order = self.order if self.plan.reordered else None
        if self.plan.wbits == 8:
            return Integers(self.stored_tensor(), order=order)
        return Integers(self.stored_tensor(), self.subscales.detach(), self.plan.weight_group, order)

    def _natural(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, K) of stored order in natural order."""
        if not self.plan.reordered:
            return matrix
        by_channel = matrix.reshape(len(matrix), -1, self.in_features)
        natural = torch.empty_like(by_channel)
        natural[:, :, self.order.long()] = by_channel
        return natural.view_as(matrix)

    def prepare(self, device: torch.device) -> Prepared:
        """The backend's form of the weight, made at the first call on a device and kept while the stored tensor is."""
        ready = self.prepared(device)
        if ready is not None:
            return ready
        with _preparing:
            ready = self.prepared(device)
            if ready is None:
                self.restore()
                ready = form_of(self.plan, device)(self, device)
                self._keep(ready)
            return ready

    def prepared(self, device: torch.device) -> Prepared | None:
        """The form of `prepare` where it was made before and serves."""
        ready = self._prepared
        if ready is None or ready.device != device:
            return None
        if not torch.compiler.is_compiling():
            if ready.source() is not self._parameters[self._stored_name]:
                return None
            ready.follow(self)
        return ready

    def _keep(self, ready: Prepared) -> None:
        """Until whoever holds the stored tensor lets go of it: offloading puts another one in its place."""
        layer, kept = weakref.ref(self), weakref.ref(ready)

        def drop(_: Any) -> None:
            owner = layer()
            if owner is not None and owner._prepared is kept():
                owner._prepared = None

        ready.source = weakref.ref(self.stored, drop)
        self._prepared = ready

    def leave(self, make: Callable[[], Tensor]) -> None:
        """Let go of the stored weight, which `make` makes again."""
        stored = self.stored
        native.page_out(stored)
        self._hold_made(StoredWeight.of(stored.shape, stored.dtype, stored.device, make))

    @property
    def prepared_bytes(self) -> int:
        """Bytes of the weight's form that a backend keeps beside the stored tensors."""
        return 0 if self._prepared is None else self._prepared.nbytes

    def fuses(self, device: torch.device) -> bool:
        """Whether the ops on this device quantize together with what comes before (`forward`'s norm and the rest)."""
        ready = self._prepared  # nothing is packed for the answer: the weight may be away until the layer is called
        return backend.chosen(device).fuses if ready is None else ready.fuses

    def forward(
        self,
        input: Tensor,  # PyTorch's name: some call layers by it
        residual: Tensor | None = None,
        sample_bias: Tensor | None = None,
        norm: nn.Module | None = None,
        activation: Activation = "none",
        offset: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """x (..., C) for a linear layer, (B, C, H, W) for a convolution, as the float layer takes it; returns x's
        dtype. Where the layer upsamples x is all that there may be.

        What happens to x before the product is done while it is quantized, where engine or ops can: in this order.
        Where gradients are wanted, that of x is the float layer's, of the weight that the integers stand for.

        Args:
            input: x.
            residual: added to the result, shaped like it.
            sample_bias: (B, N), added too; of a convolution larger than 1x1.
            norm: applied to x.
            activation: applied after the norm.
            offset: (B, C), added to the x of a convolution before its norm.
            in_place: the result of a convolution with taps may take the memory of the residual, or of x where there is
                none: for who needs neither any more.
        """
        x = input
        if self.plan.upsampled:
            return self.upsample(x[:, :, ::2, ::2], x.shape[2:])
        if self.learns(x, residual, sample_bias, norm, offset):
            y = straight_through(self, apply(x, norm, activation, offset), self._alone)
            y = y if sample_bias is None else y + sample_bias.to(y.dtype)[:, :, None, None]
            return y if residual is None else y + residual
        if self.plan.kind == "pointwise":
            y = self.over_pixels(x, norm, None if residual is None else residual.permute(0, 2, 3, 1), activation)
            return y.permute(0, 3, 1, 2)
        ready = self.prepare(x.device)
        if ready.shared is not None and residual is None and norm is None and sample_bias is None and offset is None:
            taken = ready.shared.take(self, x, activation)
            if taken is not None:
                return taken
        return ready.run(self, x, residual, sample_bias, norm, activation, offset, in_place)

    def learns(self, *sources: Tensor | nn.Module | None) -> bool:
        """Whether any of its inputs, or a norm before it, takes a gradient here. Raises DgqError where what it stores
        is to take one: it would never learn."""
        if not torch.is_grad_enabled():
            return False
        for name, stored in self._parameters.items():
            if stored is not None and stored.requires_grad:
                raise DgqError(
                    f"the {name} of a packed layer takes no gradient",
                    'train adapters beside it, of peft with bias="none"; dgq tune learns scales',
                )
        return needed(*sources)

    def _alone(self, x: Tensor) -> Tensor:
        """`forward` of x, of which nothing else is known."""
        if self.plan.kind == "pointwise":
            return self.over_pixels(x).permute(0, 3, 1, 2)
        return self.prepare(x.device).run(self, x, None, None, None, "none", None)

    def upsample(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Of a layer that upsamples, what `forward` gives for the picture (B, C, *size) that x (B, C, H, W) becomes.

        Args:
            x: the small picture.
            size: height and width, of which a side may be one less than twice as large; None: twice as large.
        """

        def run(x: Tensor) -> Tensor:
            if self.learns(x):
                return straight_through(self, x, run)
            return self.prepare(x.device).run(self, x, None, None, None, "none", None)

        return run(x) if size is None else cut(run, x, size, self.bias)

    def over_pixels(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
        activation: Activation = "none",
    ) -> Tensor:
        """A linear layer or 1x1 convolution over pixels: x (B, C, H, W) -> (B, H, W, N), like the residual."""
        if self.learns(x, norm, residual):
            x = apply(x, norm, activation, None)
            if self.plan.kind == "linear":
                return self(x.permute(0, 2, 3, 1), residual)
            y = self(x).permute(0, 2, 3, 1)
            return y if residual is None else y + residual
        return self.prepare(x.device).over_pixels(self, x, norm, residual, activation)

    def gated(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """value * gelu(gate) (..., N / 2) of the two halves (..., N) that `forward` gives for x (..., C)."""
        if self.learns(x, norm):
            return gate(self(x, norm=norm))
        return self.prepare(x.device).gated(self, x, norm)

    def set_scales(self, weight_scale: Tensor, inv_divisor: Tensor | None) -> None:
        """Run with other scales than the stored ones, which stay as they are; nothing is packed anew.

        Args:
            weight_scale: float32 (N,).
            inv_divisor: float32 (C,), what the input is multiplied by; None: nothing. Layers that are to share a
                quantized input are given the same tensor.
        """
        self._tuned = weight_scale, inv_divisor
        self._rescale()

    def clear_scales(self) -> None:
        """Run with the stored scales again."""
        self._tuned = None
        self._rescale()

    def _rescale(self) -> None:
        if self._prepared is not None:
            self._prepared.rescale(self)

    def _scale(self) -> Tensor:
        return self.weight_scale if self._tuned is None else self._tuned[0]

    def _inv_divisor(self) -> Tensor | None:
        if self._tuned is not None:
            return self._tuned[1]
        return self.inv_divisor if self.plan.channels != "none" else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        """Move between devices, but never change a dtype: scales in half precision would be another model."""
        here = self.weight_scale.device
        if fn(torch.empty(0, device=here)).device == here:
            return self
        self.restore()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            return moved.contiguous(memory_format=torch.channels_last) if moved.dim() == 4 else moved

        if self._tuned is not None:
            scale, divisor = self._tuned
            self._tuned = move(scale), None if divisor is None else move(divisor)
        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # the parameters as they are
            return
        stored = self.stored
        made = stored.make() if isinstance(stored, StoredWeight) else stored.detach()
        destination[prefix + self._stored_name] = _unshared(made)
        for name in ("subscales", "weight_scale", "bias"):  # slices where layers are joined
            if (tensor := self._parameters.get(name)) is not None:
                destination[prefix + name] = _unshared(tensor.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._parameters):  # an adapter's file has nothing of it
            self.restore()
        name = prefix + "weight"
        if name in state_dict and tuple(state_dict[name].shape) == (self.out_features, self.plan.reduction):
            state_dict[name] = shaped(state_dict[name], self.plan)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return {**self.__dict__, "_prepared": None}  # opaque tensors and addresses cannot be copied or pickled

    def extra_repr(self) -> str:
        p = self.plan
        channels = f"channels {p.channels}" + (f", rotated by {p.rotation}" if p.rotation else "")
        return f"{p.kind} {p.in_features} -> {p.out_features}, W{p.wbits}A{p.abits}, {channels}"


def is_direct(module: object, kind: str | None = None) -> bool:
    """Whether a module is an integer layer (of this kind) with nothing around it. Only such a one may be asked for more
    than `layer(x)`: an adapter computes from its own input, an offloading hook fetches the weight at the call."""
    if not isinstance(module, IntegerLayer) or (kind is not None and module.plan.kind != kind):
        return False
    return not is_hooked(module)


class IntegerLinear(IntegerLayer, nn.Linear):  # type: ignore[misc]
    """An integer layer that is an `nn.Linear`."""


class IntegerConv2d(IntegerLayer, nn.Conv2d):
    """An integer layer that is an `nn.Conv2d`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Adapters make float convolutions of `type(layer)`: they get them."""
        if args and not isinstance(args[0], LayerPlan):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.out_channels, self.in_channels, *taps = plan.float_shape  # adapters are shaped by what the float layer has
        self.kernel_size, self.stride = (*taps, 1, 1)[:2], (plan.stride,) * 2
        self.padding, self.dilation, self.output_padding = (plan.padding,) * 2, (1, 1), (0, 0)
        self.groups, self.transposed, self.padding_mode = 1, False, "zeros"


def _unshared(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own, as files want it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
