"""A file's tensors by name, none read before it is asked for.

A tensor is a place in a file: offset, dtype, shape, strides. Reading goes through
ordinary file reads, not through a memory map, whose pages would count as this
process's memory beside the array they are copied to.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from sdjax.errors import SdjaxError

MAX_RANK = 8
MAX_ELEMENTS = 2**48


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, in torch's layout.

    Attributes:
        file: the file that holds it.
        offset: bytes from the start of the file to the first element.
        strides: elements between neighbours per axis; None: row-major.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads it into memory of its own.

        Raises:
            SdjaxError: if the file ends before the tensor does.
        """
        if self.strides is None or self.size == 0:
            raw = read_bytes(self.file, self.offset, self.nbytes)
            return raw.view(self.dtype).reshape(self.shape)
        pairs = zip(self.shape, self.strides, strict=True)
        span = 1 + sum((length - 1) * stride for length, stride in pairs)
        raw = read_bytes(self.file, self.offset, span * self.dtype.itemsize)
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(raw.view(self.dtype), self.shape, steps)
        return np.ascontiguousarray(view).reshape(self.shape)

    def third(self, part: int) -> "Tensor":
        """The rows of part 0, 1 or 2 of three equal parts (packed q, k, v)."""
        rows, *rest = self.shape
        row = math.prod(rest) if self.strides is None else self.strides[0]
        start = part * (rows // 3) * row
        return dataclasses.replace(
            self,
            offset=self.offset + start * self.dtype.itemsize,
            shape=(rows // 3, *rest),
        )


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What one weights file holds.

    Attributes:
        metadata: the free text of a safetensors header.
        global_step: training step of an original-layout pickle, if it says.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    global_step: int | None = None


def read_bytes(file: Path, offset: int, count: int) -> np.ndarray:
    """Reads `count` bytes at `offset` into a new uint8 array [count].

    Raises:
        SdjaxError: if the file cannot be read or is shorter.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            # The length first: an array is never sized by what a header claims.
            if offset + count > stream.seek(0, 2):
                raise SdjaxError(f"{file} is truncated: {offset + count} bytes needed")
            buffer = np.empty(count, np.uint8)
            stream.seek(offset)
            view = buffer.data
            while view:
                got = stream.readinto(view)
                if not got:
                    raise SdjaxError(f"{file} became shorter while it was read")
                view = view[got:]
    except OSError as error:
        raise SdjaxError(f"cannot read {file}: {error.strerror}") from None
    return buffer


def check_shape(file: Path, key: str, shape: tuple[int, ...]) -> None:
    """Refuses shapes that no array can have."""
    elements = math.prod(max(length, 1) for length in shape)
    if len(shape) > MAX_RANK or elements > MAX_ELEMENTS:
        raise SdjaxError(f"{file}: tensor {key!r:.120} claims the shape {shape!r:.120}")
