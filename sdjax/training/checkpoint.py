"""Checkpoints of a run: saved in the background, whole or not at all, and checked.

    checkpoints/00000100/state/          the arrays, as Orbax keeps them
                         run.json        what else the run needs to go on
                         manifest.json   size and SHA-256 of every other file

A checkpoint is written under a temporary name and renamed when its manifest is on the
disk, so whatever has a step's name is complete, and whatever is not as its manifest
says was damaged later.
"""

import concurrent.futures
import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.errors import SdjaxError
from sdjax.training.manifest import sync_folder, verify, write_manifest

STATE, RUN = "state", "run.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Arrays = dict[str, np.ndarray]


class Restored(NamedTuple):
    """A checkpoint as it was read.

    Attributes:
        arrays: the leaves of the saved tree, by name.
        run: what else was saved.
    """

    step: int
    arrays: Arrays
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; a context that ends when the last save has.

    One save runs at a time, in a thread of its own.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every_steps: int | None = None):
        """Makes the folder, and removes what killed saves have left there.

        Args:
            folder: holds one folder for each checkpoint.
            keep: so many of the newest are kept.
            keep_every_steps: those at its multiples are kept for good.
        """
        self.folder, self.keep, self.keep_every_steps = folder, keep, keep_every_steps
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SdjaxError(f"cannot make {folder}: {error.strerror}") from None
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, tree: Any, run: dict[str, Any]) -> None:
        """Copies arrays to the host and writes them in the background.

        Waits for the save before it, and raises what that one failed with.

        Args:
            step: whose state it is; a checkpoint that it has already is left alone.
            tree: of arrays; `restore` gives its leaves by name.
            run: JSON.

        Raises:
            SdjaxError: if the save before it failed.
        """
        self.wait()
        if step in self.steps():
            return
        # A true copy: the buffers are donated to the next step.
        arrays = {name: np.array(leaf) for name, leaf in named_leaves(tree).items()}
        self._saving = self._pool.submit(self._write, step, arrays, run)

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            SdjaxError: if it failed: the disk is full, or the folder cannot be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check(self) -> None:
        """Raises what a save that has ended failed with; does not wait."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def restore(self) -> Restored | None:
        """Reads the newest checkpoint that is as it was written.

        Damaged ones newer than it are set aside under another name, with a warning
        that names the file; None, where there is no checkpoint at all.

        Raises:
            SdjaxError: if there are checkpoints and all of them are damaged.
        """
        damaged: dict[int, SdjaxError] = {}
        for step in reversed(self.steps()):
            try:
                verify(self._place(step))
                restored = _read(step, self._place(step))
            except SdjaxError as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                self._set_aside(other)
                warnings.warn(
                    f"{error}; it is set aside, and training goes on from step {step}",
                    stacklevel=2,
                )
            return restored
        if damaged:
            reasons = "; ".join(str(error) for error in damaged.values())
            raise SdjaxError(f"no checkpoint in {self.folder} is whole: {reasons}")
        return None

    def _place(self, step: int) -> Path:
        return self.folder / f"{step:08}"

    def _set_aside(self, step: int) -> None:
        aside = self.folder / f"damaged-{step:08}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self._place(step), aside)

    def _write(self, step: int, arrays: Arrays, run: dict[str, Any]) -> None:
        temporary = self.folder / f".{step}.tmp"
        try:
            temporary.mkdir()
            _save_arrays(temporary / STATE, arrays)
            (temporary / RUN).write_text(json.dumps(run))
            write_manifest(temporary)
            os.rename(temporary, self._place(step))
            sync_folder(self.folder)
        # Tensorstore raises ValueError and more where it cannot write.
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = max(self.steps(), default=None)
            kept = "there is none before it" if last is None else f"{last} is the last"
            raise SdjaxError(
                f"cannot save the checkpoint of step {step} in {self.folder}: "
                f"{_reason(error)}; of those that are whole, {kept}"
            ) from error
        self._remove_old()

    def _remove_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            if self.keep_every_steps and step % self.keep_every_steps == 0:
                continue
            # Renamed first: what has a step's name is whole, even if we are killed.
            doomed = self.folder / f".{step}.old"
            os.rename(self._place(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the path to each, joined by dots."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


def refill(tree: Any, arrays: Arrays, where: str) -> Any:
    """`tree` with its leaves taken from `arrays`, by name.

    Raises:
        SdjaxError: if a leaf is missing, one too many, or of another shape or dtype.
    """
    wanted = named_leaves(tree)
    odd = sorted(wanted.keys() ^ arrays.keys())
    if odd:
        verb = "lacks" if odd[0] in wanted else "has the unknown array"
        raise SdjaxError(f"{where} {verb} {odd[0]!r}: it is of another run")
    for name, leaf in wanted.items():
        found = arrays[name]
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise SdjaxError(
                f"{where}: {name} is {found.dtype} {found.shape}, but this run has "
                f"{leaf.dtype} {leaf.shape}"
            )
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[n] for n in wanted])


def _read(step: int, place: Path) -> Restored:
    import orbax.checkpoint as ocp

    run = json.loads((place / RUN).read_bytes())
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            path = (place / STATE).resolve()
            tree = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(tree)
            )
            arrays = checkpointer.restore(path, restore_args=as_numpy)
    # Orbax raises whatever its layers raise.
    except Exception as error:
        raise SdjaxError(f"cannot read {place / STATE}: {_reason(error)}") from error
    return Restored(step, arrays, run)


def _save_arrays(place: Path, arrays: Arrays) -> None:
    import orbax.checkpoint as ocp

    # Weights hardly compress; plain, they are written in less time.
    with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
        checkpointer.save(place.resolve(), arrays)


def _reason(error: Exception) -> str:
    text = str(error)
    told = ("No space left", "File too large", "Disk quota exceeded")
    if getattr(error, "errno", None) in _FULL or any(one in text for one in told):
        return "the disk is full"
    return (text.strip() or type(error).__name__).splitlines()[0][:200]
