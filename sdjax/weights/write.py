"""Checkpoints out, safetensors or Orbax, whole or not at all.

Everything is written beside its place under a temporary name, flushed to the disk and
renamed. What was there is never overwritten.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from sdjax.config import ModelConfig, to_json
from sdjax.errors import SdjaxError
from sdjax.typing import Params
from sdjax.weights import layout, orbax_folder
from sdjax.weights.entries import Entry, from_leaf, pack_heads
from sdjax.weights.files import Format, check_url, is_remote
from sdjax.weights.folder_write import (
    folder_config,
    folder_files,
    shard_name,
    weights_stem,
)
from sdjax.weights.read import METADATA_KEY, as_dtype
from sdjax.weights.safetensors_file import NAMES, Outgoing, write_safetensors
from sdjax.weights.text_names import PREFIX

SHARD_SIZE = 10_000_000_000
"""diffusers' own default, in bytes."""


def write(
    path: str | Path,
    config: ModelConfig,
    params: dict[str, Params],
    tokenizers: dict[str, dict[str, bytes]],
    *,
    format: Format,
    dtype: Any = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Writes a model; host memory: its largest leaf three times.

    Args:
        path: a file for "single-file", else a folder; must not exist, or be an empty
            folder. "orbax" takes gs:// URLs.
        config: describes `params`.
        params: component -> tree.
        tokenizers: component -> file name -> bytes; not for a single file.
        format: "diffusers", "single-file" (the original layout) or "orbax".
        dtype: to cast to; None: as they are.
        shard_size: bytes of a diffusers component after which it is split.

    Raises:
        SdjaxError: if something is there already, the disk is full, or `params` does
            not fit `config`.
    """
    check_destination(path, format)
    target = as_dtype(dtype)
    if format == "diffusers":
        reduced = folder_config(config)
        params, config = _without_spare(config, reduced, params), reduced
    leaves = {
        component: layout.match_tree(
            component, entries, params.get(component, {}), "params"
        )
        for component, entries in layout.tables(config).items()
    }
    _check_space(path, leaves, target)
    if format == "orbax":
        tree = {name: params[name] for name in leaves}
        _write_orbax(path, config, _cast(tree, target), tokenizers)
        return
    with beside(Path(path)) as place:
        if format == "single-file":
            _write_single(place, config, leaves, target)
        else:
            _write_folder(place, config, leaves, tokenizers, target, shard_size)


def check_destination(path: str | Path, format: Format) -> None:
    """Makes sure, before a model is read, that it can be written to `path`.

    Raises:
        SdjaxError: if something is there already, nothing can be made there, or the
            name is one that misleads.
    """
    options = ("diffusers", "single-file", "orbax")
    if format not in options:
        raise SdjaxError(f"format is {format!r:.40}; it can be {', '.join(options)}")
    check_url(path)
    if is_remote(path):
        if format != "orbax":
            raise SdjaxError(f"{path}: only Orbax folders can be written to a URL")
        return
    place = Path(path)
    if place.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise SdjaxError(
            f"{path} is the name of a torch file, which sdjax does not write: choose "
            "one that ends in .safetensors, or a folder"
        )
    try:
        _check_place(place, format)
    except (OSError, ValueError) as error:
        if isinstance(error, SdjaxError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise SdjaxError(f"cannot write {str(path)!r:.200}: {reason}") from None


def _check_place(place: Path, format: Format) -> None:
    is_folder = place.is_dir() and not place.is_symlink()
    try:
        place.lstat()
        is_there = True
    except FileNotFoundError:
        is_there = False
    if is_there and not (is_folder and not any(place.iterdir())):
        raise SdjaxError(f"{place} exists already; nothing is overwritten")
    if is_folder and format == "single-file":
        raise SdjaxError(f"{place} is a folder; a single file needs a file name")
    tempfile.TemporaryFile(dir=_existing_parent(place)).close()


def _existing_parent(place: Path) -> Path:
    """The innermost folder around a path that is there already."""
    parent = place.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent


def _check_space(
    path: str | Path,
    leaves: dict[str, list[tuple[Entry, Any]]],
    dtype: np.dtype | None,
) -> None:
    """Says before an hour of writing that the disk is too small."""
    if is_remote(path):
        return
    parent = _existing_parent(Path(path))
    needed = sum(
        leaf.size * _dtype(leaf, dtype).itemsize
        for pairs in leaves.values()
        for _, leaf in pairs
    )
    disk = shutil.disk_usage(parent)
    if disk.total and disk.free < needed:  # some file systems do not tell
        raise SdjaxError(
            f"cannot write {path}: it takes {needed / 1e9:.3f} GB, and the disk has "
            f"{disk.free / 1e9:.3f} GB left"
        )


def _write_single(
    place: Path,
    config: ModelConfig,
    leaves: dict[str, list[tuple[Entry, Any]]],
    dtype: np.dtype | None,
) -> None:
    # Other readers pass over the config, which tells ours what tensors do not.
    metadata = {"format": "pt", METADATA_KEY: json.dumps(to_json(config))}
    with _flushed(place) as stream:
        write_safetensors(stream, _original(config, leaves, dtype), metadata)


def _write_folder(
    place: Path,
    config: ModelConfig,
    leaves: dict[str, list[tuple[Entry, Any]]],
    tokenizers: dict[str, dict[str, bytes]],
    dtype: np.dtype | None,
    shard_size: int,
) -> None:
    for name, data in folder_files(config, tokenizers).items():
        write_bytes(place / name, (json.dumps(data, indent=2) + "\n").encode())
    for component, files in tokenizers.items():
        for name, data in files.items():
            write_bytes(place / component / name, data)
    for component, pairs in leaves.items():
        tensors = [folder_tensor(component, e, leaf, dtype) for e, leaf in pairs]
        write_component(place / component, weights_stem(component), tensors, shard_size)


def write_component(
    place: Path, stem: str, tensors: list[Outgoing], shard_size: int
) -> None:
    """One safetensors file, or shards with their index."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        held = sum(t.nbytes for t in shards[-1])
        if shards[-1] and held + tensor.nbytes > shard_size:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = shard_name(stem, number, len(shards))
        weight_map |= {tensor.key: name for tensor in shard}
        with _flushed(place / name) as stream:
            write_safetensors(stream, shard, {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        write_bytes(place / f"{stem}.safetensors.index.json", text.encode())


def folder_tensor(
    component: str, entry: Entry, leaf: Any, dtype: np.dtype | None
) -> Outgoing:
    """A leaf as a tensor of its component's file in a diffusers folder."""
    is_text = component.startswith("text_encoder")
    prefixed = is_text and not entry.key.startswith("text_projection")
    stored = _dtype(leaf, dtype)

    def make() -> np.ndarray:
        return from_leaf(entry, np.asarray(leaf)).astype(stored, copy=False)

    key = PREFIX + entry.key if prefixed else entry.key
    return Outgoing(key, stored, entry.shape, make)


def _original(
    config: ModelConfig,
    leaves: dict[str, list[tuple[Entry, Any]]],
    dtype: np.dtype | None,
) -> list[Outgoing]:
    """The tensors of a single file; q, k and v of OpenCLIP become one."""
    groups: dict[str, list[tuple[Entry, Any]]] = {}
    for component, pairs in leaves.items():
        prefix = layout.original_prefix(config, component)
        for entry, leaf in pairs:
            groups.setdefault(prefix + entry.original, []).append((entry, leaf))
    return [_original_tensor(key, group, dtype) for key, group in groups.items()]


def _original_tensor(
    key: str, group: list[tuple[Entry, Any]], dtype: np.dtype | None
) -> Outgoing:
    ordered = sorted(group, key=lambda pair: pair[0].part)
    stored = _dtype(ordered[0][1], dtype)

    def make() -> np.ndarray:
        parts = [_original_array(entry, leaf) for entry, leaf in ordered]
        if ordered[0][0].form == "by_head":
            return pack_heads(ordered[0][0], parts).astype(stored, copy=False)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.astype(stored, copy=False)

    return Outgoing(key, stored, ordered[0][0].original_shape, make)


def _original_array(entry: Entry, leaf: Any) -> np.ndarray:
    array = from_leaf(entry, np.asarray(leaf))
    if entry.form == "transposed":
        return np.ascontiguousarray(array.T)
    if entry.form in ("pointwise", "conv1d"):
        return array.reshape(entry.original_shape)
    return array


def _dtype(leaf: Any, dtype: np.dtype | None) -> np.dtype:
    stored = np.dtype(leaf.dtype) if dtype is None else dtype
    if stored not in NAMES:
        raise SdjaxError(f"dtype is {stored}; safetensors has no such type")
    return stored


def _without_spare(
    config: ModelConfig, reduced: ModelConfig, params: dict[str, Params]
) -> dict[str, Params]:
    """Drops the leaves that `config` has and `reduced` has not."""
    if config == reduced or reduced.text_encoder is None:
        return params
    tower = dict(params["text_encoder"])
    tower.pop("text_projection", None)
    kept = [f"layers_{i}" for i in range(reduced.text_encoder.num_layers)]
    tower["encoder"] = {name: tower["encoder"][name] for name in kept}
    return {**params, "text_encoder": tower}


def _cast(tree: Any, dtype: np.dtype | None) -> Any:
    if isinstance(tree, dict):
        return {name: _cast(value, dtype) for name, value in tree.items()}
    return tree if dtype is None else tree.astype(dtype)


def _write_orbax(
    path: str | Path, config: ModelConfig, params: Any, tokenizers: Any
) -> None:
    if is_remote(path):
        orbax_folder.save(path, config, params, tokenizers)
        return
    with beside(Path(path)) as place:
        orbax_folder.save(place.resolve(), config, params, tokenizers)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block has succeeded."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _move_to_new(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk is full" if full else error.strerror or error
            raise SdjaxError(f"cannot write {path}: {reason}") from None
        raise


def _move_to_new(temporary: Path, path: Path) -> None:
    """Renames; whoever has written to `path` meanwhile keeps what is theirs."""
    if temporary.is_dir():
        os.rename(temporary, path)  # refused where there is more than an empty folder
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


@contextlib.contextmanager
def _flushed(file: Path) -> Iterator[IO[bytes]]:
    """A new file whose bytes are on the disk when the block ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a new file, and waits until it is on the disk."""
    with _flushed(file) as stream:
        stream.write(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        remove: Callable[[Any], Any] = shutil.rmtree if path.is_dir() else os.unlink
        remove(path)
