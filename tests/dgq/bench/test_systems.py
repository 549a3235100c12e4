"""Which systems run, in which groups, and what becomes of those that fail; the processes are stand-ins here."""

import importlib.util
import math
import os
import signal
from importlib import metadata
from pathlib import Path

import pytest
import torch

from dgq.bench import systems
from dgq.bench.drawing import PARTS
from dgq.bench.systems import OVERHEAD, USABLE, Free, Size, System, Worker, chosen_peers, free_memory, measure
from dgq.bench.worker import Spec
from dgq.checkpoint.writing import WEIGHTS_NAME
from dgq.errors import DgqError

GIB = 2**30
SIZE = Size(GIB)  # with 1 byte each a system needs 2 GiB


class Fake:
    """A worker without a process: its folder's name is "MS-GIB" and what it does wrong."""

    log: list[str]

    def __init__(self, spec: Spec) -> None:
        self.ms, peak, self.fault = spec.folder.split("-")
        self.name = spec.calls
        if self.fault == "load":
            raise DgqError("cannot be loaded")
        self.log.append(f"+{self.name}")
        self.warm_ms, self.weight_bytes, self.peak_rss_bytes = float(self.ms), None, int(float(peak) * GIB)
        self.load_ms, self.parts = 10 * self.warm_ms, {part: [] for part in PARTS}
        self.output = torch.full((2,), math.nan if self.fault == "nan" else 1 + self.warm_ms / 1000)
        self.runs = 0

    def run(self) -> float:
        self.log.append(self.name)
        self.runs += 1
        if self.fault == "run" and self.runs == 2:
            raise DgqError("its process was ended by SIGKILL")
        for number, part in enumerate(PARTS):
            self.parts[part].append(self.warm_ms * (number + self.runs))
        return self.warm_ms

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"-{self.name}")


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stand-ins did."""
    Fake.log = []
    monkeypatch.setattr(systems, "Worker", Fake)
    return Fake.log


def system(name: str, ms: float, peak: float = 2, fault: str = "", kind: str = "torch") -> System:
    """A system that needs 2 GiB and then takes `peak` GiB."""
    dtype = name if name.startswith(("float", "bfloat")) else "bfloat16"
    return System(name, (Spec(kind, f"{ms}-{peak}-{fault}", dtype, name),), bytes_per_parameter=1.0)


def gib(free: float) -> Free:
    """So many GiB, of which workers take their peaks."""
    return lambda loaded: free * GIB - sum(worker.peak_rss_bytes for worker in loaded)


def test_systems_that_fit_run_in_turns(log: list[str]) -> None:
    rows, notes = measure([system("float32", 8), system("b", 4), system("c", 2)], "case", SIZE, 2, gib(6))
    assert log == ["+float32", "+b", "+c", *["float32", "b", "c"] * 2, "-c", "-b", "-float32"]
    assert [(row.system, row.p50_ms, row.ratio_to_float32) for row in rows] == [
        ("float32", 8, 1),
        ("b", 4, 0.5),
        ("c", 2, 0.25),
    ]
    assert rows[0].relative_error == 0
    assert rows[1].relative_error == pytest.approx(0.004 / 1.008, rel=1e-3)
    assert {row.peak_rss_mib for row in rows} == {2048}
    assert {(row.case, row.table) for row in rows} == {("case", "step")}
    assert notes == []


def test_systems_that_do_not_fit_run_in_groups_each_with_float32(log: list[str]) -> None:
    found = [system("float32", 8), system("b", 4, 1), system("c", 2), system("d", 1)]
    rows, notes = measure(found, "case", SIZE, 1, gib(5.5))
    # beside float32 (2 GiB) b's turns out to take 1, so that c's 2 still fit, and d's no more
    assert log == ["+float32", "+b", "+c", "float32", "b", "c", "-c", "-b", "+d", "float32", "d", "-d", "-float32"]
    assert [row.system for row in rows] == ["float32", "b", "c", "d"]
    assert notes == ["memory did not suffice for all systems at once: b, c; d ran in turns, each group with float32"]


def test_a_later_system_may_fill_the_room_that_an_earlier_one_did_not_fit_into(log: list[str]) -> None:
    large = System("large", (Spec("torch", "4-3-", "bfloat16", "large"),), bytes_per_parameter=3.0)
    found = [system("float32", 8), system("b", 4), large, system("c", 2)]
    rows, _ = measure(found, "case", SIZE, 1, gib(6))
    assert [entry for entry in log if entry.startswith("+")] == ["+float32", "+b", "+c", "+large"]
    assert [row.system for row in rows] == ["float32", "b", "large", "c"]


def test_a_pictures_rows_are_followed_by_those_of_its_parts(log: list[str]) -> None:
    # float32 runs in both groups: its row is that of the first
    found = [system("float32", 8), system("b", 4), system("c", 2)]
    rows, _ = measure(found, "case", SIZE, 3, gib(4.5), table="picture")
    assert log.count("float32") == 6
    cases = ["case", *(f"case: {part}" for part in (*PARTS, "load"))]
    assert [(row.system, row.case) for row in rows] == [
        (name, case) for name in ("float32", "b", "c") for case in cases
    ]
    assert [row.table for row in rows[:6]] == ["picture", *["part"] * 5]
    assert [row.p50_ms for row in rows[:6]] == [8, 16, 24, 32, 40, 80]
    # of the turns that they took together: in the second group float32's are its fourth to sixth
    assert [row.p50_ms for row in rows[12:]] == [2, 4, 6, 8, 10, 20]
    assert rows[13].ratio_to_float32 == pytest.approx(4 / 40)
    assert rows[7].ratio_to_float32 == 0.5
    assert {row.peak_rss_mib for row in rows if row.table == "part"} == {None}


def test_a_system_that_never_fits_is_left_out() -> None:
    large = System("large", (Spec("torch", "4-9-", "bfloat16", "large"),), bytes_per_parameter=8.0)
    rows, notes = measure([system("float32", 8), large, system("c", 2)], "case", SIZE, 1, gib(6))
    assert [row.system for row in rows] == ["float32", "c"]
    assert notes == ["large was left out: it may take 9.0 GiB, 6.0 GiB are free"]


def test_a_device_is_asked_for_its_memory_each_time(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes there take half a GiB more than they tell."""
    device = torch.device("cuda:1")

    def info(asked: torch.device) -> tuple[float, int]:
        assert asked == device
        loaded = sum((entry[0] == "+") - (entry[0] == "-") for entry in log)
        return 8 * GIB / USABLE - 2.5 * GIB * loaded, 24 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    found = [system("float32", 8), system("b", 4), system("c", 2), system("d", 1)]
    rows, notes = measure(found, "case", SIZE, 1, free_memory(device))
    assert [entry for entry in log if entry[0] in "+-"] == ["+float32", "+b", "+c", "-c", "-b", "+d", "-d", "-float32"]
    assert [row.system for row in rows] == ["float32", "b", "c", "d"]
    assert notes == ["memory did not suffice for all systems at once: b, c; d ran in turns, each group with float32"]


def test_systems_that_do_not_fit_beside_float32_run_after_it(log: list[str]) -> None:
    large, broken, ended = (
        System(name, (Spec("torch", f"4-3-{fault}", "bfloat16", name),), bytes_per_parameter=4.5)
        for name, fault in (("large", ""), ("broken", "load"), ("ended", "run"))
    )
    found = [system("float32", 8), large, broken, system("c", 2), ended]
    rows, notes = measure(found, "case", SIZE, 2, gib(6), table="picture")
    turns = [*["float32", "c"] * 2, "-c", "-float32"]
    assert log == ["+float32", "+c", *turns, "+large", "large", "large", "-large", "+ended", "ended", "ended", "-ended"]
    whole = [row for row in rows if row.table == "picture"]
    assert [(row.system, row.p50_ms, row.ratio_to_float32) for row in whole] == [
        ("float32", 8, 1),
        ("large", 4, 0.5),
        ("c", 2, 0.25),
    ]
    assert whole[1].relative_error == pytest.approx(0.004 / 1.008, rel=1e-3)
    parts = {row.case: row for row in rows if row.system == "large"}
    assert parts["case: load"].p50_ms == 40
    assert parts[f"case: {PARTS[0]}"].ratio_to_float32 == 0.5
    assert notes == [
        "broken failed: cannot be loaded",
        "ended failed: its process was ended by SIGKILL",
        "did not fit into memory beside float32, and ran after it, not in turns: large",
    ]


def test_systems_that_fail_become_notes_and_the_others_go_on() -> None:
    found = [
        system("float32", 8),
        system("b", 4, fault="load"),
        system("c", 2, fault="run"),
        system("d", 1, fault="nan"),
        system("e", 3),
    ]
    rows, notes = measure(found, "case", SIZE, 3)
    assert [(row.system, row.p50_ms) for row in rows] == [("float32", 8), ("d", 1), ("e", 3)]
    assert rows[1].relative_error is None
    assert notes == [
        "b failed: cannot be loaded",
        "c failed: its process was ended by SIGKILL",
        "the output of d holds values that are not finite",
    ]


def test_float32_has_a_row_when_all_others_fail() -> None:
    rows, notes = measure([system("float32", 8), system("b", 4, fault="load")], "case", SIZE, 1)
    assert [row.system for row in rows] == ["float32"]
    assert notes == ["b failed: cannot be loaded"]


@pytest.mark.parametrize("fault", ["load", "run"])
def test_nothing_can_be_said_without_float32(log: list[str], fault: str) -> None:
    with pytest.raises(DgqError, match="float32 failed: "):
        measure([system("float32", 8, fault=fault), system("b", 4)], "case", SIZE, 2)
    assert sum(entry.startswith("+") for entry in log) == sum(entry.startswith("-") for entry in log)


@pytest.mark.parametrize(("ms", "fastest"), [(4, "bfloat16"), (9, "float32")])
def test_the_faster_float_system_is_compiled(ms: float, fastest: str) -> None:
    both = tuple(Spec("compile", "2-1-", dtype, dtype) for dtype in ("float32", "bfloat16"))
    found = [system("float32", 8), system("bfloat16", ms), System("torch.compile", both), system("dgq W8A8", 1)]
    rows, _ = measure(found, "case", Size(1000), 1)
    assert [row.system for row in rows] == ["float32", "bfloat16", f"torch.compile ({fastest})", "dgq W8A8"]


def test_where_bfloat16_fails_float32_is_compiled() -> None:
    both = tuple(Spec("compile", "2-1-", dtype, dtype) for dtype in ("float32", "bfloat16"))
    found = [system("float32", 8), system("bfloat16", 1, fault="load"), System("torch.compile", both)]
    rows, _ = measure(found, "case", Size(1000), 1)
    assert rows[-1].system == "torch.compile (float32)"


def test_a_system_needs_memory_by_kind_and_dtype(tmp_path: Path) -> None:
    single = System("bfloat16", (Spec("torch", str(tmp_path), "bfloat16", ""),))
    assert single.needed(Size(1000, 100)) == OVERHEAD + 2 * (1000 + 100)
    int8 = System("int8", (Spec("openvino", "", "", ""),))
    assert int8.needed(Size(1000, 100)) == OVERHEAD + 2250
    assert single.chosen("float32") == single
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    for part in ("unet", "vae"):
        (tmp_path / part / WEIGHTS_NAME).write_bytes(b"12345")
    (tmp_path / "unet" / "config.json").write_bytes(b"123")
    assert single.stored_bytes == 5
    versions = f"torch {metadata.version('torch')}, numpy {metadata.version('numpy')}"
    assert System("x", single.specs, packages=("torch", "numpy")).versions == versions


def test_peers_are_named_and_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert chosen_peers(None) == chosen_peers("") == []
    assert chosen_peers("sdnq, openvino") == ["openvino", "sdnq"]
    assert chosen_peers("all") == ["openvino", "torchao", "sdnq"]
    with pytest.raises(DgqError, match="'onnx' is not one of openvino, torchao, sdnq, all"):
        chosen_peers("openvino,onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "openvino" else None)
    with pytest.raises(DgqError, match="nncf and sdnq not installed: pip install nncf sdnq"):
        chosen_peers("sdnq,openvino")


def test_a_process_that_crashes_between_steps_becomes_a_note(
    monkeypatch: pytest.MonkeyPatch, small_config: Path, tmp_path: Path
) -> None:
    """Real processes, one of which is ended from outside."""
    import json

    from dgq import architectures
    from dgq.bench import files

    class Fragile(Worker):
        def __init__(self, spec: Spec) -> None:
            super().__init__(spec)
            self.fragile = spec.dtype == "bfloat16"

        def run(self) -> float:
            if self.fragile:
                os.kill(self._child.pid, signal.SIGSEGV)
            return super().run()

    monkeypatch.setattr(systems, "Worker", Fragile)
    config = json.loads(small_config.read_text())
    files.random_model(config, str(tmp_path / "model"), "float32")
    call = architectures.call(architectures.skeleton(config), 2, torch.device("cpu"))
    files.save_calls([call], tmp_path / "calls")
    found = [
        System(dtype, (Spec("torch", str(tmp_path / "model"), dtype, str(tmp_path / "calls")),))
        for dtype in ("float32", "bfloat16")
    ]
    rows, notes = measure(found, "case", Size(1000), 2)
    assert [row.system for row in rows] == ["float32"]
    assert notes == ["bfloat16 failed: its process was ended by SIGSEGV"]


def test_the_size_of_a_model_tells_what_channels_last_copies() -> None:
    layers = [torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 7, 1), torch.nn.Linear(7, 2)]
    assert Size.of(torch.nn.Sequential(*layers)) == Size(3 * 5 * 9 + 5 + 5 * 7 + 7 + 7 * 2 + 2, 3 * 5 * 9)
