"""A checkpoint as a float pipeline: plain diffusers loads it without dgq."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.reading import component_at, decoder_header, encoder_headers, read_json
from ..checkpoint.writing import check_apart, copied_files
from ..errors import DgqError
from ..integer.layer import IntegerLayer
from ..outputs import atomic_folder, check_place
from ..progress import Progress, silent
from .source import Source, loaded


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the folder; bytes: of its files.
        layers: how many quantized layers of each component were made float.
    """

    path: str
    bytes: int
    layers: dict[str, int]


def export(source: Source, out: Path, progress: Progress = silent) -> Exported:
    """Write a checkpoint's pipeline in float16, with the weights that its integers stand for.

    Args:
        source: of `open_checkpoint`.
        out: a folder that is not there yet.
        progress: told of stage "export".

    Raises:
        DgqError: there is something at `out`, or it cannot be written.
    """
    check_apart(out, source.folder)
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise DgqError(f"{out}: already exists", "choose another --out")
    check_place(out)
    beside = ["vae"] if decoder_header(source.folder) else []
    quantized = [component_at(source.folder).name, *beside, *encoder_headers(source.folder)]
    layers = {}
    with atomic_folder(out) as folder:
        for name, file in copied_files(source.folder).items():
            if name.partition("/")[0] not in quantized:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name)
        for number, name in enumerate(quantized):
            progress("export", number, len(quantized), name)
            part = loaded(source, name)
            layers[name] = sum(isinstance(one, IntegerLayer) for one in part.modules())
            part.dequantize().save_pretrained(folder / name, safe_serialization=True)
            config = read_json(folder / name / "config.json")
            config.pop("_name_or_path", None)  # a place of this machine
            if "dtype" in config:  # of a text encoder: transformers loads it so, and diffusers the rest in float32
                before = read_json(source.folder / name / "config.json")
                config["dtype"] = before.get("dtype") or before.get("torch_dtype") or "float32"
            (folder / name / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    progress("export", len(quantized), len(quantized), str(out))
    return Exported(str(out), size, layers)
