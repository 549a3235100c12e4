"""Who may ask, and how much: before any request reaches the app.

A page of another site must not drive a server on its visitor's own machine: a browser says in `Origin` which page asks,
and in `Host` what name that page took the machine for. Neither can be left out or forged by a page, and it cannot read
an answer, as none allows it to.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from .answers import problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Told = Callable[[str, int], None]
"""told(route, status)"""

LARGEST_BODY = 2**16  # bytes: a prompt and settings
SLOWEST_BODY = 10.0  # seconds
OPEN = ("/health",)  # asked by what starts and stops servers


class Gate:
    """An ASGI application before another one.

    Args:
        app: the other one.
        key: that every request has to bring, as a bearer or as the password of any user; None for none.
        hosts: names in `Host` that are meant for this server; None where it has a key, and any name.
        told: told of each answer.
    """

    def __init__(
        self, app: Any, *, key: str | None = None, hosts: frozenset[str] | None = None, told: Told | None = None
    ) -> None:
        self.app, self.key, self.hosts, self.told = app, key, hosts, told

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        # an answer to HEAD is GET's, whose body the server leaves out
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "no-store")
                headers["X-Content-Type-Options"] = "nosniff"
                if self.told:
                    self.told(getattr(inner.get("route"), "path", "other"), message["status"])
            await send(message)

        wrong = self._wrong(scope)
        body = b""
        if wrong is None and scope["method"] not in ("GET", "HEAD"):
            body, wrong = await self._body(scope, receive)
        if wrong is not None:
            await wrong(scope, receive, answer)
            return
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        await self.app(inner, again, answer)

    def _wrong(self, scope: MutableMapping[str, Any]) -> Any:
        """The answer to a request that may not be made, or None."""
        path, headers = scope["path"], Headers(scope=scope)
        try:
            host, origin = urlsplit("//" + headers.get("host", "")), urlsplit(headers.get("origin", ""))
            name = host.hostname
        except ValueError:
            return problem(path, 400, "the Host or Origin header is no address")
        if self.hosts is not None and name not in self.hosts:
            return problem(path, 403, f"the host {name!r} is not this server: ask {' or '.join(sorted(self.hosts))}")
        if "origin" in headers and origin.netloc.lower() != host.netloc.lower():
            return problem(path, 403, "a page of another site may not ask this server")
        if self.key is not None and path not in OPEN and not self._has_key(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="dgq", charset="UTF-8"'}
            return problem(path, 401, "the API key is missing or wrong", "invalid_api_key", headers=challenge)
        return None

    def _has_key(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        given = given.strip()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.encode(), (self.key or "").encode())

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> tuple[bytes, Any]:
        """A request's body, or the answer to one that is too large, too slow or no JSON."""
        path, headers = scope["path"], Headers(scope=scope)
        too_large = problem(path, 413, f"the body is over {LARGEST_BODY} bytes", headers={"Connection": "close"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return b"", too_large
        body, more = b"", True
        try:
            async with asyncio.timeout(SLOWEST_BODY):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > LARGEST_BODY:
                        return b"", too_large
        except TimeoutError:
            return b"", problem(path, 408, "the body did not come", headers={"Connection": "close"})
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            return b"", problem(path, 415, "the body has to be application/json")
        return body, None
