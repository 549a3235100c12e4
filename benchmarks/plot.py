"""Bars of the medians in the CSV of `dgq bench --csv`, with the 20th and 80th percentile as error bars.

    python benchmarks/plot.py benchmarks/results.csv --out benchmarks/results.png [--table step]

Needs matplotlib (`pip install dgq[plots]`). Of several runs of one model on one machine the latest is drawn.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

Key = tuple[str, str, str]


def latest(file: Path, table: str) -> dict[Key, list[dict[str, str]]]:
    """The rows of the latest run of every (model, cpu or device, case)."""
    groups: dict[Key, dict[str, list[dict[str, str]]]] = {}
    with open(file, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if row["table"] == table:
                place = row["cpu"] if row["device"] == "cpu" else row["device"]
                key = (row["model"], f"{place}, {row['threads']} threads", row["case"])
                groups.setdefault(key, {}).setdefault(row["date"], []).append(row)
    return {key: runs[max(runs)] for key, runs in groups.items()}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results.png"))
    parser.add_argument("--table", choices=("step", "kernels"), default="step")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = latest(args.csv, args.table)
    if not groups:
        raise SystemExit(f"{args.csv}: holds no row of table {args.table}")
    count = sum(len(rows) for rows in groups.values())
    figure, panels = pyplot.subplots(
        len(groups), squeeze=False, figsize=(8, 0.9 * len(groups) + 0.32 * count), layout="constrained"
    )
    for panel, ((model, place, case), rows) in zip(panels.flat, groups.items(), strict=True):
        middle = [float(row["p50_ms"]) for row in rows]
        spread = [
            [value - float(row["p20_ms"]) for value, row in zip(middle, rows, strict=True)],
            [float(row["p80_ms"]) - value for value, row in zip(middle, rows, strict=True)],
        ]
        colours = ["tab:orange" if row["system"].startswith("dgq") else "tab:gray" for row in rows]
        panel.barh([row["system"] for row in rows], middle, xerr=spread, color=colours)
        panel.invert_yaxis()
        panel.set_title(f"{Path(model).name}: {case}, {place}", fontsize=9, loc="left")
        panel.set_xlabel("ms", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
