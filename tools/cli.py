"""What the command lines share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import datasets
from pointewa.config import Config, load_config
from pointewa.engine.device import select_device
from pointewa.errors import UserError

EVAL_BATCH = 64


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every tool takes."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else to stderr")
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and overrides."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as train.epochs=10")


def config_from(args: argparse.Namespace, base: dict[str, Any] | None = None) -> Config:
    """The configuration that the arguments say."""
    return load_config(args.config, args.overrides, base)


def load(config: Config, split: str) -> datasets.Clouds:
    """A split of the configuration's data set, on the configuration's device."""
    data = config.data
    stream = None if data.stream == "auto" else data.stream
    return datasets.load(
        data.name,
        data.root,
        split,
        data.num_points,
        variant=data.variant,
        stream=stream,
        device=select_device(config.train.device),
    )


def run(main: Callable[[], None]) -> None:
    """Call ``main``; the user's errors become a message and exit code 2, an interruption 130."""
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a full disk or a forbidden folder, wherever it was met
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; a training goes on from its last checkpoint with the same command and "
            "RUN=<its name> ARGS=run.resume=true",
            file=sys.stderr,
        )
        sys.exit(130)
