"""The page at /: a prompt, its progress, the pictures since it was opened."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import Receive, Scope, Send

from .. import outputs
from ..family import family_of, network_of
from ..pictures.embedded import unknown_words
from .answers import Integer, Real
from .drawing import Drawer, Drawn, Job, RefusedError

POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
QUIET = 1.0  # seconds after which a page that waits hears where it stands


class DrawRequest(BaseModel):
    """What the page asks for."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    negative_prompt: str = ""
    width: Integer | None = None
    height: Integer | None = None
    steps: Integer | None = None
    guidance: Real | None = None
    seed: Integer | None = None
    count: Integer = 1
    beside: bool = False


class _Drawing(StreamingResponse):
    """Lines of JSON about a job, which is left when nobody reads them any more."""

    def __init__(self, drawer: Drawer, job: Job, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self.drawer, self.job = drawer, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.drawer.leave(self.job)


def router(drawer: Drawer) -> APIRouter:
    """The page, and what it asks."""
    routes = APIRouter()
    width, height = drawer.size
    about = {
        "model": drawer.id,
        "label": drawer.label,
        "beside": drawer.beside[1] if drawer.beside else None,
        "width": width,
        "height": height,
        "factor": family_of(network_of(drawer.pipe)).size_factor(drawer.pipe),
        "largest": drawer.max_side,
        "steps": drawer.settings.steps,
        "guidance": drawer.settings.guidance,
    }
    page = outputs.page(Path(__file__).with_name("page.html"), about)

    @routes.get("/")
    async def show() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin"})

    @routes.post("/draw")
    async def draw(request: Request, wanted: DrawRequest) -> Response:
        order = drawer.order(
            wanted.prompt,
            count=wanted.count,
            seed=wanted.seed,
            beside=wanted.beside,
            negative=wanted.negative_prompt,
            **{name: getattr(wanted, name) for name in ("width", "height", "steps", "guidance")},
        )
        folder = drawer.model.folder
        strange = unknown_words(order.prompt, folder) if (folder / "concepts.json").is_file() else []
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = drawer.submit(
            order, lambda step, steps: _tell(loop, news, {"step": step, "steps": steps, "number": job.number})
        )
        job.result.add_done_callback(lambda _: _tell(loop, news, {}))
        return _Drawing(drawer, job, _lines(drawer, job, news, strange))

    return routes


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Queue[dict[str, Any]], what: dict[str, Any]) -> None:
    loop.call_soon_threadsafe(news.put_nowait, what)


async def _lines(
    drawer: Drawer, job: Job, news: asyncio.Queue[dict[str, Any]], strange: list[str]
) -> AsyncIterator[str]:
    yield json.dumps({"ahead": drawer.ahead(job), "strange": strange}) + "\n"
    while not job.result.done():
        try:
            what = await asyncio.wait_for(news.get(), QUIET)
        except TimeoutError:
            what = {"ahead": drawer.ahead(job)}
        if what:
            yield json.dumps(what) + "\n"
    try:
        for picture in job.result.result():
            yield json.dumps({"picture": _shown(picture)}) + "\n"
    except RefusedError as error:
        yield json.dumps({"error": error.message}) + "\n"


def _shown(picture: Drawn) -> dict[str, Any]:
    return {
        "png": base64.b64encode(picture.png).decode(),
        "beside": picture.beside and base64.b64encode(picture.beside).decode(),
        "name": picture.name,
        "seed": str(picture.seed),  # it may be larger than a number of JavaScript is exact for
        "seconds": round(picture.seconds, 2),
        "parameters": picture.parameters,
    }
