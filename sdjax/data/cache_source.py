"""Reads the folders that `write_cache` makes; a record is a safetensors file."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from sdjax.data.sample import BadSampleError, Sample
from sdjax.errors import SdjaxError

PLAN, DONE, EMPTY = "plan.json", "cache.json", "empty.safetensors"
_KEY, _CAPTION = "key", "caption"


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"{number:05d}.array_record"


def pack(key: str, caption: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """A sample as one record."""
    texts = {_KEY: key, _CAPTION: caption}
    packed = {k: np.frombuffer(v.encode(), np.uint8) for k, v in texts.items()}
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    # ascontiguousarray makes a scalar a vector.
    return safetensors.save(
        packed | {k: v.reshape(arrays[k].shape) for k, v in contiguous.items()}
    )


def is_cache(folder: Path) -> bool:
    """Whether `write_cache` was at work here."""
    return (folder / PLAN).is_file() and not (folder / "dataset_info.json").exists()


class CacheSource:
    """The samples of a cache."""

    def __init__(self, path: str):
        """Reads the cache's description.

        Raises:
            SdjaxError: if it is damaged, or was not written to its end.
        """
        self.path = path
        folder = Path(path)
        if not (folder / DONE).is_file():
            raise SdjaxError(
                f"{path} is a cache that is not whole: run the command that began it "
                "again, and it goes on"
            )
        try:
            settings = json.loads((folder / PLAN).read_text())["settings"]
            done = json.loads((folder / DONE).read_text())
            self._shards = [
                str(folder / shard_name(number)) for number in range(done["shards"])
            ]
            self._length = int(done["count"])
            empty = folder / EMPTY
            self.empty: Mapping[str, np.ndarray] = (
                safetensors.load_file(empty) if empty.is_file() else {}
            )
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise SdjaxError(f"the cache {path} is damaged: {error!s:.200}") from None
        self.settings: Mapping[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
        }
        found = len(self._records)
        if found != self._length:
            raise SdjaxError(
                f"the cache {path} has {found} samples, but says {self._length}"
            )

    @functools.cached_property
    def _records(self) -> Any:
        try:
            return grain.sources.ArrayRecordDataSource(self._shards)
        except Exception as error:  # the reader is C++: its errors have no common type
            raise SdjaxError(f"the cache {self.path} is damaged: {error}") from None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_records"}

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> tuple[str, str]:
        """The cache, and the sample's number in it."""
        return self.path, f"sample {index}"

    def __getitem__(self, index: int) -> Sample:
        try:
            arrays = safetensors.load(self._records[index])
            key, caption = (
                arrays.pop(name).tobytes().decode() for name in (_KEY, _CAPTION)
            )
        except Exception as error:
            raise BadSampleError(
                f"sample {index} cannot be read: {error!s:.200}"
            ) from None
        label = arrays.pop("label", None)
        return Sample(key, caption, b"", None if label is None else int(label), arrays)
