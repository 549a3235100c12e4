"""Install a wheel or source archive into a new environment and run tests against it, away from the sources.

    python tests/installed.py FILE [--dependencies .venv] [--constraint FILE] [--no-engine] [pytest's options]

The tests and what they read are copied to a temporary folder that holds none of the packages. With --dependencies the
distributions of another environment serve: nothing is fetched, and its own dgq is not seen. The rest goes to pytest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READ = ("tests", "embedded", "examples", "benchmarks", "pyproject.toml")
SOURCES_ONLY = (  # tests of files that no package holds
    "tests/docs",
    "tests/kernels/test_hatch_build.py",
    "tests/kernels/test_native_machines.py",
    "tests/dgq/bench/test_predict.py",
    "tests/benchmarks/test_tables.py",
)
WHERE = """
import pathlib, sys
import dgq, dgq_cli, dgq_kernels
from dgq_kernels import native
for package in (dgq, dgq_cli, dgq_kernels):
    assert pathlib.Path(package.__file__).is_relative_to(pathlib.Path(sys.prefix, "lib")), package.__file__
    assert "site-packages" in package.__file__, package.__file__
    assert pathlib.Path(package.__file__).with_name("py.typed").exists(), package
assert native.available() == (sys.argv[1] == "engine"), native.describe()
print(f"dgq {dgq.__version__} of {pathlib.Path(dgq.__file__).parent}, engine: {native.describe()}", flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="a wheel or a source archive")
    parser.add_argument("--dependencies", type=Path, help="an environment whose distributions serve")
    parser.add_argument("--constraint", default="constraints.txt", help="versions to install otherwise")
    parser.add_argument("--no-engine", action="store_true", help="expect that the CPU engine was not built")
    arguments, rest = parser.parse_known_args()
    package = arguments.package.resolve(strict=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DGQ_CPU_LIBRARY")}
    with tempfile.TemporaryDirectory(prefix="dgq-installed-") as temporary:
        prefix, away = Path(temporary, "venv"), Path(temporary, "away")
        venv.create(prefix, with_pip=True, symlinks=True)
        python = prefix / "bin" / "python"

        def call(*command: str | Path, cwd: Path = away) -> int:
            return subprocess.run(list(map(str, command)), cwd=cwd, env=environment).returncode

        started = time.monotonic()
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if arguments.dependencies:
            (theirs,) = arguments.dependencies.resolve().glob("lib/python*/site-packages")
            (ours,) = prefix.glob("lib/python*/site-packages")
            (ours / "dependencies.pth").write_text(f"{theirs}\n")  # its own .pth files are not read
            failed = call(*install, "--no-deps", package, cwd=ROOT)
        else:
            install += ["--constraint", arguments.constraint]
            # torch first: a looser request would fetch the CUDA build
            failed = call(*install, "torch", cwd=ROOT) or call(*install, f"{package}[dev,plots]", cwd=ROOT)
        if failed:
            return failed
        print(f"installed {package.name} in {time.monotonic() - started:.0f} s", flush=True)
        away.mkdir()
        for name in READ:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, away / name)
        ignored = [f"--ignore={name}" for name in SOURCES_ONLY]
        return (
            call(python, "-c", WHERE, "no engine" if arguments.no_engine else "engine")
            or call(prefix / "bin" / "dgq", "doctor")
            or call(python, "-m", "pytest", *ignored, *rest)
        )


if __name__ == "__main__":
    sys.exit(main())
