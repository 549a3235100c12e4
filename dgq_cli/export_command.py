"""dgq export: a checkpoint for other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, StageProgress, err, mib, print_json
from .light_imports import light_imports


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint folder or hub id.")],
    to: Annotated[
        str, typer.Option("--to", metavar="comfy|diffusers", help="ComfyUI's int8 file, or a float16 folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="comfy: a .safetensors file; diffusers: a folder that is not there yet.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the checkpoint's files with their checksums first.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is at --out.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint as other programs load it.

    comfy: the UNet as ComfyUI's int8_tensorwise (ConvRot where a layer is rotated), its convolutions in float16.
    diffusers: every component in float16, which diffusers loads without dgq."""
    if to not in ("comfy", "diffusers"):
        raise typer.BadParameter(f"--to {to!r} is neither comfy nor diffusers")
    if to == "comfy" and out.suffix != ".safetensors":
        raise typer.BadParameter(f"--out {out} is not a .safetensors file")
    if to == "diffusers" and overwrite:
        raise typer.BadParameter("--overwrite replaces files: no folder is replaced")
    with light_imports():
        from dgq.export import comfy, folder
        from dgq.export.source import open_checkpoint

    source = open_checkpoint(checkpoint, verify)
    found: comfy.Exported | folder.Exported
    with StageProgress({"export": "export"}) as progress:
        if to == "comfy":
            found = comfy.export(source, out, overwrite, progress)
        else:
            found = folder.export(source, out, progress)
    if json:
        print_json(dataclasses.asdict(found))
        return
    err.print(out, end="", style="bold", soft_wrap=True)
    err.print(f"  {mib(found.bytes)}")
    if isinstance(found, comfy.Exported):
        err.print(f"Linear layers in int8, integers and scales unchanged: {len(found.exact)}")
        if found.rounded:
            worst = min(found.rounded, key=lambda name: found.rounded[name])
            least = f"SQNR of the weight {found.rounded[worst]:.1f} dB or more, least {worst}"
            err.print(f"Linear layers in int8, rounded again: {len(found.rounded)} ({least})", soft_wrap=True)
        err.print(f"quantized layers in float16, without a place in the format: {len(found.as_float)}")
    else:
        for name, count in found.layers.items():
            err.print(f"layers of {name} in float16: {count}")
