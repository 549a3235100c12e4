"""Signals, in this process: the first one waits for the picture in hand, a second interrupt does not."""

import os
import signal
import threading
import time

import httpx
import pytest

from dgq.errors import DgqError
from dgq.pictures.pipelines import find_model


@pytest.fixture
def run(tiny_checkpoint, tiny_pipe):
    """run(*signals, **order): (the answer to an order, what the server ended by); a signal after a step each."""
    from dgq.serving import server
    from dgq.serving.drawing import Drawer

    def begin(*signals, **order):
        drawer = Drawer(tiny_pipe, find_model(tiny_checkpoint))
        bound = server.listen("127.0.0.1", 0)
        answers, stepped = [], threading.Event()
        drawer.progress = lambda *_: stepped.set()

        def client(url):
            asking = threading.Thread(
                target=lambda: answers.append(
                    httpx.post(url + "/v1/images/generations", json={"prompt": "a cat", **order}, timeout=60)
                )
            )
            asking.start()
            for number in signals:
                stepped.wait(60)
                stepped.clear()
                os.kill(os.getpid(), number)
                while not drawer.closing():  # two signals that come before the first is seen would be one
                    time.sleep(0.01)
            asking.join()

        threads = []

        def ready(url):
            threads.append(threading.Thread(target=client, args=(url,)))
            threads[0].start()

        ended = None
        try:
            server.run(drawer, bound, None, ready)
        except KeyboardInterrupt as error:
            ended = error
        threads[0].join()
        return answers[0], ended

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield begin
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_picture_in_hand(run, number):
    answer, ended = run(number, steps=30, n=5, seed=1)
    assert answer.status_code == 200
    assert [picture["seed"] for picture in answer.json()["data"]] == [1]
    assert ended is None


def test_a_second_interrupt_does_not(run):
    answer, ended = run(signal.SIGINT, signal.SIGINT, steps=1000)
    assert answer.status_code == 503
    assert "shutting down" in answer.json()["error"]["message"]
    assert isinstance(ended, KeyboardInterrupt)


def test_a_second_sigterm_changes_nothing(run):
    answer, ended = run(signal.SIGTERM, signal.SIGTERM, steps=60)
    assert answer.status_code == 200
    assert ended is None


def test_a_port_that_was_taken_meanwhile(tiny_checkpoint, tiny_pipe):
    from dgq.serving.drawing import Drawer
    from dgq.serving.server import listen, run

    first = listen("127.0.0.1", 0)
    second = listen("127.0.0.1", first.getsockname()[1])
    with first, second:
        first.listen()
        with pytest.raises(DgqError, match="Address already in use"):
            run(Drawer(tiny_pipe, find_model(tiny_checkpoint)), second, None, print)


@pytest.mark.parametrize(
    "host, loopback, url",
    [("127.0.0.1", True, "http://127.0.0.1:"), ("127.0.0.2", True, "http://127.0.0.2:"), ("0.0.0.0", False, "http://")],
)
def test_addresses(host, loopback, url):
    from dgq.serving.server import address, is_loopback, listen

    with listen(host, 0) as bound:
        assert is_loopback(bound) == loopback
        assert address(bound).startswith(url)
