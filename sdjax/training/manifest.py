"""A manifest: what the files of a folder were when it was written.

    {"files": {"state/_METADATA": [size, SHA-256], ...}, "self": SHA-256 of "files"}

So a file that was truncated or has a flipped bit is known by name, as is the manifest.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sdjax.errors import SdjaxError

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Lists all files below a folder; they and the list are on the disk afterwards."""
    files = _digests(folder)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    with open(folder / MANIFEST, "xb") as stream:
        stream.write(json.dumps({"files": files, "self": _sha(files)}).encode())
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def verify(folder: Path) -> None:
    """Compares the files of a folder with its manifest.

    Raises:
        SdjaxError: naming the first file that is missing or differs.
    """
    for name, (size, digest) in _manifest(folder / MANIFEST).items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise SdjaxError(f"{path} is damaged: {found} bytes, not {size}")
            same = _hash(path) == digest
        except OSError as error:
            raise SdjaxError(f"{path} is damaged: {error.strerror}") from None
        if not same:
            raise SdjaxError(f"{path} is damaged: its contents have changed")


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(file: Path) -> dict[str, list[Any]]:
    """Size and digest of every file, from a manifest that is as it was written."""
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["self"] == _sha(manifest["files"]):
            return manifest["files"]
    except FileNotFoundError:
        raise SdjaxError(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SdjaxError(f"{file} is damaged: its contents have changed")


def _digests(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file below a folder, all of them on the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        files[str(path.relative_to(folder))] = [path.stat().st_size, _hash(path)]
    return files


def _hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
