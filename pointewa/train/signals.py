"""Stopping a training between two steps."""

import signal
import threading
from types import FrameType
from typing import Self


class StopSignals:
    """While entered, SIGTERM and SIGINT are remembered instead of ending the process.

    Args:
        insist: a second SIGINT interrupts at once. False under torchrun, which may repeat what the terminal sent.

    Attributes:
        received: number of the first signal, 0 for none.
    """

    def __init__(self, insist: bool = True) -> None:
        self.received = 0
        self._insist = insist
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT and self._insist:
            raise KeyboardInterrupt
        self.received = self.received or number
