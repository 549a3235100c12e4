"""Many clients at once: each is answered by a picture or told to come later."""

import os

import httpx

from benchmarks.serve_load import load, rss_mib


def test_every_request_is_answered_and_memory_stays(start):
    served = start(waiting=4)
    load(served.url, clients=10, requests=1, steps=1)  # what is made once
    before = rss_mib(os.getpid())
    found = load(served.url, clients=50, requests=4, steps=1)
    assert found["lost"] == 0
    assert sum(found["answers"].values()) == 200
    assert found["answers"].keys() == {"200", "429"}
    assert rss_mib(os.getpid()) - before < 40  # of which the clients' threads are most
    served.wait_for(lambda drawer: not drawer._jobs)
    metrics = httpx.get(served.url + "/metrics").text
    for status, count in found["answers"].items():
        (line,) = [
            line for line in metrics.splitlines() if f'generations",status="{status}"}}' in line and "total" in line
        ]
        assert float(line.split()[-1]) >= count
