"""OpenAI's images API, as far as a text-to-image model can answer it."""

from __future__ import annotations

import base64
import time
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from ..pictures.generation import read_size
from .answers import Integer, Real, draw, problem, reply
from .drawing import Drawer


class ImagesRequest(BaseModel):
    """A request for pictures; the last four fields are dgq's own."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: Integer | None = 1
    size: str | None = "auto"
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    user: str | None = None
    steps: Integer | None = None
    seed: Integer | None = None
    guidance: Real | None = None
    sampler: str | None = None
    negative_prompt: str | None = None


def router(drawer: Drawer) -> APIRouter:
    """The routes below /v1."""
    routes = APIRouter(prefix="/v1")
    model = {"id": drawer.id, "object": "model", "created": int(time.time()), "owned_by": "dgq"}

    def unknown(path: str, name: str) -> Response:
        message = f"the model {name!r} is not served here: {drawer.id!r} is"
        return problem(path, 404, message, "model_not_found", "model")

    @routes.get("/models")
    async def models() -> Response:
        return reply({"object": "list", "data": [model]})

    @routes.get("/models/{name:path}")
    async def one(name: str) -> Response:
        return reply(model) if name == drawer.id else unknown("/v1/models", name)

    @routes.post("/images/generations")
    async def generations(request: Request, wanted: ImagesRequest) -> Response:
        if wanted.model not in (None, drawer.id):
            return unknown(request.url.path, wanted.model or "")
        width, height = (None, None) if wanted.size in (None, "auto") else read_size(wanted.size or "")
        order = drawer.order(
            wanted.prompt,
            count=1 if wanted.n is None else wanted.n,
            seed=wanted.seed,
            steps=wanted.steps,
            guidance=wanted.guidance,
            sampler=wanted.sampler,
            negative=wanted.negative_prompt or "",
            width=width,
            height=height,
        )
        pictures = await draw(request, drawer, order)
        data: list[dict[str, Any]] = [
            {"b64_json": base64.b64encode(picture.png).decode(), "seed": picture.seed} for picture in pictures
        ]
        size = f"{order.settings.width}x{order.settings.height}"
        return reply(
            {"created": int(time.time()), "output_format": "png", "background": "opaque", "size": size, "data": data}
        )

    return routes
