"""Draw what follows from Eq. 6, measured values beside the formulas: contraction, stationary spread, fold gap.

python -m tools.theory --out theory.png
"""

import json
import sys
from pathlib import Path

from pointewa.tools import cli
from pointewa.viz.clouds import check_suffix, save_figure
from pointewa.viz.theory import theory_figure


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--out", type=Path, default=Path("theory.png"), metavar="FILE",
                        help=".png, .pdf or .svg (default theory.png)")  # fmt: skip
    args = parser.parse_args(argv)
    check_suffix("--out", args.out)
    figure, measured = theory_figure()
    save_figure(args.out, figure, dpi=100)
    if args.json:
        print(json.dumps({args.out.suffix.lower()[1:]: str(args.out), **measured}))
    print(f"wrote {args.out}", file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main)
