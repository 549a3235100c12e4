"""The file format of a dgq checkpoint: a diffusers folder whose UNet holds packed integers.

    DIR/model_index.json, scheduler/, text_encoder/, tokenizer/, vae/   as the base model has them
    DIR/unet/config.json                          the float config plus "quantization_config" (see `Header`)
    DIR/unet/diffusion_pytorch_model.safetensors  per integer layer the tensors of `layers.buffer_specs`,
                                                  under the layer's name; everything else as in the float model
    DIR/README.md                                 generated model card

A checkpoint is written to a temporary folder beside its place and renamed: an interrupted save never looks like one.
Reading is strict: a missing, unknown or misshapen tensor is an error that names it, and so are a plan that is not the
float layer's and a value that no calibration writes (`verification`). No pickle is read or written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dgq_kernels.log_attention.reference import MAX_FRACTION_BITS

from .attention import AttentionPlan
from .calibration import geometry, quantizable
from .errors import DgqError
from .fusion import fuse
from .layers import IntegerLayer, build_skeleton
from .recipe import LayerPlan, Recipe, shortened, strict
from .writing import atomic_folder, save_tensors

FORMAT_VERSION = 1
QUANT_METHOD = "dgq"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# What a component's folder may carry into a checkpoint: data, never code or pickles.
COPIED_SUFFIXES = {".json", ".txt", ".safetensors", ".model"}
# The names diffusers and transformers give weights: of either library, of a variant, in shards (the variant before
# the shard's number as it is written today, or after it).
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors")
# The pipelines that dgq quantizes, loads and draws with, the components they cannot do without, and the libraries
# that components come from ("stable_diffusion" is diffusers' own module of that name: the safety checker).
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# No number in a component's configuration is larger: not the channels or the vocabulary of a model.
MAX_CONFIG_NUMBER = 2**24
MAX_TIMESTEPS = 10**5
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
# What its own folder may, beside model_index.json.
COPIED_NAMES = ("LICENSE", "NOTICE", "concepts.json")


@dataclass
class Header:
    """`quantization_config` in unet/config.json.

    Attributes:
        recipe: what was asked for.
        layers: integer recipe: the plan of every quantized layer.
        attention: integer recipe: the log attention, or None for float attention.
        paper: paper recipe: the table of `paper_calibration.calibrate_paper`, or None.
        base_model: name of the float model.
        generation: default "steps" and "guidance" of `dgq generate`.
        calibration: how it was made and what was measured then (seed, prompts, sqnr_db per layer, fidelity).
        dgq_version: version that wrote the file.
    """

    recipe: Recipe
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    attention: AttentionPlan | None = None
    paper: dict[str, Any] | None = None
    base_model: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    dgq_version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object as stored."""
        data: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "dgq_version": self.dgq_version,
            "recipe": self.recipe.to_dict(),
            "layers": {name: plan.to_dict() for name, plan in self.layers.items()},
            "attention": dataclasses.asdict(self.attention) if self.attention else None,
            "base_model": self.base_model,
            "generation": self.generation,
            "calibration": self.calibration,
        }
        return data if self.paper is None else {**data, "paper": self.paper}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Header:
        """Inverse of `to_dict`.

        Raises:
            DgqError: another method or format version, an unknown field, a value out of range.
        """
        if data.get("quant_method") != QUANT_METHOD:
            raise DgqError(f"quantization_config: quant_method is {data.get('quant_method')!r}, not 'dgq'")
        if data.get("format_version") != FORMAT_VERSION or data["format_version"] is True:
            raise DgqError(
                f"quantization_config: format version {data.get('format_version')!r}, this dgq reads {FORMAT_VERSION}",
                "install the dgq that wrote it, or calibrate again",
            )
        known = {item.name for item in dataclasses.fields(cls)} | {"quant_method", "format_version"}
        if unknown := sorted(set(data) - known):
            raise DgqError(f"quantization_config: unknown field {unknown[0]!r}")
        layers: dict[str, LayerPlan] = {}
        for name, plan in _of_type(data, "layers", dict, {}).items():
            try:
                layers[name] = LayerPlan.from_dict(plan)
            except DgqError as error:
                raise DgqError(f"quantization_config: layer {shortened(name)}: {error.message}", error.hint) from None
        recipe, attention = _of_type(data, "recipe", dict), _of_type(data, "attention", dict | None)
        try:
            asked, attention_plan = Recipe.from_dict(recipe), _attention_plan(attention)
        except DgqError as error:
            raise DgqError(f"quantization_config: {error.message}", error.hint) from None
        return cls(
            recipe=asked,
            layers=layers,
            attention=attention_plan,
            paper=_of_type(data, "paper", dict | None),
            base_model=_of_type(data, "base_model", str, ""),
            generation=_numbers(_of_type(data, "generation", dict, {}), {"steps": int, "guidance": int | float}),
            calibration=_calibration(_of_type(data, "calibration", dict, {})),
            dgq_version=_of_type(data, "dgq_version", str, ""),
        )


def _of_type(data: dict[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """A field of a JSON object, or the default where there is none."""
    value = data.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > 2**64):
        raise DgqError(f"quantization_config: damaged ({name} is {shortened(value)})")
    return value


def _numbers(data: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """The object itself, where the fields of these names are finite numbers of these types."""
    for name, kind in kinds.items():
        if name in data and not math.isfinite(_of_type(data, name, kind)):
            raise DgqError(f"quantization_config: damaged ({name} is {data[name]})")
    return data


def _calibration(data: dict[str, Any]) -> dict[str, Any]:
    _numbers(data, dict.fromkeys(("prompts", "steps", "seed", "calls"), int))
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


def apply_header(unet: nn.Module, header: Header, file: Path | None = None) -> None:
    """Turn a float UNet (usually on the meta device) into the empty quantized model a header describes.

    Args:
        unet: is changed.
        header: from `file`.
        file: for the message of an error.

    Raises:
        DgqError: a planned layer is none of the model's, or not of its kind and sizes.
    """
    try:
        if header.paper is not None:
            from .paper_calibration import build_paper_skeleton

            build_paper_skeleton(unet, header.paper)
            return
        check_plans(unet, header.layers)
    except DgqError as error:
        where = f"{file}: quantization_config" if file else "quantization_config"
        raise DgqError(f"{where}: {error.message}", error.hint) from None
    build_skeleton(unet, header.layers)
    fuse(unet)
    if header.attention is not None:
        from .attention import use_log_attention

        use_log_attention(unet, header.attention)


def check_plans(unet: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Hold plans against the float model: layers, their kinds, sizes and biases, and the parts of split ones.

    Raises:
        DgqError: the first plan that is not of this model.
    """
    modules, skipped = quantizable(unet)
    parts: dict[str, list[int]] = {}  # of split layers: where the parts so far end
    for name, plan in plans.items():
        owner = plan.owner(name)
        if owner not in modules:
            why = f"cannot be quantized ({skipped[owner]})" if owner in skipped else "is none of the model's"
            raise DgqError(f"layer {name!r} {why}")
        expected = geometry(modules[owner])
        if plan.columns:
            ends = parts.setdefault(owner, [])
            start = ends[-1] if ends else 0
            if name != f"{owner}.{len(ends)}" or plan.columns[0] != start or owner in plans:
                raise DgqError(f"layer {name!r}: columns {plan.columns} do not follow {start}")
            ends.append(plan.columns[1])
            expected |= {"kind": "pointwise", "in_features": plan.in_features, "bias": expected["bias"] and not start}
        for key, value in expected.items():
            if getattr(plan, key) != value:
                found = f"{key} is {getattr(plan, key)}, {value} in the model"
                raise DgqError(f"layer {name!r}: {found}")
    for owner, ends in parts.items():
        whole = geometry(modules[owner])
        if whole["kind"] != "pointwise" or ends[-1] != whole["in_features"]:
            what = f"the {whole['in_features']} input channels of a {whole['kind']} layer"
            raise DgqError(f"layer {owner!r}: parts that end at {ends} are not {what}")


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


def read_header(folder: Path) -> Header | None:
    """The header of a model folder, or None for a float model.

    Raises:
        DgqError: not a model folder, or a damaged header.
    """
    config = read_json(folder / "unet" / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    try:
        return Header.from_dict(_of_type(config, "quantization_config", dict))
    except DgqError as error:
        raise DgqError(f"{folder / 'unet' / 'config.json'}: {error.message}", error.hint) from None


def tensor_table(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of a safetensors file, from its header alone.

    Raises:
        DgqError: the file is missing, truncated or not safetensors.
    """
    check_regular(file)
    try:
        with safe_open(str(file), framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        reason = f"{file}: not a readable safetensors file ({error})"
        raise DgqError(reason, "it may be truncated: copy it again") from None


def weight_files(component_folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of one component (unet, vae, text_encoder, ...), sorted by name.

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


def weight_variant(component_folder: Path) -> Literal["fp16"] | None:
    """The `variant` to ask `from_pretrained` for so that it reads `weight_files` of this folder."""
    files = weight_files(component_folder)
    return "fp16" if files and ".fp16" in files[0].name else None


def verify_tensors(files: Sequence[Path], unet: nn.Module) -> None:
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
    integer = {name for name, module in unet.named_modules() if isinstance(module, IntegerLayer)}
    expected = unet.state_dict()
    for name, tensor in expected.items():
        if name not in stored:
            raise DgqError(f"{place}: tensor {name!r} is missing")
        shape, dtype = stored[name]
        if shape != tuple(tensor.shape):
            raise DgqError(f"{place}: tensor {name!r} has shape {list(shape)}, expected {list(tensor.shape)}")
        loose = tensor.is_floating_point() and name.rpartition(".")[0] not in integer
        if dtype not in (FLOAT_DTYPES if loose else [SAFETENSORS_DTYPES.get(tensor.dtype)]):
            raise DgqError(f"{place}: tensor {name!r} has dtype {dtype}, expected {tensor.dtype}")
    if unknown := sorted(set(stored) - set(expected)):
        raise DgqError(f"{place}: unknown tensor {unknown[0]!r}", "the config belongs to another checkpoint")


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
    if pipeline not in PIPELINES:
        raise DgqError(
            f"{file}: the pipeline is {shortened(pipeline)}; dgq works with {', '.join(PIPELINES)}",
            "dgq quantizes the UNet of pipelines that draw from a text alone",
        )
    found = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not name.isascii() or not name.isidentifier():
            raise DgqError(f"{file}: component {name!r} is not a plain folder name")
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or entry[0] not in LIBRARIES:
            raise DgqError(f"{file}: component {name!r} is {shortened(entry)}, not a class of {', '.join(LIBRARIES)}")
        found[name] = (entry[0], entry[1])
    if missing := [name for name in NEEDED if name not in found]:
        raise DgqError(f"{file}: the pipeline has no {missing[0]}")
    if found["unet"] != ("diffusers", "UNet2DConditionModel"):
        raise DgqError(f"{file}: the unet is {'.'.join(found['unet'])}; dgq works with diffusers.UNet2DConditionModel")
    return found


def check_folder(folder: Path) -> None:
    """Check a local pipeline folder before any weight is loaded.

    Raises:
        DgqError: no model_index.json, or of a pipeline that dgq does not work with; a component that is not plainly
            inside the folder; a file that is no regular one, not readable, or of sizes no model has; weights only as
            pickles; a damaged header.
    """
    for name in components(folder):
        _check_component(folder / name)
    read_header(folder)


def _check_component(component: Path) -> None:
    if not component.is_dir():
        raise DgqError(f"{component}: the folder is missing")
    configs: dict[Path, dict[str, Any]] = {}
    for file in sorted(component.iterdir()):
        if file.suffix in COPIED_SUFFIXES or (file.exists() and not file.is_dir()):
            check_regular(file)
        if file.suffix == ".json":
            configs[file] = read_json(file)
        elif file.suffix == ".txt":
            try:
                file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DgqError(f"{file}: cannot be read ({error})") from None
    weights = weight_files(component)
    if not weights and (list(component.glob("*.bin")) or list(component.glob("*.pt"))):
        raise DgqError(f"{component}: the weights are pickled", "convert them to safetensors; dgq loads no pickle")
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


def check_target(target: Path, base: Path, overwrite: bool = False) -> None:
    """Refuse, before any work, a place where no checkpoint of the model in `base` may go.

    Only a checkpoint is ever replaced, and only one that holds nothing but what dgq wrote.

    Raises:
        DgqError: target is, holds or lies in `base`; is a link or a file; exists and may not be replaced.
    """
    if os.path.islink(target):
        raise DgqError(f"{target}: is a link", "name the folder itself, or choose another --out")
    place, source = Path(os.path.realpath(target)), Path(os.path.realpath(base))
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise DgqError(f"{target}: is, holds or lies in the folder of the model ({base})", "choose another --out")
    if not os.path.exists(target):
        return
    if not os.path.isdir(target):
        raise DgqError(f"{target}: is not a folder", "choose another --out")
    names = set(os.listdir(target))
    if not names:
        return
    try:
        quantization = read_json(target / "unet" / "config.json").get("quantization_config")
        components = read_json(target / "model_index.json")
    except DgqError:
        quantization = None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise DgqError(f"{target}: already exists and is no dgq checkpoint", "choose another --out")
    if not overwrite:
        raise DgqError(f"{target}: already exists", "choose another --out, or pass --overwrite")
    if others := sorted(names - {*components, *COPIED_NAMES, "model_index.json", "README.md"}):
        reason = f"{target}: holds {others[0]!r}, which is no part of the checkpoint"
        raise DgqError(reason, "move it away, or choose another --out")


def component_files(source: Path) -> dict[str, Path]:
    """What a checkpoint takes over from a component's folder: {name in the checkpoint: file}.

    Data files: configs, vocabularies, and the component's weights (`weight_files`), under the plain names whatever
    their variant. Indexes of shards are left out: `index_shards` writes one for the files that are there.
    """
    found = {file.name.replace(".fp16", ""): file for file in weight_files(source)}
    for file in sorted(source.iterdir()):
        data = file.suffix in COPIED_SUFFIXES - {".safetensors"} and ".safetensors.index." not in file.name
        if data and file.is_file():
            found[file.name] = file
    return found


def index_shards(component: Path) -> None:
    """Write the index that loading weights in several files needs; nothing where they are one file."""
    shards = weight_files(component)
    if not shards or "-of-" not in shards[0].name:
        return
    weights = {name: shard.name for shard in shards for name in tensor_table(shard)}
    index = {"metadata": {"total_size": sum(shard.stat().st_size for shard in shards)}, "weight_map": weights}
    name = shards[0].name.split("-")[0] + ".safetensors.index.json"
    (component / name).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def copied_files(base: Path) -> dict[str, Path]:
    """What a checkpoint takes over from its float model: {path in the checkpoint: file}, texts and the
    `component_files` of other components.

    Raises:
        DgqError: a link leads out of the model's folder: to copy what it points to may give away what it should not.
    """
    index = read_json(base / "model_index.json")
    found = {name: base / name for name in ("model_index.json", *COPIED_NAMES) if (base / name).is_file()}
    for name, entry in index.items():
        if name != "unet" and isinstance(entry, list) and entry and entry[0] is not None:
            found |= {f"{name}/{part}": file for part, file in component_files(base / name).items()}
    root = Path(os.path.realpath(base))
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hugging Face cache: models--OWNER--NAME/snapshots/REVISION and .../blobs
        allowed.append(root.parents[1] / "blobs")
    for file in (*found.values(), base / "unet" / "config.json"):
        place = Path(os.path.realpath(file))
        if not any(place.is_relative_to(folder) for folder in allowed):
            raise DgqError(f"{file}: leads out of the model's folder, to {place}", "put a copy in the link's place")
    return found


def write_checkpoint(
    base: Path, unet: nn.Module, header: Header, target: Path, overwrite: bool = False, work: Path | None = None
) -> None:
    """Write a checkpoint: the base folder's other components, the packed UNet, the header and a model card.

    Args:
        base: local folder of the float pipeline.
        unet: quantized UNet.
        header: its description.
        target: where the checkpoint goes.
        overwrite: replace a checkpoint that is there.
        work: the target's `writing.workplace` where the caller holds it.

    Raises:
        DgqError: the target cannot be written; what was there is there still, and nothing else is left behind.
    """
    check_target(target, base, overwrite)
    files = copied_files(base)
    with atomic_folder(target, overwrite, work) as folder:
        for name, file in files.items():
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
        for component in [place for place in folder.iterdir() if place.is_dir()]:
            index_shards(component)
        (folder / "unet").mkdir()
        config = read_json(base / "unet" / "config.json")
        config.pop("_name_or_path", None)
        config["quantization_config"] = header.to_dict()
        text = json.dumps(config, indent=1, sort_keys=True)
        (folder / "unet" / "config.json").write_text(text + "\n", encoding="utf-8")
        # What stays float is stored in half precision, as published float checkpoints are. Those are the model's
        # parameters; quantized layers hold buffers, and their scales keep float32.
        parameters = {name for name, value in unet.named_parameters() if value.dtype == torch.float32}
        state = {name: value.half() if name in parameters else value for name, value in unet.state_dict().items()}
        state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        file = folder / "unet" / WEIGHTS_NAME
        save_tensors(state, file, {"format": "pt"})
        card = model_card(header, target.name, file.stat().st_size)
        (folder / "README.md").write_text(card, encoding="utf-8")
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def unet_bytes(folder: Path) -> int:
    """Size of the UNet's weight files."""
    return sum(file.stat().st_size for file in weight_files(folder / "unet"))


def float16_bytes(folder: Path) -> int:
    """Size of the float model's UNet in float16, from its configuration."""
    from diffusers import UNet2DConditionModel

    config = read_json(folder / "unet" / "config.json")
    config.pop("quantization_config", None)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return 2 * sum(parameter.numel() for parameter in unet.parameters())


def model_card(header: Header, name: str, size: int) -> str:
    """The README of a checkpoint folder `name` with a UNet file of `size` bytes: what it is, measured, and its use."""
    recipe, calibration = header.recipe, header.calibration
    lines = [
        "---", "library_name: diffusers", "tags: [text-to-image, quantized, dgq]", "---", "",
        f"# {header.base_model}, {recipe.label}", "",
        f"Made by `dgq calibrate` (dgq {header.dgq_version}) from `{header.base_model}`. "
        "The licence is the base model's.", "",
        "| | |", "|---|---|",
        f"| recipe | {recipe.label} |",
        f"| weight rounding | {recipe.rounding} |",
        f"| quantized layers | {len(header.layers) or len((header.paper or {}).get('layers', {}))} |",
        f"| UNet file | {size / 2**20:.1f} MiB |",
        f"| calibration | {calibration.get('prompts', '?')} prompts, {calibration.get('steps', '?')} steps, "
        f"seed {calibration.get('seed', '?')} |",
    ]  # fmt: skip
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    call = "".join(f", {names[key]}={value}" for key, value in header.generation.items() if key in names)
    fidelity = calibration.get("fidelity")
    if fidelity:
        lines += [
            "", f"Against the float model at equal seeds, {fidelity['prompts']} prompts not used for calibration:", "",
            "| PSNR (dB) | latent MSE |", "|---|---|",
            f"| {fidelity['psnr_db']:.2f} | {fidelity['latent_mse']:.2e} |",
        ]  # fmt: skip
    lines += [
        "", "```python", "import dgq", "", f'pipe = dgq.load("{name}")',
        f'pipe("a cat"{call}).images[0].save("cat.png")', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
