"""Command lines: parse, call the library, print."""

import os
import signal
import sys
from types import FrameType


def _stopped_early(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # one of several processes reports it
        os.write(2, b"\nstopped by SIGINT: nothing had begun\n")
    os._exit(128 + number)


# `python -m tools.x` imports this first, and then torch, for seconds. An exception during that would be a long
# traceback, if the imports let it pass at all. `cli.run` takes over.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stopped_early)
