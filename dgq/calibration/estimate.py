"""What a calibration would take, from the configuration alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import architectures
from ..checkpoint.reading import family_at, network_config
from ..method import METHODS, LayerCost
from ..pictures.generation import Settings
from ..recipe import Recipe
from ..replay import replay
from .run import float_model

if TYPE_CHECKING:
    from .run import Options


@dataclass
class Estimate:
    """What a calibration would do, from the configuration alone (`dgq calibrate --dry-run`).

    Attributes:
        layers: quantized layers; kept: {name: reason} of layers that stay float.
        float16_bytes, packed_bytes: the network's file before and after.
        statistics_bytes: peak of second moments, samples and rounding; passes: runs over the recorded calls.
        memory_bytes: rough peak of the process (float32 model, statistics, packed layers).
        calls: of the network: recorded and replayed.
        macs_per_call: multiply-accumulates of the quantized layers in one call, of both halves where the guidance
            doubles it.
        seconds: rough time on this machine, from a short timed float product.
        network: what its kind of network is called.
    """

    layers: int
    kept: dict[str, str]
    float16_bytes: int
    packed_bytes: int
    statistics_bytes: int
    passes: int
    memory_bytes: int
    calls: int
    macs_per_call: int
    seconds: float
    network: str = ""


def estimate(model: str | os.PathLike[str] | None, recipe: Recipe, options: Options) -> Estimate:
    """Predict what `calibrate` would do, without loading a weight.

    Raises:
        DgqError: as `calibrate` would.
    """
    found = float_model(model)
    folder = found.folder
    family = family_at(folder)
    network = family.skeleton(network_config(folder))
    cost = METHODS[recipe.name].cost(network, recipe, options.budget)
    settings = Settings(options.steps, options.guidance).resolved(found)
    assert settings.steps is not None
    assert settings.guidance is not None
    count = options.prompts if isinstance(options.prompts, int) else len(options.prompts)
    doubled = family.doubled(network.config, settings.guidance)
    apart = doubled and family.separate_guidance
    recorded = count * settings.steps * (2 if apart else 1)
    replayed = recorded if cost.whole else min(recorded, options.calls)
    parameters = sum(tensor.numel() for tensor in network.state_dict().values())
    quantized = sum(layer.parameters for layer in cost.layers.values())
    packed = sum(layer.stored_bytes for layer in cost.layers.values())
    rows = _rows_per_call(network, cost.layers, 2 if doubled and not apart else 1)
    macs = sum(rows[name] * layer.macs for name, layer in cost.layers.items())
    work = (recorded + cost.passes * replayed + 2 * options.evaluate * settings.steps * (2 if apart else 1)) * macs
    work += sum(layer.work(replayed * rows[name]) for name, layer in cost.layers.items())
    return Estimate(
        layers=len(cost.layers), kept=dict(cost.kept), float16_bytes=2 * parameters,
        packed_bytes=2 * (parameters - quantized) + packed, statistics_bytes=cost.statistics_bytes,
        passes=cost.passes, memory_bytes=4 * parameters + cost.statistics_bytes + packed + 2**30,
        calls=recorded + cost.passes * replayed, macs_per_call=macs, seconds=work / _macs_per_second(),
        network=family.title,
    )  # fmt: skip


def _rows_per_call(network: nn.Module, layers: Mapping[str, LayerCost], batch: int) -> dict[str, int]:
    """Rows (tokens or pixels, of all samples) each layer computes in one call, found on the meta device."""
    rows: dict[str, int] = {}

    def hook(name: str, layer: LayerCost) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            rows[name] = output.numel() // layer.outputs

        return note

    handles = [layer.module.register_forward_hook(hook(name, layer)) for name, layer in layers.items()]
    device = torch.device("meta")
    with device:
        replay(network, [architectures.call(network, batch, device)], handles, lambda done, total: None)
    return rows


def _macs_per_second() -> float:
    """Float32 multiply-accumulates a second of this machine, from a short matmul, less what small layers lose."""
    import time

    a = torch.randn(768, 768)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return 0.35 * 5 * 768**3 / (time.perf_counter() - start)
