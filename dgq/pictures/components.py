"""The components of a pipeline, loaded strictly, one by one."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint.apply import apply_header
from ..checkpoint.reading import (
    components,
    encoder_header,
    family_at,
    header_at,
    no_weights,
    read_json,
    tensor_table,
    verify_tensors,
    weight_files,
    weight_variant,
    weights_place,
)
from ..checkpoint.values import verify_values
from ..errors import DgqError
from ..family import UNKNOWN, named
from ..recipe import shortened

# What old text encoders' files hold and their classes no longer do, or that of another head: none is of any use here.
_HARMLESS = re.compile(r"(^|\.)position_ids$|^text_projection\.weight$|^logit_scale$")


# What fills tensors before they are loaded.
_FILLS = frozenset((Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_))


class _PlainMeta(TorchFunctionMode):
    """Within it networks are made on the meta device without sympy, which torch imports to compute nothing there."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if function in _FILLS:
            tensor = arguments[0] if arguments else keywords["tensor"]
            if tensor.is_meta:
                return tensor
        if function is torch.arange and torch.device(keywords.get("device") or "cpu").type == "meta":
            return function(*arguments, **{**keywords, "device": "cpu"}).to("meta")
        if function is torch.empty_like and arguments[0].is_meta and "memory_format" not in keywords:
            like = arguments[0]
            return torch.empty(like.shape, **{"dtype": like.dtype, "device": like.device, **keywords})
        return function(*arguments, **keywords)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of the libraries, whose switches are the process's."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown: Any = [one for one in (diffusers_logging, transformers_logging) if one.is_progress_bar_enabled()]
    for one in shown:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in shown:
            one.enable_progress_bar()


@without_bars()
def assemble(folder: Path, dtype: torch.dtype, given: Mapping[str, Any] | None = None) -> Any:
    """The pipeline of a folder that `check_folder` has seen, on the CPU; every component is loaded strictly, but those
    that are given."""
    import diffusers

    index = folder / "model_index.json"
    # transformers announces that torchvision is missing; no picture here goes through its image processors
    with quiet("transformers.utils.import_utils"):
        pipeline: Any = getattr(diffusers, read_json(index)["_class_name"])
    taken = inspect.signature(pipeline.__init__).parameters
    parts = dict(given or {})
    for name, (library, kind) in components(folder).items():
        if name in taken and name not in parts:
            parts[name] = component(folder, name, library, kind, dtype)
    _check_together(folder, parts)
    left_out = {name: None for name, entry in read_json(index).items() if entry == [None, None] and name in taken}
    # what the libraries would say of parts given to them is that they cannot tell the safety checker's class
    with one_line(index), quiet("diffusers.pipelines.pipeline_loading_utils"):
        return pipeline.from_pretrained(folder, local_files_only=True, **left_out, **parts)


def component(folder: Path, name: str, library: str, kind: str, dtype: torch.dtype) -> Any:
    """One component, of a library's class: a network with all its tensors and no others, all finite; or a tokenizer,
    scheduler or the like.

    Raises:
        DgqError: it is damaged, or there is no such class.
    """
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
    from diffusers.schedulers import SchedulerMixin

    place = folder / name
    with one_line(folder / "model_index.json", f"{name}: {library} has no class {shortened(kind)}"):
        found: Any = simple_get_class_obj(library, kind)
        load_from: Any = found.from_pretrained
    settings = place / getattr(found, "config_name", "config.json")
    if library == "diffusers" and "_class_name" not in read_json(settings):
        raise DgqError(f"{settings}: is no configuration of {kind} (no _class_name)")
    if not issubclass(found, nn.Module):
        if wanted := _vocabulary(place, found):
            raise DgqError(f"{place}: holds neither {wanted}")
        with one_line(settings if library == "diffusers" else place):
            part = load_from(str(place), local_files_only=True)
            if isinstance(part, SchedulerMixin):
                _try(part)
        return part
    files = weight_files(place)
    if not files:
        raise no_weights(place)
    _check_shapes(place, found, files)
    plain = _PlainMeta() if library == "transformers" else contextlib.nullcontext()
    with one_line(settings), quiet("transformers"), plain:
        part, info = load_from(
            str(place),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=weight_variant(place),
            output_loading_info=True,
        )
    weights = weights_place(files)
    for what in ("missing", "unexpected"):
        if wrong := sorted(key for key in info[f"{what}_keys"] if what == "missing" or not _HARMLESS.search(key)):
            raise DgqError(f"{weights}: tensor {wrong[0]!r} is {what}", f"the {name} is another one, or damaged")
    if getattr(part, "hf_quantizer", None) is None:
        verify_values(weights, part)
    return part


def _vocabulary(place: Path, kind: Any) -> str:
    """The files a tokenizer of this class is made of, where the folder does not hold them; it would be an empty one."""
    names = dict(getattr(kind, "vocab_files_names", {}))
    whole = names.pop("tokenizer_file", None)
    if not names or (whole and (place / whole).is_file()) or all((place / name).is_file() for name in names.values()):
        return ""
    return " nor ".join([*([whole] if whole else []), ", ".join(names.values())])


def empty_encoder(place: Path, kind: Any) -> Any:
    """The float network of a class of transformers that a folder configures, on the meta device.

    Raises:
        Exception: transformers refuses the configuration.
    """
    with torch.device("meta"):
        return kind(kind.config_class.from_pretrained(str(place), local_files_only=True))


def empty_vae(place: Path) -> Any:
    """The float VAE that a folder configures, on the meta device.

    Raises:
        DgqError: config.json cannot be read.
    """
    import diffusers

    config = read_json(place / "config.json")
    config.pop("quantization_config", None)
    kind: Any = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        return kind.from_config(config)


def _check_shapes(place: Path, kind: Any, files: list[Path]) -> None:
    """Hold a network's configuration against its weights, before anything is as large as it says.

    The libraries compare names, some of which they change: here a tensor of the network has to have its own shape in
    the files, or that of some tensor of another name.

    Raises:
        DgqError: it cannot be built, or a tensor does not fit.
    """
    file, weights = place / "config.json", weights_place(files)
    config = {name: value for name, value in read_json(file).items() if name != "quantization_config"}
    header = encoder_header(place) if named(kind.__name__) is UNKNOWN else header_at(place)
    with one_line(file), quiet("diffusers"), _PlainMeta(), torch.device("meta"):
        network = empty_encoder(place, kind) if hasattr(kind, "config_class") else kind.from_config(config)
        if header is not None:
            apply_header(network, header, file)
    if header is not None:
        verify_tensors(files, network)
        return
    stored = {name: entry for part in files for name, entry in tensor_table(part).items()}
    shapes = {shape for shape, _ in stored.values()}
    prefix = f"{getattr(kind, 'base_model_prefix', '')}."
    for name, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        found = next((stored[key] for key in (name, prefix + name, name.removeprefix(prefix)) if key in stored), None)
        if found is None and shape not in shapes:
            raise DgqError(f"{weights}: tensor {name!r} is missing", f"{file} may belong to another one")
        if found is not None and found[0] != shape:
            raise DgqError(f"{weights}: tensor {name!r} has shape {list(found[0])}, {list(shape)} in {file}")
        if found is not None and tensor.is_floating_point() and not found[1].startswith(("F", "BF")):
            raise DgqError(f"{weights}: tensor {name!r} has dtype {found[1]}, expected a float")


@torch.no_grad()
def _try(scheduler: Any) -> None:
    """Take a step of nothing: a damaged configuration shows only then."""
    scheduler = copy.deepcopy(scheduler)
    # PNDM cannot do with fewer; the shift that pipelines compute from a picture's size
    scheduler.set_timesteps(10, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    sample = torch.zeros(1, 4, 8, 8)
    step = scheduler.timesteps[0]
    scaled = scheduler.scale_model_input(sample, step) if hasattr(scheduler, "scale_model_input") else sample
    after = scheduler.step(scaled, step, sample).prev_sample
    if not bool(torch.isfinite(after).all()):
        raise ValueError("a step is not finite")


def _check_together(folder: Path, parts: dict[str, Any]) -> None:
    """Refuse components that load one by one and fail only while they draw.

    Raises:
        DgqError: the VAE's latents, or the text's width, are not the network's; or a tokenizer has tokens, or as many
            of them in a prompt, as the text encoder beside it does not know.
    """
    family_at(folder).check_parts(folder, parts)
    for suffix in ("", "_2", "_3"):
        encoder = parts.get(f"text_encoder{suffix}")
        tokenizer, place = parts.get(f"tokenizer{suffix}"), folder / f"tokenizer{suffix}"
        if tokenizer is None or encoder is None:
            continue
        embeddings = encoder.get_input_embeddings()
        known, tokens = embeddings.num_embeddings, tokenizer.get_vocab().values()
        if max(tokens, default=0) >= known or len(tokens) < known / 2:
            held = f"{len(tokens)} tokens up to number {max(tokens, default=0)}"
            raise DgqError(f"{place}: holds {held}, but the text encoder knows {known}")
        length, limit = tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", math.inf)
        # only a table of positions ends; others are computed, and the pipelines cut the text themselves
        tables = [one for one in encoder.modules() if isinstance(one, nn.Embedding) and one is not embeddings]
        if all(table.num_embeddings != limit for table in tables):
            limit = math.inf
        if not isinstance(length, int) or length < 3 or length > limit:
            file = place / "tokenizer_config.json"
            raise DgqError(f"{file}: model_max_length is {length}, the text encoder reads {limit} tokens")


@contextlib.contextmanager
def one_line(
    place: Path, reason: str = "cannot be loaded", hint: str = "the file may be damaged: copy it again"
) -> Iterator[None]:
    """What other libraries raise for damaged files (their errors have no common base) becomes a DgqError."""
    try:
        yield
    except DgqError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        detail = ": ".join([type(error).__name__, *lines[:1]])
        raise DgqError(f"{place}: {reason} ({detail})", hint) from error


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Only errors from a library's logger: what it warns of is an error here."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
