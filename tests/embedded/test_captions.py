"""Captions, and what is held out."""

import random

import pytest

from embedded import captions as cap


@pytest.fixture(scope="module")
def concepts():
    return cap.read_concepts()


def test_list_has_the_everyday_names(concepts):
    names = {phrase for concept in concepts for phrase in concept.phrases}
    wanted = {"a cat", "a dog", "a red heart", "a pizza", "a smiling face", "a smiling face with sunglasses", "a house"}
    assert wanted <= names
    assert len(concepts) > 280


def test_parse_concept_reads_flags():
    concept = cap.parse_concept("*1f3b5 | a musical note; a music note | noflip")
    assert concept == cap.Concept("1f3b5", ("a musical note", "a music note"), common=True, flip=False)


@pytest.mark.parametrize("line", ["1f3b5", "1f3b5 | a note | mirror", "1f3b5 | ;"])
def test_parse_concept_rejects(line):
    with pytest.raises(ValueError, match="concepts:"):
        cap.parse_concept(line)


def test_repeated_phrases_are_an_error(tmp_path):
    path = tmp_path / "concepts.txt"
    path.write_text("1 | a cat\n2 | a dog; a cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a cat"):
        cap.read_concepts(path)


@pytest.mark.parametrize(
    ("style", "background", "brief", "expected"),
    [
        (None, None, False, "a cat"),
        ("fluent-3d", None, False, "a cat in 3d style"),
        (None, "orange", False, "a cat on an orange background"),
        ("noto", "blue", False, "a cat in noto style on a blue background"),
        ("noto-v1", "red", True, "a cat, classic noto style, red background"),
    ],
)
def test_caption(style, background, brief, expected):
    assert cap.caption("a cat", style, background, brief) == expected


def test_bare_keeps_words_that_are_no_article():
    assert cap.bare("a cat") == "cat"
    assert cap.bare("french fries") == "french fries"


def test_held_out_pairs_are_stable_and_about_as_many_as_said(concepts):
    styles = [cap.style_held_out(c, s) for c in concepts for s in cap.STYLES if s != cap.DEFAULT_STYLE]
    colours = [cap.background_held_out(c, b) for c in concepts for b in cap.BACKGROUNDS if b != "white"]
    assert sum(styles) / len(styles) == pytest.approx(cap.HELD_OUT_STYLE, abs=0.02)
    assert sum(colours) / len(colours) == pytest.approx(cap.HELD_OUT_BACKGROUND, abs=0.02)
    assert not any(cap.style_held_out(c, cap.DEFAULT_STYLE) for c in concepts)
    assert not any(cap.background_held_out(c, cap.DEFAULT_BACKGROUND) for c in concepts)


def test_sampler_never_draws_held_out_pairs(concepts):
    sampler = cap.Sampler(concepts, {index: list(cap.STYLES) for index in range(len(concepts))})
    rng = random.Random(1)
    draws = [sampler.draw(rng) for _ in range(5000)]
    assert not any(cap.style_held_out(concepts[d.concept], d.style) for d in draws)
    assert not any(cap.background_held_out(concepts[d.concept], d.background) for d in draws)
    coloured = sum(d.background != "white" for d in draws) / len(draws)
    assert coloured == pytest.approx(cap.P_COLOURED, abs=0.03)


def test_a_coloured_background_is_always_said(concepts):
    sampler = cap.Sampler(concepts, {index: list(cap.STYLES) for index in range(len(concepts))})
    rng = random.Random(2)
    for draw in (sampler.draw(rng) for _ in range(2000)):
        assert (draw.background == "white") or f"{draw.background} background" in draw.caption


def test_draws_repeat_from_a_seed(concepts):
    sampler = cap.Sampler(concepts, {0: ["noto"], 1: ["noto", "twemoji"]})
    first, second = random.Random(3), random.Random(3)
    assert [sampler.draw(first) for _ in range(20)] == [sampler.draw(second) for _ in range(20)]
