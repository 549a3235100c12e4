"""LoRA files on pipelines, as diffusers and peft put them there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.reading import family_at, tensor_names
from ..errors import DgqError
from ..family import Family, network_of
from .components import one_line, quiet, without_bars

OTHER_KIND = "it may be of another kind of model"

# Networks that diffusers loads LoKr for, and those that it loads no LoRA for.
WITH_LOKR = ("Flux2Transformer2DModel", "ZImageTransformer2DModel")
WITHOUT_LORA = ("PixArtTransformer2DModel",)


def check_lora(file: Path, family: Family) -> None:
    """Refuse, by the names of its tensors, what is no LoRA that diffusers reads for a network.

    Raises:
        DgqError: so it is, there is no such file, or peft is missing.
    """
    names = tensor_names(file)
    if find_spec("peft") is None:
        raise DgqError("LoRA needs peft, which is not installed", 'pip install "dgq[lora]"')
    if family.network in WITHOUT_LORA:
        raise DgqError(f"{file}: diffusers loads no LoRA for the {family.title}", "fuse it into the model by peft")
    lokr = any(".lokr_" in name for name in names)
    reason = ""
    if any(".hada_" in name for name in names):
        reason = "holds LoHa of LyCORIS, which diffusers does not read"
    elif lokr and family.network not in WITH_LOKR:
        reason = "holds LoKr, which diffusers reads for FLUX.2 and Z-Image alone"
    elif not lokr and not any("lora" in name for name in names):
        reason = "holds no LoRA"
    if reason:
        raise DgqError(f"{file}: {reason}", "--lora takes diffusers', peft's and kohya's files")


def check_loras(loras: Sequence[tuple[Path, float]], folder: Path) -> None:
    """`check_lora` of files and their strengths, for the model in a folder."""
    family = family_at(folder)
    for file, _ in loras:
        check_lora(file, family)


@without_bars()
@quiet("transformers")
def load_lora(pipe: Any, file: Path, name: str) -> None:
    """Put a file's LoRA on a pipeline, under a name that none has.

    Raises:
        DgqError: it is none, or another model's.
    """
    network = network_of(pipe)
    said = one_line(file, "cannot be loaded as LoRA of this model", OTHER_KIND)
    with said, quiet("diffusers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the file before's, which is meant
        pipe.load_lora_weights(str(file), adapter_name=name, local_files_only=True)
    if name not in getattr(network, "peft_config", {}):
        raise DgqError(f"{file}: holds no LoRA of the {type(network).__name__}")
    # FLUX's: a wider input, and norms that unloading would put back
    if any(getattr(network, kept, None) for kept in ("_overwritten_params", "_transformer_norm_layers")):
        raise DgqError(
            f"{file}: is a control LoRA, which draws from pictures", "dgq works with what draws from a text alone"
        )


def load_loras(pipe: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Put LoRA files on a pipeline that has none, each at a strength of its own.

    Raises:
        DgqError: as `load_lora`.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        load_lora(pipe, file, name)
    if names:
        pipe.set_adapters(names, [strength for _, strength in loras])
