"""A float network turned into the empty quantized one that a header describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import DgqError

if TYPE_CHECKING:
    from .header import Header


def apply_header(network: nn.Module, header: Header, file: Path | None = None) -> None:
    """Turn a float network (usually on the meta device) into the empty quantized model a header describes.

    Args:
        network: is changed.
        header: from `file`.
        file: for the message of an error.

    Raises:
        DgqError: a planned layer is none of the model's, or not of its kind and sizes.
    """
    try:
        header.method.skeleton(network, header)
    except DgqError as error:
        where = f"{file}: quantization_config" if file else "quantization_config"
        raise DgqError(f"{where}: {error.message}", error.hint) from None
