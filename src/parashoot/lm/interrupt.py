"""Ctrl-C and SIGTERM as a request that is honoured between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 2.0  # seconds: under torchrun one Ctrl-C arrives twice, from the terminal and from the launcher


class Interrupt:
    """Inside `with Interrupt() as interrupt`, a first signal sets `interrupt.received`; one that comes later acts as usual."""

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > TOGETHER:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        self._before = {}
