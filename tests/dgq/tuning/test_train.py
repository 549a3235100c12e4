"""A whole run: what is learned, what is resumed, and what is refused."""

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import dgq
from dgq.errors import DgqError
from dgq.tuning import train
from dgq.tuning.file import describe, read
from dgq.tuning.layout import Layout
from dgq.tuning.objective import Objective, encode_texts
from dgq.tuning.pictures import read_subject, to_tensor
from dgq.tuning.state import State
from dgq.tuning.train import Options, tune

SHORT = {"steps": 4, "batch": 2, "checkpoint_every": 2, "learning_rate": 0.01}


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    """A folder of four pictures, of several sizes and modes."""
    folder = tmp_path_factory.mktemp("subject")
    for i, (mode, size) in enumerate((("RGB", (64, 64)), ("RGBA", (40, 64)), ("L", (64, 48)), ("P", (80, 80)))):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((8, 8, 30, 36), "teal")
        image.convert(mode).save(folder / f"{i}.png")
    return folder


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_lowers_the_loss_and_moves_the_scales(tiny_checkpoint, subject, tmp_path):
    losses = []
    options = Options(steps=40, learning_rate=0.02, batch=4, checkpoint_every=0)
    out = tmp_path / "sks.safetensors"

    def progress(stage, done, total, detail):
        if stage == "tune":
            losses.append(float(detail.removeprefix("loss ")))

    about = tune(tiny_checkpoint, [(subject, "a photo of sks cat")], out, options, progress)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert about == describe(out)[0]
    assert (about.experts, about.steps, about.subjects[0].pictures) == (2, 40, 4)
    pipe = dgq.load(tiny_checkpoint)
    vectors = read(out, pipe.unet).vectors
    for part in Layout.of(pipe.unet, True).split(vectors).values():
        assert float(part.abs().max()) > 0
    assert not (tmp_path / ".sks.safetensors.partial").exists()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation": 2, "class_prompts": ["a cat"], "class_images": 2, "gradient_checkpointing": True},
        {"experts": 1, "input_scales": False, "snr_gamma": 5.0, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(tiny_checkpoint, subject, tmp_path, more, monkeypatch):
    pairs = [(subject, "a photo of sks cat"), (subject, "a photo of zwx dog")]
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    tune(tiny_checkpoint, pairs, whole, Options(**SHORT, **more))
    step = train._Run._step

    class KilledError(BaseException):
        pass

    def killed(run, number):
        if number == 3:
            raise KilledError
        step(run, number)

    monkeypatch.setattr(train._Run, "_step", killed)
    with pytest.raises(KilledError):
        tune(tiny_checkpoint, pairs, part, Options(**SHORT, **more))
    assert not part.exists()
    done = []
    monkeypatch.setattr(train._Run, "_step", lambda run, number: (done.append(number), step(run, number)))
    tune(tiny_checkpoint, pairs, part, Options(**SHORT, **more, resume=True))
    assert done == [2, 3]
    assert digest(part) == digest(whole)


def test_experts_of_more_noise_are_written_at_less_strength(tiny_checkpoint, subject, tmp_path):
    vectors, pipe = [], dgq.load(tiny_checkpoint)
    for strength in (1.0, 0.25):
        file = tmp_path / f"{strength}.safetensors"
        options = Options(**{**SHORT, "batch": 4}, experts=3, high_noise_strength=strength)
        tune(tiny_checkpoint, [(subject, "a cat")], file, options)
        vectors.append(read(file, pipe.unet).vectors)
    assert all(float(expert.abs().max()) > 0 for expert in vectors[0])
    for whole, part, factor in zip(*vectors, (1, 0.625, 0.25), strict=True):
        torch.testing.assert_close(part, factor * whole, rtol=1e-3, atol=1e-6)
    one = tmp_path / "one.safetensors"
    tune(tiny_checkpoint, [(subject, "a cat")], one, Options(**SHORT, experts=1, high_noise_strength=0))
    assert float(read(one, pipe.unet).vectors.abs().max()) > 0


def test_checkpointed_gradients_are_the_same(tiny_checkpoint, subject, tmp_path):
    files = []
    for checkpointing in (False, True):
        files.append(tmp_path / f"{checkpointing}.safetensors")
        options = Options(**SHORT, gradient_checkpointing=checkpointing)
        tune(tiny_checkpoint, [(subject, "a cat")], files[-1], options)
    pipe = dgq.load(tiny_checkpoint)
    assert torch.equal(*(read(file, pipe.unet).vectors for file in files))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_learns_as_float32_does(tiny_checkpoint, subject, tmp_path, checkpointing):
    vectors = []
    for precision in ("no", "bf16"):
        out = tmp_path / f"{precision}.safetensors"
        options = Options(**SHORT, gradient_checkpointing=checkpointing, mixed_precision=precision)
        tune(tiny_checkpoint, [(subject, "a cat")], out, options)
        vectors.append(read(out, dgq.load(tiny_checkpoint).unet).vectors.flatten())
    assert not torch.equal(*vectors)
    assert float(torch.nn.functional.cosine_similarity(*vectors, dim=0)) > 0.9


@pytest.mark.parametrize("wrong", ["fp16", "int8"])
def test_another_precision_is_refused(tiny_checkpoint, subject, tmp_path, wrong):
    with pytest.raises(DgqError, match=f"mixed_precision '{wrong}' is not one of no, bf16") as caught:
        tune(tiny_checkpoint, [(subject, "a cat")], tmp_path / "x.safetensors", Options(mixed_precision=wrong))
    assert (caught.value.hint is not None) == (wrong == "fp16")


@pytest.mark.parametrize("validation", [(), ("a cat",)])
def test_what_encodes_is_let_go_of_where_nothing_is_drawn(tiny_checkpoint, subject, tmp_path, validation, monkeypatch):
    seen = []
    step = train._Run._step

    def watched(run, number):
        seen.append((run.pipe.vae is None, run.pipe.text_encoder is None))
        step(run, number)

    monkeypatch.setattr(train._Run, "_step", watched)
    options = Options(**SHORT, validation_prompts=validation)
    tune(tiny_checkpoint, [(subject, "a cat")], tmp_path / "x.safetensors", options)
    assert set(seen) == {(not validation, not validation)}


def test_another_run_is_not_resumed(tiny_checkpoint, subject, tmp_path):
    out = tmp_path / "x.safetensors"
    partial = tmp_path / ".x.safetensors.partial"
    partial.mkdir()
    state = State(partial, lambda *_: None)
    state.start("another", resume=False)
    with pytest.raises(DgqError, match="other pictures or with other settings"):
        tune(tiny_checkpoint, [(subject, "a cat")], out, Options(**SHORT, resume=True))
    state.file.write_bytes(b"cut")
    (partial / "fingerprint").unlink()
    for name in (".dgq-0123456789abcdef.tmp", ".tmpw6fP61"):  # as a run leaves them that is killed while it writes
        (partial / name).touch()
    told = []
    tune(
        tiny_checkpoint,
        [(subject, "a cat")],
        out,
        Options(**SHORT, resume=True),
        lambda stage, done, total, detail: told.append((stage, detail)),
    )
    assert any(stage == "resume" and "begins anew" in detail for stage, detail in told)
    assert out.is_file()
    assert not partial.exists()


@pytest.mark.parametrize("name", ["vectors", "0.exp_avg", "0.exp_avg_sq", "0.step"])
@pytest.mark.parametrize("short", [False, True])
def test_a_state_that_is_not_whole_is_not_used(tmp_path, name, short):
    vectors = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(2)]
    optimizer = torch.optim.AdamW(vectors)
    vectors[0].grad = torch.ones(3)  # of the other there is no momentum yet
    optimizer.step()
    told = []
    state = State(tmp_path, lambda *arguments: told.append(arguments[3]))
    state.store(7, vectors, optimizer)

    def load():
        fresh = [torch.nn.Parameter(torch.zeros(3)) for _ in vectors]
        other = torch.optim.AdamW(fresh)
        return state.load(fresh, other), torch.stack(list(fresh)), [other.state[one] for one in fresh]

    step, found, momentum = load()
    assert (step, told, list(momentum[1])) == (7, [], [])
    assert torch.equal(found, torch.stack(vectors))
    assert all(torch.equal(momentum[0][key], value) for key, value in optimizer.state[vectors[0]].items())
    tensors = load_file(state.file)
    whole = tensors.pop(name)
    if short:
        tensors[name] = whole[:0]
    save_file(tensors, state.file, {"step": "7"})
    step, found, momentum = load()
    assert (step, len(told), int(found.count_nonzero()), any(momentum)) == (0, 1, 0, False)
    assert told[0].startswith("state.safetensors cannot be used, the run begins anew: ")


def test_a_loss_that_is_not_finite_keeps_the_last_state(tiny_checkpoint, subject, tmp_path, monkeypatch):
    loss = Objective.loss
    calls = []

    def broken(objective, *arguments):
        calls.append(None)
        return loss(objective, *arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(Objective, "loss", broken)
    out, two = tmp_path / "x.safetensors", tmp_path / "two.safetensors"
    with pytest.raises(DgqError, match="loss of step 3 is not finite") as raised:
        tune(tiny_checkpoint, [(subject, "a cat")], out, Options(**{**SHORT, "checkpoint_every": 0}))
    assert "holds the state after step 2" in raised.value.hint
    assert describe(out)[0].steps == 2
    tune(tiny_checkpoint, [(subject, "a cat")], two, Options(**{**SHORT, "steps": 2, "checkpoint_every": 0}))
    pipe = dgq.load(tiny_checkpoint)
    assert torch.equal(read(out, pipe.unet).vectors, read(two, pipe.unet).vectors)


def test_validation_changes_nothing(tiny_checkpoint, subject, tmp_path):
    plain, drawn = tmp_path / "plain.safetensors", tmp_path / "drawn.safetensors"
    tune(tiny_checkpoint, [(subject, "a cat")], plain, Options(**SHORT))
    options = Options(**SHORT, validation_prompts=["a dog"], validate_every=3)
    tune(tiny_checkpoint, [(subject, "a cat")], drawn, options)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["drawn-step3-1.png", "drawn-step4-1.png"]
    assert digest(plain) == digest(drawn)


@pytest.mark.parametrize("step", [2, 4])
def test_validation_that_was_interrupted_is_drawn_when_resumed(tiny_checkpoint, subject, tmp_path, step, monkeypatch):
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    options = Options(**SHORT, validation_prompts=["a dog"], validate_every=2)
    tune(tiny_checkpoint, [(subject, "a cat")], whole, options)
    validate = train._Run._validate

    def interrupted(run, number):
        if number == step:
            raise KeyboardInterrupt
        validate(run, number)

    monkeypatch.setattr(train._Run, "_validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_checkpoint, [(subject, "a cat")], part, options)
    monkeypatch.undo()
    tune(tiny_checkpoint, [(subject, "a cat")], part, dataclasses.replace(options, resume=True))
    assert digest(part) == digest(whole)
    for number in (2, 4):
        names = (tmp_path / f"{name}-step{number}-1.png" for name in ("whole", "part"))
        whole_picture, part_picture = (Image.open(name).tobytes() for name in names)
        assert whole_picture == part_picture


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_schedulers(tiny_checkpoint, predicts, gamma):
    """Of a prediction that is right the loss is 0; and its weights are those of the clean picture's error."""
    pipe = dgq.load(tiny_checkpoint)
    pipe.scheduler.register_to_config(prediction_type=predicts)
    objective = Objective(pipe, encode_texts(pipe, ["a cat"], 16, 16), gamma, 1.0)
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    times = torch.tensor([10, 400, 900])
    alpha = objective.schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    right = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
    }[predicts]
    seen = []

    class Unet:
        device = torch.device("cpu")

        def __call__(self, sample, t, **kwargs):
            seen.append(sample)
            return type("Output", (), {"sample": right + 0.1})

    objective.unet = Unet()
    items = [type("Item", (), {"text": 0})] * 3
    loss = float(objective.loss(items, 3, latents, noise, times))
    torch.testing.assert_close(seen[0], alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
    ratio = (alpha / (1 - alpha)).flatten()
    clean = ratio.clamp(max=5.0)
    weight = {"epsilon": clean / ratio, "sample": clean, "v_prediction": clean / (ratio + 1)}[predicts]
    assert loss == pytest.approx(0.01 * (1.0 if gamma is None else float(weight.mean())), rel=1e-4)


def test_sdxl_is_tuned_too(tmp_path, subject):
    from dgq.calibration.run import Options as Calibration
    from dgq.calibration.run import calibrate
    from dgq.recipe import Recipe
    from tests.tiny_pipelines import sdxl

    base = sdxl(tmp_path / "xl")
    recipe = Recipe(wbits=8, rounding="nearest", channels="none")
    calibrate(base, tmp_path / "w8", recipe, Calibration(prompts=["a cat"], steps=1, evaluate=0))
    about = tune(tmp_path / "w8", [(subject, "a photo of sks cat")], tmp_path / "x.safetensors", Options(**SHORT))
    assert about.steps == 4


def test_pictures_are_fitted(subject):
    images = read_subject(subject)
    assert {image.mode for image in images} == {"RGB"}
    tensor = to_tensor(images, 32, 16)
    assert tensor.shape == (4, 3, 16, 32)
    assert float(tensor.max()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed(tiny_checkpoint, subject, tmp_path):
    """The real command, stopped at any moment from its first import on; the file is that of an undisturbed run."""
    whole, out, random_ = tmp_path / "whole.safetensors", tmp_path / "x.safetensors", random.Random(0)
    command = [
        sys.executable,
        "-m",
        "dgq_cli",
        "tune",
        str(tiny_checkpoint),
        "--images",
        str(subject),
        "--prompt",
        "a cat",
        "--steps",
        "40",
        "--batch",
        "1",
        "--checkpoint-every",
        "1",
        "--class-prompt",
        "a dog",
        "--class-images",
        "2",
    ]
    environment = {**os.environ, "NO_COLOR": "1"}
    started = time.monotonic()
    subprocess.run([*command, "--out", str(whole)], check=True, env=environment, capture_output=True)
    took, stopped = time.monotonic() - started, 0
    while stopped < 20:
        process = subprocess.Popen(
            [*command, "--out", str(out), "--resume"], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=random_.uniform(0, 1.1) * took)
        except subprocess.TimeoutExpired:
            process.send_signal(random_.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            process.wait()
            stopped += 1
        if out.exists():
            assert digest(out) == digest(whole)
            out.unlink()
    subprocess.run([*command, "--out", str(out), "--resume"], check=True, env=environment, capture_output=True)
    assert digest(out) == digest(whole)
