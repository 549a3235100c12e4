"""What is in a checkpoint: sizes, bits, each layer's error, and which layers deserve more bits (`dgq inspect`)."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import checksums
from ..checkpoint.header import Header
from ..checkpoint.reading import (
    SAFETENSORS_DTYPES,
    component_at,
    decoder_header,
    encoder_headers,
    family_at,
    float16_bytes,
    network_bytes,
    no_weights,
    read_header,
    tensor_table,
    weight_files,
)
from ..errors import DgqError
from ..family import FAMILIES
from ..pictures.pipelines import resolve
from .measurement import Measurement
from .overrides import DEFAULT_BUDGET, count_of, suggest, suggest_measured

if TYPE_CHECKING:
    from .overrides import Suggestion


_ITEM_BYTES = {name: dtype.itemsize for dtype, name in SAFETENSORS_DTYPES.items()}


_Tensors = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: its place in the network.
        kind: "linear", "pointwise", "conv2d" or "attention" (where a method has scales of q, k and v).
        shape: of the weight, (N, C) or (N, C, kh, kw); () for attention.
        wbits: bits of the weight, 0 for attention; abits: of the activations.
        channels: outlier handling ("none", "smooth", "shift"), or the published method's axis and groups.
        bytes: stored size, scales and bias included.
        sqnr_db: output signal to quantization noise on the calibration samples in dB, or None where not recorded.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    wbits: int
    abits: int
    channels: str
    bytes: int
    sqnr_db: float | None


@dataclass(frozen=True)
class PartReport:
    """Another component of a checkpoint that is quantized beside the network: the VAE, or a
    text encoder.

    Attributes:
        label: of its recipe.
        bytes, float16_bytes: of its weight files, and of its tensors in float16.
        layers: every quantized layer in the model's order.
        calibration: how it was made and what was measured then, without the per-layer errors.
    """

    label: str
    bytes: int
    float16_bytes: int
    layers: list[LayerReport]
    calibration: dict[str, Any]


@dataclass
class Inspection:
    """What `dgq inspect` tells about a model folder.

    Attributes:
        path: the folder.
        quantized: False for a float model; only path, unet_bytes, float16_bytes and ratio say something then.
        unet_bytes: size of the network's weight files; float16_bytes: size of its tensors in float16.
        ratio: unet_bytes / float16_bytes.
        label, recipe, base_model, dgq_version, generation: from the header.
        bits_per_weight: stored bits of the quantized layers, everything included, per weight.
        float_bytes: stored size of what is not quantized.
        channel_modes: how many layers handle their channels in which way.
        attention: log attention as "bits" and "fraction_bits", or None for float attention or the paper's.
        calibration: how it was made and what was measured then, without the per-layer errors.
        layers: every quantized layer in the model's order.
        worst: those with the lowest recorded SQNR, worst first; where measured, those with the most output noise.
        suggestion: None where no per-layer error is known or no 4-bit layer fits the budget.
        measurement: what each layer and step was found to do, where that was measured.
        network: what its kind of network is called; words: the method's "rounding" and "attention", for people.
        checksums: of how many files the checkpoint holds one; 0 for those of older versions.
        verified: whether the files were compared with them, and are as they were written.
        decoder: None where the VAE is float.
        encoders: by component, those text encoders that are quantized.
    """

    path: str
    quantized: bool
    unet_bytes: int
    float16_bytes: int
    ratio: float
    label: str = "float"
    recipe: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    dgq_version: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    bits_per_weight: float | None = None
    float_bytes: int = 0
    channel_modes: dict[str, int] = field(default_factory=dict)
    attention: dict[str, int] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    worst: list[LayerReport] = field(default_factory=list)
    suggestion: Suggestion | None = None
    measurement: Measurement | None = None
    network: str = ""
    words: dict[str, str] = field(default_factory=dict)
    checksums: int = 0
    verified: bool = False
    decoder: PartReport | None = None
    encoders: dict[str, PartReport] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; "suggestion" also holds the "command_line"."""
        data = dataclasses.asdict(self)
        if self.suggestion is not None:
            data["suggestion"]["command_line"] = self.suggestion.command_line
        return data


def inspect(
    model: str | os.PathLike[str] | None,
    worst: int = 10,
    budget: float = DEFAULT_BUDGET,
    measurement: Measurement | None = None,
    verify: bool = False,
) -> Inspection:
    """Describe a checkpoint from its headers; no weight is read, but where its files are to be verified.

    Args:
        model: checkpoint folder, hub id, or None for the embedded model.
        worst: how many layers to list by their error.
        budget: share of the network's file that the suggested overrides may add.
        measurement: of this checkpoint, from `measure_checkpoint`; its figures then decide which layers are the worst.
        verify: compare every file with its checksum.

    Raises:
        DgqError: the model does not exist or is damaged, a file is not as it was written or there are no
            checksums, or `worst` or `budget` is out of range.
    """
    if worst < 0 or not 0 <= budget <= 1:
        raise DgqError(f"worst {worst} or budget {budget} is out of range", "worst counts layers, budget is a share")
    folder = resolve(model)
    header = read_header(folder)
    if verify and not checksums.verify(component_at(folder)):
        raise DgqError(f"{folder}: has no checksums to verify", "it is a float model, or of an older dgq")
    tensors = _tensors(component_at(folder))
    size = network_bytes(folder)
    if header is None:
        total = float16_bytes(folder)
        return Inspection(str(folder), False, size, total, size / total, network=family_at(folder).title)
    owners = _owners(header, tensors)
    layers = _layers(header, owners, tensors)
    attention = dataclasses.asdict(header.attention) if header.attention else None
    float16 = float16_bytes(folder)
    stored = sum(layer.bytes for layer in layers)
    weights = sum(count_of(layer.shape) for layer in layers if layer.kind != "attention")
    if measurement is None:
        ranked = sorted((layer for layer in layers if layer.sqnr_db is not None), key=_sqnr)
        facts = header.method.layers(header)
        order: Iterable[str] = dict.fromkeys(facts[layer.name].owner for layer in ranked[: max(worst, 10)])
        suggestion = suggest(order, header, int(budget * size))
    else:
        noise = {one.name: one.noise for one in measurement.layers}
        ranked = sorted((layer for layer in layers if layer.name in noise), key=lambda layer: -noise[layer.name])
        suggestion = suggest_measured(measurement, header, int(budget * size))
    return Inspection(
        str(folder),
        True,
        size,
        float16,
        size / float16,
        label=header.recipe.label,
        recipe=header.recipe.to_dict(),
        base_model=header.base_model,
        dgq_version=header.dgq_version,
        generation=header.generation,
        bits_per_weight=8 * stored / max(weights, 1),
        float_bytes=sum(_bytes(tensors[name]) for name, owner in owners.items() if owner is None),
        channel_modes=dict(Counter(layer.channels for layer in layers if layer.kind != "attention")),
        attention=attention,
        words=header.method.words(header.recipe, attention),
        calibration={key: value for key, value in header.calibration.items() if key != "sqnr_db"},
        layers=layers,
        worst=ranked[:worst],
        suggestion=suggestion,
        measurement=measurement,
        network=family_at(folder).title,
        checksums=len(checksums.stored(component_at(folder))),
        verified=verify,
        decoder=_decoder(folder),
        encoders={name: _part(folder / name, of) for name, of in encoder_headers(folder).items()},
    )


def _decoder(folder: Path) -> PartReport | None:
    header = decoder_header(folder)
    return None if header is None else _part(folder / "vae", header)


def _part(place: Path, header: Header) -> PartReport:
    tensors = _tensors(place)
    owners = _owners(header, tensors)
    plain = sum(count_of(tensors[name][0]) for name, owner in owners.items() if owner is None)
    quantized = sum(plan.float_parameters for plan in header.layers.values())
    return PartReport(
        header.recipe.label,
        sum(file.stat().st_size for file in weight_files(place)),
        2 * (plain + quantized),
        _layers(header, owners, tensors),
        {key: value for key, value in header.calibration.items() if key != "sqnr_db"},
    )


def split_name(name: str) -> tuple[str, str]:
    """A layer's block and its place there: ("up_blocks.0.attentions.1", "transformer_blocks.0.attn1.to_q")."""
    found = next((match for family in FAMILIES if (match := family.block.match(name))), None)
    block = found[0] if found else name.partition(".")[0]
    return block, name[len(block) + 1 :]


def short_block(block: str) -> str:
    """A block's name in a margin: "up 0 attention 1"."""
    known = {pair for family in FAMILIES for pair in family.shortened}
    for long, short in sorted(known, key=lambda pair: -len(pair[0])):  # words may be parts of others
        block = block.replace(long, short)
    return block.replace(".", " ")


def _sqnr(layer: LayerReport) -> float:
    return float("inf") if layer.sqnr_db is None else layer.sqnr_db


def _tensors(place: Path) -> _Tensors:
    files = weight_files(place)
    if not files:
        raise no_weights(place)
    return {name: entry for file in files for name, entry in tensor_table(file).items()}


def _bytes(entry: tuple[tuple[int, ...], str]) -> int:
    shape, dtype = entry
    return count_of(shape) * _ITEM_BYTES[dtype]


def _owners(header: Header, tensors: _Tensors) -> dict[str, str | None]:
    """The quantized layer of each tensor, or None."""
    prefixes = {one.prefix: name for name, one in header.method.layers(header).items()}
    return {name: _owner(name, prefixes) for name in tensors}


def _owner(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The quantized layer a stored tensor belongs to, or None: that of the longest prefix above it."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if parent in prefixes:
            return prefixes[parent]
    return None


def _layers(header: Header, owners: Mapping[str, str | None], tensors: _Tensors) -> list[LayerReport]:
    sizes: Counter[str] = Counter()
    for name, entry in tensors.items():
        if (owner := owners[name]) is not None:
            sizes[owner] += _bytes(entry)
    errors = header.calibration.get("sqnr_db", {})
    return [
        LayerReport(name, one.kind, one.shape, one.wbits, one.abits, one.channels, sizes[name], errors.get(name))
        for name, one in header.method.layers(header).items()
    ]
