"""Errors that the user can mend. The tools print them as one line and exit with code 2."""

import signal
import traceback
from pathlib import Path

from pointewa.clone import beside

_OWN = tuple(f"{folder}/" for folder in (Path(__file__).parent, *beside("datasets")))


class UserError(Exception):
    """Says which file or key, what was expected, what was found, and what to do."""


class ConfigError(UserError):
    """A configuration key or value."""


class DataError(UserError):
    """A data set: missing, of an unknown layout, damaged."""


class CheckpointError(UserError):
    """A checkpoint or run folder: missing, damaged, of another architecture, not writable."""


class TrainingError(UserError):
    """A run that went wrong, as by a non-finite loss."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work. The tools print the message and exit with 128 + its number.

    Args:
        number: of the signal.
        message: what was saved, and how to resume.
    """

    def __init__(
        self, number: int, message: str = "if it was training, resume with the same command and its RUN=name"
    ) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.number = number


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for use inside a one-line message."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A number of things for people: "1 epoch", "2 epochs", "0 patches" (``ending`` "es")."""
    return f"{count} {noun}{ending if count != 1 else ''}"


def is_bug(error: BaseException) -> bool:
    """Whether it is a mistake of a programmer's in this repository, as opposed to what a damaged file made of a parser:
    an AttributeError, TypeError or NameError that our own code raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_code.co_filename if frames else ""
    return isinstance(error, AttributeError | TypeError | NameError) and raised_in.startswith(_OWN)
