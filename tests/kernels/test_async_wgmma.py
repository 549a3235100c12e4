"""Products of 9.0 that are in flight: which kernels they are made of, and what the machine code then does."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Prints a JSON object a line: of a kernel with a loop of products, its machine code as it is and edited, or null.
LIST = """
import json, pathlib, subprocess, tempfile, triton
from dgq_kernels import aot, async_wgmma

def disassembled(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(compiled.kernel)
        tools = (triton.knobs.nvidia.cuobjdump.path, "-res-usage"), (triton.knobs.nvidia.nvdisasm.path, "-c")
        return [subprocess.check_output([*tool, file.name], text=True) for tool in tools]

seen = {}
for case in aot.cases("90"):
    form = case.kernel.__name__, case.constants.get("CLASSES"), case.constants.get("SPLIT")
    seen[form] = seen.get(form, 0) + 1
    if case.integer and seen[form] in (1, 5):
        compiled = aot.compile_case(case, "90")
        mine = async_wgmma.edited(compiled)
        codes = [disassembled(one) for one in (compiled, mine)] if mine is not compiled else None
        print(json.dumps([case.kernel.__name__, case.constants.get("CLASSES"), case.config, codes]))
        if codes and seen[form] == 1:
            code = compiled.asm["ttgir"]
            wait = async_wgmma._WAIT.search(code)
            others = (
                code.replace("pendings = 0", "pendings = 1"),
                code.replace("scf.yield", "%more = arith.addi " + wait[1] + "#0, " + wait[1] + "#0\\n scf.yield"),
                code.replace("xi32, #mma", "xf32, #mma"),
                code.replace("ttg.memdesc_index", "ttg.local_alloc"),
            )
            print(json.dumps(["others", None, case.config, [async_wgmma.in_flight(other) for other in others]]))
"""


@pytest.fixture(scope="module")
def kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", LIST], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return list(map(json.loads, result.stdout.splitlines()))


def test_products_of_int8_weights_alone_are_edited(kernels):
    """Not those whose weights are unpacked, of shift classes, or of attention, which hold more than one product."""
    edited = {(name, classes) for name, classes, _, codes in kernels if name != "others" and codes}
    assert edited == {("linear_int8_kernel", 1), ("conv2d_int8_kernel", 1)}
    assert {name for name, *_ in kernels} > {"linear_int4_kernel", "conv2d_int4_kernel", "log_attention_kernel"}
    forms = [codes for name, *_, codes in kernels if name == "others"]
    assert forms
    assert all(found == [None] * 4 for found in forms), "a loop that is none of these is edited"


def test_the_newest_product_is_in_flight_while_the_next_operands_are_loaded(kernels):
    """In the loop all but the newest are waited for, by every warp, before a buffer is filled again; both operands lie
    in shared memory; products, loads and barriers are as they were, registers nearly so, and nothing spills."""
    for name, classes, config, codes in kernels:
        if name == "others" or classes != 1:
            continue
        (usage, before), (usage_after, after) = codes
        assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", before) == ["0x0"], config
        assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", after) == ["0x1", "0x0"], config
        begin = after.index("gsb0, 0x1")
        loop = after[after.rindex("\n.L_", 0, begin) : after.index("BRA", begin)]
        assert "IGMMA" in loop, config
        assert "LDSM" not in loop, config
        waiting, *_ = after[begin:].partition("LDGSTS")
        assert "BAR.SYNC" in waiting, config
        assert "IGMMA" not in waiting, config
        assert after.index("LDGSTS", begin) < after.index("BRA", begin) < after.index("gsb0, 0x0", begin), config
        for found in (r"IGMMA", r"LDGSTS", r"\bBAR\.SYNC"):
            assert len(re.findall(found, after)) == len(re.findall(found, before)), (config, found)
        assert re.search(r"STACK:(\d+)", usage_after)[1] == "0", config
        registers = [int(re.search(r"REG:(\d+)", one)[1]) for one in (usage, usage_after)]
        assert registers[1] < registers[0] + 8, config  # they are handed out by eights
