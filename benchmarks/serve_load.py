"""Many clients at once against `dgq serve` on this machine: is every request answered, and does memory stay?

    python benchmarks/serve_load.py [--clients 50] [--requests 4] [--rounds 3] [options of dgq serve]

A client that is told to come later (429) waits as long as it is told before its next request. Prints JSON: answers by
status, requests without an answer, and the server's memory after each round.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PNG = b"\x89PNG\r\n\x1a\n"


def ask(address: str, number: int, steps: int) -> tuple[int, int]:
    """(status, seconds to wait) of one request; a picture that is none raises."""
    place = urlsplit(address)
    assert place.hostname
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
    try:
        body = json.dumps({"prompt": "a cat", "seed": number, "steps": steps})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = json.load(answer)
        if answer.status == 200 and not base64.b64decode(data["data"][0]["b64_json"]).startswith(PNG):
            raise ValueError("no picture")
        return answer.status, int(answer.headers.get("Retry-After", 0))
    finally:
        connection.close()


def load(address: str, clients: int, requests: int, steps: int) -> dict[str, Any]:
    """Let clients make requests, each its own one after the other, all clients at once.

    Returns:
        answers by status; lost, how many had none; seconds.
    """

    def client(number: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for i in range(requests):
            try:
                status, wait = ask(address, number * requests + i, steps)
            except (OSError, http.client.HTTPException, ValueError, LookupError):
                found["lost"] += 1
                continue
            found[str(status)] += 1
            if status == 429 and i < requests - 1:
                time.sleep(wait)
        return found

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(client, range(clients)), Counter())
    lost = total.pop("lost", 0)
    return {"answers": dict(sorted(total.items())), "lost": lost, "seconds": round(time.monotonic() - started, 1)}


def rss_mib(process: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    arguments, options = parser.parse_known_args()
    command = [sys.executable, "-m", "dgq_cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        if not address:
            sys.exit("the server did not start")
        for number in range(3):
            ask(address, number, arguments.steps)
        report: dict[str, Any] = {"rss_mib": [rss_mib(server.pid)], "rounds": []}
        for _ in range(arguments.rounds):
            report["rounds"].append(load(address, arguments.clients, arguments.requests, arguments.steps))
            report["rss_mib"].append(rss_mib(server.pid))
        server.terminate()
    print(json.dumps({**report, "exit_code": server.returncode}, indent=2))


if __name__ == "__main__":
    main()
