"""Writing a checkpoint: a temporary folder, renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import DgqError
from ..family import ENCODERS, family_of
from ..integer.skeleton import stored_names
from ..outputs import atomic_folder, flush, save_tensors
from . import checksums
from .header import QUANT_METHOD
from .reading import COPIED_SUFFIXES, component_at, family_at, held, read_json, tensor_table, weight_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..family import Family
    from .header import Header


WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
ENCODER_NAME = "model.safetensors"  # of a text encoder's weights


# What its own folder may, beside model_index.json.
COPIED_NAMES = ("LICENSE", "NOTICE", "concepts.json")


def check_target(target: Path, base: Path, overwrite: bool = False) -> None:
    """Refuse, before any work, a place where no checkpoint of the model in `base` may go.

    Only a checkpoint is ever replaced, and only one that holds nothing but what dgq wrote.

    Raises:
        DgqError: target is, holds or lies in `base`; is a link or a file; exists and may not be replaced.
    """
    check_apart(target, base)
    if not os.path.exists(target):
        return
    if not os.path.isdir(target):
        raise DgqError(f"{target}: is not a folder", "choose another --out")
    names = set(os.listdir(target))
    if not names:
        return
    try:
        components = read_json(target / "model_index.json")
        quantization = read_json(component_at(target) / "config.json").get("quantization_config")
    except DgqError:
        quantization = None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise DgqError(f"{target}: already exists and is no dgq checkpoint", "choose another --out")
    if not overwrite:
        raise DgqError(f"{target}: already exists", "choose another --out, or pass --overwrite")
    if others := sorted(names - {*components, *COPIED_NAMES, "model_index.json", "README.md"}):
        reason = f"{target}: holds {others[0]!r}, which is no part of the checkpoint"
        raise DgqError(reason, "move it away, or choose another --out")


def check_apart(target: Path, base: Path) -> None:
    """Refuse a folder to be that is a link, or is, holds or lies in the model folder `base`.

    Raises:
        DgqError: so it is.
    """
    if os.path.islink(target):
        raise DgqError(f"{target}: is a link", "name the folder itself, or choose another --out")
    place, source = Path(os.path.realpath(target)), Path(os.path.realpath(base))
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise DgqError(f"{target}: is, holds or lies in the folder of the model ({base})", "choose another --out")


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
    own = component_at(base)
    found = {name: base / name for name in ("model_index.json", *COPIED_NAMES) if (base / name).is_file()}
    for name, entry in index.items():
        if name != own.name and isinstance(entry, list) and entry and entry[0] is not None:
            found |= {f"{name}/{part}": file for part, file in component_files(base / name).items()}
    root = Path(os.path.realpath(base))
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hugging Face cache: models--OWNER--NAME/snapshots/REVISION and .../blobs
        allowed.append(root.parents[1] / "blobs")
    for file in (*found.values(), own / "config.json"):
        place = Path(os.path.realpath(file))
        if not any(place.is_relative_to(folder) for folder in allowed):
            raise DgqError(f"{file}: leads out of the model's folder, to {place}", "put a copy in the link's place")
    return found


def write_checkpoint(
    base: Path,
    network: nn.Module,
    header: Header,
    target: Path,
    overwrite: bool = False,
    work: Path | None = None,
    beside: Mapping[str, tuple[nn.Module, Header]] | None = None,
) -> None:
    """Write a checkpoint: the base folder's other components, the packed network, the header and a model card.

    Args:
        base: local folder of the float pipeline.
        network: quantized.
        header: its description.
        target: where the checkpoint goes.
        overwrite: replace a checkpoint that is there.
        work: the target's `writing.workplace` where the caller holds it.
        beside: other components that are quantized too, by name: the VAE, text encoders; and their descriptions.

    Raises:
        DgqError: the target cannot be written; what was there is there still, and nothing else is left behind.
    """
    check_target(target, base, overwrite)
    files = copied_files(base)
    own = component_at(base).name
    parts = {**(beside or {}), own: (network, header)}  # the network last: its checksums are of all files
    with atomic_folder(target, overwrite, work) as folder:
        for name, file in files.items():
            component, _, part = name.partition("/")
            if component in parts and (part == "config.json" or part.endswith(".safetensors")):
                continue
            copy = folder / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        for place in [there for there in folder.iterdir() if there.is_dir()]:
            index_shards(place)
        written = {name: _write_part(base / name, folder / name, *one) for name, one in parts.items()}
        sizes = {name: file.stat().st_size for name, file in written.items()}
        others = {name: (of, sizes[name]) for name, (_, of) in (beside or {}).items()}
        card = model_card(header, target.name, family_at(base), sizes[own], others)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name, file in written.items():
            checksums.record(file.parent, pipeline=name == own)
            flush(file)


def _write_part(base: Path, place: Path, part: nn.Module, header: Header) -> Path:
    """Write a quantized component, whose float one is in a folder `base`, into a folder of its own; returns the
    weights' file."""
    place.mkdir(exist_ok=True)
    config = read_json(base / "config.json")
    config.pop("_name_or_path", None)
    config["quantization_config"] = header.to_dict()
    text = json.dumps(config, indent=1, sort_keys=True)
    (place / "config.json").write_text(text + "\n", encoding="utf-8")
    # What stays float is stored in half precision, as published float checkpoints are; the scales of quantized
    # layers keep float32.
    family = family_of(part)
    encoder = family in ENCODERS
    halved = set(part.state_dict() if encoder else family.skeleton(config).state_dict()) - stored_names(part)
    state = {
        name: value.half() if name in halved and value.dtype == torch.float32 else value
        for name, value in held(part).items()
    }
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    file = place / (ENCODER_NAME if encoder else WEIGHTS_NAME)
    save_tensors(state, file, {"format": "pt"})
    return file


def model_card(
    header: Header, name: str, family: Family, size: int, beside: Mapping[str, tuple[Header, int]] | None = None
) -> str:
    """The README of a checkpoint folder `name` with a network of `size` bytes, and other quantized components of so
    many: what it is, measured, and its use."""
    recipe, calibration = header.recipe, header.calibration
    drawn = {"prompts": "{} prompts", "steps": "{} steps", "seed": "seed {}"}
    told = [form.format(calibration[key]) for key, form in drawn.items() if key in calibration]
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [text-to-image, quantized, dgq]",
        "---",
        "",
        f"# {header.base_model}, {recipe.label}",
        "",
        f"Made by `dgq calibrate` (dgq {header.dgq_version}) from `{header.base_model}`. "
        "The licence is the base model's.",
        "",
        "| | |",
        "|---|---|",
        f"| recipe | {recipe.label} |",
        f"| weight rounding | {header.method.words(recipe, None)['rounding']} |",
        f"| quantized layers | {len(header.method.layers(header))} |",
        f"| {family.title} file | {size / 2**20:.1f} MiB |",
        f"| calibration | {', '.join(told) or 'none'} |",
    ]
    for component, (about, size) in (beside or {}).items():
        what = "VAE" if component == "vae" else component
        made = f"{about.recipe.label}, {len(about.method.layers(about))} layers; file {size / 2**20:.1f} MiB"
        lines.append(f"| {what} | {made} |")
    names = {"steps": "num_inference_steps", "guidance": family.guidance_argument}
    call = "".join(f", {names[key]}={value}" for key, value in header.generation.items() if key in names)
    fidelity = calibration.get("fidelity")
    if fidelity:
        lines += [
            "",
            f"Against the float model at equal seeds, {fidelity['prompts']} prompts not used for calibration:",
            "",
            "| PSNR (dB) | latent MSE |",
            "|---|---|",
            f"| {fidelity['psnr_db']:.2f} | {fidelity['latent_mse']:.2e} |",
        ]
    lines += [
        "",
        "```python",
        "import dgq",
        "",
        f'pipe = dgq.load("{name}")',
        f'pipe("a cat"{call}).images[0].save("cat.png")',
        "```",
        "",
    ]
    return "\n".join(lines)
