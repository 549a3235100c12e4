"""Reading model folders, strictly: a missing, unknown or misshapen tensor is an error that names it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import methods  # noqa: F401 (fills METHODS)
from ..errors import DgqError
from ..families import DECODERS, FAMILIES
from ..family import Family, drawing, working
from ..integer.layer import IntegerLayer
from ..recipe import shortened
from .header import QUANT_METHOD, Header, _of_type

# What a component's folder may carry into a checkpoint: data, never code or pickles.
COPIED_SUFFIXES = {".json", ".txt", ".safetensors", ".model", ".jinja"}


_PICKLES = {".bin", ".pt"}
_NO_PICKLE = "save them as safetensors (safe_serialization); dgq loads no pickle"


# The names diffusers and transformers give weights: of either library, of a variant, in shards (the variant before
# the shard's number as it is written today, or after it).
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors")
_OTHER_VARIANT = re.compile(r"(diffusion_pytorch_)?model(?:\.(\w+))?(-\d+-of-\d+)?(?:\.(\w+))?\.safetensors")


# The libraries that components come from ("stable_diffusion" is diffusers' own module of that name: the safety
# checker).
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


# No number in a component's configuration is larger: not the channels or the vocabulary of a model.
MAX_CONFIG_NUMBER = 2**24


MAX_TIMESTEPS = 10**5


FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_regular(path: Path) -> None:
    """Refuse to open what is no regular file (a link to one is): a pipe or a device could hang the reader.

    Raises:
        DgqError: there is no such file, or something else in its place.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DgqError(f"{path}: no such file") from None
    except OSError as error:
        raise DgqError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise DgqError(f"{path}: is not a regular file", "put the file itself in its place, or a link to it")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DgqError: the file is missing, unreadable or not a JSON object.
    """
    check_regular(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DgqError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise DgqError(f"{path}: not a JSON object")
    return data


def family_at(folder: Path) -> Family:
    """The family of the network in a model folder, by its pipeline's class, else by the networks that are there.

    Raises:
        DgqError: there is none that dgq works with.
    """
    index = folder / "model_index.json"
    if index.is_file() and (family := drawing(read_json(index).get("_class_name"))):
        return family
    there = [family for family in FAMILIES if (folder / family.component / "config.json").is_file()]
    for family in there:
        if read_json(folder / family.component / "config.json").get("_class_name") == family.network:
            return family
    if not there:
        names = " nor ".join(dict.fromkeys(family.component for family in FAMILIES if family.pipelines))
        raise DgqError(f"{folder}: has no {names}", f"dgq works with {working()}")
    return there[0]


def component_at(folder: Path) -> Path:
    """The folder of the network in a model folder.

    Raises:
        DgqError: as `family_at`.
    """
    return folder / family_at(folder).component


def network_config(folder: Path) -> dict[str, Any]:
    """The float configuration of the network in a model folder.

    Raises:
        DgqError: as `family_at`; or it is no JSON object.
    """
    config = read_json(component_at(folder) / "config.json")
    config.pop("quantization_config", None)
    return config


def read_header(folder: Path) -> Header | None:
    """The header of a model folder's network, or None for a float model.

    Raises:
        DgqError: not a model folder, or a damaged header.
    """
    return header_at(component_at(folder))


def decoder_header(folder: Path) -> Header | None:
    """The header of a model folder's VAE, or None where that is float, or of no family.

    Raises:
        DgqError: a damaged header.
    """
    place = next((folder / one.component for one in DECODERS if one.network == _class_at(folder / one.component)), None)
    return header_at(place) if place else None


def encoder_headers(folder: Path) -> dict[str, Header]:
    """The headers of a model folder's text encoders, those that dgq quantized, by component.

    Raises:
        DgqError: a damaged header.
    """
    found = {name: encoder_header(folder / name) for name in text_encoders(folder)}
    return {name: header for name, header in found.items() if header is not None}


def encoder_header(component: Path) -> Header | None:
    """The header in a text encoder's folder, or None for a float one, or one that another method quantized: what
    transformers makes of that is its own affair.

    Raises:
        DgqError: there is no configuration, or a damaged header.
    """
    quantization = read_json(component / "config.json").get("quantization_config")
    own = isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
    return header_at(component) if own else None


def text_encoders(folder: Path) -> dict[str, str]:
    """The text encoders of a pipeline folder: {component: class of transformers}.

    Raises:
        DgqError: as `components`.
    """
    known = components(folder).items()
    return {name: kind for name, (library, kind) in known if library == "transformers" and "text_encoder" in name}


def _class_at(component: Path) -> Any:
    """The class that a component's configuration names; None where there is none."""
    file = component / "config.json"
    return read_json(file).get("_class_name") if file.is_file() else None


def header_at(component: Path) -> Header | None:
    """The header in a component's folder, or None for a float one.

    Raises:
        DgqError: there is no configuration, or a damaged header.
    """
    file = component / "config.json"
    config = read_json(file)
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    try:
        return Header.from_dict(_of_type(config, "quantization_config", dict))
    except DgqError as error:
        raise DgqError(f"{file}: {error.message}", error.hint) from None


def tensor_table(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of a safetensors file, from its header alone.

    Raises:
        DgqError: the file is missing, truncated or not safetensors.
    """
    check_regular(file)
    if file.suffix in _PICKLES:
        raise DgqError(f"{file}: the weights are pickled", _NO_PICKLE)
    try:
        # not as torch maps a file: writable, which the system refuses of one larger than memory
        with safe_open(str(file), framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        reason = f"{file}: not a readable safetensors file ({error})"
        raise DgqError(reason, "it may be truncated: copy it again") from None


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file that a user named.

    Raises:
        DgqError: as `tensor_table`, or by its ending it is another kind of file.
    """
    check_regular(file)
    if file.suffix != ".safetensors":
        raise DgqError(f"{file}: is no safetensors file", "convert it; dgq loads no pickle")
    return list(tensor_table(file))


def weight_files(component_folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of one component (network, vae, text_encoder, ...), sorted by name.

    The plain files where there are any, `diffusion_pytorch_model.safetensors` or `model.safetensors`, else those of
    the variant "fp16" (`model.fp16.safetensors`); one whole file rather than shards (such as
    `model-00001-of-00002.safetensors` or `model.fp16-00001-of-00002.safetensors`). Files of other names (adapters,
    other variants such as "non_ema") are none of the component's. Only names are looked at; empty where there is no
    such file or no such folder.
    """
    names = os.listdir(component_folder) if component_folder.is_dir() else []
    found = [match for match in map(_WEIGHTS.fullmatch, sorted(names)) if match]
    found = [match for match in found if match[1]] or found
    found = [match for match in found if not (match[2] or match[4])] or found
    found = [match for match in found if not match[3]] or found
    return [component_folder / match[0] for match in found]


def no_weights(component_folder: Path) -> DgqError:
    """What a component's folder without `weight_files` is told as."""
    names = sorted(os.listdir(component_folder)) if component_folder.is_dir() else []
    if other := next(filter(None, map(_OTHER_VARIANT.fullmatch, names)), None):
        return DgqError(
            f"{component_folder}: holds weights of the variant {other[2] or other[4]!r} alone",
            'dgq reads those without a variant and of "fp16": save the pipeline without one',
        )
    return DgqError(f"{component_folder}: holds no safetensors weights")


def weight_variant(component_folder: Path) -> Literal["fp16"] | None:
    """The `variant` to ask `from_pretrained` for so that it reads `weight_files` of this folder."""
    files = weight_files(component_folder)
    return "fp16" if files and ".fp16" in files[0].name else None


def verify_tensors(files: Sequence[Path], network: nn.Module) -> None:
    """Compare the stored tensors with the empty model: names, shapes and dtypes.

    Raises:
        DgqError: the first missing, unknown, misshapen or repeated tensor, or one of another dtype (parameters may
            have any float dtype, what integer layers store only its own).
    """
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        table = tensor_table(file)
        if twice := sorted(set(stored) & set(table)):
            raise DgqError(f"{file}: tensor {twice[0]!r} is in another file too")
        stored.update(table)
    place = weights_place(files)
    integer = {name for name, module in network.named_modules() if isinstance(module, IntegerLayer)}
    expected = held(network)
    for name, tensor in expected.items():
        if name not in stored:
            raise DgqError(f"{place}: tensor {name!r} is missing")
        shape, dtype = stored[name]
        matrix = (tensor.shape[0], tensor[0].numel()) if tensor.dtype == torch.int8 and tensor.dim() == 4 else None
        if shape not in (tuple(tensor.shape), matrix):  # format 1 has a convolution's int8 weight as a matrix
            raise DgqError(f"{place}: tensor {name!r} has shape {list(shape)}, expected {list(tensor.shape)}")
        loose = tensor.is_floating_point() and name.rpartition(".")[0] not in integer
        if dtype not in (FLOAT_DTYPES if loose else [SAFETENSORS_DTYPES.get(tensor.dtype)]):
            raise DgqError(f"{place}: tensor {name!r} has dtype {dtype}, expected {tensor.dtype}")
    if unknown := sorted(set(stored) - set(expected)):
        raise DgqError(f"{place}: unknown tensor {unknown[0]!r}", "the config belongs to another checkpoint")


def held(network: nn.Module) -> dict[str, Tensor]:
    """What files hold of a network: its state without the second names of tensors that it has under two."""
    tied = getattr(network, "all_tied_weights_keys", {})  # of transformers
    return {name: tensor for name, tensor in network.state_dict().items() if name not in tied}


def weights_place(files: Sequence[Path]) -> Path:
    """What an error about one of several weight files' tensors names: the file, or the folder of shards."""
    return files[0] if len(files) == 1 else files[0].parent


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """The components of a pipeline folder, from its model_index.json: {name: (library, class)}.

    Raises:
        DgqError: the file is damaged, or the pipeline is none that dgq works with.
    """
    file = folder / "model_index.json"
    index = read_json(file)
    pipeline = index.get("_class_name")
    family = drawing(pipeline)
    if family is None:
        raise DgqError(
            f"{file}: the pipeline is {shortened(pipeline)}; dgq works with {working()}",
            "dgq quantizes the network of pipelines that draw from a text alone",
        )
    found = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not name.isascii() or not name.isidentifier():
            raise DgqError(f"{file}: component {shortened(name)} is not a plain folder name")
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or entry[0] not in LIBRARIES:
            raise DgqError(f"{file}: component {name!r} is {shortened(entry)}, not a class of {', '.join(LIBRARIES)}")
        found[name] = (entry[0], entry[1])
    if missing := [name for name in family.needed if name not in found]:
        raise DgqError(f"{file}: the pipeline has no {missing[0]}")
    if (network := found[family.component]) != ("diffusers", family.network):
        raise DgqError(
            f"{file}: the {family.component} is {shortened('.'.join(network))}; "
            f"dgq works with diffusers.{family.network}"
        )
    return found


def check_folder(folder: Path) -> Header | None:
    """Check a local pipeline folder before any weight is loaded.

    Returns:
        Its header, or None for a float model.

    Raises:
        DgqError: no model_index.json, or of a pipeline that dgq does not work with; a component that is not plainly
            inside the folder; a file that is no regular one, not readable, or of sizes no model has; weights only as
            pickles; a damaged header.
    """
    for name in components(folder):
        _check_component(folder / name)
    decoder_header(folder)
    encoder_headers(folder)
    return read_header(folder)


def _check_component(component: Path) -> None:
    if not component.is_dir():
        raise DgqError(f"{component}: the folder is missing")
    configs: dict[Path, dict[str, Any]] = {}
    for file in sorted(component.iterdir()):
        if file.suffix in COPIED_SUFFIXES or (file.exists() and not file.is_dir()):
            check_regular(file)
        if file.suffix == ".json":
            configs[file] = read_json(file)
        elif file.suffix in (".txt", ".jinja"):
            try:
                file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DgqError(f"{file}: cannot be read ({error})") from None
    weights = weight_files(component)
    if not weights and any(file.suffix in _PICKLES for file in component.iterdir()):
        raise DgqError(f"{component}: the weights are pickled", _NO_PICKLE)
    names = [name for file in weights for name in tensor_table(file)]
    for file, config in configs.items():
        if file.name in ("config.json", "scheduler_config.json"):
            _check_sizes(file, config, len(names))
        elif ".safetensors.index." in file.name:
            shards = config.get("weight_map")
            if not isinstance(shards, dict):
                raise DgqError(f"{file}: holds no weight_map")
            if lost := [shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard]:
                raise DgqError(f"{file}: {shortened(lost[0])} leads outside the checkpoint")


def _check_sizes(file: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a configuration whose network would be built for minutes, or fill the memory, before a tensor is compared.

    Args:
        file: its place.
        config: the JSON object, or one within it.
        tensors: how many the component's weight files hold; no network has more layers.
    """
    depth = {"transformer_layers": 1, "layers": 1, "block_types": 1}
    for name, value in config.items():
        if name == "quantization_config":
            continue
        if isinstance(value, dict):
            _check_sizes(file, value, tensors)
            continue
        items = value if isinstance(value, list) else [value]
        flat = [item for part in items for item in (part if isinstance(part, list) else [part])]
        numbers = [item for item in flat if isinstance(item, int | float) and not isinstance(item, bool)]
        low = 0 if name.endswith(("dim", "size", "channels", "heads", "groups")) else -MAX_CONFIG_NUMBER
        high = MAX_TIMESTEPS if "timesteps" in name else MAX_CONFIG_NUMBER
        if any(number != number or (isinstance(number, int) and not low <= number <= high) for number in numbers):
            raise DgqError(f"{file}: {name} {shortened(value)} is out of range")
        for key in depth:
            if key in name:
                counts = [len(items)] if key == "block_types" else [n for n in numbers if isinstance(n, int)]
                depth[key] = max([depth[key], *counts])
                break
    layers = math.prod(depth.values())
    if tensors and layers > tensors:
        raise DgqError(f"{file}: {layers} layers, but the weights are {tensors} tensors", "another model's file?")


def network_files(folder: Path) -> list[Path]:
    """The network's weight files; in a folder of a network alone by their names, none where there are none."""
    if (folder / "model_index.json").is_file():
        return weight_files(component_at(folder))
    components = dict.fromkeys(family.component for family in FAMILIES)
    return [file for name in components for file in weight_files(folder / name)]


def network_bytes(folder: Path) -> int:
    """Size of the network's weight files."""
    return sum(file.stat().st_size for file in network_files(folder))


def network_hash(folder: Path) -> str:
    """SHA-256 of the network's weight files one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in network_files(folder):
        with file.open("rb") as stream:
            while part := stream.read(2**24):
                digest.update(part)
    return digest.hexdigest()


def float16_bytes(folder: Path) -> int:
    """Size of the float model's network in float16, from its configuration."""
    network = family_at(folder).skeleton(network_config(folder))
    return 2 * sum(tensor.numel() for tensor in network.state_dict().values())
