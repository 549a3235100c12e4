"""The page of `dgq inspect --html`: the heat map and what stands behind it, in one file that fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import DgqError
from ..outputs import write_page
from .inspect import Inspection, LayerReport, short_block, split_name
from .measurement import LayerMeasurement, decibels
from .plot import HIGHEST, LOWEST


def write(found: Inspection, file: Path, summary: Sequence[tuple[str, str]]) -> None:
    """Write a measured checkpoint as one HTML file.

    Args:
        found: with a measurement.
        file: replaced where it is there.
        summary: (name, value) of what is told of the checkpoint.

    Raises:
        DgqError: it was not measured, or the file cannot be written.
    """
    measurement = found.measurement
    if measurement is None:
        raise DgqError(f"{found.path}: was not measured", "there is nothing to draw")
    reports = {report.name: report for report in found.layers}
    settings, total = measurement.settings, measurement.noise or 1.0
    suggestion = found.suggestion
    advice = None
    if suggestion is not None and suggestion.predicted_sqnr_db is not None:
        after = f"{decibels(1, measurement.noise):.1f} to {suggestion.predicted_sqnr_db:.1f} dB"
        advice = {
            "text": f"Overrides that help most, the output's SQNR predicted to go from {after}:",
            "command": f"dgq calibrate ... {suggestion.command_line}",
        }
    data = {
        "title": f"Layers of {Path(found.path).name}, {found.label}",
        "about": f"{found.network} output {measurement.output_sqnr_db:.1f} dB over all steps, measured against "
        f"{measurement.against} in float32 (prompts: {len(measurement.prompts)}, steps: {settings['steps']}, "
        f"guidance: {settings['guidance']:g}); the file is {found.ratio:.0%} of float16.",
        "advice": advice,
        "network": found.network,
        "low": LOWEST,
        "high": HIGHEST,
        "noise": measurement.noise,
        "output": [round(value, 2) for value in measurement.output_sqnr_db_by_step],
        "layers": [_layer(one, reports[one.name]) for one in measurement.layers],
        "attention": [
            [
                one.name,
                f"{one.noise / total:.1%}",
                "float" if one.sqnr_db is None else f"{one.sqnr_db:.1f}",
                *(f"{one.start_mass[place]:.2f}" if one.start_mass else "-" for place in (0, -1)),
            ]
            for one in measurement.attention
        ],
        "summary": summary,
    }
    write_page(file, Path(__file__).with_name("page.html"), data)


def _layer(one: LayerMeasurement, report: LayerReport) -> dict[str, Any]:
    def facts(values: Sequence[float], form: str) -> str:
        return f"{fmean(values):{form}}"

    block, place = split_name(one.name)
    return {
        "name": one.name,
        "label": f"{short_block(block)} {place.removeprefix('transformer_blocks.')}".rstrip(),
        "block": short_block(block),
        "sqnr": [round(value, 2) for value in one.sqnr_db_by_step],
        "noise": one.noise_by_step,
        "all": one.sqnr_db,
        "share": one.noise,
        "facts": {
            "with its input alone rounded": f"{one.input_sqnr_db:.1f} dB",
            "bits": f"W{report.wbits}A{report.abits}",
            "kind": f"{report.kind} {'x'.join(map(str, report.shape))}",
            "channels": report.channels,
            "KiB": f"{report.bytes / 1024:.1f}",
            "input's kurtosis": facts(one.kurtosis, ".0f"),
            "largest over median channel": facts(one.channel_ratio, ".1f"),
            "pixel": facts(one.pixel_ratio, ".1f"),
            "published axis": one.axis,
        },
    }
