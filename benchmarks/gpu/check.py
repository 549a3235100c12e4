"""What `make gpu` runs: every check and figure that needs a CUDA device, on this Python's own torch and Triton.

    python benchmarks/gpu/check.py [--into build/gpu]

Of what dgq and its tests need, only what this Python lacks is installed, into a folder, without a virtual environment.
No index is asked where there is none: PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR takes wheels from a folder.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")
# Run anywhere, and by `make test`: no GPU takes part.
CPU_TESTS = ("test_native", "test_triton_aot", "test_triton_pretended", "test_gpu")
DEVICE = (
    "import sys, torch; sys.exit(None if torch.cuda.is_available() else "
    "f'torch {torch.__version__} of {sys.executable} sees no CUDA device')"
)


def stages() -> dict[str, tuple[int, list[str]]]:
    """Name -> seconds it may take, and its command; in all under 10 minutes."""
    python, workers = [sys.executable], str(max(2, min(16, (os.cpu_count() or 2) - 2)))
    tests = ["tests/kernels", "tests/dgq/test_cuda.py", *(f"--ignore=tests/kernels/{name}.py" for name in CPU_TESTS)]
    return {
        "device": (60, [*python, "-c", DEVICE]),
        "engine": (60, [*python, "kernels/dgq_kernels/native/build.py"]),
        "doctor": (60, [*python, "-m", "dgq_cli", "doctor"]),
        "tests": (300, [*python, "-m", "pytest", *tests, "-m", "not slow", "--numprocesses", workers]),
        "bench": (120, [*python, "-m", "dgq_cli", "bench", "--csv", "benchmarks/results.csv"]),
    }


def required() -> list[str]:
    """dgq's requirements, and those of its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = [one for one in project["optional-dependencies"]["dev"] if Requirement(one).name in TEST_TOOLS]
    return [*project["dependencies"], *tools]


def missing(requirements: Iterable[str]) -> list[str]:
    """Those of the requirements (for this platform, without extras) that nothing installed fulfils."""
    importlib.invalidate_caches()
    lacking = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement.name}{requirement.specifier}")
    return lacking


def install(into: Path) -> None:
    """Install what is missing into a folder, which joins `sys.path`; torch and Triton are the machine's or nobody's.

    Raises:
        SystemExit: there is no torch or Triton that would do, or pip cannot find what is missing.
    """
    sys.path.insert(0, str(into))
    wanted = missing(required())
    own = [one for one in wanted if Requirement(one).name in ("torch", "triton")]
    if own:
        sys.exit(f"{sys.executable} lacks {', '.join(own)}: name a Python that has them, make gpu PYTHON=...")
    optional: set[str] = set()  # what a package declares may be of no use: its absence shows in the tests
    while wanted:
        print(f"installing {' '.join(wanted)} into {into}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(into)]
        if subprocess.run([*command, *wanted]).returncode:
            if optional:
                return
            sys.exit(f"pip found no {', '.join(wanted)}; without an index give PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER")
        needs = {need for one in wanted for need in importlib.metadata.requires(Requirement(one).name) or ()}
        wanted = [one for one in missing(needs) if one not in optional]
        optional |= set(wanted)


def run(name: str, limit: int, command: list[str], environment: dict[str, str]) -> bool:
    """Whether a command succeeds within its limit in seconds; what it leaves running ends with it."""
    begin = time.monotonic()
    print(f"== {name}", flush=True)
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        print(f"{name}: stopped after its limit of {limit} s", flush=True)
        return False
    print(f"== {name}: {'ok' if code == 0 else f'exit code {code}'}, {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


def main() -> int:
    """0 where every stage succeeds; without a device, the first, the others are left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "gpu", help="folder of what has to be installed")
    into = parser.parse_args().into.resolve()
    install(into)
    paths = [str(ROOT), str(ROOT / "kernels"), str(into), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    failed = []
    for name, (limit, command) in stages().items():
        if not run(name, limit, command, environment):
            failed.append(name)
            if name == "device":
                break
    print(f"failed: {', '.join(failed)}" if failed else "all stages are ok")
    # without a compiler the CPU is slower, nothing else
    return int(failed not in ([], ["engine"]))


if __name__ == "__main__":
    sys.exit(main())
