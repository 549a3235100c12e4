"""dgq calibrate: a float model to a DGQ checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .adapters import imports, with_strength
from .common import JsonOption, StageProgress, duration, err, finite, going_on, mib, print_json, prompt_count

STAGES = {
    "prepare": "prepare",
    "resume": "resume",
    "prompts": "prompts",
    "record": "record",
    "statistics": "statistics",
    "quantize": "quantize",
    "learn": "learn",
    "calibrate": "calibrate",
    "measure": "measure",
    "compare": "compare",
    "save": "save",
}


DEFAULT_MEMORY = 4.0  # GiB
DEFAULT_CALLS = 160


def _override(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or bits not in ("4", "8", "float"):
        raise typer.BadParameter(f"{text!r} is not PATTERN=BITS, such as '*.ff.net.2=8' or 'mid_block.*=float'")
    return pattern, 0 if bits == "float" else int(bits)


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Diffusers folder, hub id or single .safetensors file; default: the embedded model."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")] = Path("dgq-checkpoint"),
    wbits: Annotated[int, typer.Option(help="Bits of weights: 4 or 8.")] = 4,
    abits: Annotated[int, typer.Option(help="Bits of activations: 4 to 8.")] = 8,
    recipe: Annotated[
        str,
        typer.Option(
            help="integer (int8 products), convrot (rotated, without calibration) or paper (published, simulated)."
        ),
    ] = "integer",
    groups: Annotated[
        int | None, typer.Option(help="Activation groups of the paper recipe: 1, 8 or 16 (the default).")
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="Weight rounding: gptq (the default) or nearest; paper recipe: nearest (the default) or adaround."
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="Gradient steps a block of --rounding adaround; default 500, published 20,000."
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(help="Channel outliers: auto (the default), none, smooth, shift, rotate (integer recipe)."),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention: log (the default) or float (integer recipe).")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="The VAE: int8 or float; default int8 but with the paper recipe.")
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="The text encoders: int8 or float.")] = "float",
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=BITS", help="Weight bits (4, 8, float) of matching layers; repeatable."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=4,
            max=9,
            metavar="BITS",
            callback=finite,
            help="Bits a weight with scales and biases: 8-bit weights where 4 harm most.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="For a single file: a diffusers folder with its configurations and tokenizer."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:STRENGTH]", help="LoRA fused before calibrating; repeatable."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="How many built-in calibration prompts (default 96, paper recipe 64), or a file: lines, COCO .json or "
            "PartiPrompts .tsv.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampler steps that pictures will have; default the model's.")
    ] = None,
    record_steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Sampler steps of calibration pictures; default 6, or --steps where fewer."),
    ] = None,
    guidance: Annotated[float | None, typer.Option(callback=finite, help="Guidance scale while calibrating.")] = None,
    size: Annotated[
        int | None, typer.Option(min=64, help="Height and width of the calibration pictures in pixels.")
    ] = None,
    calls: Annotated[int, typer.Option(min=1, max=1_000_000, help="Calls replayed for the statistics.")] = (
        DEFAULT_CALLS
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the calibration pictures.")] = 0,
    evaluate: Annotated[
        int, typer.Option(min=0, max=100_000, help="Prompts for the comparison with the float model.")
    ] = 4,
    memory: Annotated[
        float,
        typer.Option(min=0.1, max=2**20, callback=finite, help="GiB for statistics at a time; less means more passes."),
    ] = DEFAULT_MEMORY,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, memory and time.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is at --out.")] = False,
    json: JsonOption = False,
) -> None:
    """Quantize a text-to-image model and write a diffusers checkpoint with packed weights."""
    with imports(lora):
        from dgq.calibration.estimate import estimate
        from dgq.calibration.run import Options, calibrate
        from dgq.calibration.sources import check_sources, float_folder, is_single_file
        from dgq.checkpoint.reading import family_at, float16_bytes, network_bytes
        from dgq.checkpoint.writing import check_target
        from dgq.errors import DgqError
        from dgq.method import METHODS
        from dgq.pictures.prompts import read_prompts
        from dgq.recipe import Recipe

    if vae not in (None, "int8", "float"):
        raise typer.BadParameter(f"--vae {vae!r} is neither int8 nor float")
    if text_encoder not in ("int8", "float"):
        raise typer.BadParameter(f"--text-encoder {text_encoder!r} is neither int8 nor float")
    if budget is not None and (recipe != "integer" or wbits != 4):
        raise typer.BadParameter("--budget chooses among layers of 4 bits: it is of --recipe integer --wbits 4")
    overrides = tuple(_override(text) for text in override or [])
    options_given = {
        "rounding": rounding,
        "channels": channels,
        "attention": attention,
        "groups": groups,
        "iterations": iterations,
    }
    given = {option: value for option, value in options_given.items() if value is not None}
    try:
        wanted = Recipe(
            name=recipe,
            wbits=wbits,
            abits=abits,
            overrides=overrides,
            **given,  # type: ignore[arg-type]
        )
    except DgqError as error:
        raise typer.BadParameter(str(error)) from None
    for option, value in given.items():
        if why := METHODS[recipe].refusal(option, value):  # a default of the integer recipe, written out
            raise typer.BadParameter(why)
    if record_steps is not None and METHODS[recipe].by_step:
        raise typer.BadParameter(f"--record-steps: the {recipe} recipe records the steps of --steps")
    unread = {
        "--prompts": prompts is not None,
        "--record-steps": record_steps is not None,
        "--calls": calls != DEFAULT_CALLS,
        "--seed": seed != 0,
        "--memory": memory != DEFAULT_MEMORY,
    }
    if not METHODS[recipe].reads_calls and any(unread.values()):
        told = next(option for option, asked in unread.items() if asked)
        raise typer.BadParameter(f"{told}: the {recipe} recipe draws no calibration pictures")
    chosen = None if prompts is None else prompt_count(prompts) or read_prompts(Path(prompts))
    options = Options(
        prompts=chosen,
        steps=steps,
        record_steps=record_steps,
        guidance=guidance,
        size=size,
        seed=seed,
        calls=calls,
        evaluate=evaluate,
        bits=budget,
        budget=int(memory * 2**30),
        overwrite=overwrite,
        resume=resume,
        vae=vae,  # type: ignore[arg-type]
        text_encoder=text_encoder,  # type: ignore[arg-type]
    )
    loras = [with_strength(text) for text in lora or []]
    made = out.with_name(f"{out.name}-float") if loras or config or is_single_file(model) else None
    if dry_run:
        if made is not None:
            check_sources(model, config, loras)
        shape = str(config) if config and is_single_file(model) else model
        _print_estimate(estimate(shape, wanted, options), wanted.label, json)
        return
    try:
        with StageProgress(STAGES) as progress:
            if made is not None:
                check_target(out, made, overwrite)  # before the model is made
                model = str(float_folder(model, made, config, loras, progress))
            header = calibrate(model, out, wanted, options, progress)
    except KeyboardInterrupt:
        going_on.append("the same command with --resume goes on from here")
        raise
    fidelity = header.calibration.get("fidelity", {})
    before, after = float16_bytes(out), network_bytes(out)
    if json:
        print_json(
            {
                "checkpoint": str(out),
                "recipe": header.recipe.to_dict(),
                "unet_bytes": after,
                "unet_float16_bytes": before,
                "layers": len(header.method.layers(header)),
                "calibration": header.calibration,
            }
        )
        return
    err.print(out, end="", style="bold", soft_wrap=True)
    err.print(f"  {wanted.label}, {family_at(out).title} {mib(after)} ({after / before:.0%} of float16)")
    if finer := [pattern for pattern, _ in header.recipe.overrides[len(overrides) :]]:
        err.print(f"8 bits by the budget: {', '.join(finer)}", soft_wrap=True)
    if fidelity:
        err.print(f"against float: PSNR {fidelity['psnr_db']:.1f} dB, latent SQNR {fidelity['latent_sqnr_db']:.1f} dB")


def _print_estimate(estimate: object, label: str, json: bool) -> None:
    data = dataclasses.asdict(estimate)  # type: ignore[call-overload]
    if json:
        print_json(data)
        return
    kept, share = data["kept"], data["packed_bytes"] / data["float16_bytes"]
    added = data["budget_bytes"]

    def beside(part: str) -> str:
        size, before = data[f"{part}_packed_bytes"], data[f"{part}_float16_bytes"]
        layers = data[f"{part}_layers"]
        return f"{layers} layers, {mib(size)} ({size / before:.0%} of float16)" if layers else "float"

    rows = [
        ["recipe", label],
        ["layers quantized", str(data["layers"])],
        ["layers kept float", f"{len(kept)} ({', '.join(list(kept)[:4])}{', ...' if len(kept) > 4 else ''})"],
        *([] if added is None else [["budget", f"{mib(added)} for layers of 8 bits, chosen by measured noise"]]),
        [f"{data['network']} file", f"{mib(data['packed_bytes'])} ({share:.0%} of float16)"],
        ["VAE", beside("decoder")],
        ["text encoders", beside("encoder")],
        ["statistics", f"{mib(data['statistics_bytes'])} in {data['passes']} pass(es)"],
        ["peak memory, about", mib(data["memory_bytes"])],
        ["calls", str(data["calls"])],
        ["time, about", duration(data["seconds"])],
    ]
    for name, value in rows:
        typer.echo(f"{name:<20}{value}")
