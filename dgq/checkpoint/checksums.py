"""Checksums of a checkpoint's files, in its network's config.json: a changed value that is still in range shows nowhere
else.

CRC-32 is against accidents: it sees every change of up to 32 bits in a row, and all but one in 2^32 of any others. Who
changes a file on purpose can change its checksum too. It is the fastest check that Python brings.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import DgqError
from ..outputs import atomic_file
from ..recipe import shortened
from .header import CHECKSUMS
from .reading import COPIED_SUFFIXES, check_regular, read_json, weight_files

CONFIG = "config.json"
SPAN = 2**26  # bytes that a thread takes at a time
PIECE = 2**20  # bytes that it reads at a time
# A file of the network's own folder, or one beside it: ../model_index.json, ../COMPONENT/FILE.
_NAME = re.compile(r"(\.\./[A-Za-z_][A-Za-z0-9_]*/)?[^/\0\ud800-\udfff]+|\.\./model_index\.json")

ON_PURPOSE = "if it was changed on purpose: dgq.load(verify=False), dgq generate --no-verify, or DGQ_VERIFY=0"

_wanted = contextvars.ContextVar("dgq_verify", default=True)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Loads within verify nothing: it is done already, or not wanted."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> bool:
    """Whether a load verifies: not within `left_out`, and not where the variable DGQ_VERIFY is 0."""
    return _wanted.get() and os.environ.get("DGQ_VERIFY") != "0"


def record(component: Path, pipeline: bool = False) -> None:
    """Write checksums into a network's config.json.

    Args:
        component: its folder, with a quantization_config.
        pipeline: of the folder around it and the other components too.

    Raises:
        DgqError: a file cannot be read or written.
    """
    config = read_json(component / CONFIG)
    files = {file.name: file for file in _needed(component) if file.name != CONFIG}
    if pipeline:
        files["../model_index.json"] = component.parent / "model_index.json"
        for folder in sorted(component.parent.iterdir()):
            if folder.is_dir() and folder.name != component.name:
                files |= {f"../{folder.name}/{file.name}": file for file in _needed(folder)}
    sums = {name: crc32(file) for name, file in files.items()}
    config["quantization_config"][CHECKSUMS] = sums
    sums[CONFIG] = _config_crc32(config)
    with atomic_file(component / CONFIG) as stream:
        stream.write((json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def stored(component: Path) -> dict[str, str]:
    """The checksums in a network's folder: {path from there: CRC-32 in hexadecimal}; empty where there are none.

    Raises:
        DgqError: config.json is damaged.
    """
    quantization = read_json(component / CONFIG).get("quantization_config")
    sums = quantization.get(CHECKSUMS, {}) if isinstance(quantization, dict) else {}
    for name, value in sums.items() if isinstance(sums, dict) else [("it", sums)]:
        if not isinstance(value, str) or not _NAME.fullmatch(name):
            what = f"{CHECKSUMS}: {shortened(name)} is {shortened(value)}"
            raise DgqError(f"{component / CONFIG}: quantization_config: damaged ({what})")
    return sums


def verify(component: Path, whole: bool = False) -> int:
    """Hold the files of a checkpoint against their checksums, those of other components where they are around it.

    Weights and configurations that are not there are left to whoever loads them: a component may be given in their
    place. Of a folder without weights (a tokenizer's, a scheduler's) every file has to be there, and no other.

    Args:
        component: the network's folder.
        whole: weights and configurations have to be there too.

    Returns:
        The number of files that were compared; 0 where the checkpoint has no checksums.

    Raises:
        DgqError: the first file that is another one than was written, or missing, or one too many.
    """
    sums = stored(component)
    found: dict[Path, str] = {}
    folders: dict[Path, list[str]] = {}
    around = (component.parent / "model_index.json").is_file()
    for name in sums:
        if around or "/" not in name:
            file = component.parent / name[3:] if name.startswith("../") else component / name
            found[file] = sums[name]
            if "/" in name[3:]:
                folders.setdefault(file.parent, []).append(file.name)
    for folder, names in folders.items():
        if folder.is_dir() and not any(name.endswith(".safetensors") for name in names):
            there = {file.name for file in _needed(folder)}
            if lost := sorted(set(names) - there):
                raise DgqError(f"{folder / lost[0]}: is missing", f"copy it again; {ON_PURPOSE}")
            if more := sorted(there - set(names)):
                raise DgqError(f"{folder / more[0]}: is no part of the checkpoint", f"remove it; {ON_PURPOSE}")
    files = [file for file in found if os.path.lexists(file)]
    if whole and len(files) < len(found):
        raise DgqError(f"{min(set(found) - set(files))}: is missing", "copy it again")
    wrong = []
    for file in files:
        own = file == component / CONFIG
        if (_config_crc32(read_json(file)) if own else crc32(file)) != found[file]:
            wrong.append(file)
    if wrong:
        others = f" (and {len(wrong) - 1} more of {len(files)} files)" if len(wrong) > 1 else ""
        raise DgqError(
            f"{wrong[0]}: is not as it was written: another checksum{others}", f"copy it again; {ON_PURPOSE}"
        )
    return len(files)


def _needed(folder: Path) -> list[Path]:
    """What a component is loaded from: its weights and config.json, or without weights all its data files."""
    if weights := weight_files(folder):
        return [folder / CONFIG, *weights]
    return sorted(file for file in folder.iterdir() if file.suffix in COPIED_SUFFIXES)


def _config_crc32(config: dict[str, Any]) -> str:
    """Of the network's config.json without this checksum itself, whatever its layout."""
    quantization = config["quantization_config"]
    sums = {name: value for name, value in quantization[CHECKSUMS].items() if name != CONFIG}
    config = {**config, "quantization_config": {**quantization, CHECKSUMS: sums}}
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def crc32(file: Path) -> str:
    """The CRC-32 of a file in hexadecimal, as zlib, gzip and zip compute it, by as many threads as there are CPUs.

    Raises:
        DgqError: it cannot be read.
    """
    check_regular(file)
    try:
        with open(file, "rb") as stream:
            starts = range(0, os.fstat(stream.fileno()).st_size, SPAN)
            if len(starts) < 2:
                return f"{_span(stream.fileno(), 0)[0]:08x}"
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 16, len(starts))) as pool:
                spans = list(pool.map(_span, [stream.fileno()] * len(starts), starts))
    except OSError as error:
        raise DgqError(f"{file}: cannot be read ({error.strerror})") from None
    total = 0
    for value, length in spans:
        total = _times(total, _power(length)) ^ value
    return f"{total:08x}"


def _span(descriptor: int, start: int) -> tuple[int, int]:
    """The checksum of up to `SPAN` bytes of an open file, and how many they are."""
    value, place, end = 0, start, start + SPAN
    while data := os.pread(descriptor, min(PIECE, end - place), place):
        value = zlib.crc32(data, value)
        place += len(data)
    return value, place - start


# Checksums are polynomials over GF(2) modulo CRC-32's, the lowest power in the highest bit: that of two texts after
# each other is (the first one's * x^(bits of the second)) + the second one's.
def _times(one: int, other: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (0xEDB88320 if other & 1 else 0)
    return product


def _power(length: int) -> int:
    """x^(8 * length)."""
    power, square = 1 << 31, 1 << 23  # 1, and x^8
    while length:
        if length & 1:
            power = _times(power, square)
        square = _times(square, square)
        length >>= 1
    return power
