"""The queue: its bound, who leaves it, who is told what when it ends."""

import json
import socket
import threading
import time

import httpx
import pytest

from dgq.errors import DgqError
from dgq.serving.drawing import RefusedError

LONG = 1000  # steps of a picture that nobody waits for


@pytest.fixture
def small(start):
    """A server with one place in its queue, free again after the test."""
    found = start(waiting=1)
    yield found
    for job in list(found.drawer._jobs):
        found.drawer.leave(job)
    found.wait_for(lambda drawer: not drawer._jobs)


def asked(served, path="/v1/images/generations", **wanted):
    """A connection on which a request was made."""
    body = json.dumps({"prompt": "a cat", **wanted})
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=60)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def in_hand(drawer):
    return drawer.current and drawer.current.step


def test_a_full_queue_refuses_with_a_time(small):
    with asked(small, steps=LONG, n=10), asked(small, steps=LONG):
        small.wait_for(lambda drawer: in_hand(drawer) and drawer.queued == 1)
        small.drawer._seconds = 1e6
        for path, shape in (("/v1/images/generations", "error"), ("/sdapi/v1/txt2img", "detail"), ("/draw", "error")):
            answer = small.post(path, json={"prompt": "a cat", "steps": 1})
            assert answer.status_code == 429
            # at the pace of the order in hand, not of what was drawn before
            assert 1 <= int(answer.headers["Retry-After"]) < 10_000
            assert "1 orders wait already" in str(answer.json()[shape])
        # what cannot be drawn is told so at once
        assert small.post("/draw", json={"prompt": ""}).status_code == 400
        metrics = httpx.get(small.url + "/metrics").text
        assert "dgq_drawing 1.0\n" in metrics
        assert "dgq_waiting 1.0\n" in metrics
        assert 'dgq_answers_total{route="/draw",status="429"} 1.0\n' in metrics


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img", "/draw"])
def test_a_client_that_goes_away_frees_its_place(small, path):
    first = asked(small, path, steps=LONG)
    small.wait_for(in_hand)
    second = asked(small, path, steps=LONG)
    small.wait_for(lambda drawer: drawer.queued == 1)
    second.close()  # waits
    small.wait_for(lambda drawer: drawer.queued == 0)
    assert small.drawer.current
    first.close()  # in hand
    small.wait_for(lambda drawer: not drawer._jobs)
    assert small.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}).status_code == 200


def test_orders_are_drawn_as_they_came(small):
    jobs = [small.drawer.submit(small.drawer.order("a cat", seed=i, steps=30)) for i in range(2)]
    assert [small.drawer.ahead(job) for job in jobs] == [0, 1]
    assert [job.result.result(60)[0].seed for job in jobs] == [0, 1]
    assert jobs[0].started < jobs[1].started


def test_the_end_finishes_the_picture_in_hand_and_tells_the_others(start):
    served = start()
    answers = {}

    def ask(name, **wanted):
        answers[name] = served.post("/v1/images/generations", json={"prompt": "a cat", "seed": 1, **wanted})

    threads = [threading.Thread(target=ask, args=("in hand",), kwargs={"steps": 60, "n": 5})]
    threads[0].start()
    served.wait_for(in_hand)
    threads.append(threading.Thread(target=ask, args=("waits",), kwargs={"steps": 1}))
    threads[1].start()
    served.wait_for(lambda drawer: drawer.queued == 1)
    served.server.should_exit = True
    with pytest.raises(RefusedError, match="shutting down"):
        served.drawer.submit(served.drawer.order("a cat"))
    for thread in threads:
        thread.join()
    assert answers["in hand"].status_code == 200
    assert [picture["seed"] for picture in answers["in hand"].json()["data"]] == [1]
    assert answers["waits"].status_code == 503
    assert "shutting down" in answers["waits"].json()["error"]["message"]
    served.thread.join(10)
    assert not served.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url + "/health")


def test_a_hard_end_takes_a_step(start):
    served = start()
    job = served.drawer.submit(served.drawer.order("a cat", steps=LONG))
    served.wait_for(in_hand)
    started = time.monotonic()
    served.drawer.end()
    assert time.monotonic() - started < 3
    with pytest.raises(RefusedError, match="shutting down"):
        job.result.result(0)


def test_beside_is_the_float_models_picture(start, tiny_pipeline):
    from dgq.pictures.generation import Settings, generate
    from dgq.pictures.pipelines import load

    served = start(beside=True)
    seen = []
    order = served.drawer.order("a cat", seed=3, steps=2, guidance=3.0, beside=True)
    (drawn,) = served.drawer.submit(order, lambda *steps: seen.append(steps)).result.result(60)
    (wanted,) = generate(
        load(tiny_pipeline), ["a cat"], Settings(2, 3.0, seed=3), label="float", name=served.drawer.model.base
    )
    assert drawn.beside == wanted.png()
    assert drawn.png != drawn.beside
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_beside_needs_its_model(served):
    with pytest.raises(DgqError, match="no float model"):
        served.drawer.order("a cat", beside=True)


def test_the_largest_side(start):
    served = start(max_side=32)
    assert served.drawer.order("a cat", width=32, height=16).settings.width == 32
    with pytest.raises(DgqError, match="over 32 pixels"):
        served.drawer.order("a cat", width=16, height=40)
