"""JAX's persistent compilation cache, in a folder that only its owner can write.

Whoever can write to the cache can run code in the process that reads it.
"""

import os
import pathlib
import stat
import warnings

import jax


def enable_cache() -> None:
    """Turns the cache on, unless the user has chosen a folder or switched it off.

    The folder is $SDJAX_CACHE_DIR, else sdjax under $XDG_CACHE_HOME, else
    ~/.cache/sdjax; SDJAX_CACHE_DIR= (empty) switches it off.
    """
    chosen = os.environ.get("SDJAX_CACHE_DIR")
    if chosen == "" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(chosen or os.path.join(home, "sdjax")) / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        warnings.warn(f"no compilation cache: {folder}: {error.strerror}", stacklevel=2)
        return
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        warnings.warn(
            f"no compilation cache: {folder} must belong to you and be writable by "
            "nobody else (chmod 700)",
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
