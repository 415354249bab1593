"""Tells what kind of data lies at a path."""

import os
from pathlib import Path

from sdjax.data.cache_source import CacheSource, is_cache
from sdjax.data.folder_source import FolderSource
from sdjax.data.sample import Source
from sdjax.data.tar_source import TarSource
from sdjax.data.tfds_source import TfdsSource
from sdjax.errors import SdjaxError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens the samples at `path`, whose kind follows from what is there.

    Args:
        path: a folder that holds a TFDS dataset in ArrayRecord files
            (`dataset_info.json`; `gs://` where tensorflow-datasets can read it), a
            cache of `write_cache`, tar shards (or one `.tar` file), or pictures, see
            `sdjax.data.folder_source`.

    Raises:
        SdjaxError: if there is nothing of these at `path`.
    """
    path = os.fspath(path)
    if not path:
        raise SdjaxError("data.path is empty: name a folder of pictures or shards")
    if path.startswith("gs://"):
        return TfdsSource(path)
    place = Path(path)
    if place.is_file():
        if path.lower().endswith((".tar", *_COMPRESSED)):
            return TarSource(path, [path])
        raise SdjaxError(f"{path} is a file, but no .tar: name a folder")
    if not place.is_dir():
        raise SdjaxError(f"{path} is not there: name a folder of pictures or shards")
    return _open_folder(path, place)


def _open_folder(path: str, place: Path) -> Source:
    if (place / "dataset_info.json").is_file():
        return TfdsSource(path)
    if is_cache(place):
        return CacheSource(path)
    archives = sorted(str(one) for one in place.glob("*.tar"))
    if archives:
        return TarSource(path, archives)
    packed = next((p for p in place.iterdir() if p.name.endswith(_COMPRESSED)), None)
    if packed is not None:
        return TarSource(path, [str(packed)])  # which says why it cannot be read
    return FolderSource(path)
