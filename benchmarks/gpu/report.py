#!/usr/bin/env python3
"""Minutes on a machine with a GPU, turned into figures: `python benchmarks/gpu/report.py --out DIR [STAGE ...]`.

Every stage is a process of its own with a time limit, so a crash or a hang costs one stage; every result is a line of
DIR/report.jsonl as soon as it is known. `--device cpu` runs all stages on a tiny UNet in Triton's interpreter;
`--device pretend` compiles the kernels of real UNet steps for sm_90 and launches none. README.md has the stages.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from session import KINDS, Session

# Seconds. The first seven make one report; the others want a call of their own.
LIMITS = {
    "doctor": 90,
    "compile": 100,
    "check": 60,
    "steps": 100,
    "ops": 100,
    "profile": 30,
    "model": 110,
    "tests": 200,
    "tiles": 150,
    "ncu": 100,
    "compiled": 280,
}
FIRST = tuple(LIMITS)[:7]
PARTS = ("shard", "hot")  # processes that a stage starts
ROOT = Path(__file__).resolve().parent.parent.parent


def lead(session: Session, stages: list[str], seconds: float) -> None:
    """Run the stages one after the other and end with a short table."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if session.cache:
        environment["TRITON_CACHE_DIR"] = session.cache
    if session.kind == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "DGQ_BACKEND": "triton"}
    end = time.monotonic() + seconds
    session = dataclasses.replace(session, since=session.size())
    for stage in stages or (FIRST if session.cuda else ("compile",)):
        begin = time.monotonic()
        ended, tail = "no time left", ""
        if end - begin > 5:
            limit = min(end - begin, LIMITS[stage] if session.cuda else 3600)
            own = dataclasses.replace(session, since=session.size())
            ended, tail = _run(own, stage, limit, environment)
        session.say("lead", name=stage, ended=ended, seconds=round(time.monotonic() - begin, 1), tail=tail)
    _summarize(session)


def _run(session: Session, stage: str, limit: float, environment: dict[str, str]) -> tuple[str, str]:
    """One stage in a process: (how it ended, the end of the log where it did not end well)."""
    path = session.out / "log.txt"
    with open(path, "a", encoding="utf-8") as log:
        print(f"==== {stage}", file=log, flush=True)
        line = session.command(stage)
        child = subprocess.Popen(line, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = child.wait(limit)
            ended = str(code)
        except subprocess.TimeoutExpired:
            code, ended = 1, "time limit"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it leaves running
    return ended, path.read_text(encoding="utf-8", errors="replace")[-1500:] if code else ""


def _summarize(session: Session) -> None:
    for row in session.said("steps") + session.said("compiled"):
        if "p50_ms" in row:
            rest = f"host {row.get('host_ms', 0):7.1f}  {row.get('of_float16_graph', 0):.2f}"
            print(f"{row['model']:12} {row['system']:26} {row['p50_ms']:9.3f} ms  {rest}")
    timed = [row for row in session.said("ops") if "us" in row]
    for row in sorted(timed, key=lambda row: -row["total_ms"])[:25]:
        what = f"{row['ratio'] or 0:5.2f} of float16, {row['of_peak']:.2f} of peak, {row['op']} {row['call'][:60]}"
        print(f"{row['model']:16} {row['count']:3} x {row['us']:8.1f} us, {what}")
    for stage in ("compile", "checked", "model", "tests", "lead"):
        for row in session.said(stage):
            print(json.dumps({key: value for key, value in row.items() if key != "tail"})[:700])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(LIMITS)}; default the first seven")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=KINDS, default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="for all stages together")
    parser.add_argument(
        "--only", default="", help="networks whose label holds one of these, as in 'sd-v1.4 W8A8,embedded'"
    )
    parser.add_argument("--checkpoints", default="", help="folder of checkpoints for the stage `model`")
    parser.add_argument(
        "--cache", default="", help="folder of Triton's cache, whose keys any build of the same release finds"
    )
    parser.add_argument("--run", choices=[*LIMITS, *PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--card", default="", help=argparse.SUPPRESS)
    parser.add_argument("--since", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.stages) - set(LIMITS)):
        parser.error(f"no stage {unknown[0]!r}; stages are {', '.join(LIMITS)}")
    asked = Session(options.out, options.device, only=options.only)
    if not any(map(asked.wants, asked.labels)):
        parser.error(f"--only {options.only!r} names no network; labels are {', '.join(asked.labels)}")
    options.out.mkdir(parents=True, exist_ok=True)
    # what runs on a pretended device runs on the CPU
    kind = "pretend" if options.run == "shard" and options.device == "cuda" else options.device
    more = (options.only, options.checkpoints, options.cache, options.card, options.since)
    session = Session(options.out.resolve(), kind, options.shard, *more)
    if not options.run:
        lead(session, options.stages, options.seconds)
        return
    if options.cache:
        import triton
        from triton.runtime import cache

        cache.triton_key = lambda: triton.__version__
    import stages
    import torch

    torch.backends.cudnn.benchmark = options.run in ("steps", "ops", "compiled")
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        getattr(stages, options.run)(session)


if __name__ == "__main__":
    main()
