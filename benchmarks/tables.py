"""The tables of README.md and docs/ that come from files of this repository, written between their markers.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; NAME is one of `TABLES`. What the file that a table
comes from does not say is in this script, as `BY_HAND`. All other tables of the docs are kept by hand: their files are
not here (the studies' layers, `dgq eval` over 200 prompts, the changes in docs/performance.md).
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Runs of results.csv, by when they began.
AMX, AMX_OFF, AMX_MEMORY, AMX_SDNQ = "2026-11-24T12:19", "2026-11-24T12:22", "2026-11-24T12:34", "2026-11-24T14:00"
EMBEDDED_W8, EMBEDDED_W4 = "2026-11-24T12:35", "2026-11-24T12:36"
PRODUCTS_VNNI, PRODUCTS_AMX, PRODUCTS_EPYC = "2026-11-24T12:35:07", "2026-11-24T12:35:14", "2026-11-25T00:59"

# Compiled float32 without AMX, the faster type there, in seconds: of a run that results.csv does not hold.
BY_HAND = {"torch.compile without AMX": "5.43 s (float32, the faster there)"}

_MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- /table -->", re.DOTALL)


@functools.cache
def results() -> list[dict[str, str]]:
    """The rows of results.csv."""
    with (HERE / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def report(name: str) -> Any:
    """A report in JSON."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def measured(run: str, system: str, case: str = "step") -> dict[str, str]:
    """The row of results.csv of a run, a system, and a case, or how it ends."""
    rows = [
        row
        for row in results()
        if row["date"].startswith(run) and row["system"] == system and row["case"].endswith(case)
    ]
    if len(rows) != 1:
        raise SystemExit(f"benchmarks/results.csv: {len(rows)} rows of {run}, {system}, {case}: one is needed")
    return rows[0]


def of_recipe(name: str, system: str) -> dict[str, Any]:
    """The row of a fidelity report whose system begins so."""
    return next(row for row in report(name)["rows"] if row["system"].startswith(system))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with the line break at its end."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:], ""])


def seconds(row: dict[str, str]) -> str:
    return f"{float(row['p50_ms']) / 1000:.2f} s"


def memory(mib: str) -> str:
    """MiB as a table has it."""
    return f"{float(mib) / 1024:.1f} GiB" if float(mib) >= 1024 else f"{float(mib):.0f} MiB"


def fidelity_table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows of a fidelity report."""
    lines = (
        (
            row["system"],
            f"{row['psnr_db']:.2f}",
            *(f"{row[key]:.2f}" if key in row else "-" for key in ("psnr_median_db", "psnr_worst_tenth_db")),
            f"{row['latent_mse']:.2e}",
            f"{row['latent_sqnr_db']:.2f}",
            "-" if row["unet_mib"] is None else f"{row['unet_mib']:.1f}",
            "-" if row["of_float16"] is None else f"{row['of_float16']:.0%}",
        )
        for row in rows
    )
    return table(
        ("system", "PSNR (dB)", "median", "worst tenth", "latent MSE", "latent SQNR (dB)", "UNet (MiB)", "of float16"),
        lines,
    )


def fidelity() -> str:
    """The embedded model's report."""
    return fidelity_table(report("fidelity-embedded")["rows"])


def fidelity_short() -> str:
    """The README's rows of the same."""

    def of(system: str) -> dict[str, Any]:
        return of_recipe("fidelity-embedded", system)

    def one(label: str, system: str) -> tuple[str, str, str]:
        bold = "**" if "integer" in system else ""
        row = of(system)
        return (f"{bold}{label}{bold}", f"{bold}{row['psnr_median_db']:.1f}{bold}", f"{row['of_float16']:.0%}")

    def both(bits: str) -> tuple[str, str, str]:
        first, second = of(f"paper G=1 {bits}"), of(f"paper G=16 {bits}")
        return (
            f"published recipe {bits}, G = 1 / G = 16",
            f"{first['psnr_median_db']:.1f} / {second['psnr_median_db']:.1f}",
            f"{100 * first['of_float16']:.0f} / {second['of_float16']:.0%}",
        )

    rows = [
        one("bfloat16, unquantized (4 prompts)", "bfloat16"),
        one("integer W8A8", "integer W8A8"),
        one("integer W4A8", "integer W4A8"),
        one("integer W4A8, `--budget 4.6`", "integer W4A8, 4.6 bits"),
        both("W8A8"),
        both("W4A8"),
    ]
    return table(("", "PSNR, median (dB)", "UNet, of float16"), rows)


def best() -> str:
    """The integer recipe, with and without a budget of bits, and what it stands beside; a budget is of W4."""

    def cell(name: str, system: str) -> str:
        rows = [row for row in report(name)["rows"] if row["system"] == system]
        return f"{rows[0]['psnr_median_db']:.1f} / {rows[0]['psnr_worst_tenth_db']:.1f}" if rows else ""

    widths = ("W8A8", "W4A8", "W4A6", "W4A4")
    systems = (
        ("convrot {}", "ConvRot"),
        ("integer rotate nearest {}", "every layer rotated, nearest"),
        ("integer {}", "**integer**"),
        ("integer {}, 4.6 bits", "**integer, 4.6 bits**"),
    )
    rows = [
        (f"{variant}{label}", *(cell(name, system.format(bits)) for bits in widths))
        for name, variant in (("fidelity-embedded", ""), ("fidelity-stress", "*stress variant*: "))
        for system, label in systems
    ]
    return table(("PSNR, median / worst tenth (dB)", *widths), rows)


def recipes() -> str:
    """Both recipes on the embedded model and on its variant with outliers."""

    def row(name: str, system: str, label: str) -> tuple[str, ...]:
        bold = "**" if system == "integer" else ""
        variant = "*stress variant*: " if name == "fidelity-stress" else ""
        cells = (of_recipe(name, f"{system} {bits}") for bits in ("W8A8", "W4A8", "W4A6"))
        figures = (f"{bold}{cell['psnr_db']:.1f} / {cell['latent_sqnr_db']:.1f}{bold}" for cell in cells)
        return (f"{variant}{bold}{label}{bold}", *figures)

    systems = (
        ("paper G=1", "paper, G = 1"),
        ("paper G=8", "paper, G = 8"),
        ("paper G=16", "paper, G = 16"),
        ("convrot", "ConvRot"),
        ("integer rotate nearest", "every layer rotated, nearest"),
        ("integer", "integer"),
    )
    rows = [row(name, *system) for name in ("fidelity-embedded", "fidelity-stress") for system in systems]
    return table(("PSNR / latent SQNR (dB)", "W8A8", "W4A8", "W4A6"), rows)


PEERS = {
    "bfloat16": "bfloat16, unquantized",
    "dgq W8A8": "**dgq W8A8**",
    "quanto W8A8": "",
    "sdnq int8 W8A8": "",
    "quanto W8A32": "",
    "sdnq int8 W8A32": "",
    "dgq W8A8, linear layers": "**dgq W8A8, linear layers only**",
    "torchao int8 W8A8 (linear layers)": "torchao W8A8, linear layers only",
    "torchao int8 W8A32 (linear layers)": "torchao W8A32, linear layers only",
    "dgq W4A8": "**dgq W4A8**",
    "quanto W4A8": "",
    "sdnq int4 W4A8": "",
    "quanto W4A32": "",
    "sdnq int4 W4A32": "",
    "dgq W4A8, linear layers": "**dgq W4A8, linear layers only**",
    "torchao int4 W4A32 (linear layers)": "torchao W4A32 (groups of 32), linear layers only",
}


def peers() -> str:
    """Other quantizers on the same pictures."""
    found = {row["system"]: row for row in report("peers-embedded")}
    rows = (
        (label or name, *(f"{found[name][key]:.1f}" for key in ("psnr_db", "latent_sqnr_db", "top1")))
        for name, label in PEERS.items()
    )
    return table(("system", "PSNR (dB)", "latent SQNR (dB)", "top-1 (%)"), rows)


def step_embedded() -> str:
    """A step of the embedded model."""
    half = f"{float(measured(EMBEDDED_W8, 'bfloat16')['weights_mib']):.1f} MiB"
    rows = []
    for run, system, label, file in (
        (EMBEDDED_W8, "float32", "float32", f"{half} (float16)"),
        (EMBEDDED_W8, "bfloat16", "bfloat16", half),
        (EMBEDDED_W8, "dgq W8A8", "**dgq W8A8**", ""),
        (EMBEDDED_W4, "dgq W4A8", "**dgq W4A8** (second run, float32 at {})", ""),
    ):
        row = measured(run, system)
        ratio = f"{float(row['ratio_to_float32']):.2f}"
        rows.append(
            (
                label.format(f"{float(measured(EMBEDDED_W4, 'float32')['p50_ms']):.1f} ms"),
                f"{float(row['p50_ms']):.1f}",
                ratio if file else f"**{ratio}**",
                error(row),
                f"{float(row['weights_mib']):.1f} MiB",
                file or f"{float(row['disk_mib']):.1f} MiB",
                memory(row["peak_rss_mib"]),
            )
        )
    header = ("system", "ms", "times float32", "relative error", "weights in memory", "UNet file", "peak memory")
    return table(header, rows)


def error(row: dict[str, str]) -> str:
    value = float(row["relative_error"])
    return f"{value:.1e}" if value else "0"


def step_sd() -> str:
    """A step of Stable Diffusion v1.4's UNet, all systems."""
    rows = []
    base, base_off = (float(measured(run, "float32")["p50_ms"]) for run in (AMX, AMX_OFF))
    other = seconds(measured(AMX_SDNQ, "dgq W8A8")).removesuffix(" s")
    for system, label, off in (
        ("float32", "float32", seconds(measured(AMX_OFF, "float32"))),
        ("bfloat16", "bfloat16, channels-last", seconds(measured(AMX_OFF, "bfloat16"))),
        ("torch.compile (bfloat16)", "torch.compile, bfloat16", BY_HAND["torch.compile without AMX"]),
        ("torchao int8 (bfloat16)", "torchao int8, bfloat16, compiled", "not measured"),
        ("sdnq int8 (bfloat16)", f"sdnq int8 (another run, dgq at {other} s)", "not measured"),
        ("OpenVINO float32", "OpenVINO float32", "not measured"),
        ("OpenVINO bfloat16", "OpenVINO bfloat16", "not measured"),
        ("OpenVINO NNCF int8", "OpenVINO with NNCF's int8", "not measured"),
    ):
        row = measured(AMX_SDNQ if system.startswith("sdnq") else AMX, system)
        rows.append((label, seconds(row), off, error(row), memory(row["disk_mib"]), memory(row["peak_rss_mib"])))
    for system in ("dgq W8A8", "dgq W4A8"):
        row, without, later = (measured(run, system) for run in (AMX, AMX_OFF, AMX_MEMORY))
        rows.append(
            (
                f"**{system}**",
                f"**{seconds(row)}** ({base / float(row['p50_ms']):.1f}x float32)",
                f"**{seconds(without)}** ({base_off / float(without['p50_ms']):.1f}x)",
                error(row),
                memory(row["disk_mib"]),
                memory(later["peak_rss_mib"]),
            )
        )
    header = ("system", "with AMX", "AMX off", "relative error", "weights file", "peak memory, loading included")
    return table(header, rows)


def step_short() -> str:
    """The README's rows of the same."""
    rows = [("float32", *(seconds(measured(run, "float32")) for run in (AMX, AMX_OFF)))]
    rows += [
        (label, seconds(measured(AMX, system)), "not measured")
        for system, label in (
            ("torch.compile (bfloat16)", "bfloat16, compiled"),
            ("OpenVINO NNCF int8", "OpenVINO with NNCF's int8"),
        )
    ]
    peaks = [
        memory(measured(AMX, name)["peak_rss_mib"])
        for name in ("float32", "torch.compile (bfloat16)", "OpenVINO NNCF int8")
    ]
    w8, w4 = ([seconds(measured(run, f"dgq {bits}")) for run in (AMX, AMX_OFF)] for bits in ("W8A8", "W4A8"))
    both = [f"**{a.removesuffix(' s')} / {b}**" for a, b in zip(w8, w4, strict=True)]
    rows.append(("**dgq W8A8 / W4A8**", *both))
    peaks.append(memory(measured(AMX_MEMORY, "dgq W8A8")["peak_rss_mib"]))
    return table(
        ("", "with AMX", "AVX512-VNNI alone", "peak memory"),
        [(*row, peak) for row, peak in zip(rows, peaks, strict=True)],
    )


def products() -> str:
    """The CPU engine's products."""
    sizes = [(4096, 320, 320), (4096, 320, 2560), (1024, 640, 640), (1024, 640, 5120)]
    sizes += [(256, 1280, 1280), (256, 1280, 10240), (77, 768, 320), (64, 256, 256)]
    cases = [(" x ".join(map(str, size)), f"linear {'x'.join(map(str, size))}") for size in sizes]
    cases += [
        (f"conv 3x3, {channels} channels, {side} x {side}", f"conv3 1x{channels}x{side}x{side} to {channels}")
        for channels, side in ((320, 64), (640, 32), (1280, 16))
    ]
    rows = []
    for label, case in cases:
        vnni, amx, epyc = (measured(run, "dgq W8A8", case) for run in (PRODUCTS_VNNI, PRODUCTS_AMX, PRODUCTS_EPYC))
        float_xeon, float_epyc = (measured(run, "float32", case) for run in (PRODUCTS_VNNI, PRODUCTS_EPYC))
        rows.append(
            (
                label,
                *(f"{float(row['gops']):.0f}" for row in (float_xeon, vnni)),
                f"{float(vnni['peak_fraction']):.2f}",
                *(f"{float(row['gops']):.0f}" for row in (amx, float_epyc, epyc)),
                f"{float(epyc['peak_fraction']):.2f}",
            )
        )
    header = ("M x K x N", "torch float32", "VNNI", "of its peak", "AMX", "EPYC: float32", "dgq", "of its peak")
    return table(header, rows)


def compiled() -> str:
    """Main loops of the compile table, of the newest Triton and the large tiles."""
    with (ROOT / "kernels" / "dgq_kernels" / "aot.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max((row["triton"] for row in rows), key=lambda version: [int(part) for part in version.split(".")])

    def loop(target: str, kernel: str, tile: str, options: str) -> tuple[int, int]:
        """Instructions of the main loop, and products among them; the target's own tile where it has several."""
        found = [
            (int(row["loop"]), int(row["loop_mma"]))
            for row in rows
            if (row["triton"], row["target"], row["kernel"]) == (newest, target, kernel)
            and re.fullmatch(rf"{tile}x\d+x\d+x\d+ {options}", row["config"])
        ]
        (only,) = found
        return only

    def pair(target: str, weights: str, tile: str, options: str) -> tuple[str, int]:
        linear, conv = (loop(target, f"{op}_{weights}_kernel", tile, options) for op in ("linear", "conv2d"))
        assert linear[1] == conv[1]
        return f"{linear[0]} / {conv[0]}", linear[1]

    lines = []
    for label, target, product in (
        ("8.0, 8.6, 8.9", "80", "`IMMA.16832`"),
        ("9.0", "90", "`IGMMA.64x128x32`"),
        ("10.0", "100", "`UTCIMMA`; `IMMA` under Triton 3.6"),
        ("12.0", "120", "`IMMA.16832`"),
    ):
        int8, count = pair(target, "int8", "128x128", "classes=1")
        classes, class_count = pair(target, "int8", "128x128", "classes=3")
        int4, int4_count = pair(target, "int4", "128x128" if target == "90" else "256x64", "group=32")
        first = target == "80"
        lines.append(
            (
                label,
                product,
                f"{int8}{' instructions' if first else ''} for {count}{' products' if first else ''}",
                classes + (f" for {class_count}" if class_count != count else ""),
                f"{int4} for {int4_count}{' products' if first else ''}",
            )
        )
    header = (
        "target",
        "int8 product",
        "main loop, int8 linear / conv",
        "shift classes",
        "two-level int4 (groups of 32), linear / conv",
    )
    return table(header, lines)


def predicted() -> str:
    """Bounds of a step on GPUs, from the compile table and the modules' shapes."""
    from dgq.bench.predict import predict_step

    devices = {"a6000": "A6000", "rtx4090": "RTX 4090", "a100": "A100", "h100": "H100"}
    lines = []
    for name, label in (
        ("sd-v1.4", "SD v1.4, 512 px, batch 2"),
        ("sdxl-turbo", "SDXL-Turbo, 512 px"),
        ("pixart-alpha", "PixArt-alpha, 512 px, batch 2"),
    ):
        items = predict_step(name, devices)
        lines.append(
            (
                f"{label}, fp16, ideal / total",
                *(f"{item.ideal['fp16']:.2f} / {item.total['fp16']:.2f}" for item in items),
            )
        )
        for bits in ("W8A8", "W4A8"):
            cells = (
                " / ".join(f"{ms[bits]:.2f} ({ms[bits] / ms['fp16']:.2f})" for ms in (item.ideal, item.total))
                for item in items
            )
            lines.append((bits, *cells))
    return table(("predicted, not measured: ms, and times fp16", *devices.values()), lines)


def models() -> str:
    """Sizes of well-known networks, from their configurations: nothing of it is measured."""
    from dgq import architectures
    from dgq.integer.plan import packed_bytes, plan_layers
    from dgq.recipe import Recipe

    lines = []
    for name, known in architectures.ARCHITECTURES.items():
        network = architectures.network(known)
        values = sum(tensor.numel() for tensor in network.state_dict().values())
        sizes = []
        for bits in (8, 4):
            layers = plan_layers(network, Recipe(wbits=bits))[0]
            whole = {layer.name if not layer.plan.columns else layer.plan.owner(layer.name): layer for layer in layers}
            taken = sum(one.numel() for layer in whole.values() for one in layer.module.parameters())
            sizes.append(sum(packed_bytes(layer.plan) for layer in layers) + 2 * (values - taken))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        lines.append(
            (
                f"`{name}`",
                f"{parameters / 1e9:.2f}",
                *(f"{size / 1e9:.2f}" for size in (4 * values, 2 * values, *sizes)),
                str(len(whole)),
            )
        )
    header = ("computed, GB", "parameters, 10^9", "float32", "float16", "W8A8", "W4A8", "quantized layers")
    return table(header, lines)


PICTURE_PARTS = ("text", "steps", "decoder", "PNG", "load")


def picture() -> str:
    """Whole pictures, every run that results.csv holds."""
    found = [row for row in results() if row["table"] == "picture"]
    lines = []
    for row in found:
        own = (row["date"], row["system"])
        parts = (
            next(part for part in results() if (part["date"], part["system"]) == own and part["case"] == case)
            for case in (f"{row['case']}: {part}" for part in PICTURE_PARTS)
        )
        bold = "**" if row["system"].startswith("dgq") else ""
        lines.append(
            (
                f"{row['model']}, {row['case'].partition(' picture, ')[2]}",
                f"{row['cpu']}, {row['backend']}, {row['threads']} threads",
                f"{bold}{row['system']}{bold}",
                f"{bold}{seconds(row)}{bold}",
                f"{1 / float(row['ratio_to_float32']):.2f}",
                *(seconds(part) for part in parts),
                memory(row["peak_rss_mib"]),
            )
        )
    if not lines:
        lines.append(("**not measured yet**", *[""] * 10))
    header = ("picture", "machine", "system", "whole", "float32's / its", *PICTURE_PARTS[:-1], "loading", "peak memory")
    return table(header, lines)


TUNED = {
    "untuned": "untuned",
    "tune": "**`dgq tune`**",
    "prior": "with `--class-prompt`",
    "even": "with `--high-noise-strength 1`",
    "together": "three subjects in one file",
    "peqa": "PEQA",
    "lora": "float model, LoRA r = 4",
    "dreambooth": "float model, DreamBooth",
}
BESIDE = ("untuned", "tune", "prior", "even", "peqa", "lora", "dreambooth")


def weights_of(name: str, weights: str = "W4A8") -> str:
    return "float" if name in ("lora", "dreambooth") else weights


def tuned(*names: str, weights: str = "W4A8", strength: float = 1) -> Iterable[tuple[str, dict[str, Any]]]:
    """(label, row of the report) of systems that were run."""
    for name in names:
        for row in report("tuning")["systems"]:
            if [row["system"], row["weights"], row["strength"]] == [name, weights_of(name, weights), strength]:
                yield TUNED[name], row


def with_interval(values: Sequence[float], sign: bool = False) -> str:
    """A mean and its interval."""
    mean, low, high = (f"{value:{'+' if sign else ''}.2f}" for value in values)
    return f"{mean} ({low} to {high})"


LIKE = (("scorer", "likeness, scorer"), ("efficientnet", "likeness, EfficientNet"))
ASKED = (("background", "background as asked"), ("style", "style as asked"))


def tuning() -> str:
    """Systems at W4A8 and in float over all subjects."""
    rows = []
    for label, row in tuned(*BESIDE[:-3], "together", *BESIDE[-3:]):
        costs = ["-"] * 3
        if row["bytes"]:
            costs = [f"{row['bytes'] / 2**20:.2f} MiB", f"{row['cpu_seconds']}", f"{row['peak_bytes'] / 2**20:.0f} MiB"]
        count = str(len(row["subjects"]))
        rows.append((label, count, *(with_interval(row[key]) for key, _ in LIKE + ASKED), *costs))
    real = report("tuning")["real"]
    for label, ending in (("real pictures through the model's autoencoder", "_coded"), ("real pictures", "")):
        rows.append((label, "", *(with_interval(real[f"{key}{ending}"]) for key, _ in LIKE), "", "", "", "", ""))
    return table(("", "subjects", *(label for _, label in LIKE + ASKED), "file", "CPU seconds", "memory"), rows)


def differences(*names: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """(label, row of the report) of what `dgq tune` has more than systems, on the subjects that both were run on."""
    for name in names:
        for row in report("tuning")["against"]:
            if row["to"] == [name, weights_of(name), 1]:
                yield TUNED[name], row


def tuning_against() -> str:
    """`dgq tune` less each other system, of the same subjects, prompts and seeds."""
    rows = [
        (label, str(len(row["subjects"])), *(with_interval(row[key], True) for key, _ in LIKE + ASKED))
        for label, row in differences("untuned", *BESIDE[2:-3], "together", *BESIDE[-3:])
    ]
    return table(("`dgq tune` less", "subjects", *(label for _, label in LIKE + ASKED)), rows)


def tuning_ratios() -> str:
    """How far the way to a real picture is gone, and what of float DreamBooth's likeness is reached."""
    found = report("tuning")["ratios"]
    rows = [
        (label, *(with_interval(found[f"{key}_W4A8_{one}"]) for one, _ in LIKE))
        for key, label in (
            ("way", "of the way from untuned to real pictures"),
            ("way_coded", "to real pictures through the model's autoencoder"),
            ("of_dreambooth", "of float DreamBooth's"),
        )
        if f"{key}_W4A8_scorer" in found
    ]
    return table(("likeness of `dgq tune`", "scorer", "EfficientNet"), rows)


def tuning_overfitting() -> str:
    """The training picture that is nearest to a drawn one."""
    rows = []
    for label, row in tuned(*BESIDE):
        cells = [
            cell for key, _ in LIKE for cell in (with_interval(row[f"{key}_nearest"]), f"{row[f'copies_{key}'][0]:.0%}")
        ]
        rows.append((label, *cells))
    real = report("tuning")["real"]
    cells = [cell for key, _ in LIKE for cell in (with_interval(real[f"{key}_nearest"]), "")]
    rows.append(("real pictures that were not trained on", *cells))
    closer = "closer than real ones"
    return table(("to the nearest training picture", "scorer", closer, "EfficientNet", closer), rows)


def tuning_subjects() -> str:
    """Each subject by itself."""
    rows = []
    found = report("tuning")["subjects"]
    for name in dict.fromkeys(row["subject"] for row in found):
        of = {
            row["system"]: row
            for row in found
            if row["subject"] == name and row["strength"] == 1 and row["weights"] == weights_of(row["system"])
        }
        likeness = (f"{of[system]['scorer']:.2f}" if system in of else "-" for system in BESIDE)
        backgrounds = (f"{of[system]['background']:.2f}" if system in of else "-" for system in BESIDE)
        rows.append((name, " / ".join(likeness), f"{of['untuned']['real_scorer']:.2f}", " / ".join(backgrounds)))
    header = "likeness, scorer: untuned / `dgq tune` / class prompt / full strength / PEQA / LoRA / DreamBooth"
    return table(("", header, "real", "background as asked, the same"), rows)


def tuning_others() -> str:
    """What becomes of the subject's class and of other subjects."""
    keys = [f"{which}_{network}" for which in ("class", "other") for network, _ in LIKE]
    rows = [(label, *(with_interval(row[key]) for key in keys)) for label, row in tuned(*BESIDE[1:])]
    header = ("distance", *(f"{of}, {network}" for of in ("kind", "others") for network in ("scorer", "EfficientNet")))
    return table(header, rows)


def tuning_bits() -> str:
    """Tuning a checkpoint of eight bits beside one of four."""
    rows = [
        (weights, label, *(with_interval(row[key]) for key, _ in LIKE + ASKED))
        for weights in ("W4A8", "W8A8")
        for label, row in tuned("untuned", "tune", "peqa", weights=weights)
    ]
    return table(("checkpoint", "", *(label for _, label in LIKE + ASKED)), rows)


def tuning_strength() -> str:
    """Tuned scales at other strengths than the one they were trained at."""
    rows = [("0 (untuned)", *(with_interval(row[key]) for key, _ in LIKE + ASKED)) for _, row in tuned("untuned")]
    for strength in (0.5, 0.75, 1, 1.25):
        for _, row in tuned("tune", strength=strength):
            rows.append((f"{strength:g}", *(with_interval(row[key]) for key, _ in LIKE + ASKED)))
    return table(("strength", *(label for _, label in LIKE + ASKED)), rows)


def tuning_short() -> str:
    """The README's rows: means of systems that were run on all subjects, differences from the others."""
    keys = ("scorer", "background")
    rows = [
        (label, str(len(row["subjects"])), *(with_interval(row[key]) for key in keys))
        for label, row in tuned("untuned", "tune")
    ]
    rows.append(("real pictures", rows[0][1], with_interval(report("tuning")["real"]["scorer"]), "-"))
    for label, row in differences("peqa", "dreambooth"):
        cells = (with_interval(row[key], True) for key in keys)
        rows.append((f"`dgq tune` less {label}", str(len(row["subjects"])), *cells))
    return table(("", "subjects", "likeness", "background"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "fidelity-short": fidelity_short,
    "best": best,
    "recipes": recipes,
    "peers": peers,
    "step-embedded": step_embedded,
    "step-sd": step_sd,
    "step-short": step_short,
    "picture": picture,
    "products": products,
    "compiled": compiled,
    "predicted": predicted,
    "models": models,
    "tuning": tuning,
    "tuning-against": tuning_against,
    "tuning-ratios": tuning_ratios,
    "tuning-overfitting": tuning_overfitting,
    "tuning-subjects": tuning_subjects,
    "tuning-others": tuning_others,
    "tuning-bits": tuning_bits,
    "tuning-strength": tuning_strength,
    "tuning-short": tuning_short,
}


def written(text: str) -> str:
    """A page with every marked table as it is made from its file.

    Raises:
        KeyError: a marker names no table.
    """
    return _MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}<!-- /table -->", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page would change")
    args = parser.parse_args()
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    stale = {page: new for page, old in pages.items() if (new := written(old)) != old}
    if not args.check:
        for page, new in stale.items():
            page.write_text(new, encoding="utf-8")
    print(f"{'stale' if args.check else 'written'}: {', '.join(page.name for page in stale) or 'none'}")
    sys.exit(1 if stale and args.check else 0)


if __name__ == "__main__":
    main()
