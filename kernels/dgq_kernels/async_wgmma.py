"""int8 products of 9.0 that are in flight while the operands of the next ones are loaded.

wgmma is asynchronous. Where the sums are float32, Triton lets a loop's product run on until the next one has begun; to
int32 it waits for each at once (in 3.6 and 3.9). Here that wait is moved in the kernel's TTGIR, to where Triton itself
has it for float32: in the loop for all products but the newest, after the loop for that one. Its pipeliner keeps one
buffer more than are loaded ahead for wgmma of either kind, so that the buffer which a step fills is that of a product
that has ended.

Off unless DGQ_ASYNC_WGMMA=1 asks for it: no GPU has run it.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import triton

ASKED = os.environ.get("DGQ_ASYNC_WGMMA") == "1"
_DOT = re.compile(r"(%\w+) = ttng\.warp_group_dot (%\w+), (%\w+), %\w+ \{.*?-> (tensor<[0-9x]+xi32, #\w+>)")
_WAIT = re.compile(r"(%\w+):3 = ttng\.warp_group_dot_wait (%\w+), .*?\{pendings = 0 : i32\}")
_LOOP = re.compile(r"^( +)(%\w+):\d+ = scf\.for .*$", re.MULTILINE)
_YIELD = re.compile(r"scf\.yield (.*?) :")


def in_flight(code: str) -> str | None:
    """The TTGIR of a kernel with its wait moved; None where it is not one loop with one product to int32 of operands
    that lie in pipelined buffers."""
    dots, waits = list(_DOT.finditer(code)), list(_WAIT.finditer(code))
    if len(dots) != 1 or len(waits) != 1 or code.count("ttng.warp_group_dot") != 2:
        return None
    (dot, *operands, kind), (wait, waited) = dots[0].groups(), waits[0].groups()
    loops = [loop for loop in _LOOP.finditer(code) if loop.end() < dots[0].start()]
    if waited != dot or not loops or not all(f"{operand} = ttg.memdesc_index " in code for operand in operands):
        return None
    indent, loop = loops[-1].groups()
    end = re.compile(rf"^{indent}}}.*$", re.MULTILINE).search(code, loops[-1].end())
    carried = _YIELD.search(code, waits[0].end())
    if end is None or not waits[0].end() < end.start() or carried is None or carried.end() > end.start():
        return None
    names = carried[1].split(", ")
    if f"{wait}#0" not in names or code.count(f"{wait}#") != 1:  # the sums go to the next step, and nowhere else
        return None
    sums = f"{loop}#{names.index(f'{wait}#0')}"
    landed = f"\n{indent}%landed = ttng.warp_group_dot_wait {sums} {{pendings = 0 : i32}} : {kind}"
    inside = waits[0][0].replace("pendings = 0", "pendings = 1")
    after = re.sub(rf"{re.escape(sums)}(?!\d)", "%landed", code[end.end() :])
    return code[: waits[0].start()] + inside + code[waits[0].end() : end.end()] + landed + after


def edited(compiled: Any) -> Any:
    """A compiled kernel whose int8 products are in flight; itself where `in_flight` finds none, or not on 9.0."""
    metadata = compiled.metadata
    code = in_flight(compiled.asm["ttgir"]) if metadata.target.arch == 90 else None
    if code is None:
        return compiled
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(code)
        options = {name: getattr(metadata, name) for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")}
        found = triton.compile(str(path), target=metadata.target, options=options)
    mine = copy.copy(compiled)  # its arguments, shared memory and options of launches stay; it is yet to be loaded
    mine.module = mine.function = mine._run = None
    mine.asm, mine.kernel = found.asm, found.kernel
    return mine
