"""The paper recipe's table in a header: the calibrated timesteps, and the plan of every layer, read strictly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DgqError
from ..recipe import shortened, strict


@dataclass(frozen=True)
class GroupsPlan:
    """How an activation is grouped: the axis, how many groups it has, and how many indices are grouped."""

    axis: Literal["tensor", "channel", "pixel"]
    groups: int
    size: int


@dataclass(frozen=True)
class LinearPlan:
    """A linear layer; see `paper.layers`."""

    kind: Literal["linear"]
    in_features: int
    out_features: int
    bias: bool
    wbits: int
    abits: int
    input: GroupsPlan

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.out_features, self.in_features


@dataclass(frozen=True)
class Conv2dPlan:
    """A convolution; see `paper.layers`."""

    kind: Literal["conv2d"]
    in_channels: int
    out_channels: int
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    conv_groups: int
    bias: bool
    wbits: int
    abits: int
    input: GroupsPlan

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.out_channels, self.in_channels // max(self.conv_groups, 1), *self.kernel_size


@dataclass(frozen=True)
class PaperAttentionPlan:
    """An attention layer's operands; probabilities without groups of their own get powers of two."""

    kind: Literal["attention"]
    cross: bool
    abits: int
    query: GroupsPlan
    key: GroupsPlan
    value: GroupsPlan
    probabilities: GroupsPlan | None = None

    @property
    def parts(self) -> dict[str, GroupsPlan]:
        """What is grouped, by name."""
        found = {name: getattr(self, name) for name in ("query", "key", "value", "probabilities")}
        return {name: part for name, part in found.items() if part is not None}


PaperPlan = LinearPlan | Conv2dPlan | PaperAttentionPlan

_KINDS: dict[Any, type] = {"linear": LinearPlan, "conv2d": Conv2dPlan, "attention": PaperAttentionPlan}
_GROUPED = ("input", "query", "key", "value", "probabilities")


@dataclass(frozen=True)
class PaperTable:
    """What `calibrate_paper` returns, typed.

    Attributes:
        timesteps: one for each set of scales.
        layers: by name.
    """

    timesteps: list[float]
    layers: dict[str, PaperPlan]

    def to_dict(self) -> dict[str, Any]:
        """As stored."""
        layers = {name: dataclasses.asdict(plan) for name, plan in self.layers.items()}
        for plan in layers.values():
            if "probabilities" in plan and plan["probabilities"] is None:
                del plan["probabilities"]
        return {"timesteps": list(self.timesteps), "layers": layers}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PaperTable:
        """Inverse of `to_dict`.

        Raises:
            DgqError: an unknown or missing field, or one of another type. Whether the values are the network's is for
                `build_paper_skeleton` to say.
        """
        times, layers = data.get("timesteps"), data.get("layers")
        if set(data) != {"timesteps", "layers"} or not isinstance(times, list) or not isinstance(layers, dict):
            raise DgqError(f"table of the paper recipe: damaged ({shortened(sorted(data))})")
        if not times or not all(type(one) in (int, float) and abs(one) < 2**32 for one in times):
            raise DgqError("table of the paper recipe: damaged (timesteps)")
        return cls(times, {name: _plan(name, plan) for name, plan in layers.items()})


def _plan(name: str, data: Any) -> PaperPlan:
    try:
        kind = data.get("kind") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            raise DgqError(f"kind {shortened(kind)} is not one of {', '.join(_KINDS)}")
        groups = {field: strict(GroupsPlan, data[field]) for field in _GROUPED if field in data}
        plan: PaperPlan = strict(_KINDS[kind], {**data, **groups})
        return plan
    except DgqError as error:
        raise DgqError(f"table of the paper recipe: layer {shortened(name)}: {error.message}", error.hint) from None
