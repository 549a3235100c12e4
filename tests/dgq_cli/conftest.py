"""Running the real command."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def dgq_command():
    """run(*args) -> CompletedProcess of `dgq` in a process of its own."""

    def run(*args, first_on_path=None, **kwargs):
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
        if first_on_path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(first_on_path), os.environ.get("PYTHONPATH")))
            )
        return subprocess.run(
            [sys.executable, "-m", "dgq_cli", *map(str, args)],
            capture_output=True, text=True, env=environment, **kwargs,
        )  # fmt: skip

    return run
