"""Bars of the rows of `dgq bench --csv`: the median times, with the 20th and 80th percentile as error bars; beside them
the peak memory of steps, or the part of the int8 peak that kernels reach.

    python benchmarks/plot.py benchmarks/results.csv --out benchmarks/results.png [--table step] [--model sd-v1.4]

Needs matplotlib (`pip install dgq[plots]`). Of several runs of one model on one machine the latest is drawn.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

Rows = list[dict[str, str]]
# table -> (column, title, limit of the axis) of the second panel
SECOND = {"step": ("peak_rss_mib", "peak memory, MiB", None), "kernels": ("peak_fraction", "part of the int8 peak", 1)}


def latest(file: Path, table: str, model: str | None) -> dict[tuple[str, str, str], Rows]:
    """The rows of the latest run of every (model, machine, case)."""
    groups: dict[tuple[str, str, str], dict[str, Rows]] = {}
    with open(file, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if row["table"] == table and model in (None, row["model"]):
                place = row["cpu"] if row["device"] == "cpu" else row["device"]
                key = (row["model"], f"{place}, {row['threads']} threads, {row['backend']}", row["case"])
                groups.setdefault(key, {}).setdefault(row["date"], []).append(row)
    return {key: runs[max(runs)] for key, runs in groups.items()}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results.png"))
    parser.add_argument("--table", choices=tuple(SECOND), default="step")
    parser.add_argument("--model", help="only rows of this model or architecture")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = latest(args.csv, args.table, args.model)
    if not groups:
        raise SystemExit(f"{args.csv}: holds no such row of table {args.table}")
    counts = [len(rows) for rows in groups.values()]
    figure, panels = pyplot.subplots(
        len(groups),
        2,
        squeeze=False,
        figsize=(11, 0.9 * len(groups) + 0.32 * sum(counts)),
        layout="constrained",
        height_ratios=[count + 2 for count in counts],
    )
    column, title, limit = SECOND[args.table]
    for (times, seconds), ((model, place, case), rows) in zip(panels, groups.items(), strict=True):
        names = [row["system"] for row in rows]
        colours = ["tab:orange" if name.startswith("dgq") else "tab:gray" for name in names]
        middle = [float(row["p50_ms"]) for row in rows]
        spread = [
            [value - float(row["p20_ms"]) for value, row in zip(middle, rows, strict=True)],
            [float(row["p80_ms"]) - value for value, row in zip(middle, rows, strict=True)],
        ]
        labels = times.barh(names, middle, xerr=spread, color=colours)
        times.bar_label(labels, [f" {value:.4g}" for value in middle], fontsize=7)
        times.margins(x=0.12)
        times.set_title(f"{Path(model).name}: {case}, {place}", fontsize=9, loc="left")
        times.set_xlabel("ms", fontsize=8)
        # what was not measured has no bar
        values = [float(row[column]) if row.get(column) else 0.0 for row in rows]
        labels = seconds.barh(names, values, color=colours)
        seconds.bar_label(labels, [f" {value:.4g}" if value else " not measured" for value in values], fontsize=7)
        seconds.margins(x=0.12)
        seconds.set_xlim(0, limit if any(values) else 1)
        seconds.set_xlabel(title, fontsize=8)
        seconds.set_yticks([])
        for panel in (times, seconds):
            panel.invert_yaxis()
            panel.tick_params(labelsize=8)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
