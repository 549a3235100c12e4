"""dgq doctor: what runs on this machine, and why."""

from __future__ import annotations

from typing import Any

import typer

from .common import JsonOption, err, mib, print_json


def command(json: JsonOption = False) -> None:
    """Print versions, devices and kernels, and test every op against its reference. Exits with 1 if one fails."""
    from dgq.doctor import report

    data = report()
    if json:
        print_json(data)
    else:
        rows = _rows(data)
        width = max(len(name) for name, _ in rows) + 2
        for name, value in rows:
            typer.echo(f"{name:<{width}}{value}")
    if not data["ok"]:
        failed = [check for check in data["self_test"] if not check["ok"]]
        named = ", ".join(f"{check['name']} on {check['device']}" for check in failed)
        ran = any(check["name"] != "kernels" for check in failed)
        err.print("self-test failed: ", end="", style="bold red")
        err.print(f"{named}{'; DGQ_BACKEND=reference avoids the kernels' if ran else ''}", soft_wrap=True)
        raise typer.Exit(1)


def _rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    machine, embedded = data["machine"], data["embedded"]
    rows = [(name, version or "not installed") for name, version in data["versions"].items()]
    flags = ", ".join(machine["isa_flags"]) or "unknown"
    rows += [
        ("platform", machine["platform"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("instruction sets", f"{machine['isa']} ({flags})"),
    ]
    for entry in data["devices"]:
        size = mib(entry["memory_bytes"]) if entry["memory_bytes"] else "unknown memory"
        rows.append((f"device {entry['device']}", f"{entry['name']}, {size}"))
        rows.append(("  kernels", f"{entry['backend']}: {entry['reason']}"))
    rows.append(("memory available", mib(data["memory"]["available"])))
    rows += [
        (f"disk free, {name.replace('_', ' ')}", f"{mib(place['free_bytes'])} ({place['path']})")
        for name, place in data["disk"].items()
    ]
    rows += list(data["environment"].items())
    size = f"{mib(embedded['bytes'])}, " if "bytes" in embedded else ""
    rows.append(("embedded model", f"{embedded['status']}: {size}{embedded['detail']}"))
    rows += [
        (f"test {check['name']}, {check['device']}", f"{'ok' if check['ok'] else 'FAILED'}: {check['detail']}")
        for check in data["self_test"]
    ]
    return rows
