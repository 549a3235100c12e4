"""dgq bench: speed, memory and error on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import DeviceOption, JsonOption, ModelOption, StageProgress, err, finite, print_json
from .light_imports import light_imports

if TYPE_CHECKING:
    from dgq.bench import Report, Row

STAGES = {stage: stage for stage in ("kernels", "files", "load", "step", "picture")}
# of dgq.architectures.ARCHITECTURES
NAMES = (
    "sd-v1.4, sd-turbo, sdxl-turbo, sd3.5-medium, sd3.5-large, flux.1-dev, flux.1-schnell, flux.2-klein-4b, "
    "flux.2-klein-9b, pixart-alpha, pixart-sigma, z-image, qwen-image, sana-1.6b"
)
# in the order of dgq.bench.Row
COLUMNS = ("p20 ms", "p50 ms", "p80 ms", "x float32")


def command(
    model: ModelOption = None,
    arch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Instead, with random weights: {NAMES}, or a network's config.json."),
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure nothing: bounds of a step on GPUs, of what --arch takes."),
    ] = None,
    pixels: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of --arch, --predict and --what picture: the picture's height and width."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Weight bits, 4 or 8, where the model is a float model.")] = None,
    what: Annotated[
        str,
        typer.Option(help="kernels (single layers), step (whole calls), all of these; or picture, from prompt to PNG."),
    ] = "all",
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Of --what picture: sampler steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(callback=finite, help="Of --what picture: guidance scale; 1 or less for none.")
    ] = None,
    text_encoder: Annotated[
        str, typer.Option(help="Of --what picture, where the model is a float model: float or int8.")
    ] = "float",
    shapes: Annotated[str, typer.Option(help="Layers of the model, or also large ones of Stable Diffusion.")] = "model",
    repeats: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, metavar="N", help="Timed calls of each system; default 20, of pictures 3."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="LIST",
            help="Beside the step: openvino, torchao, sdnq (commas between) or all; beside pictures openvino.",
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile beside the step, on CUDA with max-autotune too; default with --arch.",
        ),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files of --arch here for a later run.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, metavar="N", help="CPU threads.")] = None,
    device: DeviceOption = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to a CSV file.")] = None,
    json: JsonOption = False,
) -> None:
    """Time quantized layers, steps or whole pictures beside float ones, in turns; says so where quantized is slower."""
    if predict is not None:
        measured = (model, arch, bits, steps, guidance, repeats, peers, compiled, work, threads, device, csv)
        if any(value is not None for value in measured) or (what, text_encoder, shapes) != ("all", "float", "model"):
            raise typer.BadParameter("--predict measures nothing: only --pixels and --json go with it")
        with light_imports():
            from dgq.bench.predict import predict_step, text, to_dict

        predictions = predict_step(predict, pixels=pixels)
        if json:
            print_json(to_dict(predictions))
        else:
            typer.echo(text(predictions, products=True))
        return
    drawn = what == "picture"
    if pixels is not None and arch is None and not drawn:
        raise typer.BadParameter("--pixels goes with --arch, --predict and --what picture")
    if not drawn and (steps is not None or guidance is not None or text_encoder != "float"):
        raise typer.BadParameter("--steps, --guidance and --text-encoder go with --what picture")
    _check("--bits", bits, (4, 8, None))
    _check("--text-encoder", text_encoder, ("float", "int8"))
    _check("--what", what, ("kernels", "step", "all", "picture"))
    _check("--shapes", shapes, ("model", "large"))
    if shapes == "large" and (arch is not None or what in ("step", "picture")):
        raise typer.BadParameter("--shapes is of single layers of a model: it goes with --what kernels and all")
    from dgq.bench import bench, chosen_peers
    from dgq.bench.rows import check_csv
    from dgq.errors import DgqError

    try:
        chosen_peers(peers)
    except DgqError as error:
        raise typer.BadParameter(f"--with {peers}: {error.message}") from None
    if csv is not None:
        check_csv(csv)
    with StageProgress(STAGES) as progress:
        report = bench(
            model,
            arch=arch,
            pixels=pixels,
            what=what,
            bits=bits,
            steps=steps,
            guidance=guidance,
            text_encoder=text_encoder == "int8",
            repeats=repeats,
            large=shapes == "large",
            peers=peers,
            compiled=compiled,
            work=work,
            threads=threads,
            device=device,
            progress=progress,
        )
    try:
        if csv is not None:
            report.append_csv(csv)
    finally:  # a disk that is full takes no measurement away
        if json:
            print_json(report.to_dict())
        else:
            _print(report)


def _check(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{option} {value} is not one of {', '.join(str(item) for item in allowed if item)}")


def _print(report: Report) -> None:
    machine = report.machine
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    typer.echo(f"{machine['cpu']}, {machine['isa']}, {threads}; device {machine['device']}, torch {machine['torch']}")
    typer.echo(f"{machine['backend']}: {machine['backend_reason']}")
    for table, extra in (
        ("kernels", ("GOPS", "of peak")),
        ("step", ("error", "weights MiB", "disk MiB", "peak RSS MiB")),
        ("picture", ("error", "weights MiB", "disk MiB", "peak RSS MiB")),
    ):
        rows = [row for row in report.rows if row.table == table]
        if rows:
            _print_table(rows, extra)
    _print_parts([row for row in report.rows if row.table == "part"])
    for note in report.notes:
        err.print(f"note: {note}", soft_wrap=True)


def _print_table(rows: list[Row], extra: tuple[str, ...]) -> None:
    """Aligned lines whatever the width of the terminal; "-" is what was not measured."""
    cases = max(len(row.case) for row in rows)
    systems = max(len(row.system) for row in rows)
    widths = [max(10, len(title)) for title in (*COLUMNS, *extra)]
    head = (f"{title:>{width}}" for title, width in zip((*COLUMNS, *extra), widths, strict=True))
    typer.echo(f"\n{'case':<{cases}}  {'system':<{systems}}" + "".join(f" {cell}" for cell in head))
    for row in rows:
        if row.table == "kernels":
            values = [_number(row.gops, 1), _number(row.peak_fraction, 2)]
        else:
            error = "-" if row.relative_error is None else f"{row.relative_error:.2e}"
            values = [error, _number(row.weights_mib, 1), _number(row.disk_mib, 1), _number(row.peak_rss_mib, 0)]
        times = [_number(value, 3) for value in (row.p20_ms, row.p50_ms, row.p80_ms)]
        cells = [*times, _number(row.ratio_to_float32, 2), *values]
        line = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        typer.echo(f"{row.case:<{cases}}  {row.system:<{systems}}{line}")


def _print_parts(rows: list[Row]) -> None:
    """A line for each system, with the median of each part of its pictures."""
    systems = list(dict.fromkeys(row.system for row in rows))
    if not systems:
        return
    width = max(map(len, systems))
    names = dict.fromkeys(row.case.rpartition(": ")[2] for row in rows)
    titles = [f"{name} ms" for name in names]
    typer.echo(f"\n{'system':<{width}}" + "".join(f" {title:>12}" for title in titles))
    for system in systems:
        cells = (f"{row.p50_ms:.1f}" for row in rows if row.system == system)
        typer.echo(f"{system:<{width}}" + "".join(f" {cell:>12}" for cell in cells))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
