"""The file of tuned scales: a safetensors file that names the checkpoint it belongs to (docs/format.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint.reading import check_regular
from ..checkpoint.values import finite
from ..errors import DgqError
from ..outputs import atomic_path, save_tensors
from ..recipe import shortened, strict
from ..version import __version__
from .layout import Layout, integer_layers

KEY = "dgq_tuned"  # of the file's metadata
FORMAT_VERSION = 1
CHECKSUM = "checksum"  # of the whole file, in its description
MAX_EXPERTS = 64


@dataclass(frozen=True)
class Base:
    """The checkpoint that scales were tuned on.

    Attributes:
        name: of its folder or of its float model, for people.
        recipe: label, such as "integer W4A8".
        content: `content_hash` of its UNet, what it is known by.
    """

    name: str
    recipe: str
    content: str


@dataclass(frozen=True)
class Subject:
    """One of the subjects of a file.

    Attributes:
        prompt: what its pictures are called.
        pictures: how many there were.
        class_prompt: prior preservation's prompt; empty: none.
        class_pictures: how many of those.
    """

    prompt: str
    pictures: int
    class_prompt: str = ""
    class_pictures: int = 0


@dataclass(frozen=True)
class Description:
    """What a file says of itself.

    Attributes:
        base: the checkpoint.
        experts: N; expert i has the timesteps t with floor(t N / timesteps) = i.
        timesteps: of the noise schedule.
        input_scales: whether input scales are tuned too.
        subjects: in the order they were given.
        steps: optimizer steps that made it.
        options: how it was tuned, for people; nothing is computed from them.
        dgq_version: that wrote it.
    """

    base: Base
    experts: int
    timesteps: int
    input_scales: bool
    subjects: list[Subject]
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    dgq_version: str = __version__

    def to_json(self, **more: str) -> str:
        """The metadata's text, with more fields where they are given."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self), **more}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Inverse of `to_json`, the checksum left out. Raises DgqError: it is none, or of another version; a field is
        missing, unknown or out of range."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DgqError(f"the description is no JSON ({error})") from None
        version = data.pop("format_version", None) if isinstance(data, dict) else None
        if version != FORMAT_VERSION or version is True:
            raise DgqError(
                f"format version {shortened(version)}, this dgq reads {FORMAT_VERSION}", "install the dgq that wrote it"
            )
        if not isinstance(data.get("subjects"), list) or not isinstance(data.get("options", {}), dict):
            raise DgqError("subjects or options are damaged")
        data = {
            **data,
            "base": strict(Base, data.get("base", {})),
            "subjects": [strict(Subject, one) for one in data["subjects"]],
        }
        others = ("base", "subjects", "options", CHECKSUM)
        plain = {name: value for name, value in data.items() if name not in others}
        checked = strict(_Plain, plain)
        if not 1 <= checked.experts <= MAX_EXPERTS or not 1 <= checked.timesteps <= 10**5 or checked.steps < 0:
            raise DgqError(f"{checked.experts} experts of {checked.timesteps} timesteps are out of range")
        return cls(**{name: value for name, value in data.items() if name != CHECKSUM})


@dataclass(frozen=True)
class _Plain:
    """The fields of `Description` that are no objects, for `strict`."""

    experts: int
    timesteps: int
    input_scales: bool
    steps: int
    dgq_version: str


@dataclass(frozen=True)
class Tuned:
    """Tuned scales.

    Attributes:
        about: what they are.
        vectors: float32 (experts, layout.size), relative changes of the scales in the order of the layout.
    """

    about: Description
    vectors: Tensor


def content_hash(unet: nn.Module) -> str:
    """Of what a UNet's integer layers compute: names, plans, scales, biases, divisors, and the sums of the integers.
    The same on every device and in every form of the weights."""
    digest = hashlib.sha256()
    for name, layer in integer_layers(unet).items():
        digest.update(json.dumps([name, layer.plan.to_dict()], sort_keys=True).encode())
        sums = layer.prepare(layer.weight_scale.device).column_sum
        for tensor in (layer.weight_scale, layer.bias, getattr(layer, "inv_divisor", None), sums):
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksum(about: Description, parts: dict[str, Tensor]) -> str:
    """CRC-32 in hexadecimal of the description's text and the tensors, by name."""
    value = zlib.crc32(about.to_json().encode())
    for name in sorted(parts):
        value = zlib.crc32(parts[name].contiguous().numpy().tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def write(file: Path, tuned: Tuned, layout: Layout) -> None:
    """Write a file, whole or not at all; the changes are stored in float16.

    Raises:
        DgqError: it cannot be written.
    """
    parts = {name: part.half().contiguous() for name, part in layout.split(tuned.vectors.cpu()).items()}
    text = tuned.about.to_json(checksum=_checksum(tuned.about, parts))
    with atomic_path(file) as temporary:
        # one key: safetensors writes several in an order that changes from file to file
        save_tensors(parts, temporary, {KEY: text})


def _open(file: Path) -> tuple[Description, dict[str, Tensor], Any]:
    """The description, the tensors and the stored checksum, None where there is none."""
    check_regular(file)
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DgqError(
            f"{file}: not a readable safetensors file ({error})", "it may be truncated: copy it again"
        ) from None
    if KEY not in metadata:
        raise DgqError(f"{file}: holds no tuned scales", "dgq tune makes such files; a LoRA is loaded by diffusers")
    try:
        about = Description.from_json(metadata[KEY])
    except DgqError as error:
        raise DgqError(f"{file}: {error.message}", error.hint) from None
    return about, tensors, json.loads(metadata[KEY]).get(CHECKSUM)


def describe(file: Path) -> tuple[Description, dict[str, tuple[int, ...]]]:
    """What a file says of itself, and the shapes of its tensors.

    Raises:
        DgqError: it cannot be read, holds no tuned scales, or is damaged.
    """
    about, tensors, checksum = _open(file)
    for name, tensor in tensors.items():
        _check(file, name, tensor, about.experts)
    _verify(file, about, tensors, checksum)
    return about, {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check(file: Path, name: str, tensor: Tensor, experts: int) -> None:
    if tensor.dtype != torch.float16 or tensor.dim() != 2 or tensor.shape[0] != experts:
        raise DgqError(
            f"{file}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected float16 of {experts} experts"
        )
    if not finite(tensor):
        raise DgqError(f"{file}: tensor {name!r} holds values that are not finite", "it is damaged: copy it again")


def _verify(file: Path, about: Description, tensors: dict[str, Tensor], checksum: Any) -> None:
    if checksum is not None and checksum != _checksum(about, tensors):
        raise DgqError(f"{file}: is not as it was written: another checksum", "it is damaged: copy it again")


def read(file: Path, unet: nn.Module, content: str | None = None) -> Tuned:
    """Read a file for a UNet.

    Args:
        file: where.
        unet: of the loaded checkpoint.
        content: the UNet's `content_hash` where it is known.

    Raises:
        DgqError: it cannot be read or is damaged; it was tuned on another checkpoint; a tensor is missing, unknown or
            of another shape.
    """
    about, tensors, checksum = _open(file)
    content = content_hash(unet) if content is None else content
    if about.base.content != content:
        raise DgqError(
            f"{file}: was tuned on another checkpoint, {about.base.name} ({about.base.recipe}, content "
            f"{about.base.content[:12]}); this one is {content[:12]}",
            "load that checkpoint, or tune on this one",
        )
    layout = Layout.of(unet, about.input_scales)
    if unknown := sorted(tensors.keys() ^ layout.parts.keys()):
        what = "is unknown" if unknown[0] in tensors else "is missing"
        raise DgqError(f"{file}: tensor {unknown[0]!r} {what}", "it is damaged: copy it again")
    for name, tensor in tensors.items():
        _check(file, name, tensor, about.experts)
        if tensor.shape[1] != layout.parts[name]:
            raise DgqError(f"{file}: tensor {name!r} has {tensor.shape[1]} values, expected {layout.parts[name]}")
    _verify(file, about, tensors, checksum)
    return Tuned(about, torch.cat([tensors[name].float() for name in layout.parts], dim=1))
