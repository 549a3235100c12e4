"""dgq inspect: what is in a checkpoint, and what it does to each layer."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from . import heat_map
from .common import DeviceOption, JsonOption, StageProgress, err, finite, mib, print_json
from .light_imports import light_imports

if TYPE_CHECKING:
    from dgq.inspection.inspect import Inspection, LayerReport, PartReport
    from dgq.inspection.measurement import LayerMeasurement, Measurement
    from dgq.inspection.overrides import Suggestion

LABEL_WIDTH = 20


def command(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT|FILE]",
            help="Checkpoint folder or hub id, or a file of dgq tune; the embedded model if none.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False,
    worst: Annotated[int, typer.Option(min=0, max=1_000_000, metavar="N", help="List the N worst layers.")] = 10,
    budget: Annotated[
        float,
        typer.Option(
            min=0, max=100, callback=finite, metavar="PERCENT", help="Growth of the file the suggestion may cause."
        ),
    ] = 2,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run it beside the float model: error and outliers by layer and step.")
    ] = False,
    against: Annotated[
        str, typer.Option(metavar="float|MODEL", help="Measure against the model it was made of, or another.")
    ] = "float",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file, and compare it with its checksum.")
    ] = False,
    prompts: Annotated[
        int, typer.Option(min=1, max=1000, help="Measured prompts; calibration draws none of them.")
    ] = 4,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Measured sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(callback=finite, help="Guidance scale while measuring.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first measured picture.")] = 50_000,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure, and draw it all; replaces the file.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure, and write it as a page to look at, in one file; replaces the file."
        ),
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Print a checkpoint's recipe, sizes and per-layer errors, and suggest where more bits would help.

    By itself it reads headers alone; --verify reads every file, and --measure runs the float model's pictures
    through every layer."""
    if png is not None and png.suffix.lower() != ".png":
        raise typer.BadParameter(f"--png {png} is not a .png file")
    measure = measure or png is not None or html is not None
    if png is not None and png == html:
        raise typer.BadParameter(f"--png and --html are one file, {png}")
    measuring = {
        "--against": against != "float",
        "--prompts": prompts != 4,
        "--steps": steps is not None,
        "--guidance": guidance is not None,
        "--seed": seed != 50_000,
        "--device": device is not None,
    }
    if not measure and any(measuring.values()):
        told = next(option for option, asked in measuring.items() if asked)
        raise typer.BadParameter(f"{told} needs --measure")
    if checkpoint is not None and Path(checkpoint).is_file():
        if measure or verify:
            raise typer.BadParameter(
                f"{checkpoint} is a file: --measure, --verify, --png and --html are of checkpoints"
            )
        _tuned(Path(checkpoint), json)
        return
    with light_imports():
        from dgq.devices import check_device
        from dgq.inspection.inspect import inspect

    check_device(device)
    measurement = None
    if measure:
        from dgq.inspection.measure import MeasureOptions, measure_checkpoint
        from dgq.outputs import check_output

        if png is not None:
            from dgq.inspection.plot import check_available

            check_available()
        for file in (png, html):
            if file is not None:
                check_output(file)
        options = MeasureOptions(prompts, steps, guidance, seed, device, against)
        # what is wrong with the checkpoint comes before the work
        inspect(checkpoint, worst, budget / 100, verify=verify)
        with StageProgress({"record": "float", "measure": "measure"}) as progress:
            measurement = measure_checkpoint(checkpoint, options, progress)
    found = inspect(checkpoint, worst, budget / 100, measurement, verify)
    if png is not None:
        from dgq.inspection.plot import draw

        draw(found, png)
    if html is not None:
        from dgq.inspection import page

        page.write(found, html, _summary(found))
    if json:
        print_json(found.to_dict())
    elif not found.quantized:
        typer.echo(f"{found.path} is a float model: nothing in it is quantized")
        typer.echo(f"{found.network} {mib(found.unet_bytes)} on disk, {mib(found.float16_bytes)} in float16")
        err.print(f"quantize it: dgq calibrate {found.path} --out DIR", soft_wrap=True)
    else:
        _print(found, layers, worst)
    for file in (png, html):
        if file is not None:
            err.print(f"wrote {file}", soft_wrap=True)


def _tuned(file: Path, json: bool) -> None:
    """What is in a file of `dgq tune`."""
    import dataclasses

    with light_imports():
        from dgq.tuning.file import describe

    about, shapes = describe(file)
    size = file.stat().st_size
    values = sum(shape[1] for shape in shapes.values())
    if json:
        print_json({"file": str(file), "bytes": size, "values": values, **dataclasses.asdict(about)})
        return
    rows = [
        ("tuned scales", str(file)),
        ("of checkpoint", f"{about.base.name}, {about.base.recipe}, content {about.base.content[:12]}"),
        ("dgq", about.dgq_version),
        ("file", mib(size)),
        ("experts", f"{about.experts} of {about.timesteps} timesteps, {values:,} scales each"),
        ("scales", "output and input" if about.input_scales else "output"),
        ("steps", str(about.steps)),
        ("options", ", ".join(f"{key} {value}" for key, value in about.options.items() if value not in (None, []))),
    ]
    for subject in about.subjects:
        kept = f"; {subject.class_pictures} of {subject.class_prompt!r}" if subject.class_prompt else ""
        rows.append(("subject", f"{subject.prompt!r}, {subject.pictures} pictures{kept}"))
    for name, value in rows:
        typer.echo(f"{name:<18}{value}")


def _print(found: Inspection, layers: bool, worst: int) -> None:
    for name, value in _summary(found):
        typer.echo(f"{name:<18}{value}")
    if layers:
        _print_layers(f"{len(found.layers)} quantized layers", found.layers)
        if found.decoder:
            _print_layers(f"{len(found.decoder.layers)} quantized layers of the VAE", found.decoder.layers)
        for name, part in found.encoders.items():
            _print_layers(f"{len(part.layers)} quantized layers of the {name}", part.layers)
    if found.measurement:
        _print_measurement(found.measurement, layers, found.network)
        _print_worst(found.measurement, found.worst, found.network)
    elif found.worst:
        _print_layers(f"worst {len(found.worst)} layers by output SQNR", found.worst)
    elif worst:
        err.print(f"no per-layer error was recorded: the {found.recipe['name']} recipe measures none; --measure does")
    if found.suggestion:
        _print_suggestion(found.suggestion, found)


def _print_suggestion(suggestion: Suggestion, found: Inspection) -> None:
    def share(size: int) -> str:
        return f"{size / 1024:.0f} KiB ({size / found.unet_bytes:.1%})"

    measurement = found.measurement
    what = "overrides that help most" if measurement else "8-bit weights for the worst layers"
    sizes = f"+{share(suggestion.extra_bytes)} of a budget of {share(suggestion.budget_bytes)}"
    typer.echo(f"\n{what}, {sizes}:")
    typer.echo(f"dgq calibrate ... {suggestion.command_line}")
    if suggestion.predicted_sqnr_db is not None and measurement:
        typer.echo(
            f"predicted: SQNR of the {found.network}'s output "
            f"{_added(measurement):.1f} -> {suggestion.predicted_sqnr_db:.1f} dB"
        )


def _added(measurement: Measurement) -> float:
    from dgq.inspection.measurement import decibels

    return decibels(1, measurement.noise)


def _print_measurement(measurement: Measurement, every_layer: bool, network: str) -> None:
    """The heat map, a line a block or a layer, and the attention layers."""
    from dgq.inspection.inspect import short_block, split_name

    console = Console(highlight=False)
    shown = heat_map.columns(len(measurement.timesteps), console.width - LABEL_WIDTH)
    blocks: dict[str, list[LayerMeasurement]] = {}
    for layer in measurement.layers:
        blocks.setdefault(split_name(layer.name)[0], []).append(layer)
    settings = measurement.settings
    typer.echo(
        f"\nmeasured against {measurement.against} in float32 (prompts: {len(measurement.prompts)}, "
        f"steps: {settings['steps']}, guidance: {settings['guidance']:g})"
    )
    typer.echo("output SQNR in dB" if every_layer else "output SQNR in dB, the lowest of a block's layers")
    console.print(heat_map.head(LABEL_WIDTH, shown), no_wrap=True, crop=False)
    for block, layers in blocks.items():
        if every_layer:
            typer.echo(block)
            for layer in layers:
                label = "  " + split_name(layer.name)[1].removeprefix("transformer_blocks.")
                line = heat_map.row(label, layer.sqnr_db_by_step, LABEL_WIDTH, shown)
                console.print(line, no_wrap=True, crop=False)
            continue
        lowest = [min(values) for values in zip(*(layer.sqnr_db_by_step for layer in layers), strict=True)]
        console.print(heat_map.row(short_block(block), lowest, LABEL_WIDTH, shown), no_wrap=True, crop=False)
    output = measurement.output_sqnr_db_by_step
    console.print(heat_map.row(f"{network} output", output, LABEL_WIDTH, shown), no_wrap=True, crop=False)
    inputs = sum(layer.input_noise for layer in measurement.layers) / (measurement.noise or 1.0)
    typer.echo(
        f"{network} output over all steps {measurement.output_sqnr_db:.1f} dB; the layers' noise adds up to "
        f"{_added(measurement):.1f} dB,\n{inputs:.0%} of it from rounded inputs, which finer weights leave"
    )
    typer.echo(f"\nattention: part of the {network} output's noise, own output SQNR (dB), and")
    typer.echo("the start token's probability at the first and the last step")
    typer.echo(f"{'noise':>5}  {'SQNR':>5}  {'start token':<12}  layer")
    total = measurement.noise or 1.0
    lines = []
    for one in measurement.attention:
        sqnr = "float" if one.sqnr_db is None else f"{one.sqnr_db:.1f}"
        mass = f"{one.start_mass[0]:.2f} .. {one.start_mass[-1]:.2f}" if one.start_mass else "-"
        lines.append((f"{one.noise / total:>5.1%}  {sqnr:>5}  {mass:<12}  ", one.name))
    _print_named(lines)


def _print_worst(measurement: Measurement, reports: list[LayerReport], network: str) -> None:
    """The layers that cause most of the network's output noise."""
    by_name = {layer.name: layer for layer in measurement.layers}
    total = measurement.noise or 1.0
    together = sum(by_name[report.name].noise for report in reports) / total
    typer.echo(f"\nworst {len(reports)} layers by their part of the {network}'s output noise ({together:.0%} together)")
    typer.echo("SQNR: of its output (dB); input: with its input alone rounded; kurt: kurtosis")
    typer.echo("of the input; chan, pix: largest channel or pixel over the median; axis: that")
    typer.echo("the published method groups; mode: how the checkpoint handles channels")
    typer.echo("noise  SQNR input  kurt chan  pix axis mode    layer")
    lines = []
    for report in reports:
        one = by_name[report.name]
        mode = f"shift{max(one.exponents)}" if one.exponents else report.channels
        line = (
            f"{one.noise / total:>5.1%}  {one.sqnr_db:>4.1f} {one.input_sqnr_db:>5.1f}  {fmean(one.kurtosis):>4.0f} "
            f"{fmean(one.channel_ratio):>4.1f} {fmean(one.pixel_ratio):>4.1f} {one.axis[:4]} {mode:<6}  "
        )
        lines.append((line, one.name))
    _print_named(lines)


def _print_named(lines: list[tuple[str, str]]) -> None:
    """Lines that end with a layer's name, shortened in all of them where one would not fit the terminal."""
    from dgq.inspection.inspect import short_block, split_name

    whole = all(len(line) + len(name) <= Console().width for line, name in lines)
    for line, name in lines:
        block, place = split_name(name)
        short = f"{short_block(block)} {place.removeprefix('transformer_blocks.')}".rstrip()
        typer.echo(line + (name if whole else short))


def _summary(found: Inspection) -> list[tuple[str, str]]:
    calibration = dict(found.calibration)
    fidelity = calibration.pop("fidelity", None)
    overrides = ", ".join(f"{pattern}={bits}" for pattern, bits in found.recipe["overrides"])
    size = mib(found.unet_bytes)
    state = ", every one as it was written" if found.verified else "; --verify compares them"
    rows = [
        ("checkpoint", found.path),
        ("recipe", found.label),
        ("rounding", found.words["rounding"]),
        ("base model", found.base_model or "unknown"),
        ("dgq", found.dgq_version or "unknown"),
        ("checksums", f"of {found.checksums} files{state}" if found.checksums else "none (written by an older dgq)"),
        (f"{found.network} file", f"{size}, {found.ratio:.1%} of float16 ({mib(found.float16_bytes)})"),
        ("bits per weight", f"{found.bits_per_weight:.2f} with scales and biases"),
        ("kept float", mib(found.float_bytes)),
        ("layers", str(len(found.layers))),
        ("channels", ", ".join(f"{mode} {count}" for mode, count in sorted(found.channel_modes.items()))),
        ("attention", found.words["attention"]),
        ("generation", ", ".join(f"{key} {value}" for key, value in found.generation.items()) or "defaults"),
        ("calibration", ", ".join(f"{key} {value}" for key, value in calibration.items()) or "not recorded"),
    ]
    if found.decoder:
        alone = found.decoder.calibration.get("fidelity")
        told = f", PSNR of the decoder alone {alone['psnr_db']:.1f} dB" if alone else ""
        rows.append(("VAE", _told(found.decoder) + told))
    for name, part in found.encoders.items():
        error = part.calibration.get("embeddings_error")
        rows.append((name, _told(part) + (f", embeddings {error:.2%} off" if error is not None else "")))
    if overrides:
        rows.append(("overrides", overrides))
    if fidelity:
        text = f"PSNR {fidelity['psnr_db']:.1f} dB, latent SQNR {fidelity['latent_sqnr_db']:.1f} dB"
        rows.append(("against float", f"{text}, {fidelity['prompts']} prompts"))
    return rows


def _told(part: PartReport) -> str:
    """Of a component beside the network: what it is, and its size."""
    size = f"{mib(part.bytes)}, {part.bytes / part.float16_bytes:.1%} of float16"
    return f"{part.label}, {len(part.layers)} layers, {size}"


def _print_layers(title: str, layers: list[LayerReport]) -> None:
    """One line a layer whatever the width of the terminal: names are long and a script may cut columns."""
    typer.echo(f"\n{title}")
    typer.echo(f"{'SQNR dB':>8}  {'bits':<5} {'kind':<10} {'shape':<16} {'bytes':>12}  {'channels':<12} layer")
    for layer in layers:
        error = "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
        bits = f"W{layer.wbits}A{layer.abits}" if layer.wbits else f"A{layer.abits}"
        shape = "x".join(map(str, layer.shape)) or "-"
        typer.echo(
            f"{error:>8}  {bits:<5} {layer.kind:<10} {shape:<16} {layer.bytes:>12,}  {layer.channels:<12} {layer.name}"
        )
