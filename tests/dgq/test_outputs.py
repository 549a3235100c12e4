"""Files and folders are written whole or not at all, and nothing that was there is lost."""

import fcntl
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import windows
from safetensors.torch import load_file

import dgq
import dgq_cli
import dgq_kernels
from dgq.errors import DgqError
from dgq.outputs import atomic_file, atomic_folder, atomic_path, check_output, claim, save_tensors, workplace


@pytest.fixture(params=["here", "windows"])
def system(request, monkeypatch):
    if request.param == "windows":
        windows.pretend(monkeypatch)
    return request.param


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def write(file, data=b"new"):
    with atomic_file(file) as handle:
        handle.write(data)


def test_a_new_file_has_the_mode_that_open_gives(tmp_path, umask):
    write(tmp_path / "deep" / "file")
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
    with atomic_folder(tmp_path / "folder"):
        pass
    assert mode(tmp_path / "deep" / "file") == mode(tmp_path / "a.safetensors") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


def test_a_file_that_is_there_keeps_its_mode_and_a_link_stays_one(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert mode(tmp_path / "file") == 0o640


def test_a_library_may_put_a_file_of_its_own_in_the_temporary_ones_place(tmp_path, system):
    for _ in "12":
        with atomic_path(tmp_path / "a.safetensors") as temporary:
            temporary.unlink()
            save_tensors({"a": torch.ones(2)}, temporary, {})
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_outlives_a_write_that_fails(tmp_path, error, system):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises((DgqError, KeyboardInterrupt)), atomic_file(tmp_path / "file") as handle:  # noqa: PT012
        handle.write(b"half")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_devices_are_written_to_and_stay_what_they_are():
    with pytest.raises(DgqError, match=r"/dev/full: cannot be written .No space left"):
        write(Path("/dev/full"))
    write(Path("/dev/null"))
    assert Path("/dev/full").is_char_device()
    assert Path("/dev/null").is_char_device()


def test_pipes_are_written_to(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    write(fifo)
    reader.join(10)
    assert read == [b"new"]
    assert fifo.is_fifo()
    source, sink = os.pipe()
    write(Path(f"/dev/fd/{sink}"))
    assert os.read(source, 9) == b"new"
    os.close(source)
    os.close(sink)


def test_standard_output_in_a_file_is_not_replaced(tmp_path):
    code = (
        "from pathlib import Path; from dgq.outputs import atomic_file\n"
        "print('first')\nwith atomic_file(Path('/dev/stdout')) as file: file.write(b'second\\n')\nprint('third')"
    )
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond\nthird\n"


def test_an_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x", tmp_path / "new" / ("x" * 300), Path("/proc/nowhere/x")):
        with pytest.raises(DgqError):
            check_output(path)
    with pytest.raises(DgqError, match="already exists"):
        check_output(tmp_path / "file", overwrite=False)
    for path in (tmp_path / "file", tmp_path / "new" / "deep" / "x", Path("/dev/full")):
        check_output(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_claimed_name_is_nobody_elses(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a picture")
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim(tmp_path / "a.png"), range(40)))
    assert sorted(claimed) == sorted(tmp_path / f"a-{number}.png" for number in range(2, 42))
    assert (tmp_path / "a.png").read_bytes() == b"a picture"


def test_one_process_at_a_time(tmp_path, system):
    out = tmp_path / "out"
    with workplace(out) as folder:
        with pytest.raises(DgqError, match=r"another process.*\.out\.partial"), workplace(out):
            pass
        with pytest.raises(DgqError, match="another process"), atomic_folder(out):
            pass
        (folder / "kept").touch()
    # a lock file that nobody holds any more, as a killed process leaves it
    assert {file.name for file in folder.iterdir()} == {"kept", "lock"}
    with workplace(out) as folder:
        (folder / "kept").unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_not_that_of_a_folder_which_has_gone(tmp_path, monkeypatch):
    flock, rounds = fcntl.flock, []

    def gone(descriptor, operation):  # its holder removes the folder between open and flock
        flock(descriptor, operation)
        if not rounds:
            (tmp_path / ".out.partial" / "lock").unlink()
        rounds.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", gone)
    with workplace(tmp_path / "out") as folder:
        assert (folder / "lock").exists()
    assert len(rounds) == 2


def test_what_a_killed_process_left_is_put_right(tmp_path, system):
    out, folder = tmp_path / "out", tmp_path / ".out.partial"
    # killed while it wrote the new folder
    (folder / "new").mkdir(parents=True)
    with workplace(out):
        assert not (folder / "new").exists()
    # killed between the two renames: the old folder is nowhere else
    (folder / "new").mkdir(parents=True)
    (folder / "old").mkdir()
    (folder / "old" / "weights").touch()
    with workplace(out):
        assert (out / "weights").exists()
    # killed before it removed the old one
    (folder / "old").mkdir(parents=True)
    with workplace(out):
        assert (out / "weights").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_where_replacing_it_fails(tmp_path, monkeypatch, failing, error, system):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename, count = Path.rename, []

    def fail(self, target):
        count.append(self)
        if len(count) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((DgqError, KeyboardInterrupt)), atomic_folder(out, overwrite=True) as folder:
        (folder / "new").touch()
    assert [file.name for file in out.iterdir()] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "out").write_text("a letter")
    with pytest.raises(DgqError, match="not a folder"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out").read_text() == "a letter"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_takes_the_place_of_an_empty_or_an_older_one(tmp_path, system):
    out = tmp_path / "out"
    out.mkdir()
    for number in range(3):
        with atomic_folder(out, overwrite=number > 0) as folder:
            (folder / f"{number}").write_bytes(b"new")
        assert [file.name for file in out.iterdir()] == [f"{number}"]
    write(out / "2", b"newer")
    assert (out / "2").read_bytes() == b"newer"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_no_module_imports_at_its_top_what_windows_lacks():
    files = [file for package in (dgq, dgq_cli, dgq_kernels) for file in Path(package.__file__).parent.rglob("*.py")]
    assert len(files) > 200
    assert {str(file): names for file in files if (names := windows.of_unix(file))} == {}
