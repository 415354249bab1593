"""What a source gives: one picture as it was stored, undecoded, and its caption."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from sdjax.errors import SdjaxError

_NO_ARRAYS: Mapping[str, np.ndarray] = MappingProxyType({})


class Sample(NamedTuple):
    """One sample of a source.

    Attributes:
        key: names it in messages; unique within its shard.
        caption: empty where the source has none.
        image: the file of the picture (PNG, JPEG, ...), or empty where `arrays` holds
            what an autoencoder made of it.
        label: number of its class.
        arrays: what a cache holds: "moments", "context", "pooled", "size".
    """

    key: str
    caption: str
    image: bytes
    label: int | None = None
    arrays: Mapping[str, np.ndarray] = _NO_ARRAYS


class BadSampleError(SdjaxError):
    """One sample cannot be read; the others can."""


class Source(Protocol):
    """Samples by number, read from the disk when they are asked for.

    A source can be pickled (worker processes get a copy) and read by several threads.

    Attributes:
        path: where it is, for messages.
        empty: what a cache holds of the empty caption: "context", "pooled".
        settings: what was settled when a cache was written: "resolution" and such;
            nothing where there are pictures.
    """

    path: str
    empty: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Reads a sample.

        Raises:
            BadSampleError: if it cannot be read.
        """
        ...

    def locate(self, index: int) -> tuple[str, str]:
        """The names of the shard and of the sample, known without reading it."""
        ...
