"""The results of the bench, as a table and as a file from which it goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointewa.errors import ConfigError
from pointewa.safe.files import atomic_write


def markdown(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The tables."""
    lines = []
    for section, rows in figures.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += [f"**{section}**", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for name, row in rows.items():
            cells = [f"{row[column]:.4g}" if isinstance(row.get(column), float) else str(row.get(column, ""))
                     for column in columns]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def measured(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The sections of an earlier call with the same settings, on the same machine.

    Raises:
        ConfigError: it had others.
    """
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    for key, value in report.items():
        if before.get(key) != value:
            raise ConfigError(
                f"--resume: {path} was measured with {key} {before.get(key)}, and now it is {value}: leave --resume "
                "out to measure all anew"
            )
    return before["figures"]


def write(folder: Path, command: str, report: Mapping[str, Any], figures: dict[str, dict[str, Any]]) -> None:
    """``README.md`` and ``bench.json`` of what was measured so far.

    Args:
        folder: where to.
        command: the arguments of the bench.
        report: its settings, and the machine.
        figures: for each section its rows.
    """
    head = f"# Bench\n\n`python -m benchmarks.bench {command}`:\n\n"
    head += "\n".join(f"- {key}: {value}" for key, value in report.items() if value is not None)
    result = json.dumps({**report, "figures": figures}, indent=1)
    for file, text in (("README.md", f"{head}\n\n{markdown(figures)}"), ("bench.json", f"{result}\n")):
        with atomic_write(folder / file) as temporary:
            temporary.write_text(text)
