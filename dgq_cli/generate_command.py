"""dgq generate: pictures from prompts."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from .adapters import Adapters, LoraOption, TunedOption, imports
from .common import (
    DeviceOption,
    DtypeOption,
    GraphOption,
    JsonOption,
    ModelOption,
    OffloadOption,
    SeedOption,
    StageProgress,
    err,
    finite,
    loading,
    print_json,
)


def command(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.")],
    model: ModelOption = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for the pictures (a name that is taken gets a number), or a new .png file."
        ),
    ] = Path("."),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10000, help="Pictures a prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampler steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Such as 'DPM++ 2M Karras'; the model's own if left out.")] = None,
    guidance: Annotated[float | None, typer.Option(callback=finite, help="Classifier-free guidance scale.")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="Size in pixels.")] = None,
    seed: SeedOption = None,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures a call of the network.")] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all pictures as one sheet, grid.png.")] = False,
    lora: LoraOption = None,
    tuned: TunedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    graph: GraphOption = True,
    offload: OffloadOption = False,
    metadata: Annotated[bool, typer.Option("--metadata/--no-metadata", help="Write settings into the PNG.")] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the checkpoint's files with their checksums first.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures of the same name.")] = False,
    json: JsonOption = False,
) -> None:
    """Make pictures. Each picture's seed is the first one plus its number."""
    for prompt in prompts:
        if not prompt.strip():
            raise typer.BadParameter("a prompt is empty: say what to draw")
    single = out.suffix.lower() == ".png"
    if single and len(prompts) * count > 1 and not grid:
        total = len(prompts) * count
        raise typer.BadParameter(f"--out {out} names one file for {total} pictures: give a folder or --grid")
    with imports(lora):
        from dgq.devices import check_device
        from dgq.errors import DgqError
        from dgq.family import family_of, network_of
        from dgq.outputs import check_output, check_place
        from dgq.pictures.generation import Picture, Settings, file_name, generate, read_size, write_png
        from dgq.pictures.generation import grid as sheet
        from dgq.pictures.pipelines import find_model, load

    try:
        width, height = (None, None) if size is None else read_size(size)
    except DgqError as error:
        raise typer.BadParameter(f"--{error}") from None
    if single:
        check_output(out, overwrite)
    else:
        check_place(out / "picture.png")
    check_device(device)
    found = find_model(model)
    adapters = Adapters(lora, tuned, found)
    chosen = secrets.randbelow(2**32) if seed is None else seed
    wanted = [prompt for prompt in prompts for _ in range(count)]
    settings = Settings(steps, guidance, negative, width, height, chosen, batch, sampler).resolved(found, len(wanted))
    if (found.folder / "concepts.json").is_file():
        _hint(prompts, found.folder)
    pipe = load(found, **loading(device, dtype, graph, offload, verify))
    adapters.put_on(pipe)
    files = []

    def save(picture: Picture) -> None:
        file = out if single else out / file_name(picture.prompt, picture.seed)
        files.append(picture.save(file, metadata, keep=not overwrite))

    try:
        with StageProgress({"generate": "generate"}) as progress:
            pictures = generate(
                pipe,
                wanted,
                settings,
                label=found.label,
                name=found.base,
                fields=adapters.fields,
                progress=lambda done, total: progress("generate", done, total, f"seed {chosen}"),
                made=None if single and grid else save,
            )
        network = network_of(pipe)
        if negative and not family_of(network).doubled(network.config, settings.guidance or 0):
            err.print(f"note: at guidance {settings.guidance:g} this model does not read the negative prompt")
        if grid:
            file = out if single else out / "grid.png"
            files.append(write_png(sheet([picture.image for picture in pictures]), file, keep=not overwrite))
    finally:  # what ends a later picture takes no earlier one away
        if files and not json:
            err.print(f"seed {chosen}, {settings.steps} steps, guidance {settings.guidance:g}")
            for name in files:
                typer.echo(name)
    if json:
        print_json(
            {
                "seed": chosen,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "files": list(map(str, files)),
                "pictures": [{"prompt": p.prompt, "seed": p.seed, "parameters": p.parameters} for p in pictures],
            }
        )


def _hint(prompts: list[str], folder: Path) -> None:
    """Say which words a small model never saw."""
    from dgq.pictures.embedded import unknown_words

    for prompt in prompts:
        if words := unknown_words(prompt, folder):
            err.print(f"note: this emoji-domain model never saw: {', '.join(words)}")
