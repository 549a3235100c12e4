"""Prompts of an evaluation."""

import json
from pathlib import Path

import pytest

from dgq.errors import DgqError
from dgq.evaluation.items import items, labelled
from dgq.pictures import embedded
from dgq.pictures.prompts import calibration_pool, read_prompts
from embedded.captions import STYLES, background_held_out, read_concepts, style_held_out


def test_labels_say_what_the_prompt_says() -> None:
    chosen = labelled(embedded.FOLDER, 600)
    assert len({item.prompt for item in chosen}) == 600
    assert not {item.prompt for item in chosen} & set(calibration_pool(embedded.FOLDER))
    for item in chosen:
        assert item.concept is not None
        assert item.prompt.startswith(item.concept)
        assert (item.style is None) or f" in {STYLES[item.style]} style" in item.prompt
        assert (item.background is None) or f" {item.background} background" in item.prompt
    assert sum(item.held_out for item in chosen) > 100


def test_held_out_pairs_are_those_of_training() -> None:
    concepts = {concept.name: concept for concept in read_concepts()}
    for item in labelled(embedded.FOLDER, 600):
        concept = concepts[item.concept or ""]
        out = bool(item.style and style_held_out(concept, item.style))
        out |= bool(item.background and background_held_out(concept, item.background))
        assert item.held_out == out


def test_choice_is_the_same_every_time() -> None:
    assert labelled(embedded.FOLDER, 40) == labelled(embedded.FOLDER, 40)
    assert labelled(embedded.FOLDER, 40) != labelled(embedded.FOLDER, 40, seed=1)


def test_everyday_concepts() -> None:
    chosen = items(embedded.FOLDER, "everyday")
    assert len(chosen) >= 100
    assert all(item.prompt == item.concept for item in chosen)


def test_files(tmp_path: Path) -> None:
    coco = tmp_path / "captions.json"
    coco.write_text(json.dumps({"annotations": [{"caption": "a cat "}, {"caption": "a dog"}, {"caption": "a cat"}]}))
    parti = tmp_path / "parti.tsv"
    parti.write_text('Prompt\tCategory\na bee\tAnimals\na "red" car\tVehicles\n')
    lines = tmp_path / "lines.txt"
    lines.write_text("# a comment\na tree\n\n")
    assert read_prompts(coco) == ["a cat", "a dog"]
    assert read_prompts(parti) == ["a bee", 'a "red" car']
    assert read_prompts(lines) == ["a tree"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"images": []}', "holds no prompts where"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"annotations": []}', "holds no prompt"),
        ("a.tsv", "Text\tKind\nx\ty\n", "holds no prompts where"),
        ("a.tsv", "Kind\tPrompt\nx\n", "holds no prompts where"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DgqError, match=said):
        read_prompts(tmp_path / name)


def test_bad_wishes(tmp_path: Path) -> None:
    with pytest.raises(DgqError, match="lists no concepts"):
        items(tmp_path, "everyday")
    with pytest.raises(DgqError, match="nothing to evaluate"):
        items(embedded.FOLDER, "0")
    (tmp_path / "concepts.json").write_text(json.dumps({"concepts": [{"name": "a cat"}]}))
    with pytest.raises(DgqError, match="--prompts everyday leaves nothing to evaluate"):
        items(tmp_path, "everyday")
    with pytest.raises(DgqError, match="cannot be read"):
        items(embedded.FOLDER, str(tmp_path / "none.txt"))
