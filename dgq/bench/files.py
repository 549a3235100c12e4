"""The files that systems load: float networks and pipelines of random weights, dgq checkpoints, OpenVINO models, calls.

`write` makes them in processes of their own, so that the memory it takes is given back. Tensors are written one after
the other: a network is never in memory as a whole, but mapped from its file.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dgq_kernels

from .. import architectures
from ..checkpoint.apply import apply_header
from ..checkpoint.diffusers import DgqConfig
from ..checkpoint.header import Header
from ..checkpoint.reading import (
    SAFETENSORS_DTYPES,
    components,
    family_at,
    network_config,
    read_json,
    text_encoders,
    weight_variant,
)
from ..checkpoint.writing import ENCODER_NAME, WEIGHTS_NAME, index_shards, write_checkpoint
from ..devices import over_tensors
from ..errors import DgqError
from ..family import DECODERS, ENCODERS, family_of, named
from ..integer.attention import AttentionPlan
from ..integer.on_the_fly import packed, rounded
from ..integer.plan import plan_layers
from ..integer.skeleton import stored_names
from ..outputs import atomic_folder
from ..pictures.components import component
from ..pictures.generation import Settings, check_size, draw_latents
from ..pictures.pipelines import load
from ..recipe import Recipe
from ..replay import pack_calls, predicted, put_together, record_all, take_apart, unpack_calls
from ..version import __version__

Call = dict[str, Any]

# What the child of `write` ends with where its work failed for a known reason.
KNOWN_FAILURE = 3
OPENVINO = Path("network.xml")  # of an OpenVINO model; its weights are beside it
RESULT = Path("result.json")  # beside a component's: what it makes, as `take_apart` has it
SHARD = 2**30  # bytes of weights in a file of a pipeline: a loader that casts has one in memory at a time
TOKENIZER_WORDS = ("<|startoftext|>", "<|endoftext|>")


# Its arguments follow. -P keeps what lies in the working folder, a torch.py say, from being imported.
CHILD = (sys.executable, "-P", "-m", "dgq.bench")


def child_environment() -> dict[str, str]:
    """The environment of a process that is to import what this one imports, but nothing from the working folder."""
    roots = [str(Path(str(package.__file__)).parents[1]) for package in (architectures, dgq_kernels)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*filter(None, sys.path), *roots]))}


def write(task: str, **arguments: Any) -> None:
    """Run one of `TASKS` in a process of its own.

    Raises:
        DgqError: it failed; the message holds its last line.
    """
    command = [*CHILD, "write", task, json.dumps(arguments, default=str)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"]
        prefix = "" if child.returncode == KNOWN_FAILURE else f"writing the {task} files failed: "
        raise DgqError(prefix + lines[-1])


def save_calls(calls: Sequence[Call], file: Path) -> None:
    """Keep a network's calls as `pack_calls` packs them."""
    save_file(pack_calls(calls), str(file))


def load_calls(file: Path) -> list[Call]:
    """Inverse of `save_calls`."""
    return unpack_calls(load_file(str(file)))


def stream_safetensors(
    file: Path, specs: Mapping[str, tuple[Sequence[int], torch.dtype]], tensors: Iterable[Tensor]
) -> None:
    """Write a safetensors file of tensors that come one after the other.

    Args:
        file: is created.
        specs: name -> (shape, dtype), in the order of the tensors, which are cast to these dtypes.
        tensors: as many as there are specs.

    Raises:
        ValueError: a tensor of another shape, or too few or too many.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), tensor in zip(specs.items(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {tuple(shape)}")
            handle.write(tensor.detach().to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)


def load_network(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The network below a model's folder, float or a dgq checkpoint; `options` go to diffusers' from_pretrained."""
    family = family_at(folder)
    network = family.network_class().from_pretrained(
        folder,
        subfolder=family.component,
        dtype=dtype,
        variant=weight_variant(folder / family.component),
        use_safetensors=True,
        local_files_only=True,
        **options,
    )
    return network.eval()


def openvino_request(folder: Path, dtype: str, threads: int) -> Any:
    """What runs the OpenVINO model in a folder, in a precision ("" for OpenVINO's own choice), on so many threads."""
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if dtype:
        options["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    core = openvino.Core()
    return core.compile_model(core.read_model(folder / OPENVINO), "CPU", options).create_infer_request()


def _network_folder(place: Path, config: Mapping[str, Any]) -> Path:
    """Start a network's folder; returns the place of its weights."""
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return place / WEIGHTS_NAME


def random_model(config: dict[str, Any], target: str, dtype: str) -> None:
    """A float network of `architectures.random_weights` in a dtype; target/COMPONENT is what diffusers loads."""
    network = architectures.skeleton(config)
    kind: torch.dtype = getattr(torch, dtype)
    described: Any = network
    with atomic_folder(Path(target)) as folder:
        place = _network_folder(folder / family_of(network).component, json.loads(described.to_json_string()))
        specs = {name: (tensor.shape, kind) for name, tensor in network.state_dict().items()}
        stream_safetensors(place, specs, (tensor for _, tensor in architectures.random_weights(network)))


def quantized_model(source: str, target: str, wbits: int) -> None:
    """A dgq checkpoint (the network only) of a float model, without calibration: nearest rounding, channels as they
    are.

    Args:
        source: folder of the float model.
        target: is created.
        wbits: 4 or 8.
    """
    network = load_network(Path(source), torch.float32)
    family = family_of(network)
    recipe = Recipe(wbits=wbits, rounding="nearest", channels="none")
    layers = {layer.name: layer for layer in plan_layers(network, recipe)[0]}
    attention = AttentionPlan.for_activations(recipe.abits) if family.start_token else None
    plans = {name: layer.plan for name, layer in layers.items()}
    header = Header(recipe, plans, attention, dgq_version=__version__)
    config = network_config(Path(source))
    empty = family.skeleton(config)
    with torch.device("meta"):
        apply_header(empty, header)
    # as `write_checkpoint` does: what stays float in half precision, what a layer stores as it is
    halved = set(network.state_dict()) - stored_names(empty)
    specs = {
        name: (tensor.shape, torch.float16 if name in halved and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in empty.state_dict().items()
    }
    floats = network.state_dict()

    def tensors() -> Iterator[Tensor]:
        made: dict[str, Tensor] = {}
        current = ""
        for name in specs:
            module, _, leaf = name.rpartition(".")
            if module not in layers:
                yield floats[name]
                continue
            if module != current:  # a layer's tensors follow each other
                layer, current = layers[module], module
                weight = rounded(layer, layer.module.weight.detach().float())
                made = packed(layer, weight, layer.module.bias).state_dict()
            yield made[leaf]

    with atomic_folder(Path(target)) as folder:
        place = _network_folder(folder / family.component, {**config, "quantization_config": header.to_dict()})
        stream_safetensors(place, specs, tensors())


def pipeline_parts(config: dict[str, Any], pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """What has weights in the pipeline of `random_pipeline`, on the meta device, by component.

    Raises:
        DgqError: one of its configurations cannot be used.
    """
    network = architectures.skeleton(config)
    parts: dict[str, Any] = {family_of(network).component: network}
    for name, value in pipeline.items():
        if name.startswith("text_encoder"):
            parts[name] = _empty_encoder(name, value)
        elif name == "vae":
            if named(value["_class_name"]) not in DECODERS:
                raise DgqError(f"a VAE of class {value['_class_name']} is not known")
            parts[name] = named(value["_class_name"]).skeleton(value)
    return parts


def _empty_encoder(name: str, config: Mapping[str, Any]) -> Any:
    import transformers

    try:
        kind = getattr(transformers, config["_class_name"])
        settings = kind.config_class(**{key: value for key, value in config.items() if key != "_class_name"})
        with torch.device("meta"):
            return kind(settings)
    except Exception as error:  # any of transformers'
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DgqError(f"the {name}'s configuration cannot be used ({type(error).__name__}: {reason})") from None


def random_pipeline(config: dict[str, Any], pipeline: dict[str, Any], target: str, dtype: str) -> None:
    """A float pipeline of random weights: the network of a configuration, and what `Architecture.pipeline` says stands
    around it, with a tokenizer of bytes for each text encoder."""
    from diffusers import schedulers

    parts = pipeline_parts(config, pipeline)
    index: dict[str, Any] = {}
    with atomic_folder(Path(target)) as folder:
        for name, part in parts.items():
            encoder = family_of(part) in ENCODERS
            index[name] = ["transformers" if encoder else "diffusers", type(part).__name__]
            settings = json.loads(part.config.to_json_string(use_diff=False) if encoder else part.to_json_string())
            weights = _network_folder(folder / name, settings).with_name(ENCODER_NAME if encoder else WEIGHTS_NAME)
            _stream_shards(weights, part, getattr(torch, dtype))
            index_shards(folder / name)
            if encoder:
                place = name.replace("text_encoder", "tokenizer")
                index[place] = ["transformers", "CLIPTokenizer"]
                tokenizer = byte_tokenizer(part.config.vocab_size, part.config.max_position_embeddings)
                tokenizer.save_pretrained(folder / place)
        for name, value in pipeline.items():
            if name == "scheduler":
                index[name] = ["diffusers", value["_class_name"]]
                getattr(schedulers, value["_class_name"]).from_config(value).save_pretrained(folder / name)
            elif name not in parts:
                index[name] = [None, None] if value is None else value
        (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _stream_shards(file: Path, part: nn.Module, dtype: torch.dtype) -> None:
    """Random weights of a part on the meta device, in one file or in shards of `SHARD` bytes beside its place."""
    shards: list[dict[str, tuple[Sequence[int], torch.dtype]]] = [{}]
    size = 0
    for name, tensor in part.state_dict().items():
        own = tensor.numel() * dtype.itemsize
        if size and size + own > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = (tensor.shape, dtype)
        size += own
    tensors = (tensor for _, tensor in architectures.random_weights(part))
    for i, specs in enumerate(shards, start=1):
        place = file if len(shards) == 1 else file.with_stem(f"{file.stem}-{i:05}-of-{len(shards):05}")
        stream_safetensors(place, specs, itertools.islice(tensors, len(specs)))


def byte_tokenizer(entries: int, tokens: int) -> Any:
    """CLIP's tokenizer of a vocabulary of so many entries that merges nothing: a prompt's bytes are its tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    words += [f"<|{i}|>" for i in range(entries - len(words) - len(TOKENIZER_WORDS))]
    begin, end = TOKENIZER_WORDS
    vocabulary = {word: i for i, word in enumerate([*words, begin, end])}
    named_tokens = {"bos_token": begin, "eos_token": end, "pad_token": end, "unk_token": end}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens, **named_tokens)


def quantized_pipeline(source: str, target: str, wbits: int, text_encoder: bool) -> None:
    """A dgq checkpoint of a float pipeline, without calibration: the network, the VAE's decoder where its class is
    known (int8, rotated), the text encoders where it is said (int8).

    Args:
        source: folder of the float model.
        target: is created.
        wbits: of the network, 4 or 8.
        text_encoder: whether the text encoders are quantized.
    """
    folder = Path(source)
    own = family_at(folder).component
    asked = {own: DgqConfig(wbits)}
    if decodes_in_int8(folder):
        asked["vae"] = DgqConfig(8, channels="rotate")
    if text_encoder:
        asked |= dict.fromkeys(text_encoders(folder), DgqConfig(8))
    made: dict[str, tuple[Any, Header]] = {}
    for name, config in asked.items():
        library, kind = components(folder)[name]
        part = getattr(importlib.import_module(library), kind).from_pretrained(
            folder / name,
            quantization_config=config,
            dtype=torch.float32,
            variant=weight_variant(folder / name),
            use_safetensors=True,
            local_files_only=True,
        )
        made[name] = part, part.hf_quantizer.quantization_config.header
    network, header = made.pop(own)
    write_checkpoint(folder, network, header, Path(target), beside=made)


def decodes_in_int8(folder: Path) -> bool:
    """Whether the VAE of a pipeline's folder is of a class that is quantized."""
    kind = read_json(folder / "vae" / "config.json").get("_class_name", "")
    return named(kind) in DECODERS


def made_of(part: Any, call: Call) -> Any:
    """What a pipeline's component makes of a call: a tensor, or tensors nested in dicts and lists."""
    if hasattr(part, "decode"):  # a VAE
        return part.decode(**call, return_dict=False)[0]
    return dict(part(**call).items()) if family_of(part) in ENCODERS else predicted(part, call)


class _Flat(nn.Module):
    """A component whose arguments are the tensors of calls of one form, and so is what it makes.

    Attributes:
        result: the form of that; None before a call.
    """

    def __init__(self, part: nn.Module, form: Any) -> None:
        super().__init__()
        self.part, self.form = part, form
        self.result: Any = None

    def forward(self, *values: Tensor) -> Any:
        self.result, tensors = take_apart(made_of(self.part, put_together(self.form, values)))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


def openvino_model(source: str, target: str, calls: str) -> None:
    """target/float32 and target/float16: the float network for calls of the given shapes, as OpenVINO models."""
    with atomic_folder(Path(target)) as folder:
        model, _ = _converted(load_network(Path(source), torch.float32), load_calls(Path(calls))[0])
        _save_openvino(model, folder / "float32", half=False)
        _save_openvino(model, folder / "float16", half=True)


@torch.no_grad()
def _converted(part: Any, call: Call) -> tuple[Any, Any]:
    """A component as an OpenVINO model for calls of one form and shapes, and the form of what it makes."""
    import openvino

    form, tensors = take_apart(call)
    flat = _Flat(part, form)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    return openvino.convert_model(flat, example_input=tuple(tensors), input=shapes), flat.result


def _save_openvino(model: Any, folder: Path, half: bool) -> None:
    import openvino

    openvino.save_model(model, folder / OPENVINO, compress_to_fp16=half)


def recorded(folder: Path, settings: Settings, prompt: str, dtype: torch.dtype) -> dict[str, list[Call]]:
    """The calls that make one picture of a float pipeline, in float32, by component: network, text encoders, VAE."""
    pipe = load(folder, device="cpu", dtype=dtype)
    family = family_at(folder)
    latents: list[Tensor] = []
    modules = {name: getattr(pipe, name) for name in (*text_encoders(folder), family.component)}
    found = record_all(
        lambda prompt, _: latents.append(draw_latents(pipe, prompt, settings)),
        modules,
        [prompt],
        lambda *_: None,
    )
    plain = family.plain_latents(pipe, family.unpacked(pipe, latents[0], *check_size(pipe, settings)))
    calls = {name: of[0] for name, of in found.items()} | {"vae": [{"z": plain}]}
    cast: Callable[[Tensor], Tensor] = lambda tensor: tensor.float() if tensor.is_floating_point() else tensor  # noqa: E731
    return {name: [over_tensors(call, cast) for call in of] for name, of in calls.items()}


def openvino_pipeline(source: str, target: str, settings: dict[str, Any], prompt: str, dtype: str) -> None:
    """target/COMPONENT: the float network, text encoders and VAE's decoder as OpenVINO models in float16, for pictures
    of one size and guidance; target/calls: the calls of one, for `nncf_pipeline`.

    Args:
        source: folder of the float model.
        target: is created.
        settings: of that picture: `Settings`, resolved.
        prompt: what it shows.
        dtype: in which it is drawn.
    """
    calls = recorded(Path(source), Settings(**settings), prompt, getattr(torch, dtype))
    with atomic_folder(Path(target)) as folder:
        (folder / "calls").mkdir()
        for name, of in calls.items():
            save_calls(of, folder / "calls" / f"{name}.safetensors")
            part = component(Path(source), name, *components(Path(source))[name], torch.float32)
            model, result = _converted(part, of[0])
            del part
            _save_openvino(model, folder / name, half=True)
            (folder / name / RESULT).write_text(json.dumps(result), encoding="utf-8")
            del model


def nncf_pipeline(source: str, target: str) -> None:
    """The components that `openvino_pipeline` wrote, quantized by NNCF with the calls that it recorded."""
    with atomic_folder(Path(target)) as folder:
        for file in sorted((Path(source) / "calls").iterdir()):
            place = folder / file.stem
            _save_openvino(_quantized(Path(source) / file.stem, load_calls(file)), place, half=True)
            shutil.copyfile(Path(source) / file.stem / RESULT, place / RESULT)


def nncf_model(source: str, target: str, calls: str) -> None:
    """target: the OpenVINO model in `source`, its products and convolutions in int8 by NNCF's calibration."""
    with atomic_folder(Path(target)) as folder:
        _save_openvino(_quantized(Path(source), load_calls(Path(calls))), folder, half=True)


def _quantized(folder: Path, calls: Sequence[Call]) -> Any:
    """The OpenVINO model in a folder, calibrated by NNCF on calls."""
    import nncf
    import openvino

    samples = [[tensor.numpy() for tensor in take_apart(call)[1]] for call in calls]
    # the type for transformers also quantizes the products of attention's queries and keys
    return nncf.quantize(
        openvino.Core().read_model(folder / OPENVINO),
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )


TASKS: dict[str, Callable[..., None]] = {
    "random": random_model,
    "pipeline": random_pipeline,
    "dgq": quantized_model,
    "dgq pipeline": quantized_pipeline,
    "OpenVINO": openvino_model,
    "OpenVINO pipeline": openvino_pipeline,
    "NNCF": nncf_model,
    "NNCF pipeline": nncf_pipeline,
}


def main(task: str, arguments: str) -> None:
    """Run a task whose keyword arguments are a JSON object; a failure's reason is the last line on stderr."""
    try:
        TASKS[task](**json.loads(arguments))
    except DgqError as error:
        print(error.message, file=sys.stderr)
        sys.exit(KNOWN_FAILURE)
    except Exception as error:  # any library's
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{type(error).__name__}: {reason}", file=sys.stderr)
        sys.exit(1)
