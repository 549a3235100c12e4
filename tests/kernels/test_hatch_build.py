"""Source archives and wheels hold what the package needs, and are made with or without a compiler."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"dgq": ROOT / "dgq", "dgq_cli": ROOT / "dgq_cli", "dgq_kernels": ROOT / "kernels/dgq_kernels"}
NATIVE = "dgq_kernels/native"


def hatch(target, folder, out, **environment):
    """The file that hatchling makes of a source tree, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made, done.stdout + done.stderr


def sources():
    """What is in the packages, by its name in a wheel, but for what Python and compilers leave."""
    return {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".so", ".tmp")
    }


def names(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The tree of the source archive."""
    archive, _ = hatch("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def test_a_source_archive_makes_a_wheel_without_a_compiler(unpacked, tmp_path):
    wheel, said = hatch("wheel", unpacked, tmp_path, CXX="/nonexistent")
    assert "the CPU engine was not built, torch's integer products serve instead" in said
    assert "/nonexistent" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    held = names(wheel)
    assert held == sources()
    # of each kind of file one, should the trees above be empty
    data = "dgq/data/dgq-emoji"
    for name in (
        "dgq/py.typed",
        "dgq_cli/py.typed",
        "dgq_kernels/py.typed",
        "dgq_kernels/aot.csv",
        f"{NATIVE}/engine.cpp",
        f"{data}/unet/diffusion_pytorch_model.safetensors",
        f"{data}/NOTICE",
        "dgq/data/scorer/scorer.safetensors",
    ):
        assert name in held
    archive = zipfile.ZipFile(wheel)
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    for file in ("LICENSE", "NOTICE"):
        assert archive.read(f"{info}/licenses/{file}") == (ROOT / file).read_bytes()
    assert b"dgq = dgq_cli.main:run" in archive.read(f"{info}/entry_points.txt")


# what passes for a compiler: a script that writes the file behind -o
COMPILER = 'while [ "$1" != -o ]; do shift; done; echo compiled > "$2"'


def test_a_wheel_is_of_the_machine_it_is_built_for_and_leaves_the_tree_alone(unpacked, tmp_path):
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{COMPILER}\n")
    (tmp_path / "c++").chmod(0o755)
    own = unpacked / "kernels" / NATIVE / "libdgq_cpu.so"
    own.write_text("of the machine that builds")
    try:
        wheel, _ = hatch(
            "wheel", unpacked, tmp_path / "dist", CXX=str(tmp_path / "c++"), _PYTHON_HOST_PLATFORM="linux-aarch64"
        )
        assert own.read_text() == "of the machine that builds"
    finally:
        own.unlink()
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    assert names(wheel) == sources() | {f"{NATIVE}/libdgq_cpu.so"}
    assert zipfile.ZipFile(wheel).read(f"{NATIVE}/libdgq_cpu.so") == b"compiled\n"
