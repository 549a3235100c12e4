"""dgq eval: how good a checkpoint's pictures are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import DeviceOption, JsonOption, StageProgress, err, finite, print_json, prompt_count


def command(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CKPT]...", help="Checkpoints or float models; the embedded float model if left out."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="float|MODEL", help="Compare with: the float model it was made of, or another model."),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="N|everyday|FILE",
            help="Number of the model's prompts; everyday concepts; a file: lines, COCO .json or PartiPrompts .tsv.",
        ),
    ] = "200",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Pictures a prompt.")] = 1,
    floor: Annotated[
        int,
        typer.Option(min=0, max=1_000_000, help="Pictures also made by the float model in half precision; 0 for none."),
    ] = 16,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(callback=finite, help="Classifier-free guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first picture.")] = 40_000,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures a call of the network.")] = 8,
    reference: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Real pictures for the Frechet distance.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Inception weights (torch-fidelity's) for FID and IS.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(metavar="DIR", help="A CLIP model for the CLIP score.")] = None,
    lpips: Annotated[
        Path | None, typer.Option(metavar="WEIGHTS", help="AlexNet's weights for LPIPS: a file, or a folder of them.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write the first pictures, float above; replaces the file.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="HTML", help="Write a page to compare the pictures, in one file; replaces the file."),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="JSON", help="What `dgq bench --json` printed, for the page.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="JSON", help="Also write the report here; replaces the file.")
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Judge pictures: fidelity to the float model, alignment with the prompt, distribution.

    Several checkpoints are judged one after the other; JSON is a list of reports then. Under
    `accelerate launch -m dgq_cli eval ...` each process makes a share of the pictures."""
    paths = (
        ("--reference", reference, "folder"),
        ("--clip", clip, "folder"),
        ("--inception", inception, "file"),
        ("--lpips", lpips, "file or folder"),
    )
    for name, path, kind in paths:
        if path is not None and not (("folder" in kind and path.is_dir()) or ("file" in kind and path.is_file())):
            raise typer.BadParameter(f"{name} {path}: no such {kind}")
    if grid is not None and grid.suffix.lower() != ".png":
        raise typer.BadParameter(f"--grid {grid} is not a .png file")
    if grid is not None and checkpoints and len(checkpoints) > 1:
        raise typer.BadParameter("--grid shows one checkpoint; --html shows several")
    written = [os.path.realpath(file) for file in (grid, html, out) if file is not None]
    places = [file for file in written if os.path.isfile(file) or not os.path.exists(file)]  # but for devices
    if len(set(places)) < len(places):
        raise typer.BadParameter("two of --grid, --html and --out are one file")
    if bench is not None and html is None:
        raise typer.BadParameter("--bench is for the page: give --html too")
    prompt_count(prompts)
    from dgq.evaluation.evaluate import Kept, Options, compared, evaluate
    from dgq.evaluation.page import read_bench
    from dgq.outputs import check_output
    from dgq.pictures.generation import Settings

    measured = None if bench is None else read_bench(bench)
    for file in (grid, html, out):
        if file is not None:
            check_output(file)

    options = Options(
        prompts,
        seeds,
        floor,
        Settings(steps, guidance, seed=seed, batch=batch),
        device,
        reference,
        inception,
        clip,
        lpips,
        grid,
    )
    kept, reports = Kept(), []
    for named in checkpoints or ():
        compared(named, against)  # the last one's name is told as wrong before the first one is judged
    try:
        with StageProgress({"against": "float", "floor": "half", "checkpoint": "checkpoint"}) as progress:
            for checkpoint in checkpoints or (None,):
                report = evaluate(checkpoint, against, options, progress, kept)
                if report is not None:  # else another process tells
                    reports.append(report)
    finally:  # what ends one evaluation takes no earlier one away
        if reports:
            told = reports if len(checkpoints or ()) > 1 else reports[0]
            _write(told, kept, out, html, grid, measured, json)


def _write(
    told: list[dict[str, Any]] | dict[str, Any],
    kept: Any,
    out: Path | None,
    html: Path | None,
    grid: Path | None,
    measured: Any,
    json: bool,
) -> None:
    """Tell a report, or a list of them, in files and on stdout."""
    from dgq.evaluation.evaluate import write_report
    from dgq.evaluation.page import write_page

    try:
        if out is not None:
            write_report(out, told)
        if html is not None:
            write_page(html, kept, measured)
    finally:  # a disk that is full takes no measurement away
        if json:
            print_json(told)
        else:
            for number, report in enumerate(told if isinstance(told, list) else [told]):
                typer.echo("\n" if number else "", nl=False)
                _print(report)
            for file in (grid, html):
                if file is not None:
                    err.print(f"wrote {file}", soft_wrap=True)


def _interval(value: dict[str, float] | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def _rows(table: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        first, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join([first, *rest]).rstrip())


def _print(report: dict[str, Any]) -> None:
    settings = report["settings"]
    against = f" against {report['against']} in float32" if report["against"] else ""
    typer.echo(
        f"{report['model']} ({report['recipe']}){against}: {report['prompts']} prompts x {report['seeds']} seeds, "
        f"{settings['steps']} steps, guidance {settings['guidance']:g}, 95 % intervals in brackets"
    )
    if "fidelity" in report:
        floor = report.get("floor")
        titles = {
            "psnr_db": ("PSNR (dB)", ".2f"),
            "ssim": ("SSIM", ".4f"),
            "lpips": ("LPIPS", ".4f"),
            "latent_mse": ("latent MSE", ".2e"),
            "feature_distance": (f"feature distance ({report['fidelity'].get('feature_network', '')})", ".2e"),
        }
        head = ["fidelity", "checkpoint", "median", "worst tenth"]
        if floor:
            head.append(f"float32 against {floor['dtype']} ({floor['pictures']} pictures)")
        table = [head]
        for key, (title, form) in titles.items():
            if key in report["fidelity"]:
                value = report["fidelity"][key]
                row = [title, _interval(value, form), *(f"{value[name]:{form}}" for name in ("median", "worst_tenth"))]
                table.append([*row, _interval(floor[key], form)] if floor else row)
        typer.echo("")
        _rows(table)
    if "alignment" in report:
        typer.echo("")
        _rows(_alignment_table(report["alignment"]))
        typer.echo("the scorer knows emoji only: compare with its accuracy on real renders, never across models")
    if report["distribution"]:
        systems = ["checkpoint", "against"] if report["against"] else ["checkpoint"]
        table = [["distribution", *("float32" if name == "against" else name for name in systems)]]
        for name, values in report["distribution"].items():
            table.append([name, *(f"{values[s]:.4g}" if s in values else "-" for s in systems)])
        typer.echo("")
        _rows(table)
        typer.echo(f"distances of {report['pictures']} pictures: comparable at this number only")
    for note in report["notes"]:
        err.print(f"note: {note}", soft_wrap=True)


def _alignment_table(found: dict[str, Any]) -> list[list[str]]:
    metrics = {"top1": "concept top-1", "top5": "concept top-5", "style": "style", "background": "background"}
    table = [["emoji-domain alignment (%)", *metrics.values()]]

    def add(title: str, values: dict[str, Any]) -> None:
        cells = []
        for metric in metrics:
            value = values.get(metric)
            cells.append(f"{value:.1f}" if isinstance(value, float) else _interval(value, ".1f"))
        table.append([title, *cells])

    for part, title in (("all", ""), ("seen", ", seen pairs"), ("held_out", ", held-out pairs")):
        for system, name in (("checkpoint", "checkpoint"), ("against", "float32")):
            if system in found and found[system][part]["pictures"]:
                add(f"{name}{title}", found[system][part])
    if "difference" in found:
        add("checkpoint - float32 (points)", found["difference"])
    add("ceiling: real renders, held-out designs", found["renders_held_out"])
    add("real renders, designs the scorer saw", found["renders_seen"])
    add("floor: shuffled prompts", found["shuffled"])
    return table
