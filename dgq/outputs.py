"""Writing files and folders: whole or not at all, and over nothing that was not meant.

Whatever dgq writes for its user goes through `atomic_file`, `atomic_path` or `atomic_folder`. A file appears under its
name when it is whole. A folder is made in a hidden one beside its place, `.NAME.partial`, that one process holds at a
time; what a killed process left there is cleared by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import DgqError

_LOCK = "lock"


# What flock says on network file systems that have no locks: then nothing is locked.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def refusal(place: Path, error: Exception) -> DgqError:
    """What a failure to write a place is told as."""
    if isinstance(error, SafetensorError):
        return DgqError(f"{place}: cannot be written ({error})", "is the disk full?")
    assert isinstance(error, OSError)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some space, or write elsewhere" if full else None
    return DgqError(f"{place}: cannot be written ({error.strerror or error})", hint)


def check_output(path: Path, overwrite: bool = True) -> None:
    """Refuse, before the work whose result it takes, a place where `atomic_file` could not write.

    Raises:
        DgqError: the path is a folder, exists and may not be replaced, or cannot be written.
    """
    if os.path.isdir(path):
        raise DgqError(f"{path}: is a folder", "name a file")
    if os.path.exists(path):
        if not overwrite:
            raise DgqError(f"{path}: already exists", "choose another name, or pass --overwrite")
        if not os.access(path, os.W_OK):
            raise DgqError(f"{path}: cannot be written ({os.strerror(errno.EACCES)})")
        if _descriptor(path) is not None or not os.path.isfile(path):
            return
    check_place(path)


def check_place(path: Path) -> None:
    """Refuse a path that cannot be created: a read-only folder, a file used as one, a name too long.

    Raises:
        DgqError: why not.
    """
    whole = Path(os.path.abspath(path))
    try:
        there = next(parent for parent in whole.parents if os.path.lexists(parent))
        for part in whole.parts[len(there.parts) :]:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(there / part)
        probe = _temporary(there / whole.name)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise refusal(path, error) from None


def _temporary(path: Path) -> Path:
    """A new hidden name beside a path, never longer than any file system takes."""
    return path.with_name(f".dgq-{secrets.token_hex(8)}.tmp")


def leftovers(folder: Path) -> list[Path]:
    """What writers that were killed left in a folder that this process holds: `atomic_file`'s files, and safetensors'
    own, which it writes beside those."""
    return [*folder.glob(".dgq-*.tmp"), *folder.glob(".tmp*")]


def discard(file: Path) -> None:
    """Remove a file where there is one.

    Raises:
        DgqError: it is a folder, which no writer of files put there, or cannot be removed.
    """
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        reason = os.strerror(errno.EISDIR) if file.is_dir() else error.strerror or error
        raise DgqError(f"{file}: cannot be removed ({reason})", "move it elsewhere") from None


def _descriptor(path: Path) -> int | None:
    """Which of standard output and error a path such as /dev/stdout stands for."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(number)):
                return number
    return None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """An open file that becomes `path` when the block ends well.

    Devices, pipes and this process's own output are no files to replace: they are written to. Else as `atomic_path`.

    Raises:
        DgqError: it cannot be written; then `path` is what it was.
    """
    try:
        descriptor = _descriptor(path)
        if descriptor is not None:
            (sys.stdout if descriptor == 1 else sys.stderr).flush()
            with open(os.dup(descriptor), "wb") as stream:
                yield stream
        elif os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as stream:
                yield stream
        else:
            with atomic_path(path) as temporary, open(temporary, "wb") as stream:
                yield stream
    except OSError as error:
        raise refusal(path, error) from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """An empty temporary file that becomes `path` when the block ends well: for a library that opens files itself, or
    puts others in their place, which Windows refuses for files that are open.

    The file has the mode that open() would give it. A link stays one: what it leads to is replaced.

    Raises:
        DgqError: it cannot be written; then `path` is what it was.
    """
    try:
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        try:
            with open(temporary, "xb") as stream:
                mode = os.fstat(stream.fileno()).st_mode
            yield temporary
            with contextlib.suppress(FileNotFoundError):
                mode = target.stat().st_mode
            flush(temporary)
            temporary.chmod(stat.S_IMODE(mode))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise refusal(path, error) from None


def flush(file: Path) -> None:
    """Have a file's bytes on the disk."""
    with open(file, "r+b") as stream:  # for writing, which Windows asks for
        os.fsync(stream.fileno())


def page(template: Path, data: Any) -> str:
    """An HTML page: the template with `data` as JSON in the place of `__DATA__`, within a script element."""
    text = json.dumps(data).replace("<", "\\u003c")  # no text of the data ends the script
    return template.read_text(encoding="utf-8").replace("__DATA__", text)


def write_page(file: Path, template: Path, data: Any) -> None:
    """Write the `page` of a template and data.

    Raises:
        DgqError: it cannot be written.
    """
    with atomic_file(file) as handle:
        handle.write(page(template, data).encode())


def claim(path: Path) -> Path:
    """Create an empty file of a name that is free: `path`, else with -2, -3 and so on before its ending.

    Raises:
        DgqError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
            with contextlib.suppress(FileExistsError):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                return name
    except OSError as error:
        raise refusal(path, error) from None
    raise AssertionError


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that has the mode open() gives; safetensors itself makes it private."""
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), str(file), metadata=metadata)
    file.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """The hidden folder `.NAME.partial` beside a folder `target`, in which it is made, held by this process alone.

    What a process that was killed left of a replacement is put right before the block and after it. The folder goes
    where nothing is left in it.

    Raises:
        DgqError: another process holds it, or it cannot be written.
    """
    place = Path(os.path.abspath(target))
    folder = place.with_name(f".{place.name}.partial")
    try:
        lock = _locked(folder)
    except BlockingIOError:
        raise DgqError(
            f"{target}: another process is writing it (it holds {folder})", "let it end, or choose another place"
        ) from None
    except OSError as error:
        raise refusal(target, error) from None
    try:
        _settle(place, folder)
        yield folder
    finally:
        _settle(place, folder)
        try:
            _remove(folder)
            os.close(lock)
        except PermissionError:  # Windows removes no file that is open; who opens it from here on keeps it
            os.close(lock)
            with contextlib.suppress(PermissionError):
                _remove(folder)


def _locked(folder: Path) -> int:
    """The open lock file in a folder that is made for it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last holder has just removed the folder
            continue
        try:
            if _hold(lock, folder / _LOCK):
                return lock
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


def _hold(lock: int, file: Path) -> bool:
    """Lock an open file until it is closed; False where its name leads elsewhere by now.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where no open file loses its name
        import msvcrt

        try:
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError:
            raise BlockingIOError from None
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), os.stat(file))
    return False


def _remove(folder: Path) -> None:
    """Remove a folder in which nothing is left but its lock."""
    with contextlib.suppress(FileNotFoundError):
        if os.listdir(folder) == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()


def _settle(target: Path, folder: Path) -> None:
    """Undo a replacement that got no further than moving the old folder away, and clear what it left."""
    old = folder / "old"
    if old.exists() and not os.path.lexists(target):
        old.rename(target)
    for leftover in (old, folder / "new"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False, work: Path | None = None) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well.

    Args:
        target: where it goes; an empty folder may be there.
        overwrite: replace a folder that is there; it stays whole until the new one takes its place.
        work: the target's `workplace` where the caller holds it.

    Raises:
        DgqError: target exists and may not be replaced, cannot be written, or another process is writing it.
    """
    with workplace(target) if work is None else contextlib.nullcontext(work) as folder:
        place = Path(os.path.abspath(target))
        filled = os.path.lexists(place) and not (os.path.isdir(place) and not os.listdir(place))
        if filled and not os.path.isdir(place):
            raise DgqError(f"{target}: is not a folder", "choose another --out")
        if filled and not overwrite:
            raise DgqError(f"{target}: already exists", "choose another --out, or pass --overwrite")
        new = folder / "new"
        try:
            new.mkdir()
            yield new
            if filled:
                for file in new.rglob("*"):  # before what they replace is gone
                    if file.is_file():
                        flush(file)
                try:
                    place.rename(folder / "old")
                    new.rename(place)
                finally:
                    _settle(place, folder)
            else:
                with contextlib.suppress(FileNotFoundError):
                    place.rmdir()  # over which Windows renames nothing
                new.rename(place)
        except (OSError, SafetensorError) as error:
            raise refusal(target, error) from None
