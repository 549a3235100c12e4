"""Hints to the operating system about this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
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
    with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: Windows, where no name is no library
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


# Below, memory that is freed stays in the heap and costs little to have again.
_LARGE = 8 << 20
_active = threading.local()


@contextlib.contextmanager
def recycled() -> Iterator[None]:
    """Within it, in this thread, large results of the engine take the place of earlier ones that nobody holds any more.

    What is freed in such pieces goes back to the system at once, and every page of what is asked for anew is cleared by
    it first, which takes a tenth of a large picture's convolution.
    """
    outer = getattr(_active, "blocks", None)
    _active.blocks = [] if outer is None else outer
    try:
        yield
    finally:
        _active.blocks = outer


def empty(size: Iterable[int], like: Tensor) -> Tensor:
    """An uninitialised channels-last picture (B, C, H, W) of this size, of a tensor's dtype, on the CPU."""
    batch, channels, height, width = size
    blocks = getattr(_active, "blocks", None)
    count = batch * channels * height * width
    if blocks is None or count * like.itemsize < _LARGE or type(like) is not Tensor:
        return torch.empty(
            (batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
        )
    values = torch.frombuffer(_block(blocks, count * like.itemsize), dtype=like.dtype, count=count)
    return values.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _block(blocks: list[mmap.mmap], size: int) -> mmap.mmap:
    """One that is free and not much larger than it has to be, or a new one in the place of those that are free and
    half as large at most."""
    # a tensor holds its block; the list and this question do too
    free = [i for i in range(len(blocks)) if sys.getrefcount(blocks[i]) <= 2]
    if fitting := [i for i in free if size <= len(blocks[i]) <= 2 * size]:
        return blocks[min(fitting, key=lambda i: len(blocks[i]))]
    for i in reversed(free):
        if 2 * len(blocks[i]) <= size:
            del blocks[i]
    blocks.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return blocks[-1]
