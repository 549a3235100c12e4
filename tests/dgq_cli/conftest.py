"""Running the real command."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def warm_process():
    """ask(request) -> exit code, of a process of warm.py."""
    script = Path(__file__).with_name("warm.py")
    server = subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def dgq_command(warm_process):
    """run(*args) -> CompletedProcess of `dgq`, in a fork of a process that has the libraries, or, `alone`, in one that
    has nothing."""

    def run(*args, first_on_path=None, alone=False, cwd=None):
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
        arguments = list(map(str, args))
        if first_on_path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(first_on_path), os.environ.get("PYTHONPATH")))
            )
        command = [sys.executable, "-m", "dgq_cli", *arguments]
        if alone or first_on_path is not None:
            return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "environment": environment}
            code = warm_process({**request, "out": str(out), "err": str(err)})
            return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())

    return run
