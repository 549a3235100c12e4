"""How the fidelity tables draw."""

import json
import shutil
from pathlib import Path

import pytest

from dgq.pictures import embedded


def test_the_stress_variant_draws_as_the_model_it_was_made_of(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")  # it is a script
    from fidelity import own_settings

    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    plain = own_settings(model, None, None, 8)
    file = model / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_stress_variant": {"model": embedded.NAME}}))
    stressed = own_settings(model, None, None, 8)
    assert {"steps": stressed.steps, "guidance": stressed.guidance} == embedded.GENERATION
    assert (stressed.steps, stressed.guidance) != (plain.steps, plain.guidance)
    assert own_settings(model, 4, None, 8).steps == 4
