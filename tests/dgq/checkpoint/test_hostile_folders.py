"""A model folder is data: what SECURITY.md says of a stranger's."""

import json
import shutil

import pytest

import dgq

CODE = "from pathlib import Path\nPath({mark!r}).touch()\n\n\nclass Planted:\n    pass\n"


@pytest.fixture
def hostile(tiny_checkpoint, tmp_path):
    """hostile(place, change): (a checkpoint with place/planted.py and a changed model_index, what the code leaves)."""

    def build(place, change):
        folder, mark = tmp_path / "model", tmp_path / "mark"
        shutil.copytree(tiny_checkpoint, folder)
        (folder / place / "planted.py").write_text(CODE.format(mark=str(mark)))
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        return folder, mark

    return build


@pytest.mark.parametrize(
    ("place", "change"),
    [(".", {"_class_name": ["planted", "Planted"]}), ("scheduler", {"scheduler": ["planted", "Planted"]})],
    ids=["pipeline", "component"],
)
def test_code_of_a_folder_is_not_run(hostile, place, change):
    folder, mark = hostile(place, change)
    with pytest.raises(dgq.DgqError, match=r"model_index.json: (the pipeline|component .scheduler.) is .*planted"):
        dgq.load(folder)
    assert not mark.exists()


def test_code_is_not_copied_into_a_checkpoint(tiny_pipeline, tmp_path):
    from dgq.calibration.run import Options, calibrate
    from dgq.recipe import Recipe

    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    (base / "scheduler" / "planted.py").write_text("")
    (base / "vae" / "weights.bin").write_bytes(b"")
    recipe = Recipe(wbits=8, rounding="nearest", channels="none")
    calibrate(base, tmp_path / "out", recipe, Options(prompts=["a cat"], steps=1, evaluate=0))
    files = {file.suffix for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert files <= {".json", ".txt", ".safetensors", ".md"}
