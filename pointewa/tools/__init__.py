"""Command lines: parse, call the library, print. In a clone these are the files in its folder `tools/`."""

import os
import signal
import sys
from types import FrameType

from pointewa.clone import beside

__path__ += beside("tools")

# Threads of OpenMP spin at barriers. Where something else uses the cores, they spin for what they wait for, and a step
# takes ten times as long. libgomp reads this when torch is loaded; its default is endless. See docs/performance.md.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"


def begin() -> None:
    """What a command does first: until `cli.run` takes over, SIGINT ends it without a traceback.

    Importing torch takes seconds, and an exception during that, if the imports let it pass at all, is a long traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stopped_early)


def _stopped_early(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # one of several processes reports it
        os.write(2, b"\nstopped by SIGINT: nothing had begun\n")
    os._exit(128 + number)


if sys.argv[0] == "-m":  # python -m tools.train: its modules are being imported
    begin()
