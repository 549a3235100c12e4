"""Answers, and what an error looks like in each protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BeforeValidator, FiniteFloat
from pydantic_core import PydanticCustomError

from ..errors import DgqError
from .drawing import Drawer, Drawn, Order, RefusedError

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
LONGEST = 500  # characters of a message, which may repeat what was sent


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "true and false are no numbers")
    return value


# Numbers of a request. "20" and 20.0 are integers, as to the web UI's own server: clients that fill in templates send
# such.
Integer = Annotated[int, BeforeValidator(_no_boolean)]
Real = Annotated[FiniteFloat, BeforeValidator(_no_boolean)]


def reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON; what is no text in UTF-8 is escaped."""
    return Response(json.dumps(data, allow_nan=False), status, headers, "application/json")


def problem(
    path: str,
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error as the protocol of a path tells it."""
    message = message if len(message) <= LONGEST else message[:LONGEST] + " ..."
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    if path.startswith("/v1/"):
        data: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    elif path.startswith("/sdapi/"):
        data = {"error": code or kind, "detail": message, "body": "", "errors": message}
    else:
        data = {"error": message}
    return reply(data, status, headers)


def refusal(path: str, error: DgqError) -> Response:
    """A `DgqError` as an answer: a `RefusedError` with its own status, another one is the client's."""
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if not isinstance(error, RefusedError):
        return problem(path, 422 if path.startswith("/sdapi/") else 400, message)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 409:
        headers["x-should-retry"] = "false"  # OpenAI's clients would draw it again
    return problem(path, error.status, message, error.code, headers=headers)


def invalid(path: str, errors: Sequence[Any]) -> Response:
    """What pydantic found in a request, the first of it."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    message = "is not known here" if first["type"] == "extra_forbidden" else str(first["msg"])
    if first["type"] == "json_invalid":
        place, message = "", f"the body is not JSON ({first.get('ctx', {}).get('error', message)})"
    status = 422 if path.startswith("/sdapi/") else 400
    return problem(path, status, f"{place}: {message}" if place else message, param=place or None)


async def draw(request: Request, drawer: Drawer, order: Order) -> list[Drawn]:
    """The pictures of an order; a client that goes away takes its order along.

    Raises:
        RefusedError: the queue is full, it was interrupted or failed, the server ends, or the client is gone.
    """
    job = drawer.submit(order)
    drawn = asyncio.wrap_future(job.result)
    gone = asyncio.ensure_future(_gone(request))
    both: set[asyncio.Future[Any]] = {drawn, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            raise RefusedError(499, "gone", "the client has gone")
        return drawn.result()
    finally:
        gone.cancel()
        drawn.cancel()
        drawer.leave(job)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
