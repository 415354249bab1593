"""A folder of pictures, with captions as people keep them.

Captions come from `metadata.jsonl`, `metadata.csv`, `captions.jsonl` or `captions.csv`
in the folder (columns "file_name" and "text" or "caption", as Hugging Face's
imagefolder has them), else from `a.txt` beside `a.png`. A picture that has neither gets
the empty caption. Where all pictures lie in subfolders, those are classes: their
labels are their numbers in the order of the names, unless the table has a "label".
"""

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sdjax.data.pictures import EXTENSIONS, MAX_BYTES
from sdjax.data.sample import BadSampleError, Sample
from sdjax.errors import SdjaxError

TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")
MAX_TEXT = 2**20

_log = logging.getLogger(__name__)


class _Row(NamedTuple):
    caption: str | None
    label: int | None


class FolderSource:
    """The pictures of a folder and its subfolders, in the order of their names."""

    empty: Mapping[str, np.ndarray] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, path: str):
        """Lists the folder.

        Raises:
            SdjaxError: if there is no picture in it, or its table cannot be read.
        """
        self.path = path
        root = Path(path)
        self._rows = _read_table(root)
        names = set(_pictures(root)) | set(self._rows)
        self._names = sorted(names)
        if not self._names:
            raise SdjaxError(
                f"{path} holds no pictures: expected .tar shards, a TFDS dataset, or "
                f"files that end in {', '.join(sorted(EXTENSIONS))}"
            )
        folders = {str(PurePosixPath(name).parent) for name in self._names}
        self._classes = {} if "." in folders else _numbered(folders)
        self._warn_of_captions()

    def _warn_of_captions(self) -> None:
        """A forgotten caption shows in no picture that is drawn until much later."""
        missing = [n for n in self._names if not self._has_caption(n)]
        if 0 < len(missing) < len(self._names) or (missing and not self._classes):
            _log.warning(
                "%s: %d of %d pictures have no caption and get the empty one: %s",
                self.path,
                len(missing),
                len(self._names),
                ", ".join(missing[:5]),
            )

    def _has_caption(self, name: str) -> bool:
        row = self._rows.get(name)
        if row is not None and row.caption is not None:
            return True
        return Path(self.path, name).with_suffix(".txt").is_file()

    def __len__(self) -> int:
        return len(self._names)

    def locate(self, index: int) -> tuple[str, str]:
        """The folder, and the picture's path in it."""
        return self.path, self._names[index]

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        place = Path(self.path, name)
        row = self._rows.get(name, _Row(None, None))
        caption = row.caption
        if caption is None:
            caption = _caption_beside(place, name)
        label = row.label
        if label is None:
            label = self._classes.get(str(PurePosixPath(name).parent))
        return Sample(name, caption, _read(place, name, MAX_BYTES), label)


def _read(place: Path, name: str, most: int) -> bytes:
    try:
        if not place.is_file():
            raise BadSampleError(f"{name} is not there, or is no file")
        with place.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise BadSampleError(f"{name}: {error.strerror}") from None
    if len(data) > most:
        raise BadSampleError(f"{name} has more than {most} bytes")
    return data


def _caption_beside(place: Path, name: str) -> str:
    text = place.with_suffix(".txt")
    if not text.is_file():
        return ""
    try:
        return _read(text, f"{name}'s caption", MAX_TEXT).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadSampleError(f"{name}: its caption is not UTF-8") from None


def _pictures(root: Path) -> Iterator[str]:
    for folder, _, files in os.walk(root):
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for file in files:
            if not file.startswith(".") and Path(file).suffix.lower() in EXTENSIONS:
                yield str(inside / file)


def _numbered(folders: set[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(folders))}


def _read_table(root: Path) -> dict[str, _Row]:
    """File name -> what the folder's table says of it."""
    for table in TABLES:
        place = root / table
        if place.is_file():
            try:
                with place.open(encoding="utf-8-sig", newline="") as file:
                    parse = _json_lines if place.suffix == ".jsonl" else csv.DictReader
                    rows = dict(_row(row, f"{place}") for row in parse(file))
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise SdjaxError(f"cannot read {place}: {error}") from None
            except (ValueError, RecursionError) as error:
                if isinstance(error, SdjaxError):
                    raise
                raise SdjaxError(
                    f"{place} is not JSON, line by line: {error}"
                ) from None
            return rows
    return {}


def _json_lines(lines: Iterator[str]) -> Iterator[object]:
    return (json.loads(line) for line in lines if line.strip())


def _row(row: object, where: str) -> tuple[str, _Row]:
    fields = row if isinstance(row, dict) else {}
    name = fields.get("file_name")
    caption = fields.get("text", fields.get("caption"))
    if not isinstance(name, str) or not isinstance(caption, str | None):
        raise SdjaxError(
            f"{where}: a row is {row!r:.100}, but must have file_name and text"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise SdjaxError(f"{where}: file_name {name!r:.100} leaves the folder")
    label = fields.get("label")
    if label in (None, ""):
        return str(path), _Row(caption, None)
    try:
        return str(path), _Row(caption, int(label))
    except (TypeError, ValueError):
        raise SdjaxError(
            f"{where}: label {label!r:.40} of {name} is not a number"
        ) from None
