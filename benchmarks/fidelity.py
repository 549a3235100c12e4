"""How close quantized pictures are to the float model's: the table and the picture grid of the README.

    python benchmarks/fidelity.py --work DIR [--model MODEL] [--grid FILE] [--out PREFIX] [--resume]
    python benchmarks/fidelity.py --work DIR --only "G=1 " --floor-prompts 0 --out PREFIX    # some rows again

Calibrates each configuration once into DIR (kept, and used again while the float model and the settings stay the
same), makes the same pictures with every system from the same seeds, and compares them with float32's. The prompts are
none of the calibration prompts. Pictures are made in batches: every scale belongs to one row, one sample or one
sampler step, so a batch changes results only as float rounding does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tables import fidelity_table

import dgq
from dgq.calibration.run import Options, calibrate, count_prompts, recording_settings
from dgq.checkpoint.reading import float16_bytes, network_bytes, network_config, read_header, read_json
from dgq.errors import DgqError
from dgq.pictures import embedded
from dgq.pictures.fidelity import compare
from dgq.pictures.generation import Picture, Settings, generate, grid, write_png
from dgq.pictures.pipelines import described, load, resolve
from dgq.pictures.prompts import calibration_prompts, evaluation_prompts
from dgq.recipe import Recipe

BITS = ((8, 8), (4, 8), (4, 6), (4, 4))
GROUPS = (1, 8, 16)
BUDGET = 4.6
FIRST_SEED = 20_000
GRID_ROWS = ("float32", "integer W8A8", "integer W4A8", "integer W4A6")
GRID_PROMPTS = 6
LABEL_WIDTH, LABEL_SIZE = 190, 24


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One quantized row of the table: a recipe, and the bits a weight that it may spend (`dgq calibrate --budget`)."""

    recipe: Recipe
    bits: float | None = None

    @property
    def label(self) -> str:
        """Its name in the table."""
        per_tensor = " (per tensor)" if self.recipe.name == "paper" and self.recipe.groups == 1 else ""
        return self.recipe.label + per_tensor + ("" if self.bits is None else f", {self.bits:g} bits")


def configurations(iterations: int | None = None) -> list[Quantized]:
    """At each bit width: the published method per tensor and in groups, rounded to nearest, and with its learned
    rounding too where there are iterations; ConvRot, every layer rotated and rounded to nearest (ConvRot with a search
    of ranges), and the integer recipe, at W4 with more bits for some layers as well."""
    learned: dict[str, Any] = {"name": "paper", "rounding": "adaround", "iterations": iterations}
    found = []
    for wbits, abits in BITS:
        bits: dict[str, Any] = {"wbits": wbits, "abits": abits}
        recipes = (
            *(Recipe(name="paper", **bits, groups=groups) for groups in GROUPS),
            *(Recipe(**learned, **bits, groups=groups) for groups in GROUPS if iterations),
            Recipe(name="convrot", **bits),
            Recipe(**bits, channels="rotate", rounding="nearest"),
            Recipe(**bits),
        )
        found += [Quantized(recipe) for recipe in recipes]
        if wbits == 4:
            found.append(Quantized(Recipe(**bits), BUDGET))
    return found


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Progress:
    """Progress of a calibration: a line every half minute."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        if time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            say(f"{self.label}: {stage} {done}/{total}")


def checkpoint(model: Path, recipe: Recipe, work: Path, options: Options, name: str) -> Path:
    """The checkpoint of a recipe, made where `work` does not hold one of the same model, recipe and settings."""
    label = recipe.label if options.bits is None else f"{recipe.label} {options.bits:g} bits"
    folder = work / label.lower().replace(" ", "-").replace("=", "")
    prompts = len(calibration_prompts(model, count_prompts(options, recipe), options.seed))
    recorded = recording_settings(options, described(model), recipe).steps
    if folder.is_dir():
        try:
            header = read_header(folder)
        except DgqError:
            header = None
        weights = [max(file.stat().st_mtime for file in (place / "unet").iterdir()) for place in (model, folder)]
        if (
            header is not None
            and (header.recipe if options.bits is None else dataclasses.replace(header.recipe, overrides=())) == recipe
            and (header.base_model, header.dgq_version) == (name, dgq.__version__)
            and header.calibration.get("prompts", prompts) == prompts
            and header.calibration.get("steps") in (None, recorded)
            and header.generation == {"steps": options.steps, "guidance": options.guidance}
            and weights[0] < weights[1]
        ):
            say(f"{recipe.label}: {folder} is used again")
            return folder
    say(f"{label}: calibrating")
    started = time.process_time()
    calibrate(name if name == embedded.NAME else model, folder, recipe, options, Progress(label))
    say(f"{label}: calibrated in {time.process_time() - started:.0f} CPU s")
    return folder


def own_settings(model: Path, steps: int | None, guidance: float | None, batch: int) -> Settings:
    """How a float model draws. The embedded model's stress variant draws as that does: it is the same function, and a
    guidance of 7.5, which a folder without settings has, enlarges the noise that is to be compared."""
    stressed = network_config(model).get("_stress_variant", {}).get("model") == embedded.NAME
    own: dict[str, Any] = embedded.GENERATION if stressed else {}
    return Settings(
        own.get("steps") if steps is None else steps,
        own.get("guidance") if guidance is None else guidance,
        seed=FIRST_SEED,
        batch=batch,
    ).resolved(model)


def pictures(pipe: Any, prompts: Sequence[str], settings: Settings, label: str) -> list[Picture]:
    """One picture a prompt; seeds count up from the settings' seed."""
    started = time.monotonic()
    made = generate(pipe, prompts, settings)
    say(f"{label}: {len(made)} pictures in {time.monotonic() - started:.0f} s")
    return made


def labelled(rows: dict[str, list[Image.Image]], scale: int) -> Image.Image:
    """A sheet with one system a row, its name at the left."""
    columns = len(next(iter(rows.values())))
    sheet = grid([image for images in rows.values() for image in images], columns, scale)
    canvas = Image.new("RGB", (sheet.width + LABEL_WIDTH, sheet.height), "white")
    canvas.paste(sheet, (LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LABEL_SIZE)
    height = sheet.height / len(rows)
    for i, name in enumerate(rows):
        draw.text((6, int((i + 0.5) * height)), name, fill="black", font=font, anchor="lm")
    return canvas


def earlier_rows(file: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier report, to which those of a new one can be added.

    Raises:
        DgqError: it is of another model, or of other settings or prompts.
    """
    earlier = read_json(file)
    for key in ("model", "settings", "prompts", "calibration_prompts"):
        if earlier.get(key) != report[key]:
            raise DgqError(f"{file}: was measured with another {key}", "choose another --out, or leave out --only")
    rows: list[dict[str, Any]] = earlier["rows"]
    return rows


def merged(earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier rows, the new ones in their places, in the order of a whole run."""
    order = [row.label for row in configurations(1)]
    by_system = {row["system"]: row for row in (*earlier, *rows)}
    return sorted(by_system.values(), key=lambda row: order.index(row["system"]) if row["system"] in order else -1)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="float model: a folder or hub id; the embedded model if left out")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--prompts", type=int, default=64, help="evaluation prompts (default 64)")
    parser.add_argument(
        "--calibration-prompts",
        type=int,
        help="as dgq calibrate --prompts, whose default it is",
    )
    # a CPU without bfloat16 instructions emulates them, some thirty times slower than float32
    parser.add_argument(
        "--floor-prompts", type=int, default=4, help="prompts of the bfloat16 row, 0 for none (default 4)"
    )
    parser.add_argument("--steps", type=int, help="sampler steps; the model's own default if left out")
    parser.add_argument("--guidance", type=float, help="guidance scale; the model's own default if left out")
    parser.add_argument("--batch", type=int, default=8, help="pictures a UNet call (default 8)")
    parser.add_argument(
        "--only",
        nargs="+",
        help="only the systems whose label holds one of these texts, such as 'W4A8', in this order; --out keeps others",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="the published recipe's rounding learned too, as dgq calibrate --rounding adaround --iterations N",
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure what --out has no row of; rows are written as they come"
    )
    parser.add_argument("--out", type=Path, help="write PREFIX.md and PREFIX.json instead of printing them")
    parser.add_argument("--grid", type=Path, help="write a PNG: one system a row, the same seeds")
    parser.add_argument("--grid-prompts", nargs="+", help="prompts of the grid; some evaluation prompts if left out")
    parser.add_argument("--grid-scale", type=int, default=2, help="pixels per pixel in the grid (default 2)")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = options()
    model = resolve(args.model)
    name = embedded.NAME if model == embedded.FOLDER else str(model)
    if read_header(model) is not None:
        raise DgqError(f"{model}: is quantized already", "name the float model")
    settings = own_settings(model, args.steps, args.guidance, args.batch)
    prompts = evaluation_prompts(model, args.prompts)
    grid_prompts = list(args.grid_prompts or prompts[:GRID_PROMPTS]) if args.grid else []
    calibration = Options(
        prompts=args.calibration_prompts,
        steps=settings.steps,
        guidance=settings.guidance,
        evaluate=0,
        overwrite=True,
        vae="float",  # networks are compared
    )
    report: dict[str, Any] = {
        "model": model.name,
        "dgq": dgq.__version__,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
        "prompts": prompts,
        "calibration_prompts": args.calibration_prompts,
    }
    kept = args.out.with_suffix(".json") if (args.only or args.resume) and args.out else None
    earlier = earlier_rows(kept, report) if kept and kept.exists() else []
    measured = {row["system"] for row in earlier} if args.resume else set()
    chosen = [one for text in args.only or [""] for one in configurations(args.iterations) if text in one.recipe.label]
    chosen = [one for one in dict.fromkeys(chosen) if one.label not in measured]
    sheets: dict[str, list[Image.Image]] = {}

    def run(pipe: Any, label: str) -> list[Picture]:
        if grid_prompts and label in GRID_ROWS:
            sheets[label] = [picture.image for picture in pictures(pipe, grid_prompts, settings, f"{label}, grid")]
        return pictures(pipe, prompts, settings, label)

    reference = run(load(model, dtype=torch.float32), "float32")
    unquantized = {"unet_mib": float16_bytes(model) / 2**20, "of_float16": 1.0}
    rows: list[dict[str, Any]] = []

    def write() -> None:
        report["rows"] = merged(earlier, rows)
        if not args.out:
            return
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(fidelity_table(report["rows"]), encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    if few := min(args.floor_prompts, len(prompts)):
        lower = pictures(load(model, dtype=torch.bfloat16), prompts[:few], settings, "bfloat16")
        floor = compare(reference[:few], lower)
        rows.append({"system": f"bfloat16, unquantized ({few} prompts)", **floor, **unquantized})
    for one in chosen:
        own = dataclasses.replace(calibration, bits=one.bits)
        folder = checkpoint(model, one.recipe, args.work, own, name)
        found = compare(reference, run(load(folder, dtype=torch.float32), one.label))
        size = network_bytes(folder)
        rows.append(
            {
                "system": one.label,
                **found,
                **({} if one.bits is None else {"bits": one.bits}),
                "unet_mib": size / 2**20,
                "of_float16": size / float16_bytes(model),
                "calibration_prompts": count_prompts(own, one.recipe),
                "recipe": one.recipe.to_dict(),
            }
        )
        write()
    write()
    if args.grid:
        write_png(labelled(sheets, args.grid_scale), args.grid)
        say(f"wrote {args.grid}")
    if not args.out:
        print(f"{fidelity_table(report['rows'])}\n{json.dumps(report, indent=2)}")


if __name__ == "__main__":
    try:
        main()
    except DgqError as error:
        sys.exit(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
