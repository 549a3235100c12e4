"""The command line: the commands, and what a failure looks like."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from .common import err

app = typer.Typer(
    name="dgq",
    help="Low-bit text-to-image diffusion: quantize a model by DGQ, make pictures with it, measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name in ("calibrate", "generate", "bench", "eval", "inspect", "doctor"):
    _module = importlib.import_module(f"dgq_cli.{_name}_command")
    app.command(_name)(_module.command)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version  # importing dgq itself takes seconds

        typer.echo(f"dgq {version('dgq')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run `dgq`. Exit codes: 0; 1 a known error, told in one line; 2 wrong usage; 130 interrupted."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        sys.exit(_report(error))
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Print an error in one line and return the exit code; DGQ_DEBUG=1 shows the traceback."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):  # typer's own usage errors
        show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        err.print("interrupted")
        return 130
    if os.environ.get("DGQ_DEBUG"):
        raise error
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    known = type(error).__name__ == "DgqError"
    prefix = "error" if known else f"error: unexpected {type(error).__name__}"
    err.print(f"[bold red]{prefix}:[/] ", end="")
    err.print(message, markup=False, soft_wrap=True)
    hint = getattr(error, "hint", None) if known else "run with DGQ_DEBUG=1 for the traceback"
    if hint:
        err.print(f"  {hint}", markup=False, soft_wrap=True)
    return 1
