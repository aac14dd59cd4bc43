"""The paired differences of several studies in one table and one picture, from their reports.

python -m tools.forest results/quick results/images --out forest.png
python -m tools.forest results/quick results/sydney --pairs ewa=dense pretrained_ewa=pretrained

Without --pairs all arms of a study are compared as its report does, most with its first arm. Intervals are of 95 %
(Student's t, over seeds), and not corrected for their number.
"""

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from pointewa.errors import ConfigError
from pointewa.study.forest import read_rows, save
from pointewa.study.report import p_text
from pointewa.tools import cli
from pointewa.train.progress import say
from pointewa.viz.clouds import FIGURES, check_suffix


def _pair(text: str) -> tuple[str, str]:
    arm, equals, base = text.partition("=")
    if not (arm and equals and base):
        raise ConfigError(f"--pairs: expected ARM=BASELINE, such as ewa=dense, found {text!r}")
    return arm, base


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("reports", nargs="+", type=Path, metavar="FOLDER", help="with the report of a study")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="ARM=BASELINE", help="only these differences")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw them: .png, .pdf, .svg")
    args = parser.parse_args(argv)
    pairs = [_pair(one) for one in args.pairs]
    if args.out:
        check_suffix("--out", args.out, FIGURES)
    rows = [row for folder in args.reports for row in read_rows(folder, pairs)]
    if not rows:
        raise ConfigError(
            f"expected arms with two or more common seeds, found none in {', '.join(map(str, args.reports))}"
        )
    if args.out:
        save(args.out, rows)
    console = cli.console_of(args.json)
    if args.json:
        keys = ("study", "arm", "base", "p")
        print(json.dumps([asdict(row.difference) | {key: getattr(row, key) for key in keys} for row in rows]))
    else:
        table = Table("study", "arm", "compared with", "seeds", "difference", "95 % interval", "p")
        for row in rows:
            one = row.difference
            table.add_row(row.study, row.arm, row.base, str(one.pairs), f"{one.mean:+.2f}",
                          f"{one.low:+.2f} to {one.high:+.2f}", p_text(row.p))  # fmt: skip
        console.print(table)
    if args.out:
        say(console, f"picture: {args.out}")


if __name__ == "__main__":
    cli.run(main)
