"""What is otherwise on Windows for those who write files, as far as it can be pretended on Linux."""

import builtins
import errno
import fcntl
import os
import types
from pathlib import Path

import pytest


def _open(path: str | os.PathLike[str]) -> bool:
    """Whether this process has a file open, or one in a folder."""
    place = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if f"{target}/".startswith(f"{place}/"):
            return True
    return False


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fcntl; files that are open are neither removed nor replaced, folders never; only what is open for writing
    can be put on the disk."""
    find = builtins.__import__

    def locking(descriptor, mode, count):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    def imported(name, *args, **kwargs):
        if name == "fcntl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return types.SimpleNamespace(locking=locking, LK_NBLCK=2) if name == "msvcrt" else find(name, *args, **kwargs)

    def free(call, replaces):
        def run(path, *others, **kwargs):
            for other in others:
                if os.path.lexists(other) and (not replaces or os.path.isdir(other)):
                    raise FileExistsError(
                        errno.EEXIST, "Cannot create a file when that file already exists", str(other)
                    )
            for one in (path, *others):
                if os.path.lexists(one) and _open(one):
                    raise PermissionError(errno.EACCES, "The file is being used by another process", str(one))
            return call(path, *others, **kwargs)

        return run

    def fsync(descriptor, real=os.fsync):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor)

    monkeypatch.setattr(builtins, "__import__", imported)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("unlink", "rmdir", "rename", "replace"):
        monkeypatch.setattr(os, name, free(getattr(os, name), name == "replace"))


def of_unix(tree_of: Path) -> list[str]:
    """The modules that Windows lacks among those that a file imports at its top."""
    import ast

    names = []
    for node in ast.parse(tree_of.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return [name for name in names if name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog")]
