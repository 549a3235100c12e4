"""dgq tune: teach a checkpoint a subject by its scales alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DeviceOption, JsonOption, StageProgress, err, finite, going_on, mib, print_json

STAGES = {
    "resume": "resume",
    "class": "class",
    "encode": "encode",
    "tune": "tune",
    "validate": "validate",
    "save": "save",
}


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="An integer checkpoint: its folder or hub id.")],
    images: Annotated[
        list[Path],
        typer.Option("--images", "-i", metavar="DIR", help="Pictures of a subject; again for each further one."),
    ],
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What they show: 'a photo of sks cat'; one for each --images.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The tuned scales, FILE.safetensors.")],
    steps: Annotated[int, typer.Option(min=1, max=10**6, help="Optimizer steps.")] = 400,
    learning_rate: Annotated[
        float, typer.Option(min=0, max=10, callback=finite, help="Of the scales' relative changes.")
    ] = 0.01,
    lr_scheduler: Annotated[
        str, typer.Option(help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.")
    ] = "constant",
    lr_warmup_steps: Annotated[int, typer.Option(min=0, max=10**6, help="Steps up to the full learning rate.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures a UNet call.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(min=1, max=1024, help="UNet calls a step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Much less memory, up to twice the time.")
    ] = False,
    mixed_precision: Annotated[
        str | None, typer.Option(metavar="bf16|no", help="Of activations; bf16 on CUDA if left out, no on the CPU.")
    ] = None,
    max_grad_norm: Annotated[
        float, typer.Option(min=1e-9, max=1e9, callback=finite, help="Clip gradients to this norm.")
    ] = 1.0,
    resolution: Annotated[
        int | None, typer.Option(min=8, max=4096, metavar="N", help="Pixels of a side; the model's own if left out.")
    ] = None,
    experts: Annotated[int, typer.Option(min=1, max=64, help="Sets of scales, each for a part of the timesteps.")] = 2,
    high_noise_strength: Annotated[
        float,
        typer.Option(min=0, max=1, callback=finite, help="Of the last expert: lower keeps to the prompt's layout."),
    ] = 0.5,
    no_input_scales: Annotated[
        bool, typer.Option("--no-input-scales", help="Output scales alone: with --experts 1 this is PEQA.")
    ] = False,
    class_prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prior preservation, 'a photo of a cat': one for all subjects, or one each."),
    ] = None,
    class_images: Annotated[int, typer.Option(min=1, max=10**4, help="Pictures drawn for each class prompt.")] = 20,
    prior_weight: Annotated[
        float, typer.Option(min=0, max=1000, callback=finite, help="Weight of the class pictures' loss.")
    ] = 1.0,
    snr_gamma: Annotated[
        float | None, typer.Option(min=0.01, max=1000, callback=finite, help="Min-SNR weights of the loss, usually 5.")
    ] = None,
    validation_prompt: Annotated[
        list[str] | None, typer.Option(help="Drawn beside the file on the way and at the end; repeatable.")
    ] = None,
    validate_every: Annotated[int, typer.Option(min=0, max=10**6, help="Steps; 0: only at the end.")] = 100,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, max=10**6, help="Steps after which --resume can go on; 0: never.")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of everything random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is at --out.")] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Teach a quantized model subjects from a few pictures of each, by its scales alone, into a small file.

    dgq generate --tuned FILE draws with it."""
    if len(images) != len(prompt):
        raise typer.BadParameter(f"{len(images)} --images for {len(prompt)} --prompt: give them in pairs")
    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"--out {out} is not a .safetensors file")
    schedulers = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
    if lr_scheduler not in schedulers:
        raise typer.BadParameter(f"--lr-scheduler {lr_scheduler!r} is not one of {', '.join(schedulers)}")
    if mixed_precision not in (None, "no", "bf16"):
        raise typer.BadParameter(f"--mixed-precision {mixed_precision!r} is not one of bf16, no")
    if len(class_prompt or []) not in (0, 1, len(images)):
        raise typer.BadParameter(
            f"{len(class_prompt or [])} --class-prompt for {len(images)} subjects: one, or one each"
        )
    if not class_prompt and (class_images, prior_weight) != (20, 1.0):
        raise typer.BadParameter("--class-images and --prior-weight go with --class-prompt")
    if lr_scheduler == "constant" and lr_warmup_steps:
        raise typer.BadParameter("--lr-warmup-steps: --lr-scheduler constant has no warmup, constant_with_warmup does")
    if experts == 1 and high_noise_strength != 0.5:
        raise typer.BadParameter("--high-noise-strength is of the last of several experts: it goes with --experts 2")
    if not validation_prompt and validate_every != 100:
        raise typer.BadParameter("--validate-every goes with --validation-prompt")
    from dgq.tuning.train import Options, tune

    options = Options(
        steps=steps,
        learning_rate=learning_rate,
        lr_scheduler=lr_scheduler,
        lr_warmup_steps=lr_warmup_steps,
        batch=batch,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=mixed_precision,
        max_grad_norm=max_grad_norm,
        resolution=resolution,
        experts=experts,
        high_noise_strength=high_noise_strength,
        input_scales=not no_input_scales,
        class_prompts=tuple(class_prompt or ()),
        class_images=class_images,
        prior_weight=prior_weight,
        snr_gamma=snr_gamma,
        validation_prompts=tuple(validation_prompt or ()),
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
    )
    there = out.exists()
    try:
        with StageProgress(STAGES) as progress:
            about = tune(checkpoint, list(zip(images, prompt, strict=True)), out, options, progress)
    except KeyboardInterrupt:
        if there or not out.exists():
            going_on.append("the same command with --resume goes on from the last checkpoint")
        else:  # --resume alone would refuse to replace it
            going_on.append(f"{out} is whole")
            if checkpoint_every:
                going_on.append("the same command with --resume --overwrite draws the last validation pictures")
        raise
    size = out.stat().st_size
    if json:
        import dataclasses

        print_json({"file": str(out), "bytes": size, **dataclasses.asdict(about)})
        return
    err.print(out, end="", style="bold", soft_wrap=True)
    err.print(f"  {mib(size)}, {about.experts} experts, {len(about.subjects)} subjects")
    err.print(f"draw with it: dgq generate PROMPT --model {checkpoint} --tuned {out}", soft_wrap=True)
