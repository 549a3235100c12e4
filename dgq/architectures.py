"""Networks of well-known models, built from their configurations with random weights: for speed, never for quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.reading import read_json
from .errors import DgqError
from .families import FAMILIES
from .family import Architecture, family_of, named

ARCHITECTURES = {name: one for family in FAMILIES for name, one in family.architectures.items()}


# Of a configuration that names no class.
DEFAULT_NETWORK = FAMILIES[0].network


def architecture(name: str, pixels: int | None = None) -> Architecture:
    """The architecture of this name, or of a network's config.json (called with two samples), which may hold a
    "pipeline" too.

    Args:
        name: of ARCHITECTURES, or a path.
        pixels: height and width of the picture; None for its own.

    Raises:
        DgqError: there is none, or the file is not a JSON object; pixels is not a positive multiple of 64.
    """
    if pixels is not None:
        if pixels < 64 or pixels % 64:
            raise DgqError(f"pictures of {pixels} pixels cannot be drawn", "give a multiple of 64")
        return replace(architecture(name), pixels=pixels)
    if name.endswith(".json"):
        config = read_json(Path(name))
        config.pop("quantization_config", None)
        pipeline = config.pop("pipeline", None)
        return Architecture(config, 2, config.get("_class_name", DEFAULT_NETWORK), pipeline=pipeline)
    if name not in ARCHITECTURES:
        raise DgqError(
            f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}",
            "or give a network's config.json",
        )
    return ARCHITECTURES[name]


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The network of a configuration without weights, on the meta device.

    Raises:
        DgqError: diffusers refuses the configuration.
    """
    return network(Architecture(config, 1, config.get("_class_name", DEFAULT_NETWORK)))


def network(which: Architecture) -> nn.Module:
    """The network of an architecture without weights, on the meta device.

    Raises:
        DgqError: it is of no known family, or diffusers refuses the configuration.
    """
    family = named(which.network)
    if not family.network:
        known = ", ".join(family.network for family in FAMILIES if family.pipelines)
        raise DgqError(f"{which.network} is no network that dgq works with", f"dgq works with {known}")
    net: nn.Module = family.skeleton(which.config)
    return net


def pipeline(which: Architecture, name: str) -> dict[str, Any]:
    """What stands around an architecture's network (`Architecture.pipeline`).

    Raises:
        DgqError: it is not known.
    """
    if not isinstance(which.pipeline, dict):
        known = ", ".join(known for known, one in ARCHITECTURES.items() if one.pipeline is not None)
        raise DgqError(
            f"{name}: what stands around the network in a pipeline is not known", f"whole pictures are drawn of {known}"
        )
    return which.pipeline


def random_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The float32 weights, one after the other, of a network on the meta device, such that activations stay in range:
    matrices of deviation 1 / sqrt(inputs), gains of 1, biases of 0; tables that belong to them likewise. The same in
    every call."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.dim() > 1:
            yield name, torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        else:
            yield name, torch.full(tensor.shape, 1.0 if name.endswith("weight") else 0.0)


def call(
    network: nn.Module,
    batch: int,
    device: torch.device,
    *,
    tokens: int | None = None,
    timestep: int = 500,
    seed: int = 0,
    pixels: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of a network, float32 noise (`Family.call`), with as many tokens as are usual.

    Raises:
        DgqError: it wants conditions that its configuration does not tell, or no size.
    """
    described: Any = network
    family = family_of(network)
    return family.call(
        described.config, batch, device, tokens=tokens or family.tokens, timestep=timestep, seed=seed, pixels=pixels
    )
