"""What a run tells: a file of every step's metrics, TensorBoard, and a bar."""

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from sdjax.errors import SdjaxError

Metrics = dict[str, Any]


class LossLog:
    """A line of JSON for each step, from which a resumed run cuts what it repeats.

    Numbers have the digits that tell one float32 from another; those that are not
    finite are strings.
    """

    def __init__(self, file: Path, size: int):
        """Opens the file and cuts it to `size` bytes, what it had at the checkpoint."""
        try:
            self._stream = open(file, "ab")
            there = os.fstat(self._stream.fileno()).st_size
            self.size = min(size, there)
            self._stream.truncate(self.size)
        except OSError as error:
            raise SdjaxError(f"cannot write {file}: {error.strerror}") from None
        if there < size:
            warnings.warn(f"{file} has lost {size - there} bytes", stacklevel=2)

    def write(self, step: int, metrics: Metrics, **more: Any) -> None:
        """Appends the line of a step."""
        numbers = {name: _number(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, **numbers, **more}).encode() + b"\n"
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            raise SdjaxError(
                f"cannot write {self._stream.name}: {error.strerror}"
            ) from None
        self.size += len(line)

    def sync(self) -> None:
        """Brings what was written to the disk, as a checkpoint is about to count on."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Meter:
    """Pictures a second, and the share of the time that the device waits for data."""

    def __init__(self) -> None:
        self.total, self.waited, self.images = 0.0, 0.0, 0
        self._last = (0.0, 0)

    def add(self, seconds: float, waited: float, images: int) -> None:
        """Counts one step, which took `seconds` with `waited` of them idle."""
        self.total += seconds
        self.waited += waited
        self.images += images

    @property
    def waiting_share(self) -> float:
        """Of the time since the start, in [0, 1]."""
        return self.waited / self.total if self.total else 0.0

    def lap(self) -> float:
        """Pictures a second since the last call."""
        seconds, images = self.total - self._last[0], self.images - self._last[1]
        self._last = (self.total, self.images)
        return images / seconds if seconds else 0.0


class Board:
    """Scalars and pictures for TensorBoard; a resumed run hides what it repeats."""

    def __init__(self, folder: Path, step: int):
        """Opens a new event file that begins after `step`."""
        from tensorboardX import SummaryWriter  # takes a second

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, metrics: Metrics) -> None:
        """Writes numbers."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def picture(self, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes a picture."""
        self._writer.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, total: int, step: int, *, show: bool):
        """Begins at `step`; `show` is whether to say anything at all."""
        self.terminal = show and sys.stderr.isatty()
        self._lines = show and not self.terminal
        self._bar = tqdm(
            total=total, initial=step, disable=not self.terminal, unit="step"
        )
        self._total, self._first = total, step
        self._began: float | None = None

    def update(self, loss: float, rate: float | None) -> None:
        """One step more; `rate` is in pictures a second."""
        if self._began is None:  # the first step compiles
            self._began, self._first = time.monotonic(), self._first + 1
        if rate is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}, {rate:.3g} images/s", False)
        self._bar.update()

    def line(self, step: int, loss: float, rate: float) -> None:
        """What the bar would show, as a line."""
        if not self._lines or self._began is None:
            return
        elapsed = time.monotonic() - self._began
        left = elapsed / max(step - self._first, 1) * (self._total - step)
        print(
            f"step {step} of {self._total}: loss {loss:.4g}, {rate:.3g} images/s, "
            f"{tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def say(self, message: str) -> None:
        """Prints a line without breaking the bar."""
        if self._lines or self.terminal:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _number(value: Any) -> float | str:
    number = np.float32(value)
    return float(str(number)) if math.isfinite(number) else str(number)
