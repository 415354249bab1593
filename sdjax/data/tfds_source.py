"""A dataset of tensorflow-datasets in ArrayRecord files, read without TensorFlow.

Features: "image"; "caption" or "text"; "key" or "id" where there is one; "label",
whose negative values stand for none.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sdjax.data.sample import BadSampleError, Sample
from sdjax.errors import SdjaxError


class TfdsSource:
    """The samples of a split: "train", or the only one there is."""

    empty: Mapping[str, np.ndarray] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, path: str):
        """Reads the dataset's description.

        Raises:
            SdjaxError: if it cannot be read, is not in ArrayRecord files or has no
                pictures.
        """
        self.path = path
        try:
            info = tfds.builder_from_directory(path).info
            lengths = {name: split.num_examples for name, split in info.splits.items()}
        except Exception as error:  # of any kind, as files may be broken in any way
            raise SdjaxError(
                f"{path} is no dataset of tensorflow-datasets: {error!s:.200}"
            ) from None
        if info.file_format is None or info.file_format.value != "array_record":
            raise SdjaxError(
                f"{path} is in {info.file_format} files: only ArrayRecord files can be "
                "read at any place"
            )
        if len(lengths) != 1 and "train" not in lengths:
            raise SdjaxError(f"{path} has splits {list(lengths)}, but no train")
        self._split = "train" if "train" in lengths else next(iter(lengths))
        self._length = lengths[self._split]
        features: Any = info.features or {}
        self._image = _first(features, "image", "jpg", "png")
        self._caption = _first(features, "caption", "text", "txt")
        self._key = _first(features, "key", "id", "__key__")
        self._label = _first(features, "label")
        if self._image is None or not self._length:
            raise SdjaxError(f"{path} has features {list(features)}, but no image")
        split = info.splits[self._split]
        self._shards = [str(place) for place in split.filepaths]
        self._ends = np.cumsum(split.shard_lengths)

    @functools.cached_property
    def _records(self) -> Any:
        builder: Any = tfds.builder_from_directory(self.path)
        raw = {self._image: tfds.decode.SkipDecoding()}
        return builder.as_data_source(split=self._split, decoders=raw)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_records"}

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> tuple[str, str]:
        """The file, and the sample's number in the split."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], f"sample {index}"

    def __getitem__(self, index: int) -> Sample:
        _, name = self.locate(index)
        try:
            record = self._records[index]
        except Exception as error:  # the reader is C++: its errors have no common type
            raise BadSampleError(f"{name} cannot be read: {error!s:.200}") from None
        caption = record[self._caption] if self._caption else b""
        key = record[self._key] if self._key else name
        label = record[self._label] if self._label else None
        image = record[self._image]
        if not isinstance(image, bytes):
            raise BadSampleError(
                f"{name}: its image is {type(image).__name__}, no file"
            )
        return Sample(
            _text(key, name),
            _text(caption, name),
            image,
            None if label is None or label < 0 else int(label),
        )


def _first(features: Any, *names: str) -> str | None:
    return next((name for name in names if name in features), None)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BadSampleError(f"{name}: its text is not UTF-8") from None
    return str(value)
