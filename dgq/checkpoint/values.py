"""Values of a loaded model that could index outside of a tensor, or mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dgq_kernels import packing

from ..errors import DgqError
from ..integer.layer import IntegerLayer
from ..range_search import SMALLEST_SCALE

Check = tuple[str, Tensor, str]  # a buffer, where it is right (bool, any shape), and what it is elsewhere


def verify_values(place: Path, model: nn.Module) -> None:
    """Refuse what no calibration writes and a kernel must not meet: values that are not finite, scales that are not
    positive, an order that is none, sub-scales of 0, groups that are not there.

    A change that leaves all of them in range (another weight, another scale) cannot be seen here, nor what a device
    map leaves on the disk.

    Args:
        place: of the weights, for the message.
        model: any component; only the layers of a quantized network have more than finite values to check.

    Raises:
        DgqError: the first wrong tensor and where it is wrong.
    """
    for name, module in model.named_modules():
        if any(tensor.is_meta for _, tensor in _stored(module)):
            continue
        for leaf, tensor in _stored(module):
            if tensor.is_floating_point() and not finite(tensor):
                at = f"at {_first(~torch.isfinite(tensor))} of {tensor.numel()}"
                raise DgqError(f"{place}: tensor {_joined(name, leaf)!r} holds values that are not finite ({at})")
        for leaf, right, what in _checks(module):
            if not bool(right.all()):
                raise DgqError(
                    f"{place}: tensor {_joined(name, leaf)!r} holds {what} (at {_first(~right)} of {right.numel()})",
                    "the file is damaged: copy it again, or calibrate again",
                )


def finite(tensor: Tensor) -> bool:
    """Whether every value is finite; a sum is a third of the work of looking at each."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and buffers that files hold."""
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, tensor


def _joined(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _first(wrong: Tensor) -> int:
    return int(wrong.flatten().nonzero()[0])


def _checks(module: nn.Module) -> Iterator[Check]:
    if isinstance(module, IntegerLayer):
        yield from _integer_checks(module)
    elif checks := getattr(module, "value_checks", None):
        yield from checks()


def _integer_checks(layer: IntegerLayer) -> Iterator[Check]:
    plan = layer.plan
    yield "weight_scale", layer.weight_scale >= SMALLEST_SCALE, "a scale that is not positive"
    if plan.wbits == 4:
        groups = packing.padded_length(plan.reduction, plan.weight_group) // plan.weight_group
        nibbles = packing.unpack_subscales(layer.subscales, groups + groups % 2)
        used = torch.arange(nibbles.shape[1], device=nibbles.device) < groups
        yield "subscales", (nibbles > 0) == used, "a sub-scale that is not 1 to 15, or one of no group"
    if plan.channels == "none":
        return
    divisor = layer.inv_divisor
    yield "inv_divisor", (divisor >= SMALLEST_SCALE) & (divisor <= 1), "a divisor's reciprocal that is not in (0, 1]"
    if plan.channels != "shift":
        return
    fraction, exponent = torch.frexp(divisor)
    shift = 1 - exponent
    yield "inv_divisor", fraction == 0.5, "a divisor that is no power of two"
    order = layer.order
    natural = torch.arange(plan.in_features, device=order.device)
    yield "order", order.sort().values == natural, "an order that is no permutation of the channels"
    yield "order", order == torch.argsort(shift, stable=True), "an order that is not the divisors'"
    if len(plan.class_ends) > 1:
        class_of = torch.bucketize(natural, torch.tensor(plan.class_ends[:-1], device=order.device), right=True)
        yield "inv_divisor", shift[order.long()] == class_of, "a divisor of another shift class than the plan's"
