"""The application: every route over one drawer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..errors import DgqError
from ..version import __version__
from . import a1111_api, openai_api, page
from .answers import invalid, problem, refusal, reply
from .drawing import Drawer
from .gate import Gate
from .metrics import Metrics


def create_app(drawer: Drawer, *, key: str | None = None, hosts: frozenset[str] | None = None) -> Any:
    """The ASGI application of a server.

    Args:
        drawer: draws.
        key, hosts: as of `Gate`.
    """
    # its own pages of documentation fetch scripts from elsewhere
    app = FastAPI(title="dgq serve", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(drawer)
    for api in (openai_api, a1111_api, page):
        app.include_router(api.router(drawer))

    @app.get("/health")
    async def health() -> Response:
        return reply({"status": "ok", "model": drawer.id})

    @app.get("/metrics")
    async def told() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(DgqError)
    async def refused(request: Request, error: Any) -> Response:
        return refusal(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: Any) -> Response:
        return invalid(request.url.path, error.errors())

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: Any) -> Response:
        return problem(request.url.path, error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Any) -> Response:
        return problem(request.url.path, 500, "the server failed; its log says why")

    return Gate(app, key=key, hosts=hosts, told=metrics.told)
