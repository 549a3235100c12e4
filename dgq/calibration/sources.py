"""Float folders of what people bring: single-file checkpoints, and models with LoRA fused into them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reading import (
    SAFETENSORS_DTYPES,
    components,
    family_at,
    read_header,
    read_json,
    tensor_names,
    tensor_table,
    weight_files,
)
from ..checkpoint.writing import COPIED_NAMES, component_files
from ..errors import DgqError
from ..export import comfy
from ..family import network_of
from ..outputs import atomic_folder
from ..pictures.components import component, one_line, quiet, without_bars
from ..pictures.loras import OTHER_KIND, check_loras, load_lora
from ..pictures.pipelines import load, resolve
from ..progress import Progress, silent

SOURCES = "sources.json"  # in a folder that was made: what it was made of

# What diffusers joins where a LoKr is of the joined layer: a Kronecker product of three layers is none of each.
JOINED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}

# What a single file calls its parts, as the original code has them.
PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
# A text encoder's tensors, the kind of model that has it, and that kind's pipelines.
SD, XL = "Stable Diffusion 1 or 2", "SDXL"
ENCODERS = {
    "conditioner.embedders.1.": (XL, ("StableDiffusionXLPipeline",)),
    "conditioner.embedders.0.": ("SDXL's refiner", ()),
    "cond_stage_model.": (SD, ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")),
}


def is_single_file(model: str | None) -> bool:
    """Whether a model is named by a file, not by a folder or a hub id."""
    return model is not None and (Path(model).is_file() or model.endswith((".safetensors", ".ckpt")))


def check_sources(
    model: str | None, config: Path | None = None, loras: Sequence[tuple[Path, float]] = ()
) -> list[Path]:
    """The files that a folder of `float_folder` is made of, whose names of tensors alone are read.

    Raises:
        DgqError: as `float_folder`, as far as names tell.
    """
    single = is_single_file(model)
    if single and config is None:
        raise DgqError(
            f"{model}: a single file holds no configurations and no tokenizer",
            "name a diffusers folder of the same kind of model by --config; it needs no weights",
        )
    if config is not None and not single:
        raise DgqError(f"{config}: configurations are taken for a single-file checkpoint alone", "leave out --config")
    files = [*([Path(str(model))] if single else []), *(file for file, _ in loras)]
    if single and config is not None:
        files += _check_single(files[0], config)
        lacking = [name for name in components(config) if not (config / name).is_dir()]
        if lacking:
            raise DgqError(f"{config / lacking[0]}: the folder is missing", "--config takes a whole diffusers folder")
    if loras:
        check_loras(loras, resolve(model) if config is None else config)
    return files


@without_bars()
@quiet("transformers")
def float_folder(
    model: str | None,
    target: Path,
    config: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    progress: Progress = silent,
) -> Path:
    """Write the diffusers folder of a float model that is none yet; one that was made of the same contents stays.

    Args:
        model: a single-file checkpoint, a network's file in ComfyUI's int8, or with `loras` what `find_model` takes.
        target: the folder to be.
        config: for a file: a diffusers folder of the same kind of model, whose configurations and tokenizers are
            taken; it needs no weights, but those of the VAE where a single file has none, and those of the other
            components for a network's file.
        loras: files of LoRA and their weights, fused in float32.
        progress: told of stage "prepare".

    Returns:
        `target`.

    Raises:
        DgqError: there is no such file, the configurations are not of this model, a LoRA is of another one, or
            `target` holds something else. What the tensors' names tell is told before anything is loaded.
    """
    files = check_sources(model, config, loras)
    single = is_single_file(model)
    made_of = {
        "model": None if single else model,
        "config": None if config is None else str(config.resolve()),
        "files": [_digest(file) for file in files],
        "weights": [weight for _, weight in loras],
        "contents": _contents(files[0] if single else None, resolve(model) if config is None else config),
    }
    if (target / SOURCES).is_file():
        if read_json(target / SOURCES) == made_of:
            return target
        raise DgqError(f"{target}: already exists, made of other files", "remove it, or choose another --out")
    with atomic_folder(target) as folder:
        progress("prepare", 0, 1, str(target))
        if single:
            assert config is not None
            pipe = _from_single_file(files[0], config, torch.float32 if loras else _dtype(files[0]))
        else:
            pipe = load(model, device="cpu", dtype=torch.float32)
        _fuse(pipe, loras)
        pipe.save_pretrained(folder, safe_serialization=True)
        for own in () if single else (resolve(model) / name for name in COPIED_NAMES):
            if own.is_file():
                shutil.copy(own, folder / own.name)
        (folder / SOURCES).write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")
    progress("prepare", 1, 1, str(target))
    return target


def _check_single(file: Path, config: Path) -> list[Path]:
    """Refuse, by the names of its tensors, what is no whole checkpoint of the kind that a folder is of; the VAE's files
    of that folder, where the checkpoint has no VAE."""
    names = tensor_names(file)
    taken: list[Path] = []
    if comfy.is_quantized(names):
        return taken
    for part, prefixes in PARTS.items():
        if any(name.startswith(prefixes) for name in names):
            continue
        if any("lora" in name for name in names):
            raise DgqError(f"{file}: is a LoRA, not a model", "name the model, and this file by --lora")
        if part == "VAE":
            taken = weight_files(config / "vae")
            if taken:
                continue
            raise DgqError(
                f"{file}: holds no VAE (no tensor {prefixes[0]}*), and {config / 'vae'} has no weights",
                "name a diffusers folder by --config whose vae folder has its weights",
            )
        raise DgqError(
            f"{file}: holds no {part} (no tensor {prefixes[0]}*)",
            f"single files are whole checkpoints of {SD} or {XL}; other models are given as diffusers folders",
        )
    encoder = (known for prefix, known in ENCODERS.items() if any(name.startswith(prefix) for name in names))
    kind, pipelines = next(encoder)
    components(config)  # a pipeline that dgq does not work with is told as one
    pipeline = read_json(config / "model_index.json")["_class_name"]
    if not pipelines:
        raise DgqError(f"{file}: is {kind}, which draws from pictures", "dgq works with what draws from a text alone")
    if pipeline not in pipelines:
        raise DgqError(f"{file}: is {kind}, but {config} is a {pipeline}", f"name a folder of {kind} by --config")
    return taken


def _contents(single: Path | None, folder: Path) -> dict[str, str]:
    """Digests of the files of a diffusers folder that go into a float model, beside those that are named: of the whole
    model, or of what is taken for a single file."""
    network = family_at(folder).component
    weights = single is None or comfy.is_quantized(tensor_table(single))
    files = {name: folder / name for name in ("model_index.json", *COPIED_NAMES) if (folder / name).is_file()}
    for name in components(folder):
        for part, file in component_files(folder / name).items():
            if not part.endswith(".safetensors") or (weights and (single is None or name != network)):
                files[f"{name}/{part}"] = file
    return {name: _digest(file) for name, file in sorted(files.items())}


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _dtype(file: Path) -> torch.dtype:
    """That of most float tensors of a file, scales of int8 layers left aside."""
    named = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items() if dtype.is_floating_point}
    found = [dtype for name, (_, dtype) in tensor_table(file).items() if not name.endswith(".weight_scale")]
    most = Counter(dtype for dtype in found if dtype in named).most_common(1)
    return named[most[0][0]] if most else torch.float32


def _from_single_file(file: Path, config: Path, dtype: torch.dtype) -> Any:
    import diffusers

    found = components(config)
    if comfy.is_quantized(tensor_table(file)):
        return _from_comfy(file, config, dtype)
    pipeline: Any = getattr(diffusers, read_json(config / "model_index.json")["_class_name"])
    given: dict[str, Any] = dict.fromkeys(name for name in ("safety_checker", "feature_extractor") if name in found)
    if not any(name.startswith(PARTS["VAE"]) for name in tensor_names(file)):
        given["vae"] = component(config, "vae", *found["vae"], dtype)
    with one_line(file, f"cannot be read as the model of {config}", OTHER_KIND), quiet("diffusers"):
        return pipeline.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=dtype, **given
        )


def _from_comfy(file: Path, config: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder with the network of a file, whose int8 layers are made float."""
    if read_header(config) is not None:
        raise DgqError(f"{config}: is a dgq checkpoint", "--config takes the folder of a float model")
    tensors = comfy.float_tensors(file, dtype)
    for part, prefixes in list(PARTS.items())[1:]:
        if found := next((name for name in tensors if name.startswith(prefixes)), None):
            raise DgqError(f"{file}: holds a {part} too ({found})", "files of a network alone are read in int8")
    named = {comfy.PREFIX + name.removeprefix(comfy.PREFIX): tensor for name, tensor in tensors.items()}
    family = family_at(config)
    with one_line(file, f"cannot be read as the {family.title} of {config}", OTHER_KIND), quiet("diffusers"):
        network = family.network_class().from_single_file(
            named, config=str(config), subfolder=family.component, local_files_only=True, torch_dtype=dtype
        )
    with quiet("diffusers"):  # float16 is only written, never run on the CPU
        return load(str(config), device="cpu", dtype=dtype, network=network)


def _fuse(pipe: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Add LoRA to the weights of a float pipeline.

    Raises:
        DgqError: a file is none of a LoRA, or of another model's.
    """
    network = network_of(pipe)
    name = "lora"
    # one by one: of layers that one file has joined, the next would find its own left aside
    for file, weight in loras:
        load_lora(pipe, file, name)
        pipe.set_adapters(name, weight)
        # all that can have one: FLUX's own choice leaves its text encoder out
        parts = [part for part in pipe._lora_loadable_modules if getattr(pipe, part, None) is not None]
        pipe.fuse_lora(components=parts, adapter_names=[name])
        pipe.unload_lora_weights()
        _take_apart(network)


def _take_apart(network: Any) -> None:
    """Let queries, keys and values be layers of their own again, with what was fused into the joined one: diffusers'
    own way back forgets it."""
    joined = [module for module in network.modules() if getattr(module, "fused_projections", False)]
    for module in joined:
        for whole, parts in JOINED.items():
            if hasattr(module, whole):
                weights = getattr(module, whole).weight.detach().chunk(len(parts))
                for part, weight in zip(parts, weights, strict=True):
                    getattr(module, part).weight.data.copy_(weight)
    if joined:
        network.unfuse_qkv_projections()
