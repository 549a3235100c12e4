"""Running the real command."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def dgq_command():
    """run(*args) -> CompletedProcess of `dgq` in a process of its own."""

    def run(*args, **kwargs):
        return subprocess.run(
            [sys.executable, "-m", "dgq_cli", *map(str, args)],
            capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}, **kwargs,
        )  # fmt: skip

    return run
