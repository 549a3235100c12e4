"""The judgement of tuned scales: what it measures, by which networks, and its intervals."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import small_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import subjects
import tuning

sys.path.pop(0)


def test_held_out_pictures_are_none_of_the_training_ones():
    trained = {view.background for view in subjects.TRAINING}
    assert all(background not in trained for _, background, _ in tuning.ASKED)
    for name in subjects.SUBJECTS:
        shown = [image.tobytes() for image in subjects.pictures(name, subjects.TRAINING)]
        held_out = [image.tobytes() for image in subjects.pictures(name, subjects.HELD_OUT)]
        assert len({*shown, *held_out}) == len(subjects.TRAINING) + len(subjects.HELD_OUT)


def test_a_real_picture_is_like_its_subject_and_shows_what_was_asked_for():
    judge = tuning.Judge("teapot", tuning.Networks())
    views = [view for view in subjects.HELD_OUT if view.background in ("blue", "green", "purple")]
    asked = [(view.background, None) for view in views[:2]] + [("orange", "fluent-3d")]
    images = subjects.pictures("teapot", views)
    found = judge(images, ["a teapot"] * 3, [("", *one) for one in asked])
    assert found["background"] == [1, 1, 0]
    assert found["style"][:2] == [None, None]
    assert found["recognised"] == [1, 1, 1]
    assert found["scorer"][2] is None
    assert min(found["scorer"][:2]) > 0.7
    training = judge(subjects.pictures("teapot", subjects.TRAINING), ["a teapot"] * 5, [("", None, None)] * 5)
    assert training["scorer_nearest"] == pytest.approx([1] * 5)
    cats = judge(subjects.pictures("cat", views), ["a cat"] * 3, [("", *one) for one in asked])
    assert cats["recognised"] == [0, 0, 0]
    assert max(cats["scorer"][:2]) < min(found["scorer"][:2])


def test_networks_of_a_user(tmp_path):
    from transformers import AutoProcessor, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    dino.save_pretrained(tmp_path / "dino")
    prepare = ViTImageProcessor(size={"height": 32, "width": 32})
    prepare.save_pretrained(tmp_path / "dino")
    networks = tuning.Networks(tmp_path / "dino", small_clip(tmp_path / "clip"))
    images = [Image.effect_noise((64, 64), 90).convert("RGB"), Image.new("RGB", (64, 64), "teal")]
    found = networks(images)
    with torch.no_grad():
        inputs = prepare(images=images, return_tensors="pt")
        expected = dino(**inputs).last_hidden_state[:, 0]
    np.testing.assert_allclose(found["dino"], torch.nn.functional.normalize(expected, dim=1), atol=1e-5)
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    inputs = AutoProcessor.from_pretrained(tmp_path / "clip")(text=["a cat"] * 2, images=images, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(found["clip"], clip(**inputs).image_embeds, atol=1e-5)
    judged = tuning.Judge("cat", networks)(images, ["a cat", "a dog"], [("", None, None)] * 2)
    assert {"dino", "clip", "clip_text"} <= judged.keys()
    with pytest.raises(OSError, match="nothing"):
        tuning.Networks(tmp_path / "nothing")


def test_a_system_is_tuned_drawn_and_judged_and_not_made_again(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    command = ["tuning.py", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path), "--subjects", "cat"]
    command += ["--systems", "untuned,tune", "--steps", "2", "--seeds", "1", "--options", '{"learning_rate": 0.3}']
    command += ["--report", str(tmp_path / "report.json"), "--sheet", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(tuning, "STRENGTHS", (0,))
    monkeypatch.setattr(tuning, "ASKED", tuning.ASKED[4:6])
    monkeypatch.setattr(tuning, "prompt_of", lambda name: f"a {name}")  # the tiny model reads few tokens
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(tuning, "in_a_process", tuning.one)
    tuning.main()
    rows = tuning.read_rows(tmp_path / "rows.jsonl")
    of = {(row["system"], row["strength"]): row for row in rows}
    assert set(of) == {("untuned", 1), ("tune", 1), ("tune", 0)}
    assert of["tune", 0]["pictures"] == of["untuned", 1]["pictures"]
    assert max(of["untuned", 1]["pictures"]["other_scorer"]) == pytest.approx(0, abs=1e-4)
    assert max(of["tune", 1]["pictures"]["other_scorer"]) > 1e-3
    assert of["tune", 1]["bytes"] > 0
    told = json.loads((tmp_path / "report.json").read_text())
    assert [row["system"] for row in told["systems"]] == ["untuned", "tune", "tune"]
    assert told["against"][0]["to"] == ["untuned", "W4A8", 1]
    trained = subjects.pictures("cat", subjects.TRAINING)[0].resize((128, 128), Image.Resampling.NEAREST)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.crop((4, 4, 132, 132)).tobytes() == trained.tobytes()
    monkeypatch.setattr(tuning, "in_a_process", None)
    tuning.main()
    assert tuning.read_rows(tmp_path / "rows.jsonl") == rows


def rows_of(values):
    """Rows of two subjects, whose pictures have the values of {(system, subject): likeness of each}."""
    return [
        {
            "system": system,
            "weights": "float" if system == "dreambooth" else "W4A8",
            "subject": subject,
            "strength": 1,
            "label": "",
            "pictures": {"scorer": list(likeness), "scorer_nearest": list(likeness)},
            "real": {"scorer": 0.9, "scorer_coded": 0.8, "scorer_nearest": 0.9, "scorer_closest": 0.85},
            "bytes": 0,
        }
        for (system, subject), likeness in values.items()
    ]


def test_intervals_are_of_pairs():
    rng = np.random.default_rng(0)
    subjects_differ = {"cat": rng.uniform(0.2, 0.4, 20), "bird": rng.uniform(0.6, 0.8, 20)}
    values = {("tune", name): one + 0.1 for name, one in subjects_differ.items()}
    values |= {("peqa", name): one for name, one in subjects_differ.items()}
    told = tuning.report(rows_of(values), 400, 3)
    tune, peqa = told["systems"]
    assert tune["scorer"][2] - tune["scorer"][1] > 0.3, "subjects are resampled"
    assert peqa["scorer"][0] == pytest.approx(np.mean(list(subjects_differ.values())), abs=1e-4)
    (difference,) = told["against"]
    assert difference["scorer"] == pytest.approx([0.1] * 3), "what both share is no part of the interval"


def test_the_way_to_real_pictures_and_dreambooths_likeness():
    names = ("cat", "bird")
    values = {
        (system, name): [likeness, likeness] for system, likeness in (("untuned", 0.5), ("tune", 0.7)) for name in names
    }
    values |= {("dreambooth", name): [0.8, 0.8] for name in names}
    told = tuning.report(rows_of(values), 400, 3)
    assert told["ratios"]["way_W4A8_scorer"] == pytest.approx([0.5] * 3)
    assert told["ratios"]["way_coded_W4A8_scorer"] == pytest.approx([0.6667] * 3)
    assert told["ratios"]["of_dreambooth_W4A8_scorer"] == pytest.approx([0.875] * 3)


def test_copies_are_nearer_to_training_than_real_pictures_are_to_each_other():
    values = {("tune", "cat"): [0.8, 0.86, 0.9, 0.7], ("tune", "bird"): [0.8, 0.8, 0.8, 0.8]}
    (row,) = tuning.report(rows_of(values), 400, 3)["systems"]
    assert row["copies_scorer"][0] == 0.25


def test_subjects_that_defaults_were_chosen_on_are_not_reported():
    chosen = next(iter(subjects.CHOSEN_ON))
    told = tuning.report(rows_of({("tune", "cat"): [0.8], ("tune", chosen): [0.1]}), 400, 3)
    assert told["systems"][0]["subjects"] == ["cat"]


def test_every_case_is_there_once():
    arguments = argparse.Namespace(
        subjects=",".join(subjects.SUBJECTS),
        systems="untuned,tune,peqa,prior,together,lora,dreambooth",
        label="",
        checkpoints={"W4A8": None, "W8A8": None},
    )
    keys = [tuning.key_of(case) for case in tuning.cases(arguments)]
    assert len(set(keys)) == len(keys)
    assert {key[2] for key in keys if key[0] == "together"} & set(subjects.REPORTED) == set(tuning.TOGETHER)
