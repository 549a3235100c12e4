"""ComfyUI's `int8_tensorwise`: the Linear layers of a network in int8, with a rotation (ConvRot) or without.

A quantized layer NAME has, beside its float bias,

    NAME.weight        int8 (N, K): the weight, rotated along K in blocks where the layer is
    NAME.weight_scale  float32 (N, 1), one for each output; other tools also write one for all
    NAME.comfy_quant   uint8, JSON: {"format": "int8_tensorwise"}; of a rotated one convrot and convrot_groupsize too

and everything else is float. Inputs are rotated alike and quantized to 8 bits by row when it runs, symmetrically.
There is no place for divisors of input channels and for convolutions: what becomes of them says `Exported`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dgq_kernels.rotation import BLOCKS, rotate

from ..checkpoint.reading import FLOAT_DTYPES, family_at, tensor_table
from ..errors import DgqError
from ..integer.channels import rotate_channels
from ..integer.dequantize import dequantize
from ..integer.layer import IntegerLayer
from ..integer.skeleton import SplitLayer
from ..outputs import atomic_path, check_output, save_tensors
from ..progress import Progress, silent
from ..recipe import shortened
from ..version import __version__
from .names import original_names
from .source import Source, loaded

PREFIX = "model.diffusion_model."  # of the network in ComfyUI's files
MARK = ".comfy_quant"
FORMAT = "int8_tensorwise"


@dataclass(frozen=True)
class Exported:
    """What was written to a file.

    Attributes:
        path: of the file; bytes: its size.
        exact: quantized layers whose integers and scales are in it unchanged.
        rounded: those that were rounded again, to 8 bits, and the SQNR of that in dB: of the weight that the
            checkpoint's integers stand for to the difference.
        as_float: those without a place in the format, in float16: convolutions, and linear layers in parts.
    """

    path: str
    bytes: int
    exact: list[str] = field(default_factory=list)
    rounded: dict[str, float] = field(default_factory=dict)
    as_float: list[str] = field(default_factory=list)


def export(source: Source, out: Path, overwrite: bool = False, progress: Progress = silent) -> Exported:
    """Write a checkpoint's UNet as ComfyUI loads it ("Load Diffusion Model").

    Args:
        source: of `open_checkpoint`.
        out: a .safetensors file.
        overwrite: replace one that is there.
        progress: told of stage "export".

    Raises:
        DgqError: the file cannot be written, or the network is none whose original names are known.
    """
    check_output(out, overwrite)
    family = family_at(source.folder)
    if family.component != "unet":
        raise DgqError(
            f"{source.folder}: is a {family.title}, whose tensors' names in ComfyUI's files are not known to dgq",
            "UNets alone are exported so; --to diffusers takes every model",
        )
    network = loaded(source, family.component)
    layers = {name: one for name, one in network.named_modules() if isinstance(one, IntegerLayer | SplitLayer)}
    slots: dict[str, dict[str, Tensor]] = {}
    told = Exported(str(out), 0)
    for number, (name, layer) in enumerate(layers.items()):
        if isinstance(layers.get(name.rpartition(".")[0]), SplitLayer):
            continue
        if isinstance(layer, SplitLayer) or layer.plan.kind != "linear":
            told.as_float.append(name)
        else:
            codes, scale, sqnr_db = int8_rows(layer)
            slots[name] = slot(codes, scale, layer.plan.rotation)
            if sqnr_db is None:
                told.exact.append(name)
            else:
                told.rounded[name] = sqnr_db
        progress("export", number + 1, len(layers), name)
    dequantize(network, torch.float16)
    state = network.state_dict()
    names = original_names(network, state)
    tensors = {PREFIX + names[name]: tensor.half().contiguous() for name, tensor in state.items()}
    for name, slot_tensors in slots.items():
        place = PREFIX + names[f"{name}.weight"].removesuffix(".weight")
        tensors |= {f"{place}.{leaf}": tensor for leaf, tensor in slot_tensors.items()}
    with atomic_path(out) as temporary:
        about = {"format": "pt", "dgq_version": __version__, "base_model": source.header.base_model}
        save_tensors(tensors, temporary, about)
    return Exported(str(out), out.stat().st_size, told.exact, told.rounded, told.as_float)


def int8_rows(layer: IntegerLayer) -> tuple[Tensor, Tensor, float | None]:
    """A linear layer as the format has it.

    Returns:
        The codes int8 (N, K), rotated by the plan's rotation; the scales float32 (N,); and None where both are the
        layer's own, else the SQNR in dB of rounding again. Divisors ask for that. Those of an int8 weight's shift
        classes cancel out, and int4 codes times their sub-scales are int8.
    """
    plan = layer.plan
    if plan.channels == "none" or (plan.channels == "shift" and plan.wbits == 8):
        return layer.natural_weight, layer.weight_scale.detach(), None
    weight = layer.dequantize()
    turned = rotate_channels(weight, plan.rotation)
    scale = turned.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    codes = (turned / scale[:, None]).round()
    noise = (codes * scale[:, None] - turned).double().square().sum()
    signal = turned.double().square().sum()
    sqnr = 10 * torch.log10(signal / noise.clamp(min=1e-300)) if signal > 0 else torch.tensor(torch.inf)
    return codes.to(torch.int8), scale, float(sqnr)


def slot(codes: Tensor, scale: Tensor, rotation: int) -> dict[str, Tensor]:
    """The tensors of one layer but its bias: codes int8 (N, K), scale float32 (N,), rotated in blocks of so many."""
    about: dict[str, Any] = {"format": FORMAT}
    if rotation:
        about |= {"convrot": True, "convrot_groupsize": rotation}
    mark = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return {"weight": codes.contiguous(), "weight_scale": scale[:, None].contiguous(), MARK[1:]: mark}


def is_quantized(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names has layers in one of ComfyUI's formats."""
    return any(name.endswith(MARK) for name in names)


def float_tensors(file: Path, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of a file whose Linear layers may be `int8_tensorwise`, as a float model has them.

    Args:
        file: whoever wrote it.
        dtype: of the weights that were int8; what was float stays as it is.

    Raises:
        DgqError: the file cannot be read; a layer is of another format, or not as that says.
    """
    table = tensor_table(file)
    tensors = load_file(str(file))
    for mark in [name for name in table if name.endswith(MARK)]:
        layer = mark.removesuffix(MARK)
        rotation = _rotation(file, layer, tensors.pop(mark))
        names = f"{layer}.weight", f"{layer}.weight_scale"
        if lost := [name for name in names if name not in tensors]:
            raise DgqError(f"{file}: tensor {lost[0]!r} is missing")
        codes, scale = (tensors.pop(name) for name in names)
        tensors.pop(f"{layer}.input_scale", None)
        if codes.dtype != torch.int8 or codes.dim() != 2:
            what = f"{codes.dtype} of shape {list(codes.shape)}"
            raise DgqError(f"{file}: tensor {names[0]!r} is {what}, not an int8 matrix", "only Linear layers are read")
        rows = scale.float().flatten()
        if rows.numel() not in (1, len(codes)) or not bool((rows.isfinite() & (rows > 0)).all()):
            raise DgqError(f"{file}: tensor {names[1]!r} holds no scale of {len(codes)} outputs, or one that is none")
        if rotation and (rotation not in BLOCKS or codes.shape[1] % rotation):
            blocks = ", ".join(map(str, BLOCKS))
            raise DgqError(
                f"{file}: layer {layer!r} is rotated in groups of {rotation}, its inputs are {codes.shape[1]}",
                f"groups of {blocks} are read that divide the inputs",
            )
        weight = codes.float() * rows[:, None]
        tensors[names[0]] = (rotate(weight, rotation) if rotation else weight).to(dtype)
    if left := [name for name, one in tensors.items() if name.endswith(".weight") and not one.is_floating_point()]:
        found = table[left[0]][1]
        raise DgqError(f"{file}: tensor {left[0]!r} is {found}, and nothing says what it stands for", _ONLY)
    return tensors


_ONLY = f"files of float weights ({', '.join(FLOAT_DTYPES)}) and of {FORMAT} with their {MARK[1:]} are read"


def _rotation(file: Path, layer: str, mark: Tensor) -> int:
    """The group of a layer's rotation, 0 for none."""
    try:
        about = json.loads(bytes(mark.flatten().tolist()))
    except (ValueError, TypeError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        said = shortened(about.get("format") if isinstance(about, dict) else about)
        raise DgqError(f"{file}: layer {layer!r} is in the format {said}, which dgq does not read", _ONLY)
    inner = about.get("params")
    about = {**(inner if isinstance(inner, dict) else {}), **about}  # some tools write the rotation in there
    group = about.get("convrot_groupsize", 256) if about.get("convrot") else 0
    if type(group) is not int:
        raise DgqError(f"{file}: layer {layer!r}: convrot_groupsize {shortened(group)} is not a whole number")
    return group
