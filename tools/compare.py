"""Finished runs side by side: metrics, curves, differences of each class, and McNemar's test on the same test objects.

python -m tools.compare runs/a runs/b
python -m tools.compare runs/a runs/b runs/c --out compare.html data.root=/data

All are compared with the first; of more than two runs p is also corrected for their number. Their models are evaluated
on their test split, which has to be the same.
"""

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from pointewa.datasets.subjects import Subjects
from pointewa.errors import CheckpointError, ConfigError
from pointewa.inference import compare
from pointewa.runs.folder import CONFIG
from pointewa.tools import cli
from pointewa.train.progress import say
from pointewa.viz.clouds import PAGES, check_suffix


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path, or all of it where that would be the same twice."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(map(str, folders))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of finished trainings, two at least")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a page, with the curves")
    args = parser.parse_intermixed_args(argv)
    overrides = [word for word in args.runs if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in args.runs if word not in overrides]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ConfigError(f"expected two or more different runs, found {' '.join(map(str, folders)) or 'none'}")
    if args.out:
        check_suffix("--out", args.out, PAGES)
    for folder in folders:
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: expected a run folder, found no {CONFIG} in it")
    runs = [compare.read_run(folder, name, Subjects(folder, "test", args.config, overrides))
            for folder, name in zip(folders, _names(folders), strict=True)]  # fmt: skip
    found = compare.compare(runs)
    if args.out:
        compare.save(args.out, runs, found)
    console = cli.console_of(args.json)
    if args.json:
        listed = [{"run": run.name, **run.metrics, "parameters": run.summary["parameters"]} for run in runs]
        print(json.dumps({"dataset": runs[0].subjects.config.data.name, "objects": len(runs[0].objects), "runs": listed,
                          "comparisons": [asdict(one) for one in found]}))  # fmt: skip
    else:
        what = f"{runs[0].subjects.config.data.name}, test split, {len(runs[0].objects)} objects"
        parts = (compare.metric_rows(runs), compare.test_rows(runs, found), compare.class_rows(runs, found))
        for title, (header, rows) in zip((what, "differences", "classes, in percentage points"), parts, strict=True):
            table = Table(title=title)
            for name in header:
                table.add_column(name, justify="left" if name in ("run", "class") else "right")
            for row in rows:
                table.add_row(*row)
            if rows:
                console.print(table)
        for one in found:
            say(console, f"{runs[0].name} -> {one.name}: {'; '.join(one.changed) or 'the same configuration'}")
        if found[0].test:
            say(console, compare.CAUTION)
    for note in compare.notes(runs):
        say(console, f"caution: {note}", style="yellow")
    if args.out:
        say(console, f"wrote {args.out} (open it in any browser)")


if __name__ == "__main__":
    cli.run(main)
