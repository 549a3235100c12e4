"""`dgq eval` as a user runs it."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from random_lpips import backbone, heads
from safetensors.torch import save_file

from dgq.calibration.run import Options as Calibration
from dgq.calibration.run import calibrate
from dgq.errors import DgqError
from dgq.evaluation.evaluate import Kept, Options, evaluate
from dgq.pictures import embedded
from dgq.pictures.generation import Settings
from dgq.recipe import Recipe

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at W4A8, quickly calibrated."""
    folder = tmp_path_factory.mktemp("eval") / "w4a8"
    recipe = Recipe(wbits=4, rounding="nearest")
    calibrate(embedded.NAME, folder, recipe, Calibration(prompts=2, steps=2, guidance=3.0, evaluate=0))
    return folder


def options(**changes: object) -> Options:
    return Options(**{"prompts": "8", "floor": 2, "settings": Settings(steps=3, batch=4, seed=1), **changes})  # type: ignore[arg-type]


def test_report_of_a_checkpoint(dgq_command: Run, checkpoint: Path, tmp_path: Path) -> None:
    sheet, file, page = tmp_path / "grid.png", tmp_path / "report.json", tmp_path / "page.html"
    save_file(backbone() | heads(), tmp_path / "lpips.safetensors")
    run = dgq_command(
        "eval",
        checkpoint,
        "--prompts",
        8,
        "--steps",
        3,
        "--batch",
        4,
        "--floor",
        2,
        "--seed",
        1,
        "--lpips",
        tmp_path / "lpips.safetensors",
        "--grid",
        sheet,
        "--out",
        file,
        "--html",
        page,
        "--json",
        alone=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    items = report["items"]
    assert [item["seed"] for item in items] == list(range(1, 9))
    assert sum(item["psnr_db"] for item in items) / 8 == pytest.approx(report["fidelity"]["psnr_db"]["mean"])
    assert sum(item["top1"] for item in items) / 8 * 100 == report["alignment"]["checkpoint"]["all"]["top1"]["mean"]
    weights = (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert report["sha256"] == hashlib.sha256(weights).hexdigest()
    assert report["sha256"][:12] in page.read_text()
    assert json.loads(file.read_text()) == report
    fidelity, floor = report["fidelity"], report["floor"]
    assert fidelity["psnr_db"]["low"] <= fidelity["psnr_db"]["mean"] <= fidelity["psnr_db"]["high"]
    assert floor["psnr_db"]["mean"] > fidelity["psnr_db"]["mean"] > 15
    assert floor["latent_mse"]["mean"] < fidelity["latent_mse"]["mean"]
    assert 0 < fidelity["ssim"]["mean"] < 1
    values = sorted(item["lpips"] for item in items)
    assert fidelity["lpips"]["mean"] == pytest.approx(sum(values) / 8)
    assert fidelity["lpips"]["median"] == pytest.approx((values[3] + values[4]) / 2)
    assert fidelity["lpips"]["worst_tenth"] == values[-1]
    assert fidelity["psnr_db"]["worst_tenth"] == min(item["psnr_db"] for item in items)
    assert 0 < floor["lpips"]["mean"] < fidelity["lpips"]["mean"]
    assert f'"{values[-1]:.4f}"' in page.read_text()
    aligned = report["alignment"]
    assert aligned["domain"] == "emoji"
    parts = aligned["against"]
    assert parts["seen"]["pictures"] + parts["held_out"]["pictures"] == parts["all"]["pictures"] == 8
    difference = aligned["checkpoint"]["all"]["top1"]["mean"] - parts["all"]["top1"]["mean"]
    assert aligned["difference"]["top1"]["mean"] == pytest.approx(difference)
    with Image.open(sheet) as image:
        assert image.width > 8 * 64
        assert image.height > 2 * 64


def test_text_says_what_the_numbers_are(dgq_command: Run, checkpoint: Path, tmp_path: Path) -> None:
    save_file(backbone() | heads(), tmp_path / "lpips.safetensors")
    weights = ("--lpips", tmp_path)
    run = dgq_command("eval", checkpoint, "--prompts", 4, "--steps", 2, "--batch", 4, "--floor", 0, *weights)
    assert run.returncode == 0, run.stderr
    for text in ("PSNR (dB)", "emoji-domain alignment", "ceiling: real renders", "shuffled prompts", "95 % intervals"):
        assert text in run.stdout
    assert re.search(r"LPIPS +0\.\d{4} \[0\.\d{4}, 0\.\d{4}\] +0\.\d{4} +0\.\d{4}\n", run.stdout)


def test_the_float_model_alone() -> None:
    report = evaluate(None, None, options(prompts="4"))
    assert report is not None
    assert "fidelity" not in report
    assert report["alignment"]["checkpoint"]["all"]["pictures"] == 4


def test_a_model_against_itself_is_equal(tmp_path: Path) -> None:
    kept = Kept()
    save_file(backbone() | heads(), tmp_path / "lpips.safetensors")
    wanted = options(prompts="4", floor=0, lpips=tmp_path / "lpips.safetensors")
    report = evaluate(None, embedded.NAME, wanted, kept=kept)
    stages = []
    again = evaluate(None, embedded.NAME, wanted, lambda stage, *_: stages.append(stage), kept=kept)
    assert again == report
    assert set(stages) == {"checkpoint"}  # the float model's pictures are there already
    assert [len(one) for one in kept.systems[0][1:]] == [4, 4]
    assert report is not None
    assert report["fidelity"]["psnr_db"]["mean"] == 99
    assert report["fidelity"]["latent_mse"]["mean"] == 0
    assert report["fidelity"]["lpips"]["worst_tenth"] == 0
    assert all(value["mean"] == 0 for value in report["alignment"]["difference"].values())


def test_prompts_without_labels(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na house on a blue background\n")
    report = evaluate(str(checkpoint), "float", options(prompts=str(file), floor=0))
    assert report is not None
    assert "alignment" not in report
    assert report["prompts"] == 2


def test_processes_share_the_cores(tmp_path: Path) -> None:
    """Launched without a word of threads, they have together as many as there are cores at most."""
    script = tmp_path / "share.py"
    script.write_text(
        "import sys, torch\n"
        "from dgq.evaluation.evaluate import _Share\n"
        "share = _Share.find()\n"
        "print(share.rank, share.world, torch.get_num_threads(), file=open(f'{sys.argv[1]}-{share.rank}', 'w'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, tmp_path / "rank"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    told = [tuple(map(int, (tmp_path / f"rank-{rank}").read_text().split())) for rank in range(2)]
    assert [(rank, world) for rank, world, _ in told] == [(0, 2), (1, 2)]
    assert sum(threads for *_, threads in told) <= max(2, len(os.sched_getaffinity(0)))


@pytest.mark.slow
def test_two_processes_give_the_same_report(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(checkpoint), "--prompts", "10", "--steps", "2", "--batch", "4", "--floor", "4", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # accelerate's own launcher starts one process alone where there is neither a GPU nor MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    commands = ([sys.executable, "-m", "dgq_cli"], [*launch, "-m", "dgq_cli"])
    one, two = (
        subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        for command in commands
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(one.stdout) == json.loads(two.stdout[two.stdout.index("{") :])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--prompts", "0"), 2, "0 is not a number from 1"),
        (("--prompts", "none.txt"), 1, "none.txt: cannot be read"),
        (("--reference", "nowhere"), 2, "no such folder"),
        (("--lpips", "nowhere"), 2, "no such file or folder"),
        (("--lpips", __file__), 1, "needs pictures to compare with"),
        (("--lpips", __file__, "--against", embedded.NAME), 1, "test_eval_command.py: cannot be read as weights"),
        (("--grid", "sheet.jpg"), 2, "not a .png"),
        (("--against", "float"), 1, "is a float model already"),
    ],
)
def test_bad_input(dgq_command: Run, arguments: tuple[str, ...], code: int, said: str) -> None:
    run = dgq_command("eval", *arguments)
    assert run.returncode == code
    assert said in " ".join(run.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((embedded.NAME, "nowhere"), "nowhere: no such folder"),
        ((embedded.NAME, "--clip", "."), ".: cannot be loaded as a CLIP model"),
        ((embedded.NAME, "--inception", __file__), "--inception needs pictures to compare with"),
    ],
)
def test_what_is_wrong_is_told_before_a_picture_is_made(
    dgq_command: Run, arguments: tuple[str, ...], said: str
) -> None:
    run = dgq_command("eval", *arguments, "--prompts", "1", "--steps", "1")
    assert (run.returncode, run.stdout) == (1, "")
    assert said in " ".join(run.stderr.split())
    assert "checkpoint 1/1" not in run.stderr


def test_a_failure_leaves_the_reports_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dgq.evaluation.evaluate as module
    from dgq_cli.eval_command import command

    plain, made = evaluate, []

    def second_fails(*arguments: object) -> object:
        if made:
            raise DgqError("planted")
        made.append(plain(*arguments))  # type: ignore[arg-type]
        return made[0]

    monkeypatch.setattr(module, "evaluate", second_fails)
    with pytest.raises(DgqError, match="planted"):
        command([embedded.NAME, embedded.NAME], prompts="1", steps=1, floor=0, seed=0, json=True)
    assert json.loads(capsys.readouterr().out)[0]["model"] == embedded.NAME
