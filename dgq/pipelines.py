"""Loading pipelines: the embedded model, a local folder or a hub id; float or quantized."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from dgq_kernels import backend, native

from . import embedded
from .checkpoint import check_folder, read_header
from .errors import DgqError
from .layers import prepare_all

DEFAULT_GENERATION = {"steps": 25, "guidance": 7.5}


def resolve(model: str | os.PathLike[str] | None) -> Path:
    """The local folder of a model: None for the embedded one, a folder, or a hub id (downloaded to its cache).

    Raises:
        DgqError: no such model, or the folder is not a usable pipeline.
    """
    if model is None or str(model) == embedded.NAME:
        folder = embedded.FOLDER
        if not folder.is_dir():
            raise DgqError("the embedded model is not installed", "reinstall dgq, or name a --model")
    elif os.path.isdir(model):  # False too for what can be no path
        folder = Path(model)
    else:
        folder = _download(str(model))
    check_folder(folder)
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


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for: "cpu", "cuda" or "cuda:N", or the default one for None.

    Raises:
        DgqError: it is another kind of device, or this machine does not have it.
    """
    if device is None:
        return default_device()
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", str(device))
    if found is None:
        raise DgqError(f"device {str(device)!r} is not cpu, cuda or cuda:N")
    if found[0] == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise DgqError(f"no CUDA device: torch {torch.__version__} sees none", "run on the CPU: device cpu")
    if found[1] and int(found[1]) >= count:
        raise DgqError(f"no device {found[0]!r}: torch sees {count}, cuda:0 to cuda:{count - 1}")
    return torch.device(found[0])


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a text-to-image pipeline, quantized or float, strictly.

    Args:
        model: checkpoint folder, hub id, or None for the embedded model.
        device: default CUDA where there is one, else CPU.
        dtype: dtype of everything that is not quantized; default float16 on CUDA, float32 on the CPU.

    Returns:
        A diffusers pipeline in eval mode. Integer weights and their scales keep their types whatever `dtype` is.

    Raises:
        DgqError: there is no such device; or the model does not exist or is damaged: the message names the file or
            tensor.
    """
    place = check_device(device)
    folder = resolve(model)
    if dtype is None:
        dtype = torch.float16 if place.type == "cuda" else torch.float32
    try:
        backend.select(place)
        native.available()
    except ValueError as error:
        raise DgqError(str(error)) from None
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    except DgqError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DgqError(f"{folder}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    if not hasattr(pipe, "unet"):
        raise DgqError(f"{folder}: a {type(pipe).__name__} has no UNet", "dgq quantizes UNet pipelines")
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(place)
    prepare_all(pipe.unet, place)
    return pipe
