"""Wrong uses of every command: the right exit code, one line that says what is wrong, and nothing left behind.

They run in this process, as starting one takes seconds; what only a process of its own can show is at the end.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from dgq import doctor
from dgq_cli import common
from dgq_cli.main import main

LONG = "x" * 300
HUGE = "9" * 5000


def _tune(images="good", *more, prompt="a cat", checkpoint="{quantized}"):
    return ("tune", checkpoint, "--images", images, "--prompt", prompt, "--out", "x.safetensors", *more)


# Arguments, with {names} of what the fixture `place` makes; the exit code; a part of the message.
CASES = [
    (("calibrate", "{float}", "--out", "{float}"), 1, "is, holds or lies in"),
    (("calibrate", "{float}", "--out", "{float}", "--overwrite"), 1, "is, holds or lies in"),
    (("calibrate", "{float}", "--out", "{float}/unet", "--overwrite"), 1, "is, holds or lies in"),
    (("calibrate", "{float}", "--out", "{float}/..", "--overwrite"), 1, "is, holds or lies in"),
    (("calibrate", "{float}", "--out", "folder"), 1, "no dgq checkpoint"),
    (("calibrate", "{float}", "--out", "folder", "--overwrite"), 1, "no dgq checkpoint"),
    (("calibrate", "{float}", "--out", "file", "--overwrite"), 1, "not a folder"),
    (("calibrate", "{float}", "--out", "file/out"), 1, "cannot be written"),
    (("calibrate", "{float}", "--out", "link", "--overwrite"), 1, "is a link"),
    (("calibrate", "{float}", "--out", "/dev/null", "--overwrite"), 1, "not a folder"),
    (("calibrate", "{float}", "--out", "/dev/full"), 1, "not a folder"),
    (("calibrate", "{float}", "--out", "/proc/nowhere/out"), 1, "cannot be written"),
    (("calibrate", "{float}", "--out", LONG), 1, "File name too long"),
    (("calibrate", "{quantized}", "--out", "out"), 1, "quantized already"),
    (("calibrate", "{float}", "--recipe", "paper", "--record-steps", "4"), 2, "records the steps of --steps"),
    (("calibrate", "{float}", "--out", "{quantized}"), 1, "already exists"),
    (("calibrate", "[/x]", "--out", "out"), 1, "[/x]"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "fifo"), 1, "not a regular file"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "/dev/zero"), 1, "not a regular file"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "nul.txt"), 1, "NUL"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "binary"), 1, "cannot be read"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "file"), 1, "no prompt"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "nosuch[/x].txt"), 1, "nosuch[/x].txt"),
    (("calibrate", "{float}", "--out", "out", "--prompts", LONG), 1, "File name too long"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "0"), 2, "from 1 to"),
    (("calibrate", "{float}", "--out", "out", "--prompts", "-3"), 2, "from 1 to"),
    (("calibrate", "{float}", "--out", "out", "--prompts", HUGE), 2, "from 1 to"),
    (("calibrate", "{float}", "--out", "out", "--seed", HUGE), 2, "--seed"),
    (("calibrate", "{float}", "--out", "out", "--calls", HUGE), 2, "--calls"),
    (("calibrate", "{float}", "--out", "out", "--override", f"*={HUGE}"), 2, "PATTERN=BITS"),
    (("calibrate", "{float}", "--out", "out", "--override", "*=²"), 2, "PATTERN=BITS"),
    (("calibrate", "{float}", "--out", "out", "--override", "[/x].*=8"), 1, "matches no layer"),
    (("calibrate", "{float}", "--out", "out", "--memory", "nan"), 2, "--memory"),
    (("calibrate", "{float}", "--out", "out", "--memory", "inf"), 2, "--memory"),
    (("calibrate", "{float}", "--out", "out", "--guidance", "-inf"), 2, "finite"),
    (("calibrate", "{float}", "--out", "out", "--guidance", "-1"), 1, "guidance -1.0 is out of range"),
    (("generate", "a cat", "--size", "0"), 2, "--size"),
    (("generate", "a cat", "--size", "64x0"), 2, "--size"),
    (("generate", "a cat", "--size", "-64"), 2, "--size"),
    (("generate", "a cat", "--size", "٦٤"), 2, "--size"),
    (("generate", "a cat", "--size", HUGE), 2, "--size"),
    (("generate", "a cat", "--size", "99998"), 1, "must be a multiple"),
    (("generate", "a cat", "--seed", HUGE), 2, "--seed"),
    (("generate", "a cat", "--seed", str(2**63)), 1, "seed 9223372036854775808 is out of range"),
    (("generate", "a cat", "--seed", str(2**63 - 1), "--count", "2"), 1, "seed 9223372036854775807 is out of range"),
    (("generate", "a cat", "--guidance", "nan"), 2, "finite"),
    (("generate", "a cat", "--steps", HUGE), 2, "--steps"),
    (("generate", "a cat", "--device", ""), 1, "device ''"),
    (("generate", "a cat", "--device", "mps"), 1, "device 'mps'"),
    (("generate", "a cat", "--device", "meta"), 1, "device 'meta'"),
    (("generate", "a cat", "--device", "[/x]"), 1, "device '[/x]'"),
    (("generate", "a cat", "--device", "cuda:99"), 1, "device"),
    (("generate", "a \ud800 cat"), 1, "at character 3"),
    (("generate", "a \udcff cat"), 1, "at character 3"),
    (("generate", "a cat", "--negative", "\ud800"), 1, "negative prompt"),
    (("generate", "a cat", "--negative", "cat " * 40), 1, "the negative prompt has 42 tokens"),
    (("generate", ""), 2, "empty"),
    (("generate", "a cat", "--out", "/dev/full"), 1, "cannot be written"),
    (("generate", "a cat", "--out", "/dev/null"), 1, "cannot be written"),
    (("generate", "a cat", "--out", "file"), 1, "cannot be written"),
    (("generate", "a cat", "--out", f"{LONG}.png"), 1, "File name too long"),
    (("generate", "a cat", "--out", LONG), 1, "File name too long"),
    (("generate", "a cat", "--out", "here.png"), 1, "already exists"),
    (("generate", "a cat", "--out", "folder.png"), 1, "is a folder"),
    (("generate", "a cat", "--out", "/proc/nowhere/x.png"), 1, "cannot be written"),
    (("generate", "a cat", "--model", "./[red]"), 1, "./[red]"),
    (("generate", "a cat", "--model", ""), 1, "no such folder"),
    (("generate", "a cat", "--model", LONG), 1, "no such folder"),
    (("generate", "[/x]", "[red]", "--out", "[/x].png"), 2, "[/x].png"),
    (("eval", "--out", "folder"), 1, "is a folder"),
    (("eval", "--out", "file/report.json"), 1, "cannot be written"),
    (("eval", "--out", LONG), 1, "File name too long"),
    (("eval", "--grid", "folder.png"), 1, "is a folder"),
    (("eval", "--grid", "[/x].jpg"), 2, "[/x].jpg"),
    (("eval", "a", "b", "--grid", "sheet.png"), 2, "one checkpoint"),
    (("eval", "--html", "folder"), 1, "is a folder"),
    (("eval", "--html", "same", "--out", "./same"), 2, "one file"),
    (("eval", "--grid", "x.png", "--out", "x.png"), 2, "one file"),
    (("eval", "--bench", "nul.json"), 2, "--html"),
    (("eval", "--bench", "nul.json", "--html", "x.html"), 1, "nul.json"),
    (("eval", "--bench", "fifo", "--html", "x.html"), 1, "not a regular file"),
    (("eval", "--prompts", "fifo"), 1, "not a regular file"),
    (("eval", "--prompts", "[/x].tsv"), 1, "[/x].tsv"),
    (("eval", "--prompts", "nul.json"), 1, "NUL"),
    (("eval", "--prompts", "0"), 2, "from 1 to"),
    (("eval", "--prompts", HUGE), 2, "from 1 to"),
    (("eval", "--device", "xyz"), 1, "device 'xyz'"),
    (("eval", "--reference", "fifo"), 2, "no such folder"),
    (("eval", "--reference", "fifos"), 1, "fewer than two pictures"),
    (("eval", "--seed", HUGE), 2, "--seed"),
    (("eval", "--seed", str(2**63 - 1), "--prompts", "2"), 1, "seed 9223372036854775807 is out of range"),
    (("eval", "--guidance", "inf"), 2, "finite"),
    (("inspect", "[/x]"), 1, "[/x]"),
    (("inspect", "--budget", "nan"), 2, "--budget"),
    (("inspect", "--worst", "-1"), 2, "--worst"),
    (("inspect", "--measure", "--device", ""), 1, "device ''"),
    (("inspect", "--against", "x"), 2, "--measure"),
    (("inspect", "--prompts", "3"), 2, "--prompts needs --measure"),
    (("inspect", "--steps", "3"), 2, "--steps needs --measure"),
    (("inspect", "--guidance", "3"), 2, "--guidance needs --measure"),
    (("inspect", "--seed", "3"), 2, "--seed needs --measure"),
    (("inspect", "--device", "cpu"), 2, "--device needs --measure"),
    (("inspect", "there.safetensors", "--prompts", "3"), 2, "--prompts needs --measure"),
    (("inspect", "--png", "x.png", "--html", "x.png"), 2, "one file"),
    (("inspect", "folder"), 1, "model_index.json"),
    (("inspect", "--html", "folder"), 1, "is a folder"),
    (("inspect", "--html", "file/x.html"), 1, "cannot be written"),
    (("inspect", "there.safetensors", "--html", "x.html"), 2, "is a file"),
    (("bench", "--device", "meta"), 1, "device 'meta'"),
    (("bench", "--csv", "folder"), 1, "is a folder"),
    (("bench", "--csv", "file/rows.csv"), 1, "cannot be written"),
    (("bench", "--csv", "nul.txt"), 1, "other columns"),
    (("bench", "--repeats", "0"), 2, "--repeats"),
    (("bench", "--with", "[/x]"), 2, "[/x]"),
    (("bench", "--what", "step", "--shapes", "large"), 2, "--shapes is of single layers"),
    (("bench", "--what", "picture", "--shapes", "large"), 2, "--shapes is of single layers"),
    (("bench", "--arch", "sd-v1.4", "--shapes", "large"), 2, "--shapes is of single layers"),
    (("bench", "--arch", "[/x]"), 1, "[/x]"),
    (("bench", "--arch", "sd-v1.4", "--work", "file/work"), 1, "cannot be written"),
    (("bench", "--predict", "sd-v1.4", "--pixels", HUGE), 2, "--pixels"),
    (_tune("good", "--mixed-precision", "fp16"), 2, "--mixed-precision"),
    (_tune("folder"), 1, "no pictures"),
    (_tune("nowhere"), 1, "no such folder"),
    (_tune("fifos"), 1, "not a regular file"),
    (_tune("broken"), 1, "broken/x.png"),
    (_tune("tiny"), 1, "is 1 x 1 pixels"),
    (_tune(prompt=" "), 1, "prompt is empty"),
    (_tune(prompt="a cat " * 30), 1, "tokens"),
    (_tune("good", "--images", "good"), 2, "in pairs"),
    (_tune("good", "--out", "here.png"), 2, "here.png"),
    (_tune("good", "--out", "file/x.safetensors"), 1, "cannot be written"),
    (_tune("good", "--out", "there.safetensors"), 1, "already exists"),
    (_tune("good", "--lr-scheduler", "[/x]"), 2, "[/x]"),
    (_tune("good", "--learning-rate", "nan"), 2, "--learning-rate"),
    (_tune("good", "--experts", "0"), 2, "--experts"),
    (_tune("good", "--experts", "1", "--high-noise-strength", "0.3"), 2, "of the last of several experts"),
    (_tune("good", "--class-images", "3"), 2, "go with --class-prompt"),
    (_tune("good", "--prior-weight", "2"), 2, "go with --class-prompt"),
    (_tune("good", "--lr-warmup-steps", "3"), 2, "constant has no warmup"),
    (_tune("good", "--validate-every", "3"), 2, "goes with --validation-prompt"),
    (_tune("good", "--resolution", "63"), 1, "multiple"),
    (_tune("good", "--device", "mps"), 1, "device"),
    (_tune(checkpoint="{float}"), 1, "no integer checkpoint"),
    (_tune(checkpoint="[/x]"), 1, "[/x]"),
    (("tune", "{quantized}", "--images", "good", "--out", "x.safetensors"), 2, "--prompt"),
    (("generate", "a cat", "--tuned", "nowhere.safetensors"), 1, "nowhere.safetensors: no such file"),
    (("generate", "a cat", "--tuned", "there.safetensors"), 1, "not a readable safetensors file"),
    (("generate", "a cat", "--tuned", "fifo"), 1, "not a regular file"),
    (("generate", "a cat", "--tuned", "[/x]:0.5"), 1, "[/x]: no such file"),
    (("inspect", "there.safetensors"), 1, "not a readable safetensors file"),
    (("inspect", "there.safetensors", "--measure"), 2, "is a file"),
    (("export", "{quantized}", "--to", "gguf", "--out", "x.safetensors"), 2, "--to 'gguf'"),
    (("export", "{quantized}", "--to", "comfy", "--out", "x.gguf"), 2, "not a .safetensors file"),
    (("export", "{quantized}", "--to", "comfy"), 2, "--out"),
    (("export", "{quantized}", "--to", "diffusers", "--out", "x", "--overwrite"), 2, "no folder is replaced"),
    (("export", "{float}", "--to", "comfy", "--out", "x.safetensors"), 1, "is a float model"),
    (("export", "[/x]", "--to", "comfy", "--out", "x.safetensors"), 1, "[/x]"),
    (("export", "{quantized}", "--to", "comfy", "--out", "there.safetensors"), 1, "already exists"),
    (("export", "{quantized}", "--to", "comfy", "--out", "file/x.safetensors"), 1, "cannot be written"),
    (("export", "{quantized}", "--to", "diffusers", "--out", "folder"), 1, "already exists"),
    (("export", "{quantized}", "--to", "diffusers", "--out", "link"), 1, "is a link"),
    (("export", "{quantized}", "--to", "diffusers", "--out", "{quantized}/x"), 1, "is, holds or lies in"),
    (("export", "{quantized}", "--to", "diffusers", "--out", LONG), 1, "File name too long"),
    (("export", "{quantized}", "--to", "diffusers", "--out", "/dev/full"), 1, "already exists"),
    (("doctor", "[/x]"), 2, "[/x]"),
    (("nosuch[/x]",), 2, "nosuch[/x]"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with things in it that are not what they are taken for."""
    for name in ("folder", "folder.png", "fifos"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    (tmp_path / "here.png").write_bytes(b"a picture")
    (tmp_path / "there.safetensors").write_bytes(b"years of work")
    for name in ("good", "broken", "tiny"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (1, 1) if name == "tiny" else (32, 32)).save(tmp_path / name / "a.png")
    (tmp_path / "broken" / "x.png").write_bytes((tmp_path / "broken" / "a.png").read_bytes()[:40])
    (tmp_path / "link").symlink_to("folder")
    for name in ("fifo", "fifos/a.png", "fifos/b.png"):
        os.mkfifo(tmp_path / name)
    for name in ("nul.txt", "nul.json"):
        (tmp_path / name).write_bytes(b"a cat\0\n")
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of the command, in this process."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["dgq", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return command


def contents(*folders: Path) -> dict[str, object]:
    """Every path below the folders, with its size and date."""
    files = [file for folder in folders for file in (folder, *folder.rglob("*"))]
    return {str(file): (file.lstat().st_size, file.lstat().st_mtime_ns) for file in files if not file.is_dir()} | {
        str(file): None for file in files if file.is_dir()
    }


@pytest.mark.parametrize("arguments, code, message", CASES, ids=[ascii(" ".join(case[0]))[:60] for case in CASES])
def test_wrong_uses_end_in_one_line(run, place, tiny_pipeline, tiny_checkpoint, arguments, code, message):
    names = {"{float}": str(tiny_pipeline), "{quantized}": str(tiny_checkpoint)}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = ["generate", "--model", str(tiny_checkpoint), "--steps", "1", *arguments[1:]]
    before = contents(place, tiny_pipeline.parent, tiny_checkpoint.parent)
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    lines = [line for line in err.splitlines() if not line.startswith("  ")]  # what to do follows, indented
    if code == 2:
        lines = [line for line in lines if line and not line.startswith(("Usage: ", "Try "))]
    (line,) = lines
    assert line.startswith("error: " if code == 1 else "Error: ")
    assert message in line
    assert "error: unexpected" not in err
    assert len(err) < 4000
    assert contents(place, tiny_pipeline.parent, tiny_checkpoint.parent) == before


def test_a_device_without_enough_memory(run, monkeypatch):
    told = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 8.00 GiB of which 1.00 GiB is free."

    def fails():
        raise torch.OutOfMemoryError(f"{told} Of the allocated memory 6.00 GiB is allocated by PyTorch, and ...")

    monkeypatch.setattr(doctor, "report", fails)
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == f"error: {told}"
    assert "CUDA_VISIBLE_DEVICES=" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "{float}", "--prompts", "2", "--steps", "1", "--json", "--out"),
        ("bench", "--model", "{float}", "--what", "kernels", "--bits", "8", "--repeats", "1", "--json", "--csv"),
    ],
)
def test_a_full_disk_takes_no_measurement_away(run, place, tiny_pipeline, arguments):
    code, out, err = run(*(argument.replace("{float}", str(tiny_pipeline)) for argument in arguments), "/dev/full")
    assert code == 1
    assert "error: /dev/full: cannot be written (No space left on device)" in err
    assert json.loads(out)
    assert Path("/dev/full").is_char_device()


def test_square_brackets_are_text(run, place, tiny_pipeline):
    prompts = place / "[/x].txt"
    prompts.parent.mkdir()
    prompts.write_text("a cat [/x]\n[red] dog :cat:\n")
    code, out, err = run(
        "calibrate",
        tiny_pipeline,
        "--out",
        "[/x] [red]",
        "--prompts",
        prompts,
        "--steps",
        1,
        "--evaluate",
        1,
        "--rounding",
        "nearest",
        "--channels",
        "none",
    )
    assert (code, out) == (0, "")
    assert "[/x] [red]  integer none nearest W4A8" in err
    assert "[red] dog :cat:" in err
    code, out, err = run(
        "generate", "[/x] [red] :cat:", "--model", "[/x] [red]", "--out", "[red]/[/x]", "--steps", 1, "--seed", 1
    )
    assert (code, out) == (0, "[red]/[/x]/x-red-cat-1.png\n"), err
    code, out, err = run("inspect", "[/x] [red]")
    assert code == 0, err
    assert "[/x] [red]" in out


def test_square_brackets_are_text_in_bars_too(monkeypatch, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, markup=False, emoji=False, width=150)
    monkeypatch.setattr(common, "err", console)
    with common.StageProgress({"[red]": "[bold]"}) as progress:
        progress("[red]", 1, 2, "[/x] [red] :cat:")
    assert "[bold]" in console.file.getvalue()
    assert "[/x] [red] :cat:" in console.file.getvalue()


def test_pictures_are_numbered_never_replaced(run, place, tiny_checkpoint):
    arguments = ("generate", "a cat", "--model", tiny_checkpoint, "--steps", 1, "--seed", 1, "--out")
    names = [run(*arguments, ".")[1].strip() for _ in range(3)]
    assert names == ["a-cat-1.png", "a-cat-1-2.png", "a-cat-1-3.png"]
    assert run(*arguments, ".", "--grid")[1].split() == ["a-cat-1-4.png", "grid.png"]
    assert run(*arguments, ".", "--grid", "--overwrite")[1].split() == ["a-cat-1.png", "grid.png"]
    assert run(*arguments, "here.png")[0] == 1
    assert Path("here.png").read_bytes() == b"a picture"
    assert run(*arguments, "here.png", "--overwrite")[1].strip() == "here.png"
    assert Path("here.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command, name, told",
    [
        ("export", "dgq.export.source.open_checkpoint", "interrupted"),
        ("calibrate", "dgq.calibration.run.calibrate", "interrupted; the same command with --resume goes on from here"),
    ],
)
def test_an_interruption_is_one_line(run, place, tiny_pipeline, monkeypatch, command, name, told):
    """Typer gives main an exception or an exit code, by its version."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(name, interrupt)
    more = ("--to", "diffusers") if command == "export" else ()
    for _ in range(2):
        assert run(command, tiny_pipeline, "--out", "x", *more) == (130, "", f"{told}\n")


def in_a_process(*arguments, **options):
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [sys.executable, "-P", "-m", "dgq_cli", *arguments]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = in_a_process("bench", "--predict", "sd-v1.4", "--json", stdout=full)
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output: cannot be written (No space left on device)\n",
    )


def test_a_closed_standard_output_is_one_line():
    done = in_a_process("--version", preexec_fn=lambda: (os.close(0), os.close(1)))
    assert (done.returncode, done.stderr) == (1, "error: standard output: cannot be written (Bad file descriptor)\n")


def test_a_reader_that_has_gone_is_no_error():
    source, sink = os.pipe()
    os.close(source)
    done = in_a_process("--version", stdout=sink)
    os.close(sink)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_program_ends_with_what_was_to_be_done_and_its_exit_code(tmp_path, code):
    """Also where its modules are not taken apart: what a thread, or a function for the end, still has to do is done."""
    program = f"""
import atexit, pathlib, sys, tempfile, threading, time, weakref
from dgq_cli import main

kept = tempfile.TemporaryDirectory(dir=sys.argv[1])
atexit.register(lambda: print("the end", flush=True))
if "thread" in sys.argv:
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
sys.stdout.write("not flushed, ")
def end(): sys.exit({code})
main.main = end
main.run()
"""
    for more, told in ([], "not flushed, the end\n"), (["thread"], "not flushed, a thread\nthe end\n"):
        folder = tmp_path / str(len(more))
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder), *more], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, told), done.stderr
        assert not any(folder.iterdir())


def test_a_daemon_thread_keeps_no_program_from_its_short_end():
    """tqdm leaves one behind wherever a picture was drawn; Python would not wait for it either."""
    program = """
import sys, threading, time
from dgq_cli import main

class Kept:
    def __del__(self): print("taken apart", flush=True)

kept = Kept()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
main.main = sys.exit
main.run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_sigterm_while_a_text_is_executed(tmp_path):
    """Python notes an interruption that leaves exec of a text, and run by -m ends by it, whatever became of it."""
    (tmp_path / "stopped.py").write_text(
        "import os, signal, time\n"
        "from dgq_cli import main\n"
        "main.app = lambda **_: exec('os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)')\n"
        "main.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "stopped"], env=environment, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (143, b"interrupted\n")


def test_no_home_and_another_locale(tiny_checkpoint, place):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "LC_ALL": "C"}
    name = "caf\u00e9-\udcff"  # the last one is a byte that is no UTF-8
    command = [sys.executable, "-P", "-m", "dgq_cli", "generate", "a caf\u00e9", "--out", name, "--seed", "1"]
    command += ["--model", str(tiny_checkpoint), "--steps", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == os.fsencode(f"{name}/a-caf-1.png\n")
    assert Path(name, "a-caf-1.png").is_file()
