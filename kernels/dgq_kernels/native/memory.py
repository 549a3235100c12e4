"""Hints to the operating system about this process's memory."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def page_out(tensor: Tensor) -> None:
    """Tell the system that a tensor's memory is not needed for now: pages of a mapped file leave the resident set, and
    come back from the file when they are read. A hint; does nothing where the system has none."""
    page, advice = mmap.PAGESIZE, 21  # MADV_PAGEOUT
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // page) * page, end // page * page
    if last > first and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice))


def let_go(tensors: Iterable[Tensor]) -> None:
    """Take mapped files that hold tensors out of the resident set. Unlike `page_out` it leaves them in the cache,
    from which they come back without the disk. Files of which a private copy was changed, and all other memory, stay as
    they are; does nothing where the system does not tell of them."""
    table, advice = Path("/proc/self/smaps"), 4  # MADV_DONTNEED, which loses private changes
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.device.type == "cpu"]
    if not addresses or not table.is_file():
        return
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", table.read_text(errors="replace"), flags=re.MULTILINE):
        place = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (?!0 )\d+ ", entry)  # of no inode 0, which is no file
        if place and re.search(r"^Anonymous: +0 kB$", entry, re.MULTILINE) and not re.search(_SWAPPED, entry):
            start, end = (int(address, 16) for address in place.groups())
            if any(start <= address < end for address in addresses):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))


_SWAPPED = re.compile(r"^Swap: +[1-9]", re.MULTILINE)


def give_back() -> None:
    """Return to the system what was freed of this process's heap, which else may stay as large as its fragments make
    it; does nothing where the C library has no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))
