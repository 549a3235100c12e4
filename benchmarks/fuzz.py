"""Damaged checkpoints, by the thousand: each is refused in one line that names its file, or draws the same picture.

    python benchmarks/fuzz.py --cases 1000 --seed 1 --json fuzz.json
    python benchmarks/fuzz.py --one 1:17          # what case 17 of seed 1 does

Without --model it is the embedded model, rounded to nearest. Four fifths load by `dgq.load`, the others by
`DiffusionPipeline.from_pretrained`, whose own errors `dgq.verify` has to tell in a line that names the file. Every
case runs in a process of its own, with limits of time and memory. It exits with 1 where a case of `dgq.load` was
anything but refused or harmless, or one of diffusers drew another picture or failed where `dgq.verify` saw nothing.

diffusers reads components in the order of a set of names, another one in each process: PYTHONHASHSEED makes it one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import dgq
from dgq.calibration.run import Options, calibrate
from dgq.pictures.pipelines import resolve
from dgq.recipe import Recipe

# In the order of the table. What follows "harmless" must not be, but for an error of another library (which names the
# file, or does not) where diffusers reads a file before it asks dgq.
OUTCOMES = (
    "refused",
    "harmless",
    "unnamed",
    "library",
    "library, no file",
    "drawing",
    "silent",
    "hung",
    "crashed",
    "code run",
)
ROUTES = ("dgq", "diffusers")
SECONDS = 60  # a case may take
MEMORY = 24 * 2**30  # of address space
MARK = "code-was-run"

Damage = Callable[[Path, random.Random], str]


@dataclass
class Case:
    """One damaged checkpoint.

    Attributes:
        seed, number: which one it is.
        damage: its class; what: the damage itself.
        route: how it was loaded; outcome: one of `OUTCOMES`; line: what was said.
        verified: where that was no outcome of dgq's, the one of `dgq.verify`.
    """

    seed: int
    number: int
    damage: str
    what: str
    route: str
    outcome: str
    line: str
    verified: str = ""


def files_of(folder: Path, suffix: str = "") -> list[Path]:
    """What a checkpoint is loaded from, in an order that is always the same."""
    return sorted(
        file
        for file in folder.rglob(f"*{suffix}")
        if file.is_file() and (file.parent != folder or file.name == "model_index.json")
    )


def any_file(folder: Path, rng: random.Random) -> Path:
    """Weights, network and header more often than the rest."""
    if rng.random() < 0.5:
        return rng.choice(files_of(folder, ".safetensors"))
    return rng.choice(files_of(folder))


def rewrite(file: Path, data: bytes) -> None:
    """New contents in a file of its own: the others of the folder are links."""
    file.unlink()
    file.write_bytes(data)


def where(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))


def flip(folder: Path, rng: random.Random) -> str:
    file = any_file(folder, rng)
    data = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    rewrite(file, bytes(data))
    return f"{where(file, folder)}: bit {bit}"


def cut(folder: Path, rng: random.Random) -> str:
    file = any_file(folder, rng)
    data = file.read_bytes()
    length = rng.choice([0, len(data) - 1, rng.randrange(len(data))])
    rewrite(file, data[:length])
    return f"{where(file, folder)}: {length} of {len(data)} bytes"


def append(folder: Path, rng: random.Random) -> str:
    file = any_file(folder, rng)
    more = rng.randbytes(rng.choice([1, 8, 4096]))
    rewrite(file, file.read_bytes() + more)
    return f"{where(file, folder)}: {len(more)} bytes more"


def zero_range(folder: Path, rng: random.Random) -> str:
    file = any_file(folder, rng)
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([1, 64, 4096]))
    data[start : start + length] = bytes(length)
    rewrite(file, bytes(data))
    return f"{where(file, folder)}: {length} zeros from {start}"


def lying_header(folder: Path, rng: random.Random) -> str:
    file = rng.choice(files_of(folder, ".safetensors"))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    kind = rng.choice(["length", "shape", "dtype", "offsets", "swapped", "huge"])
    if kind == "length":
        value = rng.choice([0, 1, length + 8, length - 8, 2**40, 2**64 - 1])
        rewrite(file, struct.pack("<Q", value) + data[8:])
        return f"{where(file, folder)}: header of {value} bytes"
    if kind == "shape":
        entry["shape"] = [*entry["shape"][::-1], 1] if rng.random() < 0.5 else [-1]
    elif kind == "huge":
        entry["shape"] = [10**9, 10**9]
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F64", "I8", "U8", "F16", "BF16", "nosuch"])
    elif kind == "offsets":
        entry["data_offsets"] = [value + rng.choice([-4, 4, 2**33]) for value in entry["data_offsets"]]
    else:
        same = [key for key in sorted(header) if key != name and header[key].get("shape") == entry["shape"]]
        if same:
            other = header[rng.choice(same)]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rewrite(file, struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"{where(file, folder)}: {kind} of {name}"


def json_text(folder: Path, rng: random.Random) -> str:
    file = rng.choice(files_of(folder, ".json"))
    data = file.read_bytes()
    start = rng.randrange(len(data))
    new = rng.choice([b"", b"\xff", b"\0", b"[" * 10**5, b'"', b"1e999", rng.randbytes(4)])
    rewrite(file, data[:start] + new + data[start + rng.randrange(4) :])
    return f"{where(file, folder)}: {new[:8]!r} at {start}"


ODD = (0, -1, 1, 2, 3, 7, 10**9, 2**63, 1e-45, 1e38, float("nan"), True, False, None, "", "x", [], {}, [1, 2])


def containers(value: Any) -> Iterator[Any]:
    """A JSON value's objects and lists that hold something."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def edit(config: Any, rng: random.Random) -> str:
    """Change, remove or add a field somewhere in a JSON value."""
    place = rng.choice(list(containers(config)))
    key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
    what = rng.choice(["odd", "odd", "near", "near", "gone", "new"])
    if what == "gone":
        del place[key]
    elif what == "new" and isinstance(place, dict):
        place["surprise"] = rng.choice(ODD)
    elif what == "near" and isinstance(place[key], int | float):
        place[key] = place[key] + rng.choice([-1, 1]) if not isinstance(place[key], bool) else not place[key]
    else:
        place[key] = rng.choice(ODD)
    return f"{key} {what} ({place[key]!r})"[:80] if what in ("odd", "near") else f"{key} {what}"


def json_field(folder: Path, rng: random.Random) -> str:
    file = rng.choice([file for file in files_of(folder, ".json") if file.name not in ("vocab.json", "tokenizer.json")])
    config = json.loads(file.read_text())
    what = edit(config, rng)
    rewrite(file, json.dumps(config).encode())
    return f"{where(file, folder)}: {what}"


def plan_field(folder: Path, rng: random.Random) -> str:
    file = network(folder) / "config.json"
    config = json.loads(file.read_text())
    layers = config["quantization_config"]["layers"]
    name = rng.choice(sorted(layers))
    if rng.random() < 0.2:
        other = rng.choice(sorted(layers))
        layers[name], layers[other] = layers[other], layers[name]
        what = f"exchanged with {other}"
    else:
        what = edit(layers[name], rng)
    rewrite(file, json.dumps(config).encode())
    return f"{name}: {what}"


def network(folder: Path) -> Path:
    """The folder of the quantized network."""
    return next(
        file.parent for file in files_of(folder, "config.json") if "quantization_config" in json.loads(file.read_text())
    )


def edited(folder: Path, rng: random.Random, change: Callable[[dict[str, torch.Tensor], str], str]) -> str:
    file = rng.choice([*files_of(folder, ".safetensors"), *sorted(network(folder).glob("*.safetensors"))])
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    what = change(tensors, name)
    file.unlink()
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return f"{where(file, folder)}: {name} {what}"


def tensor_entry(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        what = rng.choice(["missing", "renamed", "extra", "shape", "dtype", "lone"])
        tensor = tensors[name]
        if what == "lone":
            tensors.clear()
            tensors[name] = tensor
        elif what == "missing":
            del tensors[name]
        elif what == "renamed":
            tensors[name + "_"] = tensors.pop(name)
        elif what == "extra":
            tensors[name + ".extra"] = torch.zeros(3)
        elif what == "shape":
            tensors[name] = tensor.flatten()[:-1].clone() if rng.random() < 0.5 else tensor[None]
        else:
            others = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32]
            tensors[name] = tensor.to(rng.choice([one for one in others if one != tensor.dtype]))
        return what

    return edited(folder, rng, change)


def tensor_value(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        flat = tensors[name].view(-1)
        index = rng.randrange(len(flat))
        if flat.dtype.is_floating_point:
            odd = [0.0, -1.0, 1e-45, 1e30, float("nan"), float("inf"), -float(flat[index]), 2 * float(flat[index])]
            flat[index : index + rng.choice([1, 1, len(flat)])] = rng.choice(odd)
        else:
            limits = torch.iinfo(flat.dtype)
            flat[index] = rng.choice([limits.min, limits.max, rng.randrange(limits.min, limits.max)])
        return f"[{index}] = {flat[index].item()}"

    return edited(folder, rng, change)


def tensor_swap(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, torch.Tensor], name: str) -> str:
        mine = tensors[name]
        same = [key for key in sorted(tensors) if key != name and tensors[key].shape == mine.shape]
        same = [key for key in same if tensors[key].dtype == mine.dtype]
        if not same:
            tensors[name] = mine.flip(0)
            return "reversed"
        other = rng.choice(same)
        tensors[name], tensors[other] = tensors[other], mine
        return f"exchanged with {other}"

    return edited(folder, rng, change)


def file_place(folder: Path, rng: random.Random) -> str:
    file = any_file(folder, rng)
    what = rng.choice(["missing", "renamed", "folder", "fifo", "/dev/zero", "dangling", "another", "extra"])
    if what == "extra":
        name = rng.choice(["added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"])
        (file.parent / name).unlink(missing_ok=True)
        (file.parent / name).write_text('{"a": 5}')
        return f"{where(file.parent / name, folder)}: extra"
    other = rng.choice([one for one in files_of(folder, file.suffix) if one != file] or [file])
    data = other.read_bytes()
    file.unlink()
    if what == "renamed":
        file.with_name("_" + file.name).write_bytes(data)
    elif what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "/dev/zero":
        file.symlink_to(what)
    elif what == "dangling":
        file.symlink_to("nowhere")
    elif what == "another":
        file.write_bytes(data)
        what = f"is {where(other, folder)}"
    return f"{where(file, folder)}: {what}"


def escape(folder: Path, rng: random.Random) -> str:
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    name = rng.choice(sorted(key for key, value in index.items() if isinstance(value, list)))
    path = rng.choice(["../" + folder.name, "/etc", "..", f"./{name}", "a\0b", "\ud800"])
    if rng.random() < 0.5:
        index[path] = index.pop(name)
    else:
        weights = files_of(folder, ".safetensors")
        shard = rng.choice(weights)
        target = shard.with_name(f"{shard.name}.index.json")
        target.write_text(json.dumps({"metadata": {}, "weight_map": {"x": f"{path}/{shard.name}"}}))
        shard.rename(shard.with_name("hidden.safetensors"))
        return f"{where(target, folder)}: {path!r}"
    rewrite(file, json.dumps(index).encode())
    return f"model_index.json: {name} is {path!r}"


def code(folder: Path, rng: random.Random) -> str:
    mark = folder / MARK
    planted = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n\n\nclass Planted:\n    pass\n"
    index = json.loads((folder / "model_index.json").read_text())
    name = rng.choice(sorted(key for key, value in index.items() if isinstance(value, list) and value[0]))
    kind = rng.choice(["module", "pipeline", "pickle"])
    if kind == "pickle":
        file = rng.choice(files_of(folder, ".safetensors"))
        data = f"cpathlib\nPath\n(V{mark}\ntR.".encode() + b"0" + f"cos\nmknod\n(V{mark}\ntR.".encode()
        file.with_name(file.name.replace(".safetensors", ".bin")).write_bytes(data)
        file.unlink()
        return f"{where(file, folder)}: a pickle in its place"
    place = folder if kind == "pipeline" else folder / name
    (place / "planted.py").write_text(planted)
    index.update({"_class_name": ["planted", "Planted"]} if kind == "pipeline" else {name: ["planted", "Planted"]})
    rewrite(folder / "model_index.json", json.dumps(index).encode())
    return f"{kind} of {name}"


def component(folder: Path, rng: random.Random) -> str:
    """Weights of the same names and shapes, or a component of another configuration, in a component's place."""
    file = rng.choice([one for one in files_of(folder, ".safetensors") if one.parent != network(folder)])
    if rng.random() < 0.5:
        torch.manual_seed(rng.randrange(2**32))
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) * tensor.float().std(correction=0))
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
        return f"{where(file, folder)}: other weights"
    config = file.with_name("config.json")
    data = json.loads(config.read_text())
    names = [key for key in sorted(data) if type(data[key]) in (int, float) or key in ("hidden_act", "act_fn")]
    name = rng.choice(names)
    data[name] = rng.choice(["relu", "gelu"]) if isinstance(data[name], str) else data[name] * 2
    rewrite(config, json.dumps(data).encode())
    return f"{where(config, folder)}: {name} {data[name]}"


DAMAGES: dict[str, Damage] = {
    "bit flipped": flip,
    "truncated": cut,
    "bytes appended": append,
    "range zeroed": zero_range,
    "header lies": lying_header,
    "JSON text": json_text,
    "JSON field": json_field,
    "plan of a layer": plan_field,
    "tensor entry": tensor_entry,
    "tensor value": tensor_value,
    "tensors exchanged": tensor_swap,
    "file replaced": file_place,
    "path escapes": escape,
    "code planted": code,
    "component exchanged": component,
}


def checkpoint(model: str | None, out: Path) -> tuple[str, str]:
    """A W4A8 checkpoint to damage; its quality does not matter."""
    recipe = Recipe(wbits=4, abits=8, rounding="nearest", channels="none")
    calibrate(resolve(model), out, recipe, Options(steps=1, prompts=["a cat"], evaluate=0))
    return "made", ""


def load(folder: Path, route: str) -> Any:
    """The pipeline, on the CPU."""
    return dgq.load(folder, device="cpu") if route == "dgq" else DiffusionPipeline.from_pretrained(folder)


def draw(pipe: Any, size: int) -> bytes:
    """The bits of a picture."""
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        "a cat",
        num_inference_steps=2,
        height=size,
        width=size,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images
    return np.ascontiguousarray(pictures).tobytes()


def in_a_process(work: Callable[[], tuple[str, str]], seconds: int = SECONDS) -> tuple[str, str]:
    """What the work returns in a process of its own; or that it hung, or crashed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # others did not survive the fork
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            silence = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(silence, descriptor)
            answer = json.dumps(work()).encode("ascii")
            os.write(writer, answer)
        finally:
            os._exit(0)
    os.close(writer)
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return "hung", f"longer than {seconds} s"
        time.sleep(0.005)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    if not answer:
        return "crashed", f"status {status}"
    outcome, line = json.loads(answer)
    return outcome, line


def told(folder: Path, error: dgq.DgqError, route: str = "dgq") -> tuple[str, str]:
    """Whether an error of ours is one line that names the file, and its message."""
    named = str(folder) in error.message or (route == "diffusers" and error.message.startswith("config.json: "))
    line = "\n" not in error.message and len(error.message) < 1000
    return "refused" if named and line else "unnamed", error.message[:1000]


def verified(folder: Path) -> tuple[str, str]:
    """The outcome of `dgq.verify`, and what was said."""
    try:
        dgq.verify(folder)
    except dgq.DgqError as error:
        return told(folder, error)
    return "harmless", ""


def judged(folder: Path, route: str, size: int, wanted: bytes) -> tuple[str, str]:
    """The outcome of loading and drawing, and what was said."""
    try:
        pipe = load(folder, route)
    except dgq.DgqError as error:
        return told(folder, error, route)
    except Exception as error:
        return "library" if str(folder) in str(error) else "library, no file", f"{type(error).__name__}: {error}"[:300]
    try:
        picture = draw(pipe, size)
    except Exception as error:
        return "drawing", f"{type(error).__name__}: {error}"[:300]
    return ("harmless" if picture == wanted else "silent"), ""


def copied(source: Path, target: Path) -> Path:
    """A copy of links to the same files."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def run(base: Path, size: int, cases: int, seed: int, work: Path, only: int | None = None) -> Iterator[Case]:
    """Damage the checkpoint `base` and tell what comes of it.

    Args:
        base: is left as it is.
        size: of the pictures, in pixels.
        cases: how many; seed: which.
        work: an empty folder on the same file system.
        only: one of them.
    """
    wanted = {}
    for route in ROUTES:
        picture = work / f"{route}.bits"

        def reference(route: str = route, picture: Path = picture) -> tuple[str, str]:
            try:
                picture.write_bytes(draw(load(base, route), size))
            except Exception:
                return "failed", traceback.format_exc()
            return "drawn", ""

        if (said := in_a_process(reference))[0] != "drawn":
            raise SystemExit(f"{base}: {said}")
        wanted[route] = picture.read_bytes()
    names = list(DAMAGES)
    for number in range(cases) if only is None else [only]:
        rng = random.Random(f"{seed}:{number}")
        name, route = names[number % len(names)], ROUTES[number // len(names) % 5 == 4]
        folder = copied(base, work / f"case-{number}")
        what = DAMAGES[name](folder, rng)
        outcome, line = in_a_process(lambda folder=folder, route=route: judged(folder, route, size, wanted[route]))
        seen = ""
        if route == "diffusers" and outcome not in ("refused", "harmless"):
            seen, _ = in_a_process(lambda folder=folder: verified(folder))
        if (folder / MARK).exists():
            outcome = "code run"
        shutil.rmtree(folder)
        yield Case(seed, number, name, what, route, outcome, line, seen)


def table(cases: list[Case]) -> str:
    """Markdown: how many of each damage and route had which outcome."""
    lines = ["| damage | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for route in ROUTES:
        for name in (*DAMAGES, None):
            found = Counter(case.outcome for case in cases if case.route == route and name in (None, case.damage))
            if found:
                title = f"{name}, {route}" if name else f"**all, {route}**"
                lines.append(f"| {title} | " + " | ".join(str(found[one] or "") for one in OUTCOMES) + " |")
    return "\n".join(lines)


def wrong(case: Case) -> bool:
    """Whether it should not have ended so."""
    if case.outcome in ("refused", "harmless"):
        return False
    foreign = case.route == "diffusers" and case.outcome in ("library", "library, no file", "drawing", "hung")
    return not foreign or case.verified != "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--one", metavar="SEED:NUMBER", help="run one case, and say all of it")
    parser.add_argument("--model", help="float model; the embedded one if left out")
    parser.add_argument(
        "--checkpoint", type=Path, help="integer checkpoint to damage, instead of making one of --model"
    )
    parser.add_argument("--size", type=int, default=32, help="of the pictures, in pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every case")
    arguments = parser.parse_args()
    seed, only = arguments.seed, None
    if arguments.one:
        seed, only = map(int, arguments.one.split(":"))
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "checkpoint")
        if arguments.checkpoint:
            shutil.copytree(arguments.checkpoint, base)
        elif in_a_process(lambda: checkpoint(arguments.model, base), 600)[0] != "made":
            raise SystemExit("no checkpoint could be made")
        for case in run(base, arguments.size, arguments.cases, seed, Path(folder), only):
            cases.append(case)
            if only is not None or wrong(case):
                print(f"{case.seed}:{case.number} {case.route} {case.damage}, {case.what}: {case.outcome} {case.line}")
            elif case.number % 100 == 99:
                print(f"{case.number + 1} cases", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
    if only is None:
        print(table(cases))
    sys.exit(any(map(wrong, cases)))


if __name__ == "__main__":
    main()
