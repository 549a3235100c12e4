"""The stages of a report; each function takes a `Session`, runs in a process of its own and says its results."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from networks import (
    Step,
    chosen,
    embedded_network,
    float_unet,
    networks,
    own_ops,
    plans_of,
    quantized,
    quantized_steps,
    step_of,
)
from pretend import HOPPER, MOST_SHARED, MOST_STACK, pretend
from session import RECIPES, Session, clocks, label, reason
from torch.profiler import ProfilerActivity
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

import dgq
from dgq.architectures import Architecture, skeleton
from dgq.bench import rows, worker
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.apply import apply_header
from dgq.checkpoint.header import Header
from dgq.graphs import Graphs
from dgq.integer import prepared
from dgq.integer.attention import AttentionPlan
from dgq.integer.shared_input import prepare_all
from dgq.pictures import generation
from dgq.recipe import Recipe
from dgq.self_test import relative_error
from dgq_kernels import async_wgmma, launch
from dgq_kernels.codes import unsigned
from dgq_kernels.conv2d import triton as conv2d
from dgq_kernels.linear import tiles as table
from dgq_kernels.linear import triton as linear

log_attention = importlib.import_module("dgq_kernels.log_attention")  # the package has the operator by that name

PEAK_TOPS = 1979.0  # dense int8 of an H100 or H200 SXM, by the data sheet


def doctor(session: Session) -> None:
    """Versions, tools and clocks; what the device reaches at best; the project's own self-test."""
    tools = {tool: bool(shutil.which(tool)) for tool in ("gcc", "g++", "make", "ncu", "compute-sanitizer")}
    session.say("doctor", clocks=clocks(), tools=tools)
    if session.cuda:
        device, flops = session.device, 2 * 8192**3
        x = torch.randn(8192, 8192, device=device, dtype=torch.float16)
        codes = torch.randint(-128, 128, (8192, 8192), device=device, dtype=torch.int8)
        big, copy = (torch.randint(0, 9, (2**30,), dtype=torch.uint8, device=device) for _ in range(2))
        session.say(
            "doctor",
            fp16_tflops=flops / session.microseconds(lambda: x @ x) / 1e6,
            copy_gbs=2**31 / session.microseconds(lambda: copy.copy_(big)) / 1e3,
            cublas_int8_tops=flops / session.microseconds(lambda: torch._int_mm(codes, codes.t())) / 1e6,
            clocks=clocks(),
        )
    ask = subprocess.run(
        [sys.executable, "-P", "-m", "dgq_cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "DGQ_BACKEND": ""},
    )
    facts = json.loads(ask.stdout) if ask.stdout.startswith("{") else {"error": ask.stderr[-500:]}
    failed = [test for test in facts.get("self_test", []) if not test["ok"]]
    told = {key: facts.get(key) for key in ("ok", "versions", "machine", "error")}
    session.say("doctor", failed=failed, **told)


def compile(session: Session) -> None:
    """Every kernel of every step, compiled on all cores, for the device that is there, into the cache that the later
    stages read."""
    machine, most_shared = HOPPER, MOST_SHARED
    if session.cuda:  # the children see no device
        machine = table._machine(session.device)
        most_shared = triton.runtime.driver.active.utils.get_device_properties(0)["max_shared_mem"]
    card = json.dumps([machine, most_shared])
    shards = max(1, (os.cpu_count() or 1) - 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DGQ_BACKEND": "triton"}
    environment.pop("TRITON_INTERPRET", None)
    children = [
        subprocess.Popen(session.command("shard", "--shard", f"{i}/{shards}", "--card", card), env=environment)
        for i in range(shards)
    ]
    failed = sum(child.wait() != 0 for child in children)
    found = session.said("shard")
    bad = [
        row
        for row in found
        if row.get("error") or row.get("stack", 0) > MOST_STACK or row.get("shared", 0) > most_shared
    ]
    session.say("compile", card=machine, variants=len(found), shards=shards, failed_shards=failed, bad=bad)
    if failed or bad:
        sys.exit(1)


def shard(session: Session) -> None:
    """A share of the kernels, on a pretended device: nothing is launched, float operators run on the CPU on rubbish."""
    number, shards = map(int, session.shard.split("/"))
    idle = types.SimpleNamespace(launch_metadata=lambda *_: None, run=lambda *_: None, function=None)
    idle.packed_metadata = None
    really = JITFunction._do_compile

    def share(self: Any, key: Any, signature: Any, *rest: Any) -> Any:
        if zlib.crc32(f"{self.__name__}{key}".encode()) % shards == number:
            try:
                kernel = really(self, key, signature, *rest)
                async_wgmma.edited(kernel)  # into the cache, for the stages that ask for it
                if shutil.which("nvidia-smi"):  # also the launcher that the device will want: it links with the driver
                    CudaLauncher(kernel.src, kernel.metadata)
                return kernel
            except Exception as error:
                session.say("shard", kernel=self.__name__, error=reason(error), signature=str(signature))
        self.device_caches[0][0][key] = idle
        return idle

    JITFunction._do_compile = share
    # what takes a CPU long, of rubbish
    prepared.column_sum = lambda matrix, *_: torch.empty(len(matrix), dtype=torch.int32)
    F.scaled_dot_product_attention = lambda query, *_, **__: query
    torch.set_num_threads(1)
    (capability, *figures), shared = json.loads(session.card) if session.card else (HOPPER, MOST_SHARED)
    pretend(functools.partial(session.say, "shard"), machine=table.Machine(tuple(capability), *figures), shared=shared)
    todo = [(name, which, torch.float16) for name, which in networks(session).items()]
    if session.kind != "cpu":  # and what the stage `model` runs
        small = embedded_network()
        todo += [("embedded", small, torch.float16), ("embedded", small, torch.float32)]
    for (name, which, dtype), recipe in itertools.product(todo, RECIPES):
        if not session.wants(f"{name} {label(*recipe)}"):
            continue
        unet = skeleton(which.config)
        plans = {one.name: one.plan for one in plans_of(unet, *recipe)}
        apply_header(unet, Header(Recipe(), plans, AttentionPlan.for_activations(8), dgq_version="0"))
        prepare_all(unet.to_empty(device="cpu").requires_grad_(False).to(dtype), torch.device("cpu"))
        try:
            step = step_of(session, unet, which, dtype)
            for run in (step, with_log_attention(step)):
                run()
        except Exception as error:
            session.say("shard", kernel=f"{name} {label(*recipe)}", error=reason(error))


def check(session: Session) -> None:
    """Every distinct call of an operator in a step, on its own operands: against the reference, and itself again."""
    for model, step in quantized_steps(session):
        for op in own_ops(with_log_attention(step)):
            results: list[Any] = []
            for name, asked in (("triton", False), ("triton", False), ("triton", True), ("reference", False)):
                os.environ["DGQ_BACKEND"], async_wgmma.ASKED = name, asked
                for old in results[0] if results else ():
                    torch.full_like(old, 85)  # freed at once: what an output that nothing wrote would show
                outputs = op.function(*op.arguments)
                results.append(outputs if isinstance(outputs, tuple | list) else (outputs,))
            got, again, flying, expected = results
            pairs = list(zip(got, expected, strict=True))
            codes = [(unsigned(a).int() - unsigned(b).int()).abs() for a, b in pairs if not a.is_floating_point()]
            error = max(relative_error(a, b) for a, b in pairs if a.is_floating_point())
            most = max((int(c.max()) for c in codes), default=0)
            differ = max((float((c > 0).float().mean()) for c in codes), default=0.0)
            same, in_flight = (all(map(torch.equal, got, others)) for others in (again, flying))
            bad = not same or not in_flight or error > 5e-3 or most > 1 or differ > 5e-3
            facts = {"op": op.name, "call": op.text, "error": error, "most": most, "differ": differ, "bad": bad}
            facts |= {"same": same, "async_wgmma_same": in_flight}
            session.say("check", model=model, **facts)
        os.environ["DGQ_BACKEND"], async_wgmma.ASKED = "triton", False
    found = session.said("check")
    bad_rows = [row for row in found if row["bad"]][:20]
    session.say("checked", calls=len(found), bad=bad_rows, worst=max(row["error"] for row in found))


def calibrate_quickly(out: str, wbits: str) -> None:
    """A checkpoint of the embedded model of which only agreement is asked; for a process that sees no GPU."""
    recipe = Recipe(wbits=int(wbits), rounding="nearest", channels="none")
    calibrate(None, Path(out), recipe, Options(prompts=["a cat"], steps=2, evaluate=0))


def checkpoints(session: Session, work: Path) -> dict[str, Path]:
    """Checkpoints of the embedded model by their name: those that were given, or such as are made quickly."""
    if session.checkpoints:
        return {folder.name: folder for folder in sorted(Path(session.checkpoints).iterdir())}
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DGQ_BACKEND": "", "TRITON_INTERPRET": "0"}
    where = str(Path(__file__).parent)
    hidden["PYTHONPATH"] = os.pathsep.join([where, os.environ.get("PYTHONPATH", "")])
    found = {}
    for wbits in (8, 4) if session.cuda else (4,):
        folder = found[f"w{wbits}a8"] = work / f"w{wbits}a8"
        code = "import stages, sys; stages.calibrate_quickly(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", code, str(folder), str(wbits)], env=hidden, check=True)
    return found


def model(session: Session) -> None:
    """The embedded model drawn on both devices with the same attention; pictures.png has a row for each of them."""
    prompts, count = (["a cat", "a dog"], 10) if session.cuda else (["a cat"], 1)
    images: list[Any] = []

    def draw(folder: Path, place: Any, dtype: torch.dtype, **options: Any) -> tuple[torch.Tensor, float]:
        pipe = dgq.load(folder, device=place, dtype=dtype, **options)
        begin = time.monotonic()
        drawn = generation.generate(pipe, prompts, generation.Settings(steps=count, guidance=3.0, seed=3))
        images.extend(one.image for one in drawn)
        return torch.stack([one.latents.float().cpu() for one in drawn]), time.monotonic() - begin

    kinds = (
        [(torch.float32, None), (torch.float32, False), (torch.float16, None)]
        if session.cuda
        else [(torch.float32, None)]
    )
    with tempfile.TemporaryDirectory() as work:
        for (name, folder), forced in itertools.product(checkpoints(session, Path(work)).items(), (False, True)):
            log_attention.FORCED = forced
            os.environ["DGQ_BACKEND"] = "" if session.cuda else "reference"
            expected, cpu_seconds = draw(folder, "cpu", torch.float32)
            os.environ["DGQ_BACKEND"] = "triton"
            for dtype, graph in kinds[: 1 if forced else None]:
                told: dict[str, Any] = {"model": name, "dtype": str(dtype), "log_attention": forced}
                told |= {"graph": graph is None, "cpu_seconds": cpu_seconds}
                try:
                    got, seconds = draw(folder, session.device, dtype, graph=graph)
                    error = float((got - expected).norm() / expected.norm())
                    session.say("model", latents_error=error, seconds=seconds, **told)
                except Exception as failure:
                    session.say("model", error=reason(failure), **told)
    generation.grid(images, columns=len(prompts)).save(session.out / "pictures.png")


def through_graphs(unet: torch.nn.Module, step: Step) -> Step:
    """The step as `dgq.load` has it."""
    graphs = Graphs(unet)

    def run() -> torch.Tensor:
        unet.forward = graphs
        try:
            return step()
        finally:
            del unet.forward

    return run


def having(module: Any, name: str, value: bool, step: Step) -> Step:
    """The step with a module's switch set so."""

    def run() -> torch.Tensor:
        before = getattr(module, name)
        setattr(module, name, value)
        try:
            return step()
        finally:
            setattr(module, name, before)

    return run


def with_log_attention(step: Step) -> Step:
    """The step with log attention where it has torch's because that is the faster."""
    return having(log_attention, "FORCED", True, step)


def systems(session: Session, which: Architecture) -> dict[str, tuple[torch.nn.Module, Step]]:
    """What a step is timed of, and its network."""
    unets = {"float16": float_unet(session, which, session.half)}
    for recipe in RECIPES:
        unets[f"dgq {label(*recipe)}"] = quantized(session, which, *recipe)
    found = {name: (unet, step_of(session, unet, which)) for name, unet in unets.items()}
    unet, step = found["dgq W8A8"]
    return {
        **found,
        "dgq W8A8 log attention": (unet, with_log_attention(step)),
        "dgq W8A8 without PDL": (unet, having(launch, "DEPENDENT", False, step)),
        "dgq W8A8 async wgmma": (unet, having(async_wgmma, "ASKED", True, step)),
    }


def steps(session: Session) -> None:
    """Whole UNet steps, eager and replayed from a graph, in turns; error against float32, memory, the host's time."""
    plain = {"float16", *(f"dgq {label(*recipe)}" for recipe in RECIPES)}
    for name, which in chosen(session).items():
        exact = step_of(session, float_unet(session, which, torch.float32), which, torch.float32)()
        runs: dict[str, Step] = {}
        facts: dict[str, dict[str, Any]] = {}
        for system, (unet, step) in systems(session, which).items():
            try:
                error = relative_error(step(), exact)
                before = 0
                if session.cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                begin = time.perf_counter()
                step()
                host = 1000 * (time.perf_counter() - begin)
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if session.cuda else None
                weights = worker.weight_bytes(unet) / 2**20
                facts[system] = {"error": error, "host_ms": host, "activations_mib": peak, "weights_mib": weights}
                if system in ("float16", "dgq W8A8"):
                    runs[f"{system} eager"] = step
                runs[f"{system} graph"] = session.graphed(step)
                if system in plain:  # graphs do not know that they depend on the others' switches
                    loaded = runs[f"{system} loaded"] = through_graphs(unet, step)
                    for _ in range(3):  # as it is, captured, replayed
                        begun = time.perf_counter()
                        loaded()
                    facts[system]["loaded_host_ms"] = 1000 * (time.perf_counter() - begun)
            except Exception as failure:
                session.say("steps", model=name, system=system, error=reason(failure))
        timers = {key: functools.partial(session.timed, run) for key, run in runs.items()}
        times = rows.interleaved(timers, 11 if session.cuda else 1, 2 * session.cuda)
        base = statistics.median(times.get("float16 graph") or [float("nan")])
        for key, values in times.items():
            low, middle, high = (sorted(values)[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
            session.say(
                "steps",
                model=name,
                system=key,
                p20_ms=low,
                p50_ms=middle,
                p80_ms=high,
                of_float16_graph=middle / base,
                clocks=clocks(),
                **facts[key.rsplit(" ", 1)[0]],
            )
        del runs, timers, unet, step, exact
        session.forget()


def rivals(
    session: Session, op: str, x: torch.Tensor, rest: tuple[Any, ...]
) -> tuple[Callable[[], Any] | None, Callable[[], Any] | None, int]:
    """(float16's call for what the operator does, cuBLAS's int8 product, operations); None where there is none."""
    like = functools.partial(torch.randn, device=session.device, dtype=session.half)
    if op.startswith("linear"):
        (m, k), n = x.shape, len(rest[4 if op == "linear_int8" else 5])
        a, w, b = like(m, k), like(n, k), like(n)
        codes = torch.ones(n, k, device=session.device, dtype=torch.int8)
        fits = m > 16 and k % 8 == n % 8 == 0
        return (
            lambda: F.linear(a, w, b),
            (lambda: torch._int_mm(x.view(torch.int8), codes.t())) if fits else None,
            2 * m * n * k,
        )
    if op.startswith("conv2d"):
        n, size, stride = (*rest[2].shape[:3:2], rest[6]) if op == "conv2d" else (len(rest[5]), *rest[7:9])
        shapes = (tuple(x.shape), (n, x.shape[1], size, size))
        a, w = (like(*shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
        return lambda: F.conv2d(a, w, None, stride), None, 2 * F.conv2d(a, w, None, stride).numel() * w[0].numel()
    if op == "log_attention":
        return lambda: F.scaled_dot_product_attention(x, *rest[:2]), None, 4 * x.numel() * rest[0].shape[2]
    if op.startswith("group_norm"):
        return lambda: F.silu(F.group_norm(x, rest[0])), None, 0
    return (lambda: F.layer_norm(x, x.shape[1:])) if op.startswith("layer_norm") else None, None, 0


def ops(session: Session) -> None:
    """What each operator of a step costs, times how often it runs, beside what float16 and cuBLAS take for it; and with
    operands that no cache holds."""
    for model, step in quantized_steps(session):
        attention = [op for op in own_ops(with_log_attention(step)) if op.name == "log_attention"]
        for op in own_ops(step) + attention:
            told = {"model": model, "op": op.name, "call": op.text, "count": op.times}
            try:
                rival, int8, work = rivals(session, op.name, op.arguments[0], op.arguments[1:])
                own = functools.partial(op.function, *op.arguments)
                us = session.microseconds(own)
                base = session.microseconds(rival) if rival else None
                session.say(
                    "ops",
                    us=us,
                    total_ms=op.times * us / 1000,
                    float16_us=base,
                    ratio=base and us / base,
                    cold_us=session.microseconds(own, cold=True),
                    float16_cold_us=rival and session.microseconds(rival, cold=True),
                    cublas_int8_us=int8 and session.microseconds(int8),
                    of_peak=work / us / 1e6 / PEAK_TOPS,
                    **told,
                )
            except Exception as failure:
                session.say("ops", error=reason(failure), **told)


def profile(session: Session) -> None:
    """The kernels of a replayed and of an eager step by their time, and what takes the host's: profile.txt."""
    name, step = next(quantized_steps(session))
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * session.cuda]

    def took(event: Any) -> float:
        return event.self_device_time_total if session.cuda else event.self_cpu_time_total

    with open(session.out / "profile.txt", "w", encoding="utf-8") as file:
        for title, run in (("graph", session.graphed(step)), ("eager", step)):
            with torch.profiler.profile(activities=activities) as seen:
                run()
                if session.cuda:
                    torch.cuda.synchronize()
            average = seen.key_averages()
            events = [e for e in average if not session.cuda or str(e.device_type).endswith("CUDA")]
            found = sorted(events, key=took, reverse=True)
            launches, total = sum(e.count for e in found), sum(map(took, found))
            print(f"== {name} {title}: {launches} on the device, {total:.0f} us", file=file)
            print(*(f"{e.count:5} x {took(e):10.1f} us  {e.key[:100]}" for e in found[:40]), sep="\n", file=file)
            print(average.table(sort_by="self_cpu_time_total", row_limit=25), file=file, flush=True)
            top = [[e.key[:60], e.count, took(e)] for e in found[:12]]
            session.say("profile", kind=title, launches=launches, total_us=total, top=top)


def tests(session: Session) -> None:
    """The repository's own tests on this device."""
    which = ["tests/kernels/test_triton_tiles.py"]
    if session.cuda:
        which = ["tests/kernels", "tests/dgq/test_cuda.py", "-m", "not slow", "--timeout=100"]
    workers = str(max(2, (os.cpu_count() or 2) - 2))
    options = ["-n", workers, f"--junitxml={session.out / 'junit.xml'}", "--tb=short", "-q", "-rfE"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DGQ_BACKEND": ""}
    done = subprocess.run([sys.executable, "-m", "pytest", *which, *options], env=environment)
    session.say("tests", rc=done.returncode)


def tiles(session: Session) -> None:
    """Every tile and split for the products of a step, and some that the table lacks, beside what `choose` takes."""
    sizes = ((128, 128, 64, 4, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 3))
    more = [table.Tiling(table.Config(*tile)) for tile in sizes]
    machine = table._machine(session.device) if session.cuda else HOPPER
    for model, step in quantized_steps(session):
        products = [op for op in own_ops(step) if op.name.startswith(("linear", "conv2d"))]
        for op in products if session.cuda else products[:1]:
            run = getattr(linear if op.name.startswith("linear") else conv2d, op.name)
            kind = "int4" if op.name.endswith("4") else "int8"
            x = op.arguments[0]
            out, channels = run(*op.arguments), len(op.arguments[6 if kind == "int4" else 5])
            taps = 1
            if op.name.startswith("conv2d"):
                taps = op.arguments[8] ** 2 if kind == "int4" else op.arguments[3][0, 0].numel()
            m = x.shape[0] if op.name.startswith("linear") else out.numel() // channels
            shape = (m, channels, x.shape[1] * taps)
            chosen = table.choose(kind, *shape, shape[2], machine)
            candidates = [*table.tilings(kind, machine.capability[0], shape[2]), *more] if session.cuda else more[:1]
            for tiling in candidates:
                told = {"model": model, "op": op.name, "shape": shape, "splits": tiling.splits}
                told["tile"] = "x".join(map(str, tiling.config))
                try:
                    us = session.microseconds(functools.partial(run, *op.arguments, out=out, tiling=tiling))
                    modelled = table.clocks(tiling, kind, *shape, machine)
                    same = tiling == chosen
                    session.say("tiles", us=us, modelled=modelled, chosen=same, count=op.times, **told)
                except Exception as failure:
                    session.say("tiles", error=reason(failure), **told)


def hot(session: Session) -> None:
    """One eager step, for a profiler that wraps this process."""
    next(quantized_steps(session))[1]()


def ncu(session: Session) -> None:
    """Nsight Compute's counters of the kernels that take most: ncu.txt."""
    if not shutil.which("ncu"):
        session.say("ncu", rc="no ncu here")
        return
    names = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
    sections = [word for name in names for word in ("--section", name)]
    kernels = "regex:conv2d_int8_kernel|log_attention_kernel|linear_int8_kernel"
    line = ["ncu", "--clock-control", "none", "-k", kernels, "-c", "9", *sections, *session.command("hot")]
    with open(session.out / "ncu.txt", "w", encoding="utf-8") as file:
        done = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT)
    session.say("ncu", rc=done.returncode)


def compiled(session: Session) -> None:
    """torch.compile of float16, as it is best (`max-autotune`) and by default, and of dgq, in turns with the graphs of
    both: takes minutes. What fails says so in its line and stops none of the others."""
    for name, which in chosen(session).items():
        unets = {
            "float16": float_unet(session, which, session.half),
            "dgq W8A8": quantized(session, which, *RECIPES[0]),
        }
        runs = {f"{system} graph": session.graphed(step_of(session, unet, which)) for system, unet in unets.items()}
        for system, mode in (("float16", "max-autotune"), ("float16", "default"), ("dgq W8A8", "default")):
            begin, unet = time.monotonic(), unets[system]
            told: dict[str, Any] = {"model": name, "system": f"{system} compiled", "mode": mode}
            try:
                torch.compiler.reset()
                unet.forward = torch.compile(unet.forward, mode=mode, fullgraph=True)  # type: ignore[method-assign]
                step = step_of(session, unet, which)
                step()
                told["compile_s"] = time.monotonic() - begin
                # with a graph of its own where the mode brings none
                run = step if mode == "max-autotune" else session.graphed(step)
                timers = {key: functools.partial(session.timed, one) for key, one in {**runs, "compiled": run}.items()}
                times = rows.interleaved(timers, 15 if session.cuda else 1, 2 * session.cuda)
                middle = {key: statistics.median(values) for key, values in times.items()}
                graphs = {f"{key.replace(' ', '_')}_ms": middle[key] for key in runs}
                session.say("compiled", p50_ms=middle["compiled"], clocks=clocks(), **graphs, **told)
            except Exception as failure:
                session.say("compiled", error=reason(failure), **told)
            unet.__dict__.pop("forward", None)  # torch.compile itself may have failed
        del unets, runs, unet
        session.forget()
