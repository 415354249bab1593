"""Runs an iterator ahead of its user, in a thread."""

import atexit
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """The items of an endless iterator, some of them made before they are asked for."""

    def __init__(self, iterate: Callable[[], Iterator[T]], ahead: int):
        """Starts the thread, which holds up to `ahead` items ready."""
        self._queue: queue.Queue[tuple[T | None, Exception | None]]
        self._queue = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(iterate,), daemon=True, name="sdjax-data"
        )
        self._thread.start()
        # Before the exit handlers of multiprocessing, which would end Grain's workers
        # while the thread is at them: handlers run last in, first out.
        atexit.register(self.close)

    def _run(self, iterate: Callable[[], Iterator[T]]) -> None:
        try:
            for item in iterate():
                if not self._put((item, None)):
                    return
        except Exception as error:
            self._put((None, error))

    def _put(self, item: tuple[T | None, Exception | None]) -> bool:
        while not self._stop.is_set():
            try:
                # Not for ever: whoever stops may never take another item.
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self) -> T:
        """The next item; what the iterator raised, if it did, and then again."""
        if self._failure is None:
            item, self._failure = self._queue.get()
            if item is not None:
                return item
        assert self._failure is not None
        raise self._failure

    def close(self) -> None:
        """Stops the thread and waits for it."""
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join()
