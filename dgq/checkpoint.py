"""The file format of a dgq checkpoint: a diffusers folder whose UNet holds packed integers.

    DIR/model_index.json, scheduler/, text_encoder/, tokenizer/, vae/   as the base model has them
    DIR/unet/config.json                          the float config plus "quantization_config" (see `Header`)
    DIR/unet/diffusion_pytorch_model.safetensors  per integer layer the tensors of `layers.buffer_specs`,
                                                  under the layer's name; everything else as in the float model
    DIR/README.md                                 generated model card

A checkpoint is written to a temporary folder beside its place and renamed: an interrupted save never looks like one.
Reading is strict: a missing, unknown or misshapen tensor is an error that names it. No pickle is read or written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .attention import AttentionPlan
from .errors import DgqError
from .fusion import fuse
from .layers import build_skeleton
from .recipe import LayerPlan, Recipe
from .writing import atomic_folder, save_tensors

FORMAT_VERSION = 1
QUANT_METHOD = "dgq"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# What a component's folder may carry into a checkpoint: data, never code or pickles.
COPIED_SUFFIXES = {".json", ".txt", ".safetensors", ".model"}
# And its own folder, beside model_index.json.
COPIED_NAMES = ("LICENSE", "NOTICE", "concepts.json")
# The names diffusers and transformers give weights: of either library, of a variant, in shards (the variant before
# the shard's number as it is written today, or after it).
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors")
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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
        if data.get("format_version") != FORMAT_VERSION:
            raise DgqError(
                f"quantization_config: format version {data.get('format_version')!r}, this dgq reads {FORMAT_VERSION}",
                "install the dgq that wrote it, or calibrate again",
            )
        known = {item.name for item in dataclasses.fields(cls)} | {"quant_method", "format_version"}
        if unknown := sorted(set(data) - known):
            raise DgqError(f"quantization_config: unknown field {unknown[0]!r}")
        try:
            attention = data.get("attention")
            return cls(
                recipe=Recipe.from_dict(data["recipe"]),
                layers={name: LayerPlan.from_dict(plan) for name, plan in data.get("layers", {}).items()},
                attention=AttentionPlan(**attention) if attention else None,
                paper=data.get("paper"),
                base_model=data.get("base_model", ""),
                generation=data.get("generation", {}),
                calibration=data.get("calibration", {}),
                dgq_version=data.get("dgq_version", ""),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DgqError(f"quantization_config: damaged ({type(error).__name__}: {error})") from None


def apply_header(unet: nn.Module, header: Header) -> None:
    """Turn a float UNet (usually on the meta device) into the empty quantized model a header describes.

    Raises:
        DgqError: the header names a layer the model does not have.
    """
    if header.paper is not None:
        from .paper_calibration import build_paper_skeleton

        build_paper_skeleton(unet, header.paper)
        return
    for name, plan in header.layers.items():
        try:
            unet.get_submodule(plan.owner(name))
        except AttributeError:
            raise DgqError(f"quantization_config: the model has no layer {name!r}") from None
    build_skeleton(unet, header.layers)
    fuse(unet)
    if header.attention is not None:
        from .attention import use_log_attention

        use_log_attention(unet, header.attention)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DgqError: the file is missing, unreadable or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DgqError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
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
        return Header.from_dict(quantization)
    except DgqError as error:
        raise DgqError(f"{folder / 'unet' / 'config.json'}: {error.message}", error.hint) from None


def tensor_table(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of a safetensors file, from its header alone.

    Raises:
        DgqError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError:
        raise DgqError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
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
    """Compare the stored tensors with the empty model: names, shapes, and the dtypes of integers.

    Raises:
        DgqError: the first missing, unknown or misshapen tensor.
    """
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        stored.update(tensor_table(file))
    place = files[0] if len(files) == 1 else files[0].parent
    expected = unet.state_dict()
    for name, tensor in expected.items():
        if name not in stored:
            raise DgqError(f"{place}: tensor {name!r} is missing")
        shape, dtype = stored[name]
        if shape != tuple(tensor.shape):
            raise DgqError(f"{place}: tensor {name!r} has shape {list(shape)}, expected {list(tensor.shape)}")
        floating = dtype.startswith(("F", "BF"))
        if floating != tensor.is_floating_point() or (not floating and _DTYPES.get(dtype) != tensor.element_size()):
            raise DgqError(f"{place}: tensor {name!r} has dtype {dtype}, expected {tensor.dtype}")
    if unknown := sorted(set(stored) - set(expected)):
        raise DgqError(f"{place}: unknown tensor {unknown[0]!r}", "the config belongs to another checkpoint")


def check_folder(folder: Path) -> None:
    """Check a local pipeline folder before any weight is loaded.

    Raises:
        DgqError: no model_index.json, a component that is not plainly inside the folder, weights only as pickles,
            an unreadable safetensors file, or a damaged header.
    """
    index = read_json(folder / "model_index.json")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        component = folder / name
        if Path(name).name != name:
            raise DgqError(f"{folder / 'model_index.json'}: component {name!r} is not a plain folder name")
        if not component.is_dir():
            raise DgqError(f"{component}: the folder is missing")
        for shard_index in component.glob("*.index.json"):
            for shard in set(read_json(shard_index).get("weight_map", {}).values()):
                if Path(shard).name != shard:
                    raise DgqError(f"{shard_index}: {shard!r} leads outside the checkpoint")
        weights = sorted(component.glob("*.safetensors"))
        if not weights and (list(component.glob("*.bin")) or list(component.glob("*.pt"))):
            raise DgqError(f"{component}: the weights are pickled", "convert them to safetensors; dgq loads no pickle")
        for file in weights:
            tensor_table(file)
    read_header(folder)


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


def copied_files(base: Path) -> list[Path]:
    """What a checkpoint takes over from its float model as it is: texts, and the data files of other components
    (configs, vocabularies, safetensors of the plain variant).

    Raises:
        DgqError: a link leads out of the model's folder: to copy what it points to may give away what it should not.
    """
    index = read_json(base / "model_index.json")
    files = [base / name for name in ("model_index.json", *COPIED_NAMES) if (base / name).is_file()]
    for name, entry in index.items():
        if name == "unet" or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        for file in sorted((base / name).iterdir()):
            variant = file.suffix == ".safetensors" and len(file.suffixes) > 1 and "-of-" not in file.stem
            if file.is_file() and file.suffix in COPIED_SUFFIXES and not variant:
                files.append(file)
    root = Path(os.path.realpath(base))
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hugging Face cache: models--OWNER--NAME/snapshots/REVISION and .../blobs
        allowed.append(root.parents[1] / "blobs")
    for file in (*files, base / "unet" / "config.json"):
        place = Path(os.path.realpath(file))
        if not any(place.is_relative_to(folder) for folder in allowed):
            raise DgqError(f"{file}: leads out of the model's folder, to {place}", "put a copy in the link's place")
    return files


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
        for file in files:
            place = folder / file.relative_to(base)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
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
