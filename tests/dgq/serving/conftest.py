"""Servers of the tiny checkpoint, as `dgq serve` makes them, on ports of their own."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from dgq.pictures.pipelines import find_model, load


@dataclass
class Served:
    drawer: Any
    server: Any
    url: str
    port: int
    thread: threading.Thread

    def post(self, path, **options):
        return httpx.post(self.url + path, timeout=60, **options)

    def wait_for(self, condition):
        """Wait until something holds of the drawer."""
        end = time.monotonic() + 30
        while not condition(self.drawer):
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture(scope="session")
def tiny_pipe(tiny_checkpoint):
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def start(tiny_checkpoint, tiny_pipeline, tiny_pipe):
    """start(key, beside, **options of Drawer): a server in a thread."""
    from dgq.serving.drawing import Drawer
    from dgq.serving.server import address, create_server, listen

    running = []

    def begin(*, key=None, beside=False, **options):
        other = (load(tiny_pipeline), "float", {}) if beside else None
        drawer = Drawer(tiny_pipe, find_model(tiny_checkpoint), beside=other, **options)
        bound = listen("127.0.0.1", 0)
        url = address(bound)
        server = create_server(drawer, bound, key)
        bound.listen(100)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        running.append(Served(drawer, server, url, int(url.rpartition(":")[2]), thread))
        return running[-1]

    yield begin
    for one in running:
        one.server.should_exit = True
        one.drawer.end()
        one.thread.join()


@pytest.fixture(scope="module")
def served(start):
    return start()


@pytest.fixture
def damaged_vae(tiny_pipe):
    """While the test runs, the decoder makes NaN."""
    bias = tiny_pipe.vae.decoder.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
        yield
        bias.copy_(kept)
