"""The files that systems load: float networks of random weights, dgq checkpoints, OpenVINO models, calls.

`write` makes them in processes of their own, so that the memory it takes is given back. Tensors are written one after
the other: a network is never in memory as a whole, but mapped from its file.
"""

from __future__ import annotations

import json
import os
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
from ..checkpoint.header import Header
from ..checkpoint.reading import SAFETENSORS_DTYPES, family_at, network_config, weight_variant
from ..checkpoint.writing import WEIGHTS_NAME
from ..errors import DgqError
from ..family import family_of
from ..integer.attention import AttentionPlan
from ..integer.on_the_fly import packed, rounded
from ..integer.plan import plan_layers
from ..integer.skeleton import stored_names
from ..outputs import atomic_folder
from ..recipe import Recipe
from ..replay import pack_calls, predicted, put_together, take_apart, unpack_calls
from ..version import __version__

Call = dict[str, Any]

# What the child of `write` ends with where its work failed for a known reason.
KNOWN_FAILURE = 3
OPENVINO = Path("network.xml")  # of an OpenVINO model; its weights are beside it


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
                made = packed(layer, weight, layer.bias).state_dict()
            yield made[leaf]

    with atomic_folder(Path(target)) as folder:
        place = _network_folder(folder / family.component, {**config, "quantization_config": header.to_dict()})
        stream_safetensors(place, specs, tensors())


class _Flat(nn.Module):
    """A network whose arguments are the tensors of calls of one form."""

    def __init__(self, network: nn.Module, form: Any) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, *values: Tensor) -> Tensor:
        return predicted(self.network, put_together(self.form, values))


def openvino_model(source: str, target: str, calls: str) -> None:
    """target/float32 and target/float16: the float network for calls of the given shapes, as OpenVINO models."""
    import openvino

    form, tensors = take_apart(load_calls(Path(calls))[0])
    with atomic_folder(Path(target)) as folder, torch.no_grad():
        model = openvino.convert_model(
            _Flat(load_network(Path(source), torch.float32), form),
            example_input=tuple(tensors),
            input=[tuple(tensor.shape) for tensor in tensors],
        )
        openvino.save_model(model, folder / "float32" / OPENVINO, compress_to_fp16=False)
        openvino.save_model(model, folder / "float16" / OPENVINO, compress_to_fp16=True)


def nncf_model(source: str, target: str, calls: str) -> None:
    """target: the OpenVINO model in `source`, its products and convolutions in int8 by NNCF's calibration."""
    import nncf
    import openvino

    samples = [[tensor.numpy() for tensor in take_apart(call)[1]] for call in load_calls(Path(calls))]
    with atomic_folder(Path(target)) as folder:
        # the type for transformers also quantizes the products of attention's queries and keys
        model = nncf.quantize(
            openvino.Core().read_model(Path(source) / OPENVINO),
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
        )
        openvino.save_model(model, folder / OPENVINO)


TASKS: dict[str, Callable[..., None]] = {
    "random": random_model,
    "dgq": quantized_model,
    "OpenVINO": openvino_model,
    "NNCF": nncf_model,
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
