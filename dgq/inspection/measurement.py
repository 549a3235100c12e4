"""What `dgq inspect --measure` found: a checkpoint beside its float model, layer by layer and step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SQNR_MAX = 99.0  # of outputs that are equal


@dataclass(frozen=True)
class LayerMeasurement:
    """One quantized layer on the float model's inputs. Lists have one entry a sampler step.

    Attributes:
        name: as in the checkpoint; of the parts of a joined input each has its own.
        sqnr_db: of the output without its bias, signal to quantization noise, over all steps; sqnr_db_by_step.
        input_sqnr_db: the same where only the input is rounded and the weight is float.
        noise: the noise it causes in the network's output, relative to the output's energy (see the module); the same
            of each step alone, noise_by_step.
        input_noise: what would be left of it with a float weight.
        kurtosis: of the input's values (3 for a normal distribution).
        channel_ratio: of a sample's channels, the largest absolute maximum over the median one; mean over samples.
        pixel_ratio: the same of its pixels or tokens.
        axis: that the published method groups, "channel" or "pixel" (the larger spread of ranges over the steps);
            "tensor" for inputs without pixels. axis_by_step: its choice at each step alone.
        exponents: exponent -> channels of a layer with shift groups; empty for others.
    """

    name: str
    sqnr_db: float
    sqnr_db_by_step: list[float]
    input_sqnr_db: float
    noise: float
    noise_by_step: list[float]
    input_noise: float
    kurtosis: list[float]
    channel_ratio: list[float]
    pixel_ratio: list[float]
    axis: str
    axis_by_step: list[str]
    exponents: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionMeasurement:
    """One attention layer with the float model's projections. Lists have one entry a sampler step.

    Attributes:
        name: its place in the network.
        cross: whether it reads the text.
        sqnr_db: of the output with quantized probabilities (and what else of q, k and v the recipe rounds) and float
            projections; None where the checkpoint's attention is float. sqnr_db_by_step, noise: as of a layer.
        start_mass: cross-attention: the mean probability of the start token, where there is one; else empty.
    """

    name: str
    cross: bool
    sqnr_db: float | None
    sqnr_db_by_step: list[float]
    noise: float
    start_mass: list[float]


@dataclass(frozen=True)
class Measurement:
    """What `measure_checkpoint` found.

    Attributes:
        against: the float model; prompts, settings: of the pictures.
        timesteps: of the sampler's steps.
        output_sqnr_db: of the network's guided output on the float model's inputs; output_sqnr_db_by_step.
        layers, attention: in the order they run.
    """

    against: str
    prompts: list[str]
    settings: dict[str, Any]
    timesteps: list[float]
    output_sqnr_db: float
    output_sqnr_db_by_step: list[float]
    layers: list[LayerMeasurement]
    attention: list[AttentionMeasurement]

    @property
    def noise(self) -> float:
        """The layers' and attentions' noise together, relative to the output's energy."""
        return sum(one.noise for one in self.layers) + sum(one.noise for one in self.attention)


def decibels(signal: float, noise: float) -> float:
    """Signal to noise of two energies in dB, within +-SQNR_MAX."""
    if noise <= 0:
        return SQNR_MAX
    return max(-SQNR_MAX, min(SQNR_MAX, 10 * math.log10(max(signal, 1e-300) / noise)))
