"""A server from its socket to its end."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..errors import DgqError
from .app import create_app
from .drawing import Drawer

CONNECTIONS = 512


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and not listening yet, for `create_server`.

    Args:
        host: an address or a name of this machine.
        port: 0 for any that is free.

    Raises:
        DgqError: there is no such address here, or the port is taken.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = socket.socket(family, kind, protocol)
        if os.name == "posix":  # where it is about connections that have ended, not about sharing a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        raise _taken(host, port, error) from None
    return found


def _taken(host: str, port: int, error: Exception) -> DgqError:
    reason = error.strerror if isinstance(error, OSError) else "it is no name"
    return DgqError(f"{host} port {port}: cannot be listened on ({reason})", "choose another --host or --port")


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Ends with the picture in hand; where it is interrupted again, at its next step.

    Attributes:
        hurried: whether it was interrupted again.
    """

    def __init__(self, config: uvicorn.Config, drawer: Drawer) -> None:
        super().__init__(config)
        self.drawer, self.hurried = drawer, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.should_exit and sig == signal.SIGINT:
            self.hurried = True
            self.drawer.stop()
        else:
            super().handle_exit(sig, frame)


def create_server(drawer: Drawer, bound: socket.socket, key: str | None = None) -> Server:
    """A server whose `run(sockets=[bound])` answers until `should_exit` is set; the picture in hand is its last."""
    host = bound.getsockname()[0]
    hosts = frozenset({host, "localhost", "127.0.0.1", "::1"}) if key is None else None
    config = uvicorn.Config(
        create_app(drawer, key=key, hosts=hosts),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
    )
    server = Server(config, drawer)
    drawer.closing = lambda: server.should_exit
    return server


def run(drawer: Drawer, bound: socket.socket, key: str | None, ready: Callable[[str], None]) -> None:
    """Answer until SIGTERM or SIGINT, which let the picture in hand be finished; a second SIGINT does not.

    Args:
        drawer: draws; ended at the end.
        bound: of `listen`.
        key: that every request has to bring, or None.
        ready: told of the address when clients may come.

    Raises:
        DgqError: the port was taken meanwhile.
        KeyboardInterrupt: the second SIGINT.
    """
    server = create_server(drawer, bound, key)
    # the server raises the signals that it took once more when it has ended
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        host, port = bound.getsockname()[:2]
        try:
            bound.listen(server.config.backlog)
        except OSError as error:
            raise _taken(host, port, error) from None
        ready(address(bound))
        server.run(sockets=[bound])
    finally:
        drawer.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    if server.hurried:
        raise KeyboardInterrupt
