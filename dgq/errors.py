"""The one exception a user is meant to read."""

from __future__ import annotations


class DgqError(ValueError):
    """A known failure, said in one line; the command line prints it and exits with 1.

    It is a ValueError for whoever asks diffusers to load something and expects its errors.

    Args:
        message: what went wrong and where (file, tensor, option).
        hint: what to do about it, or None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
