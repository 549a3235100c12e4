"""dgq serve as a person runs it."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import tiny_pipelines
from PIL import Image

from dgq_cli.main import main


@pytest.fixture
def lora(tmp_path):
    return tiny_pipelines.lora(tmp_path / "style.safetensors", size=2)


@pytest.fixture
def server(tiny_checkpoint, lora):
    """(process, client) of `dgq serve`."""
    command = [sys.executable, "-P", "-m", "dgq_cli", "serve", "--model", str(tiny_checkpoint), "--port", "0"]
    command += ["--lora", f"{lora}:0.5", "--against", "float"]
    environment = {**os.environ, "NO_COLOR": "1", "DGQ_API_KEY": "secret"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), process.communicate()
        with httpx.Client(base_url=address, timeout=120, headers={"Authorization": "Bearer secret"}) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def test_a_seed_is_the_picture_of_generate_and_sigterm_finishes_it(
    server, lora, dgq_command, tiny_checkpoint, tiny_pipeline, tmp_path
):
    process, client = server

    def ask(**wanted):
        return client.post("/v1/images/generations", json={"prompt": "a cat", **wanted})

    assert httpx.get(client.base_url.join("/v1/models")).status_code == 401  # the key is the environment's
    drawn = base64.b64decode(ask(seed=5, steps=2, n=2).json()["data"][1]["b64_json"])
    lines = client.post("/draw", json={"prompt": "a cat", "seed": 6, "steps": 2, "beside": True}).text.splitlines()
    beside = base64.b64decode(json.loads(lines[-1])["picture"]["beside"])
    given = ("--seed", 6, "--steps", 2, "--lora", f"{lora}:0.5")
    for model, file in ((tiny_checkpoint, tmp_path / "x.png"), (tiny_pipeline, tmp_path / "float.png")):
        run = dgq_command("generate", "a cat", "--model", model, *given, "--out", file)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "x.png").read_bytes() == drawn
    with Image.open(tmp_path / "float.png") as image, Image.open(io.BytesIO(beside)) as served:
        assert image.tobytes() == served.tobytes()
        assert all(one.text["parameters"].endswith(': float, Lora: "style:0.5"') for one in (image, served))

    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(seed=5, steps=60)))
    asking.start()
    while not client.get("/sdapi/v1/progress").json()["state"]["sampling_step"]:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["data"]) == 1
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.startswith(
        f"serving {tiny_checkpoint.name} (integer W4A8, Lora style:0.5); Ctrl-C ends it after the picture in hand\n"
    )
    assert "generate 2/2" in err
    assert "seed 5" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--host", "0.0.0.0"), 2, "--api-key"),
        (("--host", "0.0.0.0", "--api-key", ""), 2, "visible ASCII"),
        (("--api-key", "a key"), 2, "visible ASCII"),
        (("--host", "nosuch.invalid"), 1, "cannot be listened on"),
        (("--host", "x" * 300), 1, "cannot be listened on"),
        (("--host", "192.0.2.1"), 1, "cannot be listened on"),
        (("--port", "70000"), 2, "--port"),
        (("--port", "{taken}"), 1, "Address already in use"),
        (("--waiting", "-1"), 2, "--waiting"),
        (("--max-side", "0"), 2, "--max-side"),
        (("--device", "nosuch"), 1, "nosuch"),
        (("--model", "/nowhere"), 1, "no such folder"),
        (("--lora", "/nowhere.safetensors", "--port", "0"), 1, "no such file"),
        (("--against", "float"), 1, "is a float model already"),
        (("--against", "/nowhere", "--port", "0"), 1, "no such folder"),
    ],
)
def test_wrong_uses_end_in_one_line(dgq_command, arguments, code, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = dgq_command("serve", *(argument.replace("{taken}", port) for argument in arguments))
    assert (run.returncode, run.stdout) == (code, "")
    assert message in run.stderr
    if code == 1:
        first, *rest = run.stderr.splitlines()
        assert first.startswith("error: ")
        assert all(line.startswith("  ") for line in rest)
    assert "unexpected" not in run.stderr


def test_without_what_it_needs_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "dgq.serving.server", raising=False)
    monkeypatch.setattr(sys, "argv", ["dgq", "serve"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    wanted = 'error: serving needs uvicorn, which is not installed\n  pip install "dgq[serve]"\n'
    assert capsys.readouterr() == ("", wanted)


def test_nothing_of_it_is_imported_for_the_other_commands():
    code = "import sys, dgq_cli.main; print(sorted({'fastapi', 'uvicorn', 'torch', 'starlette'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
