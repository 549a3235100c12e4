"""Whole pictures: the pipeline of a system, and how long each part of a picture takes it."""

from __future__ import annotations

import functools
import importlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.reading import components, family_at, network_config, read_header, read_json, text_encoders
from ..family import family_of
from ..pictures.components import empty_encoder, empty_vae
from ..pictures.generation import Picture, Settings, generate
from ..pictures.pipelines import load
from ..replay import put_together, take_apart
from .files import RESULT, openvino_request

# Of a picture; each begins where the one before ends.
PARTS = ("text", "steps", "decoder", "PNG")


@dataclass(frozen=True)
class Subject:
    """A picture to draw.

    Attributes:
        prompt: what it shows.
        settings: `Settings`, resolved.
        base: folder of the float pipeline, whose tokenizers and scheduler OpenVINO's models are used with.
    """

    prompt: str
    settings: dict[str, Any]
    base: str


def load_classes(folder: Path) -> None:
    """Import what a folder's pipeline is made of, which is no part of loading it."""
    import diffusers

    for library, kind in components(folder).values():
        getattr(importlib.import_module(library), kind)
    getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])


def float_or_dgq(folder: Path, dtype: torch.dtype, device: torch.device, graph: bool) -> Any:
    """A pipeline as `dgq.load` makes it; the networks of a float one are channels-last, which they are faster in."""
    pipe = load(folder, dtype=dtype, device=device, graph=graph)
    if read_header(folder) is None:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pipe


class _Output(OrderedDict[str, Any]):
    """What a text encoder makes, as pipelines read it: by name or by number."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def skeletons(folder: Path) -> dict[str, Any]:
    """What has weights in a folder's pipeline, on the meta device, by component: network, text encoders and VAE."""
    import transformers

    family = family_at(folder)
    parts = {"vae": empty_vae(folder / "vae")}
    parts[family.component] = family.skeleton(network_config(folder))
    for name, kind in text_encoders(folder).items():
        parts[name] = empty_encoder(folder / name, getattr(transformers, kind))
    return parts


def hollow(folder: Path) -> Any:
    """The pipeline of a folder, of which no weights are read: its parts are what pipelines ask of them but their
    results."""
    parts = {name: _shell(part) for name, part in skeletons(folder).items()}
    network = parts.pop(family_at(folder).component)
    return load(folder, device="cpu", dtype=torch.float32, network=network, parts=parts)


def openvino_pipeline(folder: Path, base: Path, dtype: str, threads: int) -> Any:
    """The pipeline in `base` with OpenVINO's models in `folder` in the places of network, text encoders and decoder.

    Args:
        folder: as `files.openvino_pipeline` or `files.nncf_pipeline` writes it.
        base: of the float pipeline.
        dtype: precision asked of OpenVINO, "" for its own choice.
        threads: of OpenVINO.
    """
    pipe = hollow(base)

    def runs(name: str) -> Callable[..., Any]:
        request = openvino_request(folder / name, dtype, threads)
        result = json.loads((folder / name / RESULT).read_text(encoding="utf-8"))
        arguments = family_of(getattr(pipe, name)).arguments

        def run(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            _, tensors = take_apart(dict(zip(arguments, args, strict=False)) | kwargs)
            request.infer([tensor.contiguous().numpy() for tensor in tensors], share_inputs=True)
            outputs = range(len(request.model_outputs))
            made = [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in outputs]
            return put_together(result, made)

        return run

    predict, decode = runs(family_at(base).component), runs("vae")

    def decoded(z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        pixels = decode(z=z)
        return SimpleNamespace(sample=pixels) if return_dict else (pixels,)

    getattr(pipe, family_at(base).component).forward = lambda *args, **kwargs: (predict(*args, **kwargs),)
    pipe.vae.decode = decoded
    for name in text_encoders(base):
        encode = runs(name)
        getattr(pipe, name).forward = functools.partial(_encoded, encode)
    return pipe


def _encoded(encode: Callable[..., Any], *args: Any, **kwargs: Any) -> _Output:
    return _Output(encode(*args, **kwargs))


def _shell(part: nn.Module) -> Any:
    """A part on the meta device with tensors that take no memory: what pipelines ask of a part but its results."""
    for module in part.modules():
        tensors: list[Any] = [module._parameters, module._buffers]
        for named in tensors:
            for name, value in named.items():
                if value is not None:
                    empty = torch.zeros((), dtype=value.dtype).expand(value.shape)
                    named[name] = nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty
    return part.eval()


class Stopwatch:
    """Draws a picture again and again, and tells when its parts end.

    Args:
        pipe: a text-to-image pipeline.
        subject: what it draws.
        device: where.
    """

    def __init__(self, pipe: Any, subject: Subject, device: torch.device) -> None:
        self._pipe, self._device = pipe, device
        self._prompt, self._settings = subject.prompt, Settings(**subject.settings)
        self._ends: dict[str, float] = {}
        self._marked(pipe, "encode_prompt", None, "text")
        self._marked(pipe.vae, "decode", "steps", "decoder")

    def _marked(self, owner: Any, name: str, before: str | None, after: str) -> None:
        """Let a call of a method end the part before it and its own."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self._ends[before] = self._now()
            result = method(*args, **kwargs)
            self._ends[after] = self._now()
            return result

        setattr(owner, name, timed)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def draw(self) -> tuple[Picture, float, dict[str, float]]:
        """A picture, and the milliseconds that it took, its PNG file in memory included: all of them, and by part."""
        begin = last = self._now()
        (picture,) = generate(self._pipe, [self._prompt], self._settings)
        picture.png()
        self._ends["PNG"] = self._now()
        parts = {}
        for part in PARTS:
            parts[part] = 1000 * (self._ends[part] - last)
            last = self._ends[part]
        return picture, 1000 * (last - begin), parts
