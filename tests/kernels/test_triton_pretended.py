"""Every operator compiles as a GPU would ask for it, on a pretended device (`pretended.py`, a process of its own)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dgq.bench import predict
from dgq_kernels.samples import samples

pytest.importorskip("triton")

OPERATORS = {sample.operator for sample in samples()} - {"quantize_wide_samples"}  # which torch's operators serve


def pretend(*parts):
    """What the pretended device says, and its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("pretended.py")), *parts]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stderr[-3000:]
    *rows, end = map(json.loads, result.stdout.splitlines())
    assert end["launches"] >= len([row for row in rows if "counted" not in row]) // 2
    return rows


def check(rows, spills=False):
    assert not [row for row in rows if "error" in row]
    kernels = [row for row in rows if "kernel" in row]
    assert kernels
    assert not [row for row in kernels if row["registers"] > 255 or row["shared"] > 232448]
    if not spills:
        assert not [row for row in kernels if row["spilled"]]


def test_edges_compile_and_launch_where_their_tensors_are():
    """Arguments of 1, unaligned and absent ones, and the types of every operator; float32 may spill. Each operator then
    launches on its tensors' device while another one is current. What is launched a second time is what Triton would
    launch, and by two threads at once."""
    rows = pretend("operators", "again", "apart", "in_flight", "second_device", "threads")
    check(rows, spills=True)
    apart = {row["dependent"]: row["launched"] for row in rows if "dependent" in row}
    assert apart == {True: [True, True], False: [False, False]}
    flying = [(row["in_flight"], row["kernels"]) for row in rows if "in_flight" in row]
    assert {name for name, kernels in flying if kernels == [0, 1, 0]} == {"linear_int8", "conv2d"}
    assert all(kernels in ([0, 0, 0], [0, 1, 0]) for _, kernels in flying)
    repeated = [row for row in rows if "again" in row]
    assert {row["again"] for row in repeated} == OPERATORS
    assert all(row["same"] and row["launches"] for row in repeated), [row for row in repeated if not row["same"]]
    assert [row["threads"] for row in rows if "threads" in row] == [[True, True]]
    placed = {row["operator"]: row for row in rows if "operator" in row}
    assert set(placed) == OPERATORS
    assert all(row["devices"] == [1] and row["left"] == 0 for row in placed.values()), placed


AMPERE = """
import os, sys
sys.path.append(sys.argv[1])
os.environ.pop("TRITON_INTERPRET", None)
import torch
from pretend import pretend
from triton.runtime import driver
import dgq_kernels
from dgq_kernels.linear import tiles
machine, registers = tiles.Machine((8, 0), 108, 40 * 2**20, 9.6), []
pretend(lambda **kernel: registers.append(kernel["registers"]), machine=machine, shared=163 * 1024)
dgq_kernels.quantize_rows(torch.randn(4, 64), 8, None)
assert registers and tiles._machine(torch.device("cuda")) is machine
assert driver.active.get_current_target().arch == 80
"""


def test_another_card_can_be_pretended():
    """The report compiles for the one that is there."""
    folder = Path(__file__).parents[2] / "benchmarks" / "gpu"
    subprocess.run([sys.executable, "-c", AMPERE, str(folder)], check=True, timeout=300)


def test_the_prediction_counts_what_a_step_launches(small_config, small_picture, tmp_path):
    """Of Stable Diffusion's blocks and SDXL's, and where a norm's range is a launch of its own."""
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({**json.loads(small_config.read_text()), "sample_size": 40, "norm_num_groups": 1}))
    names = [str(small_config), str(small_picture), str(wide)]
    counted = {(row["name"], row["wbits"], row["log_attention"]): row["counted"] for row in pretend(*names)}
    assert counted[names[0], 8, False] < counted[names[2], 8, False]
    systems = {"W8A8 fp16-attention": (8, False), "W8A8": (8, True), "W4A8": (4, True)}
    for name in names:
        for system, which in systems.items():
            own = [work for work in predict.works(name) if work.quantized]
            if not which[1]:
                own = [work for work in own if not work.kind.endswith("attention")]
            costs = [predict.cost(work, system, predict.DEVICES["h100"], {})[0] for work in own]
            assert sum(one.launches for one in costs) == counted[name, *which], (name, system)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedded", "sd-v1.4", "sdxl-turbo"])
def test_a_step(name):
    check(pretend(name))


@pytest.mark.slow
def test_a_step_of_tuning():
    rows = pretend("tuning")
    check(rows)
    assert {row["kernel"] for row in rows if "kernel" in row} == {"unscaled_product_kernel"}
