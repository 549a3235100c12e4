"""What a calibration would take, from the configuration alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import architectures
from ..checkpoint.reading import read_json
from ..integer.plan import GPTQ_MAX_REDUCTION, Layer, plan_layers
from ..integer.rounding import passes
from ..integer.stored import stored_shapes
from ..pictures.generation import Settings
from ..recipe import LayerPlan, Recipe
from .run import float_folder

if TYPE_CHECKING:
    from .run import Options


@dataclass
class Estimate:
    """What a calibration would do, from the configuration alone (`dgq calibrate --dry-run`).

    Attributes:
        layers: quantized layers; kept: {name: reason} of layers that stay float.
        float16_bytes, packed_bytes: UNet file before and after.
        statistics_bytes: peak of second moments and samples; passes: runs over the recorded calls.
        memory_bytes: rough peak of the process (float32 model, statistics, packed layers).
        calls: UNet calls: recorded and replayed.
        macs_per_call: multiply-accumulates of the quantized layers in one UNet call, of both halves where the guidance
            doubles it.
        seconds: rough time on this machine, from a short timed float product.
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


def packed_bytes(plan: LayerPlan) -> int:
    """Stored bytes of one quantized layer."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored_shapes(plan).values())


def estimate(model: str | os.PathLike[str] | None, recipe: Recipe, options: Options) -> Estimate:
    """Predict what `calibrate` would do, without loading a weight.

    Raises:
        DgqError: as `calibrate` would.
    """
    from diffusers import UNet2DConditionModel

    folder = float_folder(model)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
    layers, kept = plan_layers(unet, recipe)
    settings = Settings(options.steps, options.guidance).resolved(folder)
    assert settings.steps is not None
    count = options.prompts if isinstance(options.prompts, int) else len(options.prompts)
    recorded = count * settings.steps
    replayed = min(recorded, options.calls)
    groups = passes(layers, options.budget)
    parameters = sum(p.numel() for p in unet.parameters())
    quantized = sum(layer.weight.numel() + layer.plan.bias * layer.plan.out_features for layer in layers)
    packed = sum(packed_bytes(layer.plan) for layer in layers)
    statistics = max(sum(layer.moment_bytes for layer in group) for group in groups)
    assert settings.guidance is not None
    # a UNet that is told the guidance scale (LCM) is called once for it
    doubled = settings.guidance > 1 and unet.config.time_cond_proj_dim is None
    outputs = _outputs_per_call(unet, layers, 2 if doubled else 1)
    macs = sum(outputs[layer.name] * layer.plan.reduction * layer.plan.out_features for layer in layers)
    work = (recorded + len(groups) * replayed + 2 * options.evaluate * settings.steps) * macs
    for layer in layers:
        k = layer.plan.reduction
        if k <= GPTQ_MAX_REDUCTION:
            work += replayed * outputs[layer.name] * k * k + k**3 + 2 * layer.plan.out_features * k * k
    return Estimate(
        layers=len(layers), kept=kept, float16_bytes=2 * parameters,
        packed_bytes=2 * (parameters - quantized) + packed, statistics_bytes=statistics, passes=len(groups),
        memory_bytes=4 * parameters + statistics + packed + 2**30, calls=recorded + len(groups) * replayed,
        macs_per_call=macs, seconds=work / _macs_per_second(),
    )  # fmt: skip


def _outputs_per_call(unet: nn.Module, layers: Sequence[Layer], batch: int) -> dict[str, int]:
    """Rows (tokens or pixels, of all samples) each layer computes in one UNet call, found on the meta device."""
    rows: dict[str, int] = {}

    def hook(layer: Layer) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            rows[layer.name] = output.numel() // layer.plan.out_features

        return note

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    device = torch.device("meta")
    with device, torch.no_grad():
        unet(**architectures.call(unet, batch, device))
    for handle in handles:
        handle.remove()
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
