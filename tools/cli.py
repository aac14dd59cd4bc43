"""Shared parts of the command lines."""

import argparse
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from pointewa.config import Config, load_config
from pointewa.errors import ConfigError, Stopped, UserError
from pointewa.ops import UP_AXES
from pointewa.safe.files import NO_ROOM
from pointewa.train.device import PRECISIONS, keep_freed_memory
from pointewa.train.distributed import launched


class Debug(argparse.Action):
    """``--debug`` sets ``POINTEWA_DEBUG=1``, which the processes of a study inherit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, **kwargs)

    def __call__(self, *_: Any) -> None:
        """Set the variable."""
        os.environ["POINTEWA_DEBUG"] = "1"


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Take the word after ``--up`` for its value, although it may begin with a '-' as options do."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            joined = words and words[-1] == "--up" and word in UP_AXES
            words = [*words[:-1], f"--up={word}"] if joined else [*words, word]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """One line, as for all that the user can mend."""
        self.exit(2, f"error: {message}: {self.prog} --help shows the arguments\n")


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every tool takes."""
    parser = _Parser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action=Debug, help="show the traceback behind an error, as POINTEWA_DEBUG=1 does")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else to stderr")
    return parser


def add_number(
    parser: argparse.ArgumentParser,
    flag: str,
    least: float = 1,
    kind: Callable[[str], float] = int,
    above: bool = False,
    **options: Any,
) -> None:
    """Add an option that takes a number, a whole one unless ``kind`` is float.

    Anything else, such as one below ``least`` (or, with ``above``, at it), raises a ConfigError when it is parsed.
    """
    noun, bound = "a whole number" if kind is int else "a number", f"{'more than' if above else 'at least'} {least:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise ConfigError(f"{flag}: expected {noun}, {bound}, found {text!r}") from error
        if not (least < value if above else least <= value) or value == math.inf:  # nor NaN
            raise ConfigError(f"{flag}: expected {bound}, found {text}")
        return value

    parser.add_argument(flag, type=parse, **options)


def add_up(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--up``, an axis of `UP_AXES`; "-z" may be given as ``--up -z`` too."""
    parser.add_argument("--up", choices=UP_AXES, help=f"{text}; -z: z points down")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add ``--precision``; None if it is not given."""
    parser.add_argument("--precision", choices=PRECISIONS, help="of the large products: float32 (default), bfloat16; "
                        "auto: bfloat16 where the hardware computes in it")  # fmt: skip


def refuse_unused(args: argparse.Namespace, what: str, uses: Mapping[str, Container[str]]) -> None:
    """Refuse options that were given and have no effect.

    Args:
        args: in which an option that was not given is None, False or empty.
        what: what is done.
        uses: options, as they are in ``args``, and what uses each.

    Raises:
        ConfigError: naming the option.
    """
    for name, users in uses.items():
        value = getattr(args, name)
        if value is not None and value is not False and value != [] and what not in users:  # 0 is something
            raise ConfigError(f"--{name.replace('_', '-')}: {what} does not use it: leave it out")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and overrides."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration, such as train.epochs=10")


def console_of(as_json: bool) -> Console:
    """For tables and messages: on stderr beside JSON, and wide where the output goes to a file or a pipe, which have no
    width of their own."""
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 140
    return console


def config_from(args: argparse.Namespace, base: dict[str, Any] | None = None) -> Config:
    """The configuration given by the arguments."""
    return load_config(args.config, args.overrides, base)


def _told(error: UserError | OSError) -> str:
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    remedy = ": free some space, then give the same command again" if error.errno in NO_ROOM else ""
    return f"{error.filename}: {error.strerror}{remedy}"


def run(main: Callable[[], None]) -> None:
    """Call ``main``. The user's errors end in a message and exit code 2, SIGINT and SIGTERM in one and 130 and 143."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    world = launched()
    process = f"[process {world.rank}] " if world.rank else ""

    def leave(code: int) -> NoReturn:
        if world.size > 1:  # threads of a process group that lost a member would wait at exit
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer: whoever uses it is told, and reports it.
        if not issubclass(args.exc_type, OSError):
            threading.__excepthook__(args)

    keep_freed_memory()
    threading.excepthook = in_thread
    signal.signal(signal.SIGTERM, terminate)
    warnings.showwarning = lambda message, *_: world.first and print(f"warning: {message}", file=sys.stderr)
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except (UserError, OSError) as error:  # OSError: a full disk or a forbidden folder, wherever it occurs
        if os.environ.get("POINTEWA_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"{process}error: {_told(error)}", file=sys.stderr, flush=True)
        leave(2)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if world.first:
            print(f"\n{stopped}", file=sys.stderr, flush=True)
        leave(128 + stopped.number)
