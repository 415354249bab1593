"""Tar shards as img2dataset and webdataset write them, read where they lie.

A sample is the members whose names agree up to the first dot of the base name: a
picture, `.txt` (its caption), `.json` (with "caption" and "label") and `.cls` (the
number of its class).
"""

import collections
import functools
import json
import logging
import os
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sdjax.data.pictures import EXTENSIONS, MAX_BYTES
from sdjax.data.sample import BadSampleError, Sample
from sdjax.data.tar_index import members
from sdjax.errors import SdjaxError

MAX_TEXT = 2**20
"""Bytes of a caption or of its JSON."""
MAX_OPEN = 64
"""Archives that are open at a time."""

_PICTURE, _TEXT, _JSON, _CLASS = range(4)
_KINDS = {".txt": _TEXT, ".json": _JSON, ".cls": _CLASS}
_NAMED = 5

_log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """The samples of one archive.

    Attributes:
        keys: of the samples, in the archive's order.
        places: offset and size of picture, text, JSON and class; -1: there is none.
        ignored: how many members were left out, and the first of them with the reason.
    """

    path: str
    keys: list[str]
    places: np.ndarray  # int64 [N, 4, 2]
    ignored: tuple[int, list[str]]


def index_shard(path: str) -> Shard:
    """Reads the headers of an archive.

    Raises:
        SdjaxError: if it cannot be opened or is compressed.
    """
    samples: dict[str, list[tuple[int, int]]] = {}
    ignored, named = 0, []

    def ignore(name: str, why: str) -> None:
        nonlocal ignored
        ignored += 1
        if ignored <= _NAMED:
            named.append(f"{name!r:.100} ({why})" if name else why)

    for member in members(path):
        stem, extension = _split(member.name)
        kind = _PICTURE if extension in EXTENSIONS else _KINDS.get(extension)
        if member.flaw is not None:
            ignore(member.name, member.flaw)
        elif kind is None:
            continue
        elif member.size > (MAX_BYTES if kind == _PICTURE else MAX_TEXT):
            ignore(member.name, f"{member.size} bytes are too many")
        else:
            places = samples.setdefault(stem, [(-1, -1)] * 4)
            if places[kind] != (-1, -1):
                ignore(member.name, "its key is there twice")
            else:
                places[kind] = (member.offset, member.size)
    keys = [key for key, places in samples.items() if places[_PICTURE] != (-1, -1)]
    places = np.array([samples[key] for key in keys], np.int64).reshape(-1, 4, 2)
    return Shard(path, keys, places, (ignored, named))


def _split(name: str) -> tuple[str, str]:
    """Key and extension; of "a/b.left.png", they are "a/b" and ".png"."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    kind = f"{dot}{extension}".rpartition(".")[2]
    return f"{folder}/{stem}".lstrip("/"), f"{dot}{kind}".lower()


class _OpenFiles:
    """Descriptors of the archives last read; safe for threads, since pread is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, int] = collections.OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                file = os.open(path, os.O_RDONLY)
            self._files[path] = file
            if len(self._files) > MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            # Another thread may close what is not the newest.
            file = os.dup(file)
        try:
            return os.pread(file, size, offset)
        finally:
            os.close(file)

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class TarSource:
    """Samples of some archives, in the order of their names and of their members."""

    empty: Mapping[str, np.ndarray] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, path: str, archives: list[str]):
        """Reads the headers of all `archives`; some 100 bytes of memory a sample.

        Raises:
            SdjaxError: if one cannot be opened, or there is no picture in any.
        """
        self.path = path
        self._shards = [index_shard(archive) for archive in sorted(archives)]
        ends = np.cumsum([len(shard.keys) for shard in self._shards])
        self._ends = ends.astype(np.int64)
        for shard in self._shards:
            count, named = shard.ignored
            if count:
                more = ", ..." if count > len(named) else ""
                _log.warning(
                    "%s: %d members ignored: %s%s",
                    shard.path,
                    count,
                    ", ".join(named),
                    more,
                )
        if not len(self):
            raise SdjaxError(f"{path} holds no pictures")

    @property
    def ignored(self) -> dict[str, int]:
        """How many members of each archive were left out, where any was."""
        return {s.path: s.ignored[0] for s in self._shards if s.ignored[0]}

    @functools.cached_property
    def _files(self) -> _OpenFiles:
        return _OpenFiles()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_files"}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self._shards[number], index - before

    def locate(self, index: int) -> tuple[str, str]:
        """The archive and the sample's key."""
        shard, row = self._find(index)
        return shard.path, shard.keys[row]

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._find(index)
        key = shard.keys[row]
        picture, text, meta, number = (
            self._read(shard, key, *place) for place in shard.places[row].tolist()
        )
        described = _parse_json(meta, key) if meta else {}
        caption = described.get("caption") or "" if text is None else _text(text, key)
        label = _label(described.get("label") if number is None else number, key)
        if not isinstance(caption, str):
            raise BadSampleError(f"{key}: its caption is {caption!r:.40}, not a text")
        return Sample(key, caption, picture or b"", label)

    def _read(self, shard: Shard, key: str, offset: int, size: int) -> bytes | None:
        if offset < 0:
            return None
        try:
            data = self._files.read(shard.path, offset, size)
        except OSError as error:
            raise BadSampleError(f"{key}: {error.strerror}") from None
        if len(data) < size:
            raise BadSampleError(f"{key} is cut off: {len(data)} of {size} bytes")
        return data


def _text(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadSampleError(f"{key}: its caption is not UTF-8") from None


def _parse_json(data: bytes, key: str) -> dict:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSampleError(f"{key}: its .json cannot be read") from None
    return parsed if isinstance(parsed, dict) else {}


def _label(value: object, key: str) -> int | None:
    if value is None:
        return None
    try:
        label = int(value)  # pyright: ignore[reportArgumentType]
        if 0 <= label < 2**31:
            return label
    except (TypeError, ValueError):
        pass
    raise BadSampleError(f"{key}: its class is {value!r:.40}, not a number")
