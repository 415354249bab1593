"""An Orbax folder of sdjax: the tree, with config and tokenizers beside it.

    sdjax.json             the config; written last, it marks a complete folder
    params/                the tree, as Orbax keeps it
    tokenizer/vocab.json   ...

Paths go through etils' epath, so gs:// URLs work where Orbax can read them.
"""

import concurrent.futures
import contextlib
import ctypes
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.config import ModelConfig, to_json
from sdjax.errors import SdjaxError
from sdjax.weights import layout
from sdjax.weights.entries import Entry
from sdjax.weights.files import ORBAX_CONFIG, TOKENIZER_FILES, is_remote
from sdjax.weights.json_file import config_from_json, parse_json

VERSION = 1


def save(
    folder: str | Path,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizers: dict[str, dict[str, bytes]],
) -> None:
    """Writes the folder; `sdjax.json` comes last."""
    import orbax.checkpoint as ocp
    from etils import epath

    place = epath.Path(folder)
    place.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        # Weights hardly compress; plain, they are read in less time and memory.
        with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
            checkpointer.save(place / "params", params)

    # Ctrl-C reaches the main thread alone, which waits: cut off, Orbax's own threads
    # would write on into a folder that is being removed.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(write).result()
        # Tensorstore raises ValueError and more where it cannot write.
        except Exception as error:
            full = "No space left" in str(error)
            reason = "the disk is full" if full else _line(error)
            raise SdjaxError(f"cannot write {folder}: {reason}") from None
    for component, files in tokenizers.items():
        (place / component).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (place / component / name).write_bytes(data)
    data = {"version": VERSION, "config": to_json(config)}
    (place / ORBAX_CONFIG).write_text(json.dumps(data, indent=2))


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the config beside the tree.

    Raises:
        SdjaxError: if it is missing or malformed.
    """
    from etils import epath

    file = epath.Path(folder) / ORBAX_CONFIG
    try:
        data = parse_json(file.read_bytes(), str(file))
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, SdjaxError):
            raise
        raise SdjaxError(f"cannot read {file}: {_line(error)}") from None
    if data.get("version") != VERSION:
        raise SdjaxError(
            f"{file}: version is {data.get('version')!r:.40}, not {VERSION}"
        )
    return config_from_json(data.get("config"), str(file))


class Leaf(NamedTuple):
    """A leaf in the folder, not read yet; `metadata` has its shape and dtype."""

    component: str
    entry: Entry
    metadata: Any

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.metadata.shape) * np.dtype(self.metadata.dtype).itemsize


def find_leaves(folder: str | Path, config: ModelConfig) -> list[Leaf]:
    """Finds every leaf of `config` in the folder, in order of components and keys.

    Raises:
        SdjaxError: if a leaf is missing, of the wrong shape, or one too many.
    """
    with _restoring(folder) as (checkpointer, place):
        tree = dict(checkpointer.metadata(place).item_metadata.tree)
    leaves = []
    for component, entries in sorted(layout.tables(config).items()):
        found = layout.match_tree(
            component, entries, tree.pop(component, {}), str(folder)
        )
        ordered = sorted(found, key=lambda pair: pair[0].key)
        leaves += [Leaf(component, entry, metadata) for entry, metadata in ordered]
    if tree:
        raise SdjaxError(f"{folder} has the unknown component {min(tree)!r:.80}")
    return leaves


def read_leaves(
    folder: str | Path, leaves: list[Leaf]
) -> Iterator[tuple[Leaf, np.ndarray]]:
    """Reads leaves as stored, in order.

    Host memory: a 64th of the model, or its largest leaf, and Orbax's buffers.

    Raises:
        SdjaxError: if the folder is damaged.
    """
    import orbax.checkpoint as ocp

    with _restoring(folder) as (checkpointer, place):
        for batch in _batches(leaves):
            item: dict[str, Any] = {}
            for leaf in batch:
                _at(item, leaf)[leaf.entry.path[-1]] = leaf.metadata
            arguments = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
            )
            wanted = ocp.args.PyTreeRestore(
                item=item, restore_args=arguments, partial_restore=True
            )
            tree = checkpointer.restore(place, args=wanted)
            for leaf in batch:
                yield leaf, _at(tree, leaf).pop(leaf.entry.path[-1])
            _trim()


def read_tokenizers(folder: str | Path) -> dict[str, dict[str, bytes]]:
    """The tokenizers beside the tree: component -> file name -> bytes."""
    from etils import epath

    tokenizers: dict[str, dict[str, bytes]] = {}
    for component in ("tokenizer", "tokenizer_2"):
        for name in TOKENIZER_FILES:
            file = epath.Path(folder) / component / name
            if file.exists():
                tokenizers.setdefault(component, {})[name] = file.read_bytes()
    return tokenizers


@contextlib.contextmanager
def _restoring(folder: str | Path) -> Iterator[tuple[Any, Any]]:
    """A checkpointer and the tree's place; its errors become one SdjaxError."""
    import orbax.checkpoint as ocp
    from etils import epath

    place = epath.Path(folder) / "params"
    if not is_remote(folder):
        place = place.resolve()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer, place
    except SdjaxError:
        raise
    # Orbax and tensorstore raise whatever their layers raise on damaged files.
    except Exception as error:
        raise SdjaxError(f"cannot read {place}: {_line(error)}") from None


def _trim() -> None:
    """Gives freed memory back: glibc keeps what Orbax's threads have used."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _batches(leaves: list[Leaf]) -> Iterator[list[Leaf]]:
    most = sum(leaf.nbytes for leaf in leaves) // 64
    batch: list[Leaf] = []
    for leaf in leaves:
        if batch and sum(held.nbytes for held in batch) + leaf.nbytes > most:
            yield batch
            batch = []
        batch.append(leaf)
    if batch:
        yield batch


def _at(tree: dict[str, Any], leaf: Leaf) -> dict[str, Any]:
    """The innermost dict around a leaf; made where it is not there."""
    node = tree
    for name in (leaf.component, *leaf.entry.path[:-1]):
        node = node.setdefault(name, {})
    return node


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
