"""The command line: the commands, and what a failure looks like."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from typing import Annotated, Any

import typer

from .common import err, going_on

app = typer.Typer(
    name="dgq",
    help="Low-bit text-to-image diffusion: quantize a model by DGQ, draw with it, teach it subjects, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name in ("calibrate", "generate", "tune", "bench", "eval", "inspect", "export", "serve", "doctor"):
    _module = importlib.import_module(f"dgq_cli.{_name}_command")
    app.command(_name)(_module.command)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version  # importing dgq itself takes seconds

        typer.echo(f"dgq {version('dgq')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Of several processes that `accelerate launch` starts, `dgq eval` shares its work among all; what another command
    makes is made once."""
    processes, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK") or "0"
    for name, value in (("WORLD_SIZE", processes), ("RANK", rank)):
        if not (value.isascii() and value.isdigit()):
            err.print(f"error: {name}={value} is no number; leave it to accelerate launch", soft_wrap=True)
            raise typer.Exit(1)
    if int(processes) > 1 and int(rank) and context.invoked_subcommand != "eval":
        err.print(f"dgq {context.invoked_subcommand} is the work of one process; the first one does it")
        raise typer.Exit


def main() -> None:
    """Run `dgq`.

    Exit codes: 0; 1 a known error, told in one line; 2 wrong usage; 130 interrupted; 141 nobody reads the output; 143
    ended by SIGTERM, which is told and put in order as an interruption.
    """
    _open_streams()
    terminated = []

    def terminate(number: int, _: Any) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if usual:
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as end:  # typer's own, where a pipe was closed
        code = CLOSED_PIPE if isinstance(end.__context__, BrokenPipeError) else end.code
    except Exception as error:
        code = _report(error)
    if usual:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to put in order
    if code == INTERRUPTED:  # raised as it is or as typer's Abort, or, by newer versions of typer, returned
        err.print("; ".join(["interrupted", *going_on]))
        going_on.clear()
        code = 128 + terminated[0] if terminated else code
    try:
        sys.stdout.flush()
    except OSError:  # told already; Python would try and fail again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # An interruption within exec of a text, as dataclasses are made, stays noted: Python's -m would end by SIGINT.
    exec("")
    sys.exit(code if isinstance(code, int) else 0)


def run() -> None:
    """`main` as a program.

    It ends without taking its modules apart first, a twentieth of a small picture's time: what was to be done at its
    end is done, and as long as a thread works it ends as others do.
    """
    try:
        main()
    except SystemExit as end:
        # tqdm's monitor is a daemon that stays once a picture was drawn
        if sum(not thread.daemon for thread in threading.enumerate()) > 1:
            raise
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)


INTERRUPTED = 128 + signal.SIGINT  # as the shell says it of a program that a signal ended
CLOSED_PIPE = 128 + 13  # as the shell says it of a program that SIGPIPE ended


def _open_streams() -> None:
    """Standard streams that are closed fail when they are written to; and what cannot be encoded is printed escaped.

    Left closed, their numbers would go to the next files that are opened.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # bytes of a file's name that are no text come out as they came in
        plain = sys.stdout.encoding.lower() == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if plain else "backslashreplace")


def _report(error: Exception) -> int:
    """Print an error in one line and return the exit code; DGQ_DEBUG=1 shows the traceback."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):  # typer's own usage errors
        if len(getattr(error, "message", "")) > LONGEST_MESSAGE:
            error.message = _shortened(error.message)  # type: ignore[attr-defined]
        show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if os.environ.get("DGQ_DEBUG"):
        raise error
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    prefix, hint = "error", getattr(error, "hint", None)
    if _full_output(error):
        message, hint = f"standard output: cannot be written ({error.strerror})", None  # type: ignore[attr-defined]
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
        message = message.partition(" Of the allocated memory")[0]
        hint = "smaller or fewer pictures at a time take less; CUDA_VISIBLE_DEVICES= hides GPUs, and the CPU does it"
    elif type(error).__name__ != "DgqError":
        prefix, hint = f"error: unexpected {type(error).__name__}", "run with DGQ_DEBUG=1 for the traceback"
    err.print(f"{prefix}: ", end="", style="bold red")
    err.print(_shortened(message), soft_wrap=True)
    if hint:
        err.print(f"  {hint}", soft_wrap=True)
    return 1


LONGEST_MESSAGE = 2000


def _shortened(message: str) -> str:
    """A message without the middle of what someone wrote at length."""
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def _full_output(error: Exception) -> bool:
    """Whether an error comes from writing standard output: nothing else here writes without a file's name."""
    return (
        isinstance(error, OSError)
        and error.filename is None
        and error.errno
        in (
            errno.ENOSPC,
            errno.EBADF,
            errno.EIO,
            errno.EDQUOT,
            errno.EFBIG,
        )
    )
