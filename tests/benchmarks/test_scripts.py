"""Every benchmark starts on today's library."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))


def test_every_script_finds_what_it_imports():
    assert len(SCRIPTS) > 10
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {', '.join(SCRIPTS)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
