"""Write the page of a run: result, curves, experts, what its task shows (mistakes, reconstructions), how it was made.

python -m tools.report runs/x
python -m tools.report runs/x --out x.html data.root=/data

The page is one file that opens in any browser without a network. The run must be finished.
"""

import json
import sys
from pathlib import Path

from pointewa.datasets.subjects import Subjects
from pointewa.errors import CheckpointError
from pointewa.inference import page
from pointewa.runs.folder import CONFIG
from pointewa.tools import cli
from pointewa.viz.clouds import PAGES, check_suffix


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("run", type=Path, help="run folder of a finished training")
    cli.add_config(parser)
    cli.add_number(parser, "--count", default=8, metavar="N", help="mistakes or reconstructions (default 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default {page.HTML} in the run folder)")
    args = parser.parse_intermixed_args(argv)
    if args.out:
        check_suffix("--out", args.out, PAGES)
    if not (args.run / CONFIG).is_file():
        raise CheckpointError(f"{args.run}: expected a run folder, found no {CONFIG} in it")
    numbers = page.write(args.run, Subjects(args.run, "test", args.config, args.overrides), args.out, args.count)
    if args.json:
        print(json.dumps(numbers))
    print(f"wrote {numbers['html']} (open it in any browser)", file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main)
