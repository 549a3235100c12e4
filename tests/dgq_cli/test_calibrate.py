"""dgq calibrate as a person runs it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options
from dgq.recipe import Recipe
from dgq_cli import calibrate_command

BUDGET = ("--budget", 5.5)


def test_calibrate_then_generate(dgq_command, tiny_pipeline, tmp_path):
    out = tmp_path / "w8"
    run = dgq_command(
        "calibrate",
        tiny_pipeline,
        "--out",
        out,
        "--wbits",
        8,
        "--prompts",
        2,
        "--steps",
        2,
        "--evaluate",
        1,
        "--text-encoder",
        "int8",
        "--json",
        alone=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["checkpoint"] == str(out)
    assert result["recipe"]["wbits"] == 8
    assert result["unet_bytes"] < result["unet_float16_bytes"]
    assert result["calibration"]["fidelity"]["prompts"] == 1
    run = dgq_command("generate", "a cat", "--model", out, "--out", tmp_path / "cat.png", "--seed", 3, "--steps", 2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "cat.png")
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")
    run = dgq_command("inspect", out, "--verify", "--layers")
    assert run.returncode == 0, run.stderr
    assert "text_encoder      integer W8A8, 6 layers, " in run.stdout
    assert "6 quantized layers of the text_encoder\n" in run.stdout
    assert "embeddings" in run.stdout


def test_convrot_needs_no_calibration(dgq_command, tiny_pipeline, tmp_path):
    out = tmp_path / "out"
    options = ("--recipe", "convrot", "--wbits", 8, "--evaluate", 0, "--text-encoder", "int8")
    run = dgq_command("calibrate", tiny_pipeline, "--out", out, *options, "--dry-run")
    assert "calls               0\n" in run.stdout
    run = dgq_command("calibrate", tiny_pipeline, "--out", out, *options)
    assert run.returncode == 0, run.stderr
    run = dgq_command("inspect", out, "--verify")
    assert "convrot W8A8" in run.stdout
    assert "text_encoder      convrot W8A8, 6 layers, " in run.stdout
    run = dgq_command("generate", "a cat", "--model", out, "--out", tmp_path / "cat.png", "--steps", 1)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_method_learns_its_rounding(dgq_command, tiny_pipeline, tmp_path):
    out = tmp_path / "out"
    options = ("--recipe", "paper", "--rounding", "adaround", "--iterations", 3, "--groups", 8, "--evaluate", 1)
    few = ("--out", out, *options, "--prompts", 1, "--steps", 2)
    run = dgq_command("calibrate", tiny_pipeline, *few, "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "paper G=8 adaround W4A8" in run.stdout
    assert " in 2 pass(es)\n" in run.stdout
    run = dgq_command("calibrate", tiny_pipeline, *few, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["recipe"]["iterations"] == 3
    assert "learn " in run.stderr
    run = dgq_command("inspect", out, "--verify")
    assert "paper G=8 adaround W4A8" in run.stdout
    assert "rounding          adaround, 3 iterations\n" in run.stdout
    run = dgq_command("generate", "a cat", "--model", out, "--out", tmp_path / "cat.png", "--steps", 1)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "cat.png").read_bytes().startswith(b"\x89PNG")


def test_the_options_default_to_the_librarys():
    """The command line imports no library before it has checked its options."""
    parameters = signature(calibrate_command.command).parameters.items()
    options, defaults = Options(), {name: parameter.default for name, parameter in parameters}
    assert defaults["memory"] * 2**30 == options.budget
    alike = ("prompts", "steps", "record_steps", "calls", "evaluate", "seed", "text_encoder")
    assert all(defaults[name] == getattr(options, name) for name in alike)


def test_dry_run_writes_nothing(dgq_command, tiny_pipeline, tmp_path):
    run = dgq_command("calibrate", tiny_pipeline, "--out", tmp_path / "out", "--dry-run", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["layers"] == 85
    assert json.loads(run.stdout)["decoder_layers"] == 30
    options = ("--vae", "float", "--text-encoder", "int8")
    run = dgq_command("calibrate", tiny_pipeline, "--out", tmp_path / "out", "--dry-run", *options)
    assert "VAE                 float" in run.stdout
    assert "text encoders       6 layers, " in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_bits(dgq_command, tiny_pipeline, tmp_path):
    options = ("--out", tmp_path / "out", "--prompts", 1, "--steps", 1, "--evaluate", 0, "--vae", "float")
    dry = [dgq_command("calibrate", tiny_pipeline, *options, "--dry-run", "--json", *more) for more in ((), BUDGET)]
    without, within = (json.loads(run.stdout) for run in dry)
    assert without["budget_bytes"] is None
    assert within["packed_bytes"] - without["packed_bytes"] == within["budget_bytes"] > 0
    # by one measurement of the machine, which each process makes anew
    once = Options(prompts=1, steps=1, evaluate=0, vae="float")
    plain, chosen = (estimate(tiny_pipeline, Recipe(), replace(once, bits=bits)) for bits in (None, BUDGET[1]))
    assert chosen.packed_bytes == within["packed_bytes"]
    assert chosen.seconds > plain.seconds
    run = dgq_command("calibrate", tiny_pipeline, *options, "--dry-run", *BUDGET)
    assert "for layers of 8 bits, chosen by measured noise" in run.stdout
    assert list(tmp_path.iterdir()) == []
    run = dgq_command("calibrate", tiny_pipeline, *options, *BUDGET)
    assert run.returncode == 0, run.stderr
    (told,) = (line for line in run.stderr.splitlines() if line.startswith("8 bits by the budget: "))
    found = json.loads(dgq_command("inspect", tmp_path / "out", "--json").stdout)
    chosen = [name for name, bits in found["recipe"]["overrides"] if bits == 8]
    assert told.removeprefix("8 bits by the budget: ").split(", ") == chosen
    assert 5.4 < found["bits_per_weight"] <= 5.5
    assert found["unet_bytes"] == pytest.approx(within["packed_bytes"], rel=0.1)


@pytest.mark.parametrize(
    "args, code, message",
    [
        (("--budget", "3.9"), 2, "--budget"),
        (("--budget", "nan"), 2, "--budget"),
        (("--budget", "8.5", "--wbits", "8"), 2, "--recipe integer --wbits 4"),
        (("--budget", "5", "--recipe", "paper"), 2, "--recipe integer --wbits 4"),
        (("--budget", "4.1"), 1, "scales and biases included"),
        (("--budget", "4.1", "--dry-run"), 1, "too small: the layers take"),
        (("--wbits", "5"), 2, "wbits"),
        (("--abits", "2"), 2, "abits"),
        (("--recipe", "magic"), 2, "recipe"),
        (("--recipe", "convrot", "--rounding", "gptq"), 2, "the convrot recipe has rounding 'nearest', not 'gptq'"),
        (("--recipe", "paper", "--rounding", "gptq"), 2, "has rounding 'nearest' or 'adaround', not 'gptq'"),
        (("--rounding", "adaround"), 2, "the integer recipe has rounding 'gptq' or 'nearest', not 'adaround'"),
        (("--recipe", "paper", "--iterations", "9"), 2, "iterations are of rounding 'adaround'"),
        (("--recipe", "paper", "--rounding", "adaround", "--iterations", "0"), 2, "--iterations"),
        (("--iterations", "9"), 2, "the integer recipe has no iterations"),
        (("--recipe", "paper", "--attention", "float"), 2, "the paper recipe has no attention"),
        (("--groups", "16"), 2, "the integer recipe has no groups"),
        (("--recipe", "convrot", "--channels", "smooth"), 2, "the convrot recipe has channels 'rotate', not 'smooth'"),
        (("--recipe", "convrot", "--budget", "5"), 2, "--recipe integer --wbits 4"),
        (("--recipe", "convrot", "--prompts", "5"), 2, "--prompts: the convrot recipe draws no calibration pictures"),
        (("--recipe", "convrot", "--record-steps", "5"), 2, "--record-steps: the convrot recipe"),
        (("--recipe", "convrot", "--calls", "5"), 2, "--calls: the convrot recipe"),
        (("--recipe", "convrot", "--seed", "5"), 2, "--seed: the convrot recipe"),
        (("--recipe", "convrot", "--memory", "5"), 2, "--memory: the convrot recipe"),
        (("--vae", "int4"), 2, "neither int8 nor float"),
        (("--text-encoder", "int4"), 2, "neither int8 nor float"),
        (("--override", "mid_block"), 2, "PATTERN=BITS"),
        (("--prompts", "0"), 2, "from 1 to"),
        (("--prompts", "/no/such/file"), 1, "/no/such/file"),
        (("--override", "nosuch.*=8", "--dry-run"), 1, "nosuch"),
    ],
)
def test_wrong_options_end_in_one_line(dgq_command, tiny_pipeline, tmp_path, args, code, message):
    run = dgq_command("calibrate", tiny_pipeline, "--out", tmp_path / "out", *args)
    assert run.returncode == code
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_captions_files(dgq_command, tiny_pipeline, tmp_path):
    """As `dgq eval` reads them, not their lines."""
    (tmp_path / "captions.json").write_text('{"annotations": [{"caption": "a cat"},\n{"caption": "a dog"}]}')
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\n")
    options = ("--steps", 1, "--evaluate", 0, "--rounding", "nearest", "--channels", "none", "--vae", "float")
    for file in ("captions.json", "parti.tsv"):
        out = tmp_path / f"of-{file}"
        run = dgq_command("calibrate", tiny_pipeline, "--out", out, "--prompts", tmp_path / file, *options)
        assert run.returncode == 0, run.stderr
        assert "record 1/2  a cat" in run.stderr
        assert "record 2/2, about 0 s left  a dog\n" in run.stderr


def test_fewer_prompts_than_were_asked_for_are_told(dgq_command, tiny_pipeline, tmp_path):
    options = ("--steps", 1, "--evaluate", 0, "--rounding", "nearest", "--channels", "none", "--vae", "float")
    run = dgq_command("calibrate", tiny_pipeline, "--out", tmp_path / "out", "--prompts", 500, *options)
    assert run.returncode == 0, run.stderr
    assert "prompts 2/2  500 asked for: there are no more built-in ones" in run.stderr


def test_unknown_model(dgq_command, tmp_path):
    run = dgq_command("calibrate", "./nosuch", "--out", tmp_path / "out")
    assert run.returncode == 1
    assert run.stderr.startswith("error: ./nosuch: no such folder")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_no_checkpoint_and_it_resumes(tiny_pipeline, tmp_path, dgq_command, number):
    args = [
        "calibrate",
        str(tiny_pipeline),
        "--out",
        str(tmp_path / "out"),
        "--prompts",
        "2",
        "--steps",
        "2",
        "--evaluate",
        "0",
    ]
    # a session of its own, so that the signal reaches only this process; a shell starts jobs in the background with the
    # signal ignored, which would be handed down
    process = subprocess.Popen(
        [sys.executable, "-m", "dgq_cli", *args],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "NO_COLOR": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 120
    while not list(partial.glob("layer-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume" in stderr
    assert not (tmp_path / "out").exists()
    run = dgq_command(*args, "--resume")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_lora_fused_before_calibrating(dgq_command, tiny_pipeline, tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file, single = tmp_path / "style.safetensors", tmp_path / "single.safetensors"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, file)
    save_file(factors, single)
    given = (
        "calibrate",
        tiny_pipeline,
        "--lora",
        f"{file}:0.7",
        "--prompts",
        1,
        "--steps",
        1,
        "--evaluate",
        0,
        "--rounding",
        "nearest",
        "--out",
        tmp_path / "out",
    )
    run = dgq_command(*given, "--lora", file)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out-float" / "sources.json").read_text())["weights"] == [0.7, 1.0]
    assert (tmp_path / "out" / "model_index.json").is_file()
    shutil.rmtree(tmp_path / "out-float")
    run = dgq_command(*given)  # refused before the float model is made
    assert run.returncode == 1
    assert "out: already exists" in run.stderr
    assert not (tmp_path / "out-float").exists()
    for args, code, message in (
        ((single, "--out", tmp_path / "x"), 1, "--config"),
        ((tiny_pipeline, "--lora", f"{file}:nan"), 2, "not finite"),
    ):
        run = dgq_command("calibrate", *args)
        assert run.returncode == code
        assert message in run.stderr
        assert "Traceback" not in run.stderr


def test_one_of_several_processes_calibrates_and_draws(dgq_command, tiny_pipeline, tmp_path, monkeypatch):
    """As `accelerate launch` starts them."""
    made, drawn = tmp_path / "out", tmp_path / "pictures"
    few = ("--prompts", 1, "--steps", 1, "--evaluate", 0, "--rounding", "nearest")
    commands = (
        ("calibrate", tiny_pipeline, *few, "--out", made),
        ("generate", "a cat", "--model", made, "--steps", 1, "--seed", 7, "--out", drawn),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in commands:
        before = list(tmp_path.rglob("*"))
        monkeypatch.setenv("RANK", "1")
        run = dgq_command(*command)
        assert run.returncode == 0
        assert "the first one does it" in run.stderr
        assert list(tmp_path.rglob("*")) == before
        monkeypatch.setenv("RANK", "0")
        assert dgq_command(*command).returncode == 0
    assert (made / "model_index.json").is_file()
    assert [file.name for file in drawn.iterdir()] == ["a-cat-7.png"]


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "two"), ("RANK", "first")])
def test_processes_that_are_no_number_are_told(dgq_command, monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    run = dgq_command("generate", "a cat")
    assert run.returncode == 1
    assert run.stderr == f"error: {name}={value} is no number; leave it to accelerate launch\n"


def test_processes_that_are_empty_are_one(dgq_command, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    run = dgq_command("generate", "a cat", "--model", tiny_pipeline, "--steps", 1, "--out", tmp_path / "a.png")
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_killed_fifteen_times_and_resumed(tiny_pipeline, tmp_path, rounding, threads):
    """The real command, stopped at any moment and resumed: byte for byte the checkpoint of an undisturbed run with as
    many threads; torch's float sums are others with others."""
    random_, signals = random.Random(f"{rounding} {threads}"), [signal.SIGKILL, signal.SIGTERM, signal.SIGINT] * 5
    few = ("--prompts", "2", "--steps", "2", "--evaluate", "1", "--rounding", rounding)
    command = [sys.executable, "-m", "dgq_cli", "calibrate", str(tiny_pipeline), *few]

    def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
        # a shell starts jobs in the background with SIGINT ignored, which would be handed down
        return subprocess.Popen(
            [*command, "--out", str(out), *more],
            env={**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": str(threads)},
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def at_work(process: subprocess.Popen[bytes], out: Path) -> None:
        """Until it holds the place of its work: then its imports are done."""
        lock, files = str(out.with_name(f".{out.name}.partial") / "lock"), Path(f"/proc/{process.pid}/fd")
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if lock in [os.readlink(file) for file in files.iterdir()]:
                    return
            time.sleep(0.01)

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"  # the model card tells the name
    process, began = start(whole), time.monotonic()
    at_work(process, whole)
    working = time.monotonic()
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    before, during = working - began, time.monotonic() - working
    expected = contents(whole)
    while signals:
        process = start(out, "--resume")
        working = random_.random() < 0.8
        if working:
            at_work(process, out)
        try:
            process.wait(timeout=random_.uniform(0, during if working else before))
        except subprocess.TimeoutExpired:
            process.send_signal(number := signals.pop())
            assert process.wait() in (-number, 128 + number, 0), (number, process.returncode, process.stderr.read())
        process.stderr.close()
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
    process = start(out, "--resume")
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    assert contents(out) == expected
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    "options, said",
    [
        (("--size", "4104"), "from 64 to 4096"),
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--config", "nowhere"), "taken for a single-file checkpoint alone"),
    ],
)
def test_dry_run_refuses_what_calibrating_refuses(dgq_command, tiny_pipeline, options, said):
    run = dgq_command("calibrate", tiny_pipeline, "--dry-run", *options)
    assert (run.returncode, run.stdout) == (1, "")
    assert said in run.stderr


def test_dry_run_counts_the_prompts_there_are(dgq_command, tiny_pipeline):
    found = [
        json.loads(dgq_command("calibrate", tiny_pipeline, "--dry-run", "--json", "--prompts", count).stdout)["calls"]
        for count in ("1", "100000", "200000")
    ]
    assert found[0] < found[1] == found[2]
