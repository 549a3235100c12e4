"""The picture of `dgq inspect --png`: heat map, worst layers, outliers, attention (matplotlib, the `plots` extra)."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DgqError
from ..pictures.generation import write_png
from .inspect import Inspection, split_name
from .measurement import LayerMeasurement, Measurement, decibels

LOWEST, HIGHEST = 10, 40  # dB, the ends of the colours


WORST = 10


_ROW_INCHES, _DPI = 0.105, 100


_AXES = {"channel": "o", "pixel": "s"}  # markers


def check_available() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        DgqError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DgqError("the picture needs matplotlib, which is not installed", 'pip install "dgq[plots]"')


def draw(found: Inspection, file: Path) -> None:
    """Draw a measured checkpoint.

    Raises:
        DgqError: it was not measured, matplotlib is missing, or the file cannot be written.
    """
    check_available()
    if found.measurement is None:
        raise DgqError(f"{found.path}: was not measured", "there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measurement = found.measurement
    height = max(13.0, 1.6 + _ROW_INCHES * len(measurement.layers))
    figure = Figure(figsize=(15, height), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    settings = measurement.settings
    figure.suptitle(
        f"{Path(found.base_model).name}, {found.label}, {found.ratio:.0%} of float16: the {found.network}'s output "
        f"SQNR is {measurement.output_sqnr_db:.1f} dB (prompts: {len(measurement.prompts)}, "
        f"steps: {settings['steps']}, guidance: {settings['guidance']:g})"
    )
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    left, right = halves
    _heat_map(left, measurement)
    panels = right.subplots(5, 1, height_ratios=[1.1, 1.5, 1.3, 0.9, 0.9])
    _worst(panels[0], measurement)
    _blocks(panels[1], measurement)
    _outliers(panels[2], measurement)
    _steps(panels[3], measurement)
    _start_token(panels[4], measurement)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    write_png(image.quantize(256, kmeans=3, dither=Image.Dither.NONE), file)  # a third of the bytes


def _label(name: str) -> str:
    """A layer's name without what all names share."""
    for long, short in (("_blocks.", "."), ("mid_block", "mid"), ("transformer.", "")):
        name = name.replace(long, short)
    return name


def _heat_map(figure: Any, measurement: Measurement) -> None:
    layers = measurement.layers
    axes = figure.subplots()
    values = [layer.sqnr_db_by_step for layer in layers]
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="RdYlBu",
        vmin=LOWEST,
        vmax=HIGHEST,
        interpolation="nearest",
        extent=(0.5, len(values[0]) + 0.5, len(layers) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(layers)), [_label(layer.name) for layer in layers], fontsize=6)
    place = 0
    for _, members in itertools.groupby(layers, key=lambda layer: split_name(layer.name)[0]):
        place += len(list(members))
        axes.axhline(place - 0.5, color="black", linewidth=0.6)
    axes.set(title="SQNR of each layer's output by sampler step (dB)", xlabel="step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axes, location="bottom", extend="both", shrink=0.6, aspect=40, pad=0.01)
    bar.set_label("dB")


def _worst(axes: Any, measurement: Measurement) -> None:
    worst = sorted(measurement.layers, key=lambda layer: -layer.noise)[:WORST]
    total = measurement.noise or 1.0
    places = range(len(worst))
    axes.barh(places, [100 * one.noise / total for one in worst], color="tab:red", label="rounded weight and input")
    axes.barh(places, [100 * one.input_noise / total for one in worst], color="tab:orange", label="rounded input alone")
    for place, one in enumerate(worst):
        axes.text(100 * one.noise / total, place, f" {one.sqnr_db:.1f} dB", va="center", fontsize=7)
    axes.set_yticks(places, [_label(one.name) for one in worst], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="worst layers: % of the output's noise; own SQNR")
    axes.legend(fontsize=7, loc="lower right")


def _blocks(axes: Any, measurement: Measurement) -> None:
    rows: dict[str, list[float]] = {}
    for layer in measurement.layers:
        sums = rows.setdefault(_label(split_name(layer.name)[0]), [0.0] * len(layer.noise_by_step))
        for step, noise in enumerate(layer.noise_by_step):
            sums[step] += noise
    values = [[decibels(1, noise) for noise in row] for row in rows.values()]
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="RdYlBu",
        vmin=HIGHEST - 25,
        vmax=HIGHEST + 10,
        interpolation="nearest",
        extent=(0.5, len(values[0]) + 0.5, len(values) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set(title="SQNR of the output by each block's noise alone (dB)", xlabel="step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, extend="both").set_label("dB")


def _outliers(axes: Any, measurement: Measurement) -> None:
    from matplotlib.ticker import LogLocator

    def points(one: LayerMeasurement) -> tuple[float, float]:
        return fmean(one.channel_ratio), fmean(one.pixel_ratio)

    shown = [one for one in measurement.layers if one.axis in _AXES]
    if not shown:
        return
    highest = max(fmean(one.kurtosis) for one in shown)
    colours, counts = None, []
    for axis, marker in _AXES.items():
        chosen = [one for one in shown if one.axis == axis]
        counts.append(f"{axis} {len(chosen)}")
        if chosen:
            x, y = zip(*map(points, chosen), strict=True)
            colours = axes.scatter(
                x, y, c=[fmean(one.kurtosis) for one in chosen], norm="log", marker=marker, s=18, cmap="viridis"
            )
            colours.set_clim(2, max(highest, 10))
    for one in sorted(shown, key=lambda one: -max(points(one)))[:4]:
        axes.annotate(_label(one.name), points(one), fontsize=6, ha="right", xytext=(-5, 4), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="largest over median channel",
        ylabel="over median pixel",
        title=f"outliers of the inputs; published axis: {', '.join(counts)}",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.margins(0.1)
    axes.figure.colorbar(colours, ax=axes).set_label("kurtosis (normal: 3)")


def _steps(axes: Any, measurement: Measurement) -> None:
    steps = range(1, len(measurement.timesteps) + 1)
    axes.plot(steps, measurement.output_sqnr_db_by_step, "k", linewidth=2, label="output")
    for cross, style, label in ((False, "--", "log attention, self"), (True, "-", "log attention, cross")):
        curves = [one.sqnr_db_by_step for one in measurement.attention if one.cross == cross and one.sqnr_db_by_step]
        for i, curve in enumerate(curves):
            colour = "tab:blue" if cross else "tab:green"
            axes.plot(steps, curve, style, color=colour, linewidth=0.8, label="" if i else label)
    axes.set(title="output SQNR of the network and of quantized attention alone (dB)", xlabel="step")
    axes.set_ylim(bottom=min(0.0, *measurement.output_sqnr_db_by_step))
    axes.legend(fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _start_token(axes: Any, measurement: Measurement) -> None:
    steps = range(1, len(measurement.timesteps) + 1)
    cross = [one for one in measurement.attention if one.cross]
    for i, one in enumerate(cross):
        axes.plot(steps, one.start_mass, label=_label(one.name) if len(cross) <= 16 else "", color=f"C{i % 10}")
    axes.set(title="probability of the start token in cross-attention", xlabel="step", ylim=(0, 1))
    axes.legend(fontsize=6, ncols=2) if 0 < len(cross) <= 16 else None
    axes.xaxis.get_major_locator().set_params(integer=True)
