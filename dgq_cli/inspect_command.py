"""dgq inspect: what is in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import JsonOption, err, mib, print_json

if TYPE_CHECKING:
    from dgq.inspection import Inspection, LayerReport


def command(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CKPT]", help="Checkpoint folder or hub id; the embedded model if none.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every quantized layer.")] = False,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="List the N layers with the lowest SQNR.")] = 10,
    budget: Annotated[
        float, typer.Option(min=0, max=100, metavar="PERCENT", help="Growth of the UNet file the suggestion may cause.")
    ] = 2,
    json: JsonOption = False,
) -> None:
    """Print a checkpoint's recipe, sizes and per-layer errors, and suggest where more bits would help."""
    from dgq.inspection import inspect

    found = inspect(checkpoint, worst, budget / 100)
    if json:
        print_json(found.to_dict())
        return
    if not found.quantized:
        typer.echo(f"{found.path} is a float model: nothing in it is quantized")
        typer.echo(f"UNet {mib(found.unet_bytes)} on disk, {mib(found.float16_bytes)} in float16")
        err.print(f"quantize it: dgq calibrate {found.path} --out DIR", markup=False, soft_wrap=True)
        return
    for name, value in _summary(found):
        typer.echo(f"{name:<18}{value}")
    if layers:
        _print_layers(f"{len(found.layers)} quantized layers", found.layers)
    if found.worst:
        _print_layers(f"worst {len(found.worst)} layers by output SQNR", found.worst)
    elif worst:
        err.print("no per-layer error was recorded: the paper recipe measures none")
    if found.suggestion:
        extra = found.suggestion.extra_bytes
        growth = f"{mib(extra)}, {extra / found.unet_bytes:.1%}"
        typer.echo(f"\n8-bit weights for the worst layers that fit (UNet grows by {growth}):")
        typer.echo(f"dgq calibrate ... {found.suggestion.command_line}")


def _summary(found: Inspection) -> list[tuple[str, str]]:
    calibration = dict(found.calibration)
    fidelity = calibration.pop("fidelity", None)
    overrides = ", ".join(f"{pattern}={bits}" for pattern, bits in found.recipe["overrides"])
    attention = "float"
    if found.attention:
        attention = f"log2, {found.attention['bits']} bits, {2 ** found.attention['fraction_bits']} steps per octave"
    elif found.recipe["name"] == "paper":
        attention = f"log2, {found.recipe['abits']} bits, whole octaves (simulated)"
    rows = [
        ("checkpoint", found.path),
        ("recipe", found.label),
        ("rounding", found.recipe["rounding"] if found.recipe["name"] == "integer" else "nearest"),
        ("base model", found.base_model or "unknown"),
        ("dgq", found.dgq_version or "unknown"),
        ("UNet file", f"{mib(found.unet_bytes)}, {found.ratio:.1%} of float16 ({mib(found.float16_bytes)})"),
        ("bits per weight", f"{found.bits_per_weight:.2f} with scales and biases"),
        ("kept float", mib(found.float_bytes)),
        ("layers", str(len(found.layers))),
        ("channels", ", ".join(f"{mode} {count}" for mode, count in sorted(found.channel_modes.items()))),
        ("attention", attention),
        ("generation", ", ".join(f"{key} {value}" for key, value in found.generation.items()) or "defaults"),
        ("calibration", ", ".join(f"{key} {value}" for key, value in calibration.items()) or "not recorded"),
    ]
    if overrides:
        rows.append(("overrides", overrides))
    if fidelity:
        text = f"PSNR {fidelity['psnr_db']:.1f} dB, latent SQNR {fidelity['latent_sqnr_db']:.1f} dB"
        rows.append(("against float", f"{text}, {fidelity['prompts']} prompts"))
    return rows


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
