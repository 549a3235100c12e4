"""What a calibration would take, from the configuration alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import architectures
from ..checkpoint.reading import components, family_at, held, network_config, tensor_table, weight_files
from ..devices import check_kernels
from ..family import TOKENS, family_of
from ..integer.rates import rates
from ..method import METHODS, Cost, LayerCost
from ..pictures.components import empty_encoder, empty_vae
from ..pictures.prompts import calibration_pool
from ..recipe import Recipe
from ..replay import hooked, rows_per_call
from .budget import MEASURED_PICTURES, check_budget
from .run import (
    DECODED_PICTURES,
    count_prompts,
    decoder_recipe,
    encoder_recipes,
    float_model,
    recording_settings,
    wanted_settings,
)

if TYPE_CHECKING:
    from ..family import Family
    from .run import Options


# What everything around one layer of a network takes beside its products.
SECONDS_PER_LAYER = 3e-4


# A call that is measured beside the quantized network, its backward pass included, in calls of the float one.
CALLS_OF_A_MEASURED = 6


# What a gradient step of a learned rounding does to each weight, in copies of it.
COPIES_OF_A_STEP = 40


# Python, torch, diffusers and transformers, and a call's activations.
PROCESS_BYTES = 700 * 2**20


@dataclass
class Estimate:
    """What a calibration would do, from the configuration alone (`dgq calibrate --dry-run`).

    Attributes:
        layers: quantized layers; kept: {name: reason} of layers that stay float.
        float16_bytes, packed_bytes: the network's file before and after, with a budget spent in full.
        budget_bytes: what a budget of bits lets layers of eight bits add, part of it; None without a budget.
        statistics_bytes: peak of second moments, samples and rounding; passes: runs over the recorded calls.
        memory_bytes: peak of the process (float32 model, text encoders or statistics and packed layers; pages of mapped
            files count while they are resident).
        calls: of the network: recorded and replayed.
        macs_per_call: multiply-accumulates of the quantized layers in one call, of both halves where the guidance
            doubles it.
        seconds: on this machine, from short timings, when nothing else runs on it.
        network: what its kind of network is called.
        decoder_layers: quantized layers of the VAE, none where it stays float; decoder_float16_bytes,
            decoder_packed_bytes: the VAE's file before and after.
        encoder_layers, encoder_float16_bytes, encoder_packed_bytes: the same of all text encoders that are quantized.
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
    budget_bytes: int | None = None
    decoder_layers: int = 0
    decoder_float16_bytes: int = 0
    decoder_packed_bytes: int = 0
    encoder_layers: int = 0
    encoder_float16_bytes: int = 0
    encoder_packed_bytes: int = 0


def estimate(model: str | os.PathLike[str] | None, recipe: Recipe, options: Options) -> Estimate:
    """Predict what `calibrate` would do, without loading a weight.

    Raises:
        DgqError: as `calibrate` would.
    """
    check_kernels(torch.device("cpu"))  # they are timed
    found = float_model(model)
    folder = found.folder
    family = family_at(folder)
    vae, config, pixels = empty_vae(folder / "vae"), dict(network_config(folder)), options.size
    if pixels and "sample_size" in config:
        config["sample_size"], pixels = pixels // _decoder(family, vae)[1], None
    network = family.skeleton(config)
    added = None if options.bits is None else check_budget(network, recipe, options.bits)
    settings = wanted_settings(options, found)
    assert settings.steps is not None
    assert settings.guidance is not None
    count = count_prompts(options, recipe)
    if options.prompts is None or isinstance(options.prompts, int):
        count = min(count, len(calibration_pool(folder)))
    doubled = family.doubled(network.config, settings.guidance)
    apart = doubled and family.separate_guidance
    method = METHODS[recipe.name]
    of_each = recording_settings(options, found, recipe).steps
    assert of_each is not None
    recorded = count * of_each * (2 if apart else 1) if method.reads_calls else 0
    meta = torch.device("meta")
    with meta:
        call = architectures.call(network, 2 if doubled and not apart else 1, meta, pixels=pixels)
    cost = method.cost(network, recipe, options.budget, call)
    replayed = min(recorded, options.calls)
    parameters = sum(tensor.numel() for tensor in network.state_dict().values())
    quantized = sum(layer.parameters for layer in cost.layers.values())
    packed = sum(layer.stored_bytes for layer in cost.layers.values()) + (added or 0)
    rows = _rows(network, cost, call)
    macs = sum(rows[name] * layer.macs for name, layer in cost.layers.items())
    per_pixel, factor = _decoder(family, vae)
    drawn = 2 * options.evaluate
    per_call, before = 0.0, {}  # seconds, and those until a layer is reached
    for name in rows:
        before[name] = per_call
        per_call += rows[name] * cost.layers[name].macs * rates().product + SECONDS_PER_LAYER
    seconds = (recorded + drawn * settings.steps * (2 if apart else 1)) * per_call
    for times, passes in ((replayed, cost.passes), (recorded, cost.whole)):
        seconds += times * sum(max(map(before.__getitem__, names)) for names in passes)
    seconds += sum(_learning_seconds(layer) for layer in cost.layers.values())
    measured = 0 if added is None else min(MEASURED_PICTURES, count) * recorded // count
    seconds += CALLS_OF_A_MEASURED * measured * per_call
    pipe = SimpleNamespace(vae=vae, vae_scale_factor=factor, **{family.component: network})
    width, height = (options.size, options.size) if options.size else family.default_size(pipe)
    seconds += drawn * width * height * per_pixel * rates().product
    seconds += sum(layer.seconds(replayed * rows[name]) for name, layer in cost.layers.items())
    # either the whole pipeline records, or the network alone is quantized, then the VAE beside it
    gathered = cost.gathered_bytes
    if gathered is None or not _is_mapped(folder / family.component):
        gathered = cost.statistics_bytes
    memory = max(4 * parameters + max(_others(folder), gathered + packed), cost.statistics_bytes + packed)
    after = 4 * (parameters - quantized) + packed
    decoder, decoder_cost = decoder_recipe(found, recipe, options), Cost({}, {})
    decoding = sum(tensor.numel() for tensor in vae.state_dict().values())
    if decoder is not None:
        with meta:
            latent = architectures.call(vae, 1, meta, pixels=math.isqrt(width * height))
        decoder_cost = METHODS[decoder.name].cost(vae, decoder, options.budget, latent)
        decoder_rows = _rows(vae, decoder_cost, latent)
        decoded = min(count, options.calls, DECODED_PICTURES)
        per_picture, _ = _macs(vae, lambda: family_of(vae).run(vae, latent))
        seconds += len(decoder_cost.passes) * decoded * per_picture * rates().product
        seconds += sum(layer.seconds(decoded * decoder_rows[name]) for name, layer in decoder_cost.layers.items())
        memory = max(memory, after + 4 * decoding + decoder_cost.statistics_bytes)
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    encoders = {"layers": 0, "before": 0, "after": 0}
    for name, wanted in encoder_recipes(found, recipe, options).items():
        encoder = empty_encoder(folder / name, simple_get_class_obj(*components(folder)[name]))
        encoder_cost = METHODS[wanted.name].cost(encoder, wanted, options.budget, None)
        size = sum(tensor.numel() for tensor in held(encoder).values())
        read = TOKENS * min(2 * count if doubled else count, options.calls)
        seconds += sum(
            len(encoder_cost.passes) * read * layer.macs * rates().product + layer.seconds(read)
            for layer in encoder_cost.layers.values()
        )
        memory = max(memory, after + 4 * size + encoder_cost.statistics_bytes)
        encoders["layers"] += len(encoder_cost.layers)
        encoders["before"] += 2 * size
        encoders["after"] += 2 * size + _stored(encoder_cost)
    return Estimate(
        layers=len(cost.layers),
        kept=dict(cost.kept),
        float16_bytes=2 * parameters,
        packed_bytes=2 * (parameters - quantized) + packed,
        statistics_bytes=cost.statistics_bytes,
        passes=len(cost.passes) + len(cost.whole),
        memory_bytes=memory + PROCESS_BYTES,
        calls=recorded + len(cost.passes) * replayed + len(cost.whole) * recorded + measured,
        macs_per_call=macs,
        seconds=seconds,
        network=family.title,
        budget_bytes=added,
        decoder_layers=len(decoder_cost.layers),
        decoder_float16_bytes=2 * decoding,
        decoder_packed_bytes=2 * decoding + _stored(decoder_cost),
        encoder_layers=encoders["layers"],
        encoder_float16_bytes=encoders["before"],
        encoder_packed_bytes=encoders["after"],
    )


def _learning_seconds(layer: LayerCost) -> float:
    """Of gradient steps: three products for each of a float layer, and what is done to every weight."""
    return 3 * layer.learned_rows * layer.macs * rates().product + layer.learned_steps * (
        layer.parameters * COPIES_OF_A_STEP * rates().copied + 3 * SECONDS_PER_LAYER
    )


def _stored(cost: Cost) -> int:
    """Bytes by which quantized layers make a file in float16 larger."""
    return sum(layer.stored_bytes - 2 * layer.parameters for layer in cost.layers.values())


def _rows(network: nn.Module, cost: Cost, call: dict[str, Any]) -> Mapping[str, int]:
    """`Cost.rows`, of every method; a call on the meta device."""
    if cost.rows:
        return cost.rows
    layers = {name: (layer.module, layer.outputs) for name, layer in cost.layers.items()}
    with torch.device("meta"):
        return rows_per_call(network, layers, call)


def _others(folder: Path) -> int:
    """float32 bytes of all components that are not the network."""
    names = [name for name in components(folder) if name != family_at(folder).component]
    tables = [tensor_table(file) for name in names for file in weight_files(folder / name)]
    return sum(4 * math.prod(shape) for table in tables for shape, _ in table.values())


def _is_mapped(place: Path) -> bool:
    """Whether a component's weights are mapped from its files: those of float32, others are widened to it."""
    return {dtype for file in weight_files(place) for _, dtype in tensor_table(file).values()} == {"F32"}


def _macs(network: Any, run: Callable[[], Any]) -> tuple[int, Any]:
    """Multiply-accumulates of all layers of a network in what is run, and what that returns."""
    done = 0

    def note(module: Any, _: Any, output: Tensor) -> None:
        nonlocal done
        done += output.numel() // module.weight.shape[0] * module.weight.numel()

    kinds = nn.Conv2d | nn.Conv3d | nn.Linear
    handles = [part.register_forward_hook(note) for part in network.modules() if isinstance(part, kinds)]
    with torch.no_grad(), hooked(handles):
        result = run()
    return done, result


def _decoder(family: Family, vae: Any) -> tuple[float, int]:
    """Multiply-accumulates of the decoder for a pixel of a picture, and pixels for each latent along a side."""
    channels, side = vae.config.get("latent_channels") or vae.config["z_dim"], 8
    latents = torch.empty(1, channels, side, side, device="meta")
    done, pixels = _macs(vae, lambda: family.decode(SimpleNamespace(vae=vae), latents))
    return done / (pixels.shape[-1] * pixels.shape[-2]), pixels.shape[-1] // side
