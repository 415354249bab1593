"""Folders that appear whole or not at all, and never over what is there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sdjax.errors import SdjaxError


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Makes sure that nothing is lost by writing a folder at `path`.

    Raises:
        SdjaxError: if something other than an empty folder is there already, or the
            folder around it is not.
    """
    place = Path(path)
    is_folder = place.is_dir() and not place.is_symlink()
    if os.path.lexists(place) and not (is_folder and not any(place.iterdir())):
        raise SdjaxError(f"{place} exists already; nothing is overwritten")
    if not place.absolute().parent.is_dir():
        raise SdjaxError(f"{place.absolute().parent} is not there, or is no folder")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, beside `path`, which it becomes if all goes well.

    Raises:
        SdjaxError: as `check_new_folder`, and where the disk says no.
    """
    check_new_folder(path)
    place = Path(path).absolute()
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise SdjaxError(f"cannot write to {place.parent}: {error.strerror}") from None
    try:
        yield draft
        # mkdtemp's folder is for its owner alone; the one at hand follows the umask.
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)
        draft.rename(place)
    except OSError as error:
        raise SdjaxError(f"cannot write {place}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
