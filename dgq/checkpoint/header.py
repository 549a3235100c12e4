"""The header of a checkpoint: `quantization_config` in its network's config.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from dgq_kernels.log_attention.reference import MAX_FRACTION_BITS

from ..errors import DgqError
from ..integer.attention import AttentionPlan
from ..method import METHODS, Method
from ..recipe import LayerPlan, Recipe, shortened, strict

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)


QUANT_METHOD = "dgq"
CHECKSUMS = "checksums"  # of files: no part of what a loaded model is (`checksums`)


@dataclass
class Header:
    """`quantization_config` in the network's config.json.

    Attributes:
        recipe: what was asked for.
        layers: integer recipe: the plan of every quantized layer.
        attention: integer recipe: the log attention, or None for float attention.
        table: of another method, which its JSON has under the method's name; or None.
        base_model: name of the float model.
        generation: default "steps" and "guidance" of `dgq generate`.
        calibration: how it was made and what was measured then (seed, prompts, sqnr_db per layer, fidelity).
        dgq_version: version that wrote the file.
        modules_to_not_convert: what a quantization on the fly was told to leave in float.
    """

    recipe: Recipe
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    attention: AttentionPlan | None = None
    table: Any = None
    base_model: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    dgq_version: str = ""
    modules_to_not_convert: list[str] = field(default_factory=list)

    @property
    def method(self) -> Method:
        """The recipe's."""
        return METHODS[self.recipe.name]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object as stored."""
        data: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": _version(self.layers),
            "dgq_version": self.dgq_version,
            "recipe": self.recipe.to_dict(),
            "layers": {name: plan.to_dict() for name, plan in self.layers.items()},
            "attention": dataclasses.asdict(self.attention) if self.attention else None,
            "base_model": self.base_model,
            "generation": self.generation,
            "calibration": self.calibration,
        }
        if self.modules_to_not_convert:
            data["modules_to_not_convert"] = self.modules_to_not_convert
        if self.table is None:
            return data
        return {**data, self.recipe.name: self.table.to_dict() if hasattr(self.table, "to_dict") else self.table}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Header:
        """Inverse of `to_dict`.

        Raises:
            DgqError: another method or format version, an unknown field, a value out of range.
        """
        if data.get("quant_method") != QUANT_METHOD:
            raise DgqError(f"quantization_config: quant_method is {data.get('quant_method')!r}, not 'dgq'")
        version = data.get("format_version")
        if version not in READABLE_VERSIONS or version is True:
            raise DgqError(
                f"quantization_config: format version {shortened(version)}, "
                f"this dgq reads {' and '.join(map(str, READABLE_VERSIONS))}",
                "install the dgq that wrote it, or calibrate again",
            )
        known = {item.name for item in dataclasses.fields(cls)} - {"table"} | set(METHODS)
        known |= {"quant_method", "format_version", CHECKSUMS}
        if unknown := sorted(set(data) - known):
            raise DgqError(f"quantization_config: unknown field {shortened(unknown[0])}")
        layers: dict[str, LayerPlan] = {}
        for name, plan in _of_type(data, "layers", dict, {}).items():
            try:
                layers[name] = LayerPlan.from_dict(plan)
            except DgqError as error:
                raise DgqError(f"quantization_config: layer {shortened(name)}: {error.message}", error.hint) from None
        if version < FORMAT_VERSION == _version(layers):
            raise DgqError(f"quantization_config: format version {version} has no layers that upsample")
        recipe, attention = _of_type(data, "recipe", dict), _of_type(data, "attention", dict | None)
        try:
            asked, attention_plan = Recipe.from_dict(recipe), _attention_plan(attention)
        except DgqError as error:
            raise DgqError(f"quantization_config: {error.message}", error.hint) from None
        return cls(
            recipe=asked,
            layers=layers,
            attention=attention_plan,
            table=_table(data, METHODS[asked.name]),
            base_model=_of_type(data, "base_model", str, ""),
            generation=_numbers(_of_type(data, "generation", dict, {}), {"steps": int, "guidance": int | float}),
            calibration=_calibration(_of_type(data, "calibration", dict, {})),
            dgq_version=_of_type(data, "dgq_version", str, ""),
            modules_to_not_convert=_names(_of_type(data, "modules_to_not_convert", list, [])),
        )


def _version(layers: dict[str, LayerPlan]) -> int:
    """The first format that has all that these layers are."""
    return FORMAT_VERSION if any(plan.upsampled for plan in layers.values()) else 2


def _table(data: dict[str, Any], method: Method) -> Any:
    """The table of the recipe's method, of which there has to be one, and of no other."""
    for name in METHODS:
        found = _of_type(data, name, dict | None)
        if (found is not None) != (name == method.name and method.read_table is not None):
            what = "missing" if found is None else f"that of another method than {method.name!r}"
            raise DgqError(f"quantization_config: damaged (the table of {name!r} is {what})")
    if method.read_table is None:
        return None
    try:
        return method.read_table(data[method.name])
    except DgqError as error:
        raise DgqError(f"quantization_config: {error.message}", error.hint) from None


def _of_type(data: dict[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """A field of a JSON object, or the default where there is none."""
    value = data.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > 2**64):
        raise DgqError(f"quantization_config: damaged ({name} is {shortened(value)})")
    return value


def _names(names: list[Any]) -> list[str]:
    """The list itself, where it holds texts."""
    if not all(isinstance(name, str) for name in names):
        raise DgqError(f"quantization_config: damaged (modules_to_not_convert is {shortened(names)})")
    return names


def _numbers(data: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The object itself, where the fields of these names are finite numbers of these types."""
    for name, kind in kinds.items():
        if name in data and not math.isfinite(_of_type(data, name, kind)):
            raise DgqError(f"quantization_config: damaged ({name} is {data[name]})")
    return data


def _calibration(data: dict[str, Any]) -> dict[str, Any]:
    _numbers(data, {**dict.fromkeys(("prompts", "steps", "seed", "calls"), int), "embeddings_error": int | float})
    for name in ("sqnr_db", "fidelity"):
        values = _of_type(data, name, dict, {})
        for key in values:
            _of_type(values, key, int | float | None)
    return data


def _attention_plan(data: dict[str, Any] | None) -> AttentionPlan | None:
    if data is None:
        return None
    plan: AttentionPlan = strict(AttentionPlan, data)
    if not 2 <= plan.bits <= 8 or not 0 <= plan.fraction_bits <= min(plan.bits - 1, MAX_FRACTION_BITS):
        raise DgqError(f"attention of {plan.bits} bits, {plan.fraction_bits} of them fractional, is out of range")
    return plan
