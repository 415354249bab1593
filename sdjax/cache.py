"""What is worth keeping between processes: compiled programs, and models' hashes.

Both are kept in folders that only their owner can write: whoever can write to JAX's
persistent cache can run code in the process that reads it.
"""

import contextlib
import hashlib
import os
import pathlib
import stat
import tempfile
import warnings
from collections.abc import Callable

import jax

_warned: set[pathlib.Path] = set()


def enable_compilation_cache() -> None:
    """Turns JAX's persistent cache on, unless the user has chosen a folder for it."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = private_folder("compiled")
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))


def private_folder(name: str) -> pathlib.Path | None:
    """Makes the folder `name` of the cache, with no access for others.

    The cache is $SDJAX_CACHE_DIR, else sdjax under $XDG_CACHE_HOME, else
    ~/.cache/sdjax. An empty SDJAX_CACHE_DIR switches it off.

    Returns:
        None, where it is off or, with a warning, where others could write to it.
    """
    chosen = os.environ.get("SDJAX_CACHE_DIR")
    if chosen == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(chosen or os.path.join(home, "sdjax")) / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        return _without(folder, f"{folder}: {error.strerror}")
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        need = "must belong to you and be writable by nobody else (chmod 700)"
        return _without(folder, f"{folder} {need}")
    return folder


def _without(folder: pathlib.Path, reason: str) -> None:
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(f"nothing is cached: {reason}", stacklevel=4)


def remembered(path: str, question: str, compute: Callable[[], str]) -> str:
    """Computes a text about a file or folder once, until something in it changes.

    Args:
        path: of the file or folder; a change of any file's size or time counts.
        question: what the text answers.
        compute: gives the answer.
    """
    folder = private_folder("remembered")
    state = _state(path)
    if folder is None or state is None:
        return compute()
    entry = folder / hashlib.sha256(f"{question}\n{state}".encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return entry.read_text()
    answer = compute()
    with contextlib.suppress(OSError):  # a full disk costs the memory alone
        _write(entry, answer)
    return answer


def _write(entry: pathlib.Path, answer: str) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
        try:
            file.write(answer)
            file.flush()
            os.replace(file.name, entry)
        except OSError:
            os.unlink(file.name)
            raise


def _state(path: str) -> str | None:
    """Absolute path, size and time of a file, or of every file below a folder.

    None, where it is no local file or is changing at this moment.
    """
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(top, f) for top, _, names in os.walk(path) for f in names]
    try:
        states = [(os.path.abspath(file), os.stat(file)) for file in sorted(files)]
    except OSError:
        return None
    return "\n".join(f"{f}\0{s.st_size}\0{s.st_mtime_ns}" for f, s in states)
