"""What to quantize and how: the recipe a user asks for and the plan of one layer that results from it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dgq_kernels.rotation import BLOCKS

from .errors import DgqError
from .method import METHODS

WEIGHT_BITS = (4, 8)
ACTIVATION_BITS = (4, 5, 6, 7, 8)
UPSAMPLED_BITS = 16
PAPER_GROUPS = (1, 8, 16)
ITERATIONS = 500  # of a learned rounding; the published number is 20,000
MAX_ITERATIONS = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """A quantization recipe (docs/method.md).

    Attributes:
        name: of the method: "integer" (int8 products, the default), "paper" (the published one, simulated in float) or
            "convrot" (every layer rotated and rounded to nearest, without calibration; attention is float).
        wbits, abits: bits of weights (4 or 8) and activations (4 to 8).
        rounding: how weights are rounded: "gptq" (second moments; integer recipe), "nearest", or "adaround" (learned
            block by block; paper recipe). The paper recipe's default is "nearest".
        channels: outlier handling of input channels, integer recipe: "auto" chooses per layer by measured error, the
            others are for every layer that can be handled so.
        attention: integer recipe: "log" (fractional log2 probabilities) or "float" (scaled dot product).
        groups: activation groups G of the paper recipe (1 is the per-tensor baseline, without log attention).
        weight_group: input channels that share an int4 sub-scale, 32 or 64.
        overrides: (pattern, bits) in order, the last match wins; bits 0 keeps the layer in float.
        iterations: gradient steps for each block of a learned rounding, `ITERATIONS` where nothing else is asked for;
            None where nothing is learned.
    """

    name: str = "integer"
    wbits: int = 4
    abits: int = 8
    rounding: Literal["gptq", "nearest", "adaround"] = "gptq"
    channels: Literal["auto", "none", "smooth", "shift", "rotate"] = "auto"
    attention: Literal["log", "float"] = "log"
    groups: int = 16
    weight_group: int = 32
    overrides: tuple[tuple[str, int], ...] = ()
    iterations: int | None = None

    def __post_init__(self) -> None:
        checks: list[tuple[str, Any, tuple[Any, ...]]] = [
            ("recipe", self.name, tuple(METHODS)),
            ("wbits", self.wbits, WEIGHT_BITS),
            ("abits", self.abits, ACTIVATION_BITS),
            ("rounding", self.rounding, ("gptq", "nearest", "adaround")),
            ("channels", self.channels, ("auto", "none", "smooth", "shift", "rotate")),
            ("attention", self.attention, ("log", "float")),
            ("groups", self.groups, PAPER_GROUPS),
            ("weight_group", self.weight_group, (32, 64)),
        ]
        for option, value, allowed in checks:
            if value not in allowed:
                raise DgqError(f"{option} {value!r} is not one of {', '.join(map(str, allowed))}")
        for pattern, bits in self.overrides:
            if bits not in (0, *WEIGHT_BITS):
                raise DgqError(f"override '{pattern}={bits}': bits must be 0 (float), 4 or 8")
        method = METHODS[self.name]
        for option in (*method.unread, *method.choices):
            asked = getattr(self, option)
            if asked != getattr(Recipe, option) and (why := method.refusal(option, asked)):
                raise DgqError(why)
        for option, choices in method.choices.items():
            if getattr(self, option) not in choices:
                object.__setattr__(self, option, choices[0])
        if self.rounding == "adaround":
            object.__setattr__(self, "iterations", ITERATIONS if self.iterations is None else self.iterations)
        elif self.iterations is not None:
            raise DgqError(f"iterations are of rounding 'adaround', and the rounding is {self.rounding!r}")
        if self.iterations is not None and self.iterations not in range(1, MAX_ITERATIONS + 1):
            raise DgqError(f"iterations {self.iterations!r} is not a number from 1 to {MAX_ITERATIONS}")
        method.check(self)

    @property
    def label(self) -> str:
        """Short name for tables, such as "integer W4A8" or "paper G=16 W4A8"."""
        return f"{METHODS[self.name].label(self)} W{self.wbits}A{self.abits}"

    def weight_bits(self, layer: str, bits: int | None = None) -> int:
        """Weight bits of a layer after the overrides; 0 means the layer stays float.

        Args:
            layer: its name.
            bits: where no override says otherwise; None for `wbits`.
        """
        bits = self.wbits if bits is None else bits
        for pattern, value in self.overrides:
            if fnmatch.fnmatchcase(layer, pattern):
                bits = value
        return bits

    def unmatched_overrides(self, layers: list[str]) -> list[str]:
        """Override patterns that match no layer (a typing error more often than not)."""
        return [p for p, _ in self.overrides if not any(fnmatch.fnmatchcase(name, p) for name in layers)]

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["overrides"] = [list(item) for item in self.overrides]
        if self.iterations is None:  # as older versions know it
            del data["iterations"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Options that the method does not read, which earlier versions stored, are left out.

        Raises:
            DgqError: an unknown field or a value out of range.
        """
        overrides = data.get("overrides", ())
        pairs = isinstance(overrides, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in overrides)
        name = data.get("name", cls.name)
        unread = METHODS[name].unread if isinstance(name, str) and name in METHODS else ()
        data = {option: value for option, value in data.items() if option not in unread}
        return strict(cls, {**data, "overrides": tuple(map(tuple, overrides)) if pairs else overrides})


@dataclass(frozen=True)
class LayerPlan:
    """How one layer of an integer checkpoint is stored and run; one entry of `quantization_config["layers"]`.

    Attributes:
        kind: "linear", "pointwise" (a 1x1 convolution, run as a linear layer over pixels so that every pixel
            has its own scale) or "conv2d".
        in_features, out_features: input and output channels.
        kernel_size, stride, padding: of a convolution (square); 1, 1, 0 for a linear layer.
        bias: whether the layer has one.
        wbits, abits: bits of weights and activations.
        channels: "none", "smooth" or "shift".
        class_ends: shift classes of the sorted input channels; [in_features] where there are none.
        reordered: whether input channels are stored sorted by their shift exponent.
        rotation: channels of a block that is rotated after the division (16, 64 or 256), 0 for none.
        weight_group: values per int4 sub-scale.
        columns: [start, end] of the float layer's input channels where this is one of its parts, else [].
        upsampled: whether it is a nearest upsampling by two and a 3x3 convolution, as four convolutions of 2x2 taps of
            the small picture (`integer.folding`), each with a quarter of out_features; a layer of 16 bits is one.
    """

    kind: Literal["linear", "pointwise", "conv2d"]
    in_features: int
    out_features: int
    wbits: int
    abits: int
    bias: bool
    kernel_size: int = 1
    stride: int = 1
    padding: int = 0
    channels: Literal["none", "smooth", "shift"] = "none"
    class_ends: list[int] = field(default_factory=list)
    reordered: bool = False
    rotation: int = 0
    weight_group: int = 32
    columns: list[int] = field(default_factory=list)
    upsampled: bool = False

    def owner(self, name: str) -> str:
        """The float layer that the layer of this plan and name stands for, or is a part of."""
        return name.rpartition(".")[0] if self.columns else name

    @property
    def reduction(self) -> int:
        """Length of one output's sum: input channels times taps."""
        return self.in_features * self.kernel_size**2

    @property
    def wide(self) -> bool:
        """Whether inputs have 16 bits."""
        return self.abits == UPSAMPLED_BITS

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Of the weight that this is the float layer's, or its part's: (N, C), or (N, C, kh, kw) of a convolution with
        taps."""
        if self.upsampled:
            return self.out_features // 4, self.in_features, 3, 3
        taps = () if self.kernel_size == 1 else (self.kernel_size, self.kernel_size)
        return self.out_features, self.in_features, *taps

    @property
    def float_parameters(self) -> int:
        """Of such a layer: weight and bias."""
        return math.prod(self.float_shape) + self.bias * self.float_shape[0]

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        data = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "columns":
                if value:
                    data[item.name] = value
            elif item.default is dataclasses.MISSING or value != item.default:
                data[item.name] = value
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        """Inverse of `to_dict`.

        Raises:
            DgqError: an unknown or missing field, or a value no layer can have.
        """
        plan: LayerPlan = strict(cls, data)
        sizes = (plan.in_features, plan.out_features, plan.kernel_size, plan.stride)
        if any(not 0 < size < 2**20 for size in sizes) or plan.padding not in range(8):
            raise DgqError(f"layer sizes {sizes}, padding {plan.padding} are out of range")
        bits = (*ACTIVATION_BITS, UPSAMPLED_BITS) if plan.upsampled else ACTIVATION_BITS
        if plan.wbits not in WEIGHT_BITS or plan.abits not in bits or plan.weight_group not in (32, 64):
            values = f"wbits {plan.wbits}, abits {plan.abits} or weight_group {plan.weight_group}"
            raise DgqError(f"{values} is out of range")
        ends = plan.class_ends
        if ends != sorted(ends) or not ends or ends[-1] != plan.in_features or ends[0] < 0 or len(ends) > 5:
            raise DgqError(f"class_ends {ends} do not cover {plan.in_features} channels")
        if plan.reordered != (plan.channels == "shift") or (len(ends) > 1 and (not plan.reordered or plan.wbits != 8)):
            what = f"reordered {plan.reordered}, {len(ends)} shift classes and {plan.wbits} bits"
            raise DgqError(f"channels {plan.channels!r} with {what}: no such layer")
        if plan.rotation and (
            plan.rotation not in BLOCKS or plan.in_features % plan.rotation or plan.channels == "shift"
        ):
            what = f"{plan.in_features} channels, {plan.channels!r}"
            raise DgqError(f"rotation {plan.rotation} of {what}: no such layer")
        if plan.upsampled:
            form = (plan.kind, plan.kernel_size, plan.stride, plan.padding)
            inside = (plan.wbits, plan.channels, plan.rotation)
            fits = inside == (8, "none", 0) if plan.wide else plan.channels != "shift"
            if form != ("conv2d", 2, 1, 1) or not fits or plan.out_features % 4 or plan.columns:
                raise DgqError(f"upsampled, and {plan.out_features} outputs of {(*form, *inside)}: no such layer")
        start, *end = plan.columns or (0, plan.in_features)
        if start < 0 or end != [start + plan.in_features]:
            raise DgqError(f"columns {plan.columns} are not {plan.in_features} channels")
        return plan


def strict(cls: type, data: dict[str, Any]) -> Any:
    """Build a dataclass from a JSON object.

    Raises:
        DgqError: a field is unknown, missing or of another type than the class says.
    """
    hints = _hints(cls)
    if not isinstance(data, dict):
        raise DgqError(f"{cls.__name__} is {shortened(data)}, not a JSON object")
    if unknown := sorted(set(data) - set(hints)):
        raise DgqError(f"unknown field {shortened(unknown[0])} in {cls.__name__}", "a newer dgq may have written it")
    for name, value in data.items():
        if not _fits(value, hints[name]):
            raise DgqError(f"{name} {shortened(value)} is not {_described(hints[name])}")
    try:
        return cls(**data)
    except TypeError as error:
        raise DgqError(f"{cls.__name__}: {error}") from None


_hints = functools.cache(get_type_hints)  # a checkpoint has hundreds of plans


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; True is no integer."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return type(value) is str and value in parts
    if kind is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return type(value) is list and all(_fits(item, parts[0]) for item in value)
    if kind is tuple and parts[-1] is Ellipsis:
        return type(value) is tuple and all(_fits(item, parts[0]) for item in value)
    if kind is tuple:
        return type(value) is tuple and len(value) == len(parts) and all(map(_fits, value, parts))
    return type(value) is hint


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return {int: "a whole number", bool: "true or false", str: "a text"}.get(hint, "a list of the right kind")


def shortened(value: Any) -> str:
    """A damaged value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
