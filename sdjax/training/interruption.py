"""SIGTERM and Ctrl-C, heard between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interruption:
    """Whether the run was asked to stop, and by which signal.

    Attributes:
        signal: SIGTERM or SIGINT, or None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler: notes the first, and lets a second Ctrl-C through."""
        if self.signal is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def heard() -> Iterator[Interruption]:
    """While it lasts, both signals ask to stop instead of ending the process.

    Elsewhere than in the main thread, Python cannot hear them: nothing is changed.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, interruption.ask) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
