"""Hints to the operating system about this process's memory."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor


def page_out(tensor: Tensor) -> None:
    """Tell the system that a tensor's memory is not needed for now: pages of a mapped file leave the resident set, and
    come back from the file when they are read. A hint; does nothing where the system has none."""
    page, advice = mmap.PAGESIZE, 21  # MADV_PAGEOUT
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // page) * page, end // page * page
    if last > first and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))


def give_back() -> None:
    """Return to the system what was freed of this process's heap, which else may stay as large as its fragments make
    it; does nothing where the C library has no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))
