"""A page to look at: float and quantized pictures over each other, worst first, in one file that fetches nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import outputs
from ..checkpoint.reading import read_json
from ..errors import DgqError
from ..pictures.fidelity import spread
from ..pictures.generation import Picture
from .evaluate import HIGHER_IS_BETTER, Kept

LOSSLESS = 256  # pixels of a side up to which pictures are stored as they are
QUALITY = 90  # of WebP above that
BENCH = {
    "system": "this machine",
    "case": "",
    "p50_ms": "ms",
    "ratio_to_float32": "of float32's time",
    "peak_rss_mib": "peak MiB",
    "weights_mib": "weights, MiB",
    "disk_mib": "on disk, MiB",
}


def write_page(file: Path, kept: Kept, bench: Mapping[str, Any] | None = None) -> None:
    """Write the pictures and values of evaluations as one HTML file.

    Args:
        file: replaced where it is there.
        kept: evaluations with the same prompts and seeds, one at least.
        bench: of `read_bench`, for a table of this machine.

    Raises:
        DgqError: the evaluations are of other float models or settings; it cannot be written.
    """
    reports = [report for report, _, _ in kept.systems]
    for key in ("against", "settings"):
        if any(report[key] != reports[0][key] for report in reports):
            raise DgqError(f"{file}: the checkpoints differ in their {key}", "put those on a page that have them alike")
    report, floats, pictures = kept.systems[0]
    side = max(pictures[0].image.size)
    settings = report["settings"]
    stored = "" if side <= LOSSLESS else f"; pictures are stored as WebP of quality {QUALITY}"
    data = {
        "title": "Pictures of " + "; ".join(dict.fromkeys(map(_name, reports))),
        "about": f"{report['prompts']} prompts, {report['seeds']} each, {settings['steps']} steps, guidance "
        f"{settings['guidance']:g}, seeds from {settings['seed']}"
        + (f", beside {report['against']} in float32 of equal seeds" if floats else "")
        + f"; dgq {report['dgq']}, torch {report['torch']}{stored}.",
        "small": side <= LOSSLESS,
        "floats": _stored(floats) if floats else None,
        "systems": [
            {"name": _name(one), "items": one["items"], "images": _stored(mine)} for one, _, mine in kept.systems
        ],
        "head": ["checkpoint", *_summary(report), "MiB", "SHA-256"],
        "rows": [
            [_name(one), *_summary(one).values(), f"{one['bytes'] / 2**20:.1f}", one["sha256"][:12]] for one in reports
        ],
        "bench": bench or {"head": [], "rows": []},
    }
    outputs.write_page(file, Path(__file__).with_name("page.html"), data)


def _name(report: Mapping[str, Any]) -> str:
    return f"{Path(report['model']).name}, {report['recipe']}"


def _stored(pictures: Sequence[Picture]) -> list[str]:
    """Pictures as `data:` addresses."""
    return [_address(picture.image) for picture in pictures]


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _summary(report: Mapping[str, Any]) -> dict[str, str]:
    """Title -> value over all pictures."""
    found: dict[str, str] = {}
    for metric, title, form in (("psnr_db", "PSNR, median (dB)", ".1f"), ("lpips", "LPIPS, median", ".4f")):
        values = [item[metric] for item in report["items"] if metric in item]
        if values:
            told = spread(values, metric in HIGHER_IS_BETTER)
            found[title] = f"{told['median']:{form}}"
            found["worst tenth" if metric == "psnr_db" else "LPIPS, worst tenth"] = f"{told['worst_tenth']:{form}}"
    if "fidelity" in report:
        found["SSIM"] = f"{report['fidelity']['ssim']['mean']:.4f}"
    for metric, title in (("top1", "concept (%)"), ("background", "background (%)")):
        accuracy = report.get("alignment", {}).get("checkpoint", {}).get("all", {}).get(metric)
        if accuracy:
            found[title] = f"{accuracy['mean']:.1f}"
    return found


def read_bench(file: Path) -> dict[str, Any]:
    """The rows that `dgq bench --json` printed into a file, as a table: head and rows, columns that hold anything.

    Raises:
        DgqError: it holds no such rows.
    """
    rows = read_json(file).get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "p50_ms" in row for row in rows):
        raise DgqError(f"{file}: holds no rows of a benchmark", "dgq bench --json > FILE makes such a file")
    columns = [name for name in BENCH if any(row.get(name) is not None for row in rows)]

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    return {"head": [BENCH[name] for name in columns], "rows": [[cell(row.get(n)) for n in columns] for row in rows]}
