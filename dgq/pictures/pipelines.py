"""Loading pipelines: the embedded model, a local folder or a hub id; float or quantized."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import checksums
from ..checkpoint.header import Header
from ..checkpoint.reading import (
    check_folder,
    component_at,
    family_at,
    network_config,
    read_header,
    read_json,
    tensor_table,
    weight_files,
)
from ..devices import check_device, check_kernels
from ..errors import DgqError
from ..family import FAMILIES, family_of
from ..graphs import use_graphs
from ..integer.shared_input import leave_files, prepare_all
from . import embedded
from .components import assemble

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A model at hand, and what its files say of it.

    Attributes:
        folder: local.
        name: the embedded model's, else as it was asked for.
        header: of a checkpoint; None for a float model.
        generation: its own defaults, "steps" and "guidance".
    """

    folder: Path
    name: str
    header: Header | None
    generation: dict[str, Any]

    @property
    def embedded(self) -> bool:
        """Whether it is the one that ships with dgq."""
        return self.folder == embedded.FOLDER

    @property
    def label(self) -> str:
        """Its recipe's, or "float"."""
        return "float" if self.header is None else self.header.recipe.label

    @property
    def base(self) -> str:
        """What its pictures' metadata call it: a checkpoint by the float model it was made of."""
        if self.header is not None:
            return self.header.base_model
        return self.name if self.embedded else self.folder.name


def find_model(model: str | os.PathLike[str] | None) -> Model:
    """A model: None for the embedded one, a folder, or a hub id (downloaded to its cache).

    Raises:
        DgqError: no such model, or the folder is not a usable pipeline.
    """
    folder = _place(model)
    return _model(folder, check_folder(folder), model)


def described(folder: Path) -> Model:
    """The model in a folder, which is not checked.

    Raises:
        DgqError: its header is damaged.
    """
    return _model(folder, read_header(folder), folder)


def resolve(model: str | os.PathLike[str] | None) -> Path:
    """The folder that `find_model` finds.

    Raises:
        DgqError: as it does.
    """
    return find_model(model).folder


def verify(model: str | os.PathLike[str]) -> int:
    """Refuse a damaged checkpoint in one line, before another library reads it.

    `load` does the same. It is for whoever loads by diffusers' `from_pretrained`, which reads the other components of a
    pipeline before it asks dgq, and ends in errors of its own.

    Args:
        model: checkpoint folder or hub id.

    Returns:
        The number of files that were held against their checksums; 0 where there are none.

    Raises:
        DgqError: there is no such model, or it is damaged: the message names the file.
    """
    component = component_at(resolve(model))
    file = component / checksums.CONFIG
    if "quantization_config" not in read_json(file):  # which has the checksums
        for weights in weight_files(component):
            if any(dtype in ("I8", "U8") for _, dtype in tensor_table(weights).values()):
                raise DgqError(f"{file}: has no quantization_config, and the weights are packed", "copy it again")
    return checksums.verify(component, whole=True)


def _model(folder: Path, header: Header | None, said: object) -> Model:
    own = header.generation if header else {}
    if folder == embedded.FOLDER:
        return Model(folder, embedded.NAME, header, {**own, **embedded.GENERATION})
    index, scheduler = (
        read_json(file) if file.is_file() else {}
        for file in (folder / "model_index.json", folder / "scheduler" / "scheduler_config.json")
    )
    family, network = family_at(folder), network_config(folder)
    origins = (index.get("_name_or_path"), network.get("_name_or_path"), header and header.base_model)
    names = [_own_name(name) for name in (str(folder.resolve()), *origins) if isinstance(name, str)]
    usual = {**family.generation(index, network), **family.few_steps(scheduler, network, names)}
    return Model(folder, str(said), header, {**usual, **own})


def _own_name(place: str) -> str:
    """What a model is called by the folder or hub id it comes from, of which other parts are somebody's choice."""
    parts = Path(place).parts
    cached = [part for part in parts if part.startswith("models--")]  # of a hub id, in Hugging Face's cache
    if cached:
        return cached[-1].rpartition("--")[2]
    return next((part for part in reversed(parts) if part not in {one.component for one in FAMILIES}), "")


def _place(model: str | os.PathLike[str] | None) -> Path:
    """Where a model's folder is."""
    if model is None or str(model) == embedded.NAME:
        folder = embedded.FOLDER
        if not folder.is_dir():
            raise DgqError("the embedded model is not installed", "reinstall dgq, or name a --model")
    elif os.path.isdir(model):  # False too for what can be no path
        folder = Path(model)
    elif os.path.isfile(model):
        raise DgqError(f"{model}: is a file, not a folder", "dgq calibrate FILE --config FOLDER makes a model of one")
    else:
        folder = _download(str(model))
    return folder


def _download(name: str) -> Path:
    """Fetch a hub id's safetensors pipeline into the Hugging Face cache and return its folder."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DgqError(f"{name}: no such folder", "give a diffusers folder, a hub id like owner/name, or no --model")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # hub, network and file errors have no common base
        reason = str(error).strip().splitlines()
        detail = reason[0] if reason else type(error).__name__
        raise DgqError(
            f"{name}: neither a folder nor a model that can be fetched ({detail})",
            "check the name and the connection, or download it first",
        ) from None


def float_base(folder: Path, against: str | None = None) -> Path | None:
    """The model that a model folder is compared with.

    Args:
        folder: from `resolve`.
        against: another model; None or "float" for the one a checkpoint was made of.

    Returns:
        Its folder, or None where `folder` is a float model and `against` is not given.

    Raises:
        DgqError: there is no such model, or "float" is asked of a float model.
    """
    if against not in (None, "float"):
        return resolve(against)
    header = read_header(folder)
    if header is None:
        if against:
            raise DgqError(f"{folder}: is a float model already", "name a checkpoint, or --against another model")
        return None
    try:
        return resolve(header.base_model or "")
    except DgqError:
        raise DgqError(
            f"{folder}: the float model it was made of ({header.base_model}) is not at hand", "give it by --against"
        ) from None


def load(
    model: str | os.PathLike[str] | Model | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    network: Any = None,
    parts: Mapping[str, Any] | None = None,
    graph: bool | None = None,
    offload: bool = False,
    verify: bool = True,
) -> Any:
    """Load a text-to-image pipeline, quantized or float, strictly.

    Args:
        model: checkpoint folder, hub id, or None for the embedded model; or what `find_model` found.
        device: default CUDA where there is one, else CPU.
        dtype: of everything that is not quantized, or its name; default float16 on CUDA, float32 on the CPU.
        network, parts: take the place of the folder's components; `parts` by name.
        graph: replay the network's calls from CUDA graphs (`dgq.use_graphs`); default on CUDA, unless offloaded.
        offload: keep text encoders, network and VAE in the CPU's memory, but for the one that draws at the moment
            (diffusers' `enable_model_cpu_offload`).
        verify: hold a checkpoint's files against their checksums first; those of older versions have none. False takes
            files that were changed on purpose.

    Returns:
        A diffusers pipeline in eval mode. Integer weights and their scales keep their types whatever `dtype` is.

    Raises:
        DgqError: there is no such device or dtype; offloading on the CPU, or with graphs; or the model does not exist
            or is damaged: the message names the file or tensor.
    """
    place = check_device(device)
    if dtype is None:
        dtype = torch.float16 if place.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise DgqError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if offload and place.type == "cpu":
        raise DgqError("there is no GPU to offload from: all is on the CPU", "leave out --offload (offload=True)")
    if offload and graph:
        raise DgqError("CUDA graphs need weights that stay in their place, and offloading moves them")
    folder = model.folder if isinstance(model, Model) else resolve(model)
    check_kernels(place)
    if verify and checksums.wanted():
        checksums.verify(component_at(folder))
    with checksums.left_out():
        given = {} if network is None else {family_of(network).component: network}
        pipe = assemble(folder, dtype, {**given, **(parts or {})})
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=place)
        return pipe
    pipe = pipe.to(place)
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for one in models:
        prepare_all(one, place)
    leave_files(models)
    if graph or (graph is None and place.type == "cuda"):
        use_graphs(pipe)
    return pipe
