"""One system in a process of its own: it loads, warms up, and answers every line on its stdin with the time of a step,
or of a whole picture.

Answers are JSON objects, one a line: first {"load": {...}}, then {"ms": ..., "peak_rss_bytes": ...} for every line
asked, with {"parts": {...}} for a picture; or {"error": reason}, and the process ends. So does it at the end of stdin.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ..devices import over_tensors
from ..errors import DgqError
from ..graphs import use_graphs
from ..integer.layer import IntegerLayer
from ..integer.shared_input import prepare_all
from ..integer.stored import StoredWeight
from ..replay import predicted, take_apart
from .drawing import Stopwatch, Subject, float_or_dgq, load_classes, openvino_pipeline
from .files import Call, load_calls, load_network, openvino_request
from .rows import WARM_UP, timed


@dataclass(frozen=True)
class Spec:
    """What a worker runs.

    Attributes:
        kind: of `LOADERS`.
        folder: what it loads.
        dtype: of the weights that stay float and of the activations; for "openvino" the precision asked of OpenVINO,
            "" for its own choice.
        calls: file of `files.save_calls`; all give the output, the middle one is timed.
        device, threads: where it runs.
        picture: what it draws, with the whole pipeline in `folder`; None for calls of the network.
    """

    kind: str
    folder: str
    dtype: str
    calls: str
    device: str = "cpu"
    threads: int = 1
    picture: Subject | None = None


Step = Callable[[Call], Tensor]


def cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A call's arguments on a device: float tensors in a dtype, pictures channels-last."""

    def made(tensor: Tensor) -> Tensor:
        # scalars are timesteps, whose float dtype is the model's business
        tensor = tensor.to(device, dtype if tensor.is_floating_point() and tensor.dim() > 1 else tensor.dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return over_tensors(value, made)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights in memory, with the form a backend has packed for itself."""
    held = [tensor for tensor in (*network.parameters(), *network.buffers()) if not isinstance(tensor, StoredWeight)]
    total = sum(tensor.nbytes for tensor in held)
    for module in network.modules():
        if isinstance(module, IntegerLayer):
            total += module.prepared_bytes
    return total


def peak_rss() -> int:
    """Peak resident bytes of this process. Linux counts the parent into ru_maxrss, so its own counter comes first."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: on CUDA of the device's memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()


def _eager(spec: Spec, **options: Any) -> Any:
    """A network, float (channels-last) or dgq's, as `from_pretrained` makes it."""
    network = load_network(Path(spec.folder), getattr(torch, spec.dtype), **options)
    network = network.to(torch.device(spec.device)).to(memory_format=torch.channels_last)
    prepare_all(network, torch.device(spec.device))
    return network


def _steps(network: Any) -> Step:
    return lambda call: predicted(network, call)


def _load_torch(spec: Spec) -> tuple[Step, Any]:
    network = _eager(spec)
    return _steps(network), network


def _load_graph(spec: Spec) -> tuple[Step, Any]:
    network = _eager(spec)
    use_graphs(network)
    return _steps(network), network


def _load_compile(spec: Spec) -> tuple[Step, Any]:
    return _steps(_compiled(_eager(spec))), None


def _compiled(network: Any) -> Any:
    import torch._inductor.config as inductor

    inductor.freezing = True
    inductor.compile_threads = 1  # no pool of processes that stays around
    return torch.compile(network)


def _load_autotune(spec: Spec) -> tuple[Step, Any]:
    """As fast as torch makes a float network on CUDA: tiles by measurement, and graphs of its own. Takes minutes."""
    return _steps(torch.compile(_eager(spec), mode="max-autotune")), None


def _load_torchao(spec: Spec) -> tuple[Step, Any]:
    """Linear layers in int8 with activations quantized as they come; uncompiled it is slower than float."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    network = _eager(spec)
    quantize_(network, Int8DynamicActivationInt8WeightConfig())
    return _steps(_compiled(network)), None


def _load_sdnq(spec: Spec) -> tuple[Step, Any]:
    """Linear layers and convolutions in int8 products; sdnq compiles its own functions."""
    from sdnq import SDNQConfig

    config = SDNQConfig("int8", use_quantized_matmul=True, quant_conv=True, use_quantized_matmul_conv=True)
    return _steps(_eager(spec, quantization_config=config)), None


def _load_openvino(spec: Spec) -> tuple[Step, Any]:
    request = openvino_request(Path(spec.folder), spec.dtype, spec.threads)

    def step(call: Call) -> Tensor:
        # the arrays are the call's own memory: nothing is copied
        request.infer([tensor.numpy() for tensor in take_apart(call)[1]], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data)

    return step, None


LOADERS: dict[str, Callable[[Spec], tuple[Step, Any]]] = {
    "torch": _load_torch,
    "graph": _load_graph,
    "compile": _load_compile,
    "autotune": _load_autotune,
    "torchao": _load_torchao,
    "sdnq": _load_sdnq,
    "openvino": _load_openvino,
}


def _pipeline(spec: Spec, subject: Subject) -> Any:
    """The pipeline of a system, of a kind "torch", "graph" or "openvino"."""
    folder, base = Path(spec.folder), Path(subject.base)
    if spec.kind == "openvino":
        return openvino_pipeline(folder, base, spec.dtype, spec.threads)
    return float_or_dgq(folder, getattr(torch, spec.dtype), torch.device(spec.device), spec.kind == "graph")


def _serve_pictures(spec: Spec, subject: Subject, output: str, answer: Callable[..., None]) -> None:
    device = torch.device(spec.device)
    load_classes(Path(subject.base))
    begin = time.perf_counter()
    pipe = _pipeline(spec, subject)
    load_ms = 1000 * (time.perf_counter() - begin)
    watch = Stopwatch(pipe, subject, device)
    picture, warm, _ = watch.draw()
    np.save(output, np.asarray(picture.image, dtype=np.float32))
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = None if spec.kind == "openvino" else sum(map(weight_bytes, modules))
    answer(load={"ms": warm, "load_ms": load_ms, "weight_bytes": weights, "peak_rss_bytes": peak_memory(device)})
    for _ in sys.stdin:
        _, ms, parts = watch.draw()
        answer(ms=ms, parts=parts, peak_rss_bytes=peak_memory(device))


def _serve(spec: Spec, output: str, answer: Callable[..., None]) -> None:
    device = torch.device(spec.device)
    step, network = LOADERS[spec.kind](spec)
    calls = load_calls(Path(spec.calls))
    inputs = calls
    if spec.kind != "openvino":  # which was made for the memory layout that the calls are kept in
        inputs = [cast(call, getattr(torch, spec.dtype), device) for call in calls]
    np.save(output, torch.stack([step(call).float().cpu() for call in inputs]).numpy())
    run = functools.partial(step, inputs[len(inputs) // 2])
    warm = min(timed(run, device) for _ in range(WARM_UP))
    weights = None if network is None else weight_bytes(network)
    answer(load={"ms": warm, "weight_bytes": weights, "peak_rss_bytes": peak_memory(device)})
    for _ in sys.stdin:
        answer(ms=timed(run, device), peak_rss_bytes=peak_memory(device))


def main(text: str, output: str) -> None:
    """Serve a `Spec`, given as a JSON object; its outputs, stacked, go to a .npy file in float32."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**facts: Any) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    facts = json.loads(text)
    subject = facts.pop("picture")
    spec = Spec(**facts, picture=subject and Subject(**subject))
    torch.set_num_threads(spec.threads)
    try:
        with torch.no_grad():
            if spec.picture is not None:
                _serve_pictures(spec, spec.picture, output, answer)
            else:
                _serve(spec, output, answer)
    except Exception as error:  # any library's; the parent tells it in one line
        reason = (str(error).strip().splitlines() or [""])[0]
        answer(error=reason if isinstance(error, DgqError) else f"{type(error).__name__}: {reason}")
        sys.exit(1)


def as_json(spec: Spec) -> str:
    """A spec as `main` takes it."""
    return json.dumps(dataclasses.asdict(spec))
