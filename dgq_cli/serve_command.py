"""dgq serve: one model behind HTTP, and a page to draw on."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from .adapters import Adapters, LoraOption, TunedOption, imports
from .common import DeviceOption, DtypeOption, GraphOption, ModelOption, OffloadOption, StageProgress, err, loading


def command(
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; other ones than loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Every request has to bring it; DGQ_API_KEY where it is left out."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="float|MODEL", help="Also load the float model it was made of, to draw beside it."),
    ] = None,
    waiting: Annotated[int, typer.Option(min=0, max=10000, help="Orders that may wait; further ones get 429.")] = 16,
    max_side: Annotated[
        int | None,
        typer.Option(min=8, max=4096, help="Largest width and height; 1024, or the model's own where it is larger."),
    ] = None,
    lora: LoraOption = None,
    tuned: TunedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    graph: GraphOption = True,
    offload: OffloadOption = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the checkpoint's files with their checksums first.")
    ] = True,
) -> None:
    """Serve a model: OpenAI's and A1111's APIs, and a page, at http://127.0.0.1:7860.

    One picture is drawn at a time. Ctrl-C and SIGTERM let the one in hand be finished; a second Ctrl-C does not."""
    key = os.environ.get("DGQ_API_KEY") if api_key is None else api_key
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise typer.BadParameter("the API key has to be of visible ASCII characters, one at least")
    with imports(lora):
        from dgq.devices import check_device
        from dgq.errors import DgqError
        from dgq.pictures.pipelines import find_model, float_base, load

    try:
        from dgq.serving.drawing import Drawer
        from dgq.serving.server import is_loopback, listen, run
    except ModuleNotFoundError as error:
        raise DgqError(f"serving needs {error.name}, which is not installed", 'pip install "dgq[serve]"') from None

    check_device(device)
    bound = listen(host, port)
    if key is None and not is_loopback(bound):
        raise typer.BadParameter(f"--host {host} is reached from other machines: give --api-key")
    found = find_model(model)
    wanted = [(found, Adapters(lora, tuned, found))]
    if against is not None:
        other = find_model(float_base(found.folder, against))
        wanted.append((other, Adapters(lora, None, other)))  # tuned scales are of integers
    loaded = []
    for one, adapters in wanted:
        pipe = load(one, **loading(device, dtype, graph, offload, verify))
        adapters.put_on(pipe)
        loaded.append((pipe, one.label, adapters.fields))
    (pipe, _, fields), *beside = loaded
    with StageProgress({"generate": "generate"}) as progress:
        drawer = Drawer(
            pipe,
            found,
            fields=fields,
            beside=beside[0] if beside else None,
            waiting=waiting,
            max_side=max_side,
            progress=progress,
        )

        def ready(address: str) -> None:
            err.print(f"serving {drawer.id} ({drawer.label}); Ctrl-C ends it after the picture in hand", soft_wrap=True)
            typer.echo(address)

        run(drawer, bound, key, ready)
