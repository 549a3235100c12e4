"""Fetch the emoji packages and render the training pictures.

Packs each pinned npm package into the work folder (unless it is there already), verifies its SHA-256, renders
every concept in every design that has it, and writes ``masters.npz`` (128 px RGBA, straight alpha) with
``masters.json`` (what each picture is) and ``manifest.json`` (packages, versions, hashes, licences, concepts).

    python -m embedded.build_data --work DIR
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from embedded.captions import Concept, read_concepts
from embedded.common import add_work_option, write_json

MASTER_PX = 128
RENDER_PX = 512


@dataclass(frozen=True)
class Package:
    """A pinned npm package."""

    style: str
    name: str
    version: str
    sha256: str
    licence: str
    attribution: str

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji, Google Inc.",
    ),
    Package(
        "noto-v1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Noto Emoji (first version), Google Inc.",
    ),
    Package(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji, Copyright (c) Microsoft Corporation.",
    ),
    Package(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "Fluent Emoji, Copyright (c) Microsoft Corporation; packaged by LobeHub.",
    ),
    Package(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, Copyright 2020 Twitter, Inc and other contributors; pictures were resized, "
        "composited on plain backgrounds and used to train the model.",
    ),
)


class DataError(RuntimeError):
    """The data cannot be built, for the reason given."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raise one clear error unless the file has the pinned hash."""
    found = file_sha256(path)
    if found != expected:
        raise DataError(f"{path.name}: SHA-256 is {found}, expected {expected}; delete the file and try again")


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's verified tarball, packing it first where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.tarball
    if not path.exists():
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder), "--silent"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    verify(path, package.sha256)
    return path


def read_tar_json(tar: tarfile.TarFile, name: str) -> dict:
    """Read one JSON file of an npm tarball."""
    file = tar.extractfile(f"package/{name}")
    if file is None:
        raise DataError(f"{tar.name}: {name} is missing")
    return json.load(file)


def plain_code(code: str) -> str:
    """A code point sequence without variation selectors, in lower case: the key that designs are matched by."""
    return code.lower().replace("-fe0f", "")


def icon_names(tar: tarfile.TarFile) -> dict[str, str]:
    """Code point sequence -> icon name of an icon set (empty where the set has no table)."""
    return {plain_code(code): name for code, name in read_tar_json(tar, "chars.json").items()}


def resample(image: Image.Image, size: int = MASTER_PX) -> np.ndarray:
    """Shrink an RGBA picture in premultiplied alpha; returns straight-alpha uint8 (4, size, size)."""
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    alpha = pixels[..., 3:]
    planes = np.concatenate([pixels[..., :3] * alpha, alpha], axis=-1).transpose(2, 0, 1)
    shrunk = np.stack(
        [np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BOX)) for plane in planes]
    )
    colour = shrunk[:3] / np.maximum(shrunk[3:], 1e-6)
    straight = np.concatenate([colour, shrunk[3:]])
    return np.round(straight.clip(0, 1) * 255).astype(np.uint8)


def render_svg(body: str, width: int, height: int) -> np.ndarray:
    """Render the body of an icon; returns straight-alpha uint8 (4, MASTER_PX, MASTER_PX)."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_PX}" height="{RENDER_PX}" viewBox="0 0 {width} {height}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg)
    return resample(Image.open(io.BytesIO(bytes(png))))


def svg_masters(path: Path, concepts: list[Concept], names: dict[str, str]) -> dict[int, np.ndarray]:
    """Concept index -> master, from a package of SVG bodies; ``names`` helps sets that have no code point table."""
    with tarfile.open(path) as tar:
        icons = read_tar_json(tar, "icons.json")
        table = icon_names(tar) or names
    masters = {}
    for index, concept in enumerate(concepts):
        name = table.get(concept.code, "")
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"].get(name)
        if icon is not None:
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            masters[index] = render_svg(icon["body"], width, height)
    return masters


def webp_masters(path: Path, concepts: list[Concept]) -> dict[int, np.ndarray]:
    """Concept index -> master, from a package of WebP files named by code point."""
    wanted = {concept.code: index for index, concept in enumerate(concepts)}
    masters = {}
    with tarfile.open(path) as tar:
        for member in tar:
            index = wanted.get(plain_code(Path(member.name).stem))
            if index is None or not member.name.endswith(".webp"):
                continue
            file = tar.extractfile(member)
            assert file is not None
            masters[index] = resample(Image.open(io.BytesIO(file.read())))
    return masters


def noto_names(path: Path) -> dict[str, str]:
    """Code point sequence -> icon name of the noto set, which the older set shares."""
    with tarfile.open(path) as tar:
        return icon_names(tar)


def render_all(tarballs: dict[str, Path], concepts: list[Concept]) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Render every concept in every design; returns masters (N, 4, MASTER_PX, MASTER_PX) and what each shows."""
    names = noto_names(tarballs["noto"])
    pictures, records = [], []
    for style, path in tarballs.items():
        found = webp_masters(path, concepts) if style == "fluent-3d" else svg_masters(path, concepts, names)
        for index in sorted(found):
            pictures.append(found[index])
            records.append({"code": concepts[index].code, "style": style})
    return np.stack(pictures), records


def manifest(concepts: list[Concept], records: list[dict[str, object]]) -> dict[str, object]:
    """What the data was made from."""
    return {
        "packages": [asdict(package) for package in PACKAGES],
        "pictures": len(records),
        "concepts": [{"code": concept.code, "name": concept.name} for concept in concepts],
    }


def main() -> None:
    """Build the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work_option(parser)
    work: Path = parser.parse_args().work
    concepts = read_concepts()
    try:
        tarballs = {package.style: fetch(package, work / "tarballs") for package in PACKAGES}
        pictures, records = render_all(tarballs, concepts)
    except (DataError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"embedded data: {error}") from error
    np.savez_compressed(work / "masters.npz", rgba=pictures)
    write_json(work / "masters.json", records)
    write_json(work / "manifest.json", manifest(concepts, records))
    counts = {package.style: sum(r["style"] == package.style for r in records) for package in PACKAGES}
    pictured = {record["code"] for record in records}
    missing = [concept.name for concept in concepts if concept.code not in pictured]
    print(f"{len(records)} pictures of {len(concepts)} concepts: {counts}; without a picture: {missing}")


if __name__ == "__main__":
    main()
