"""What a model on disk is, without loading it: for `sdjax info`."""

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np

from sdjax.config import ModelConfig
from sdjax.errors import SdjaxError
from sdjax.weights import orbax_folder
from sdjax.weights.entries import from_leaf
from sdjax.weights.files import Format, detect
from sdjax.weights.read import open_model

_CHUNK = 2**22


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model is.

    Attributes:
        parameters: component -> number of parameters.
        tensors: component -> number of leaves.
        dtypes: component -> dtypes of its leaves, in order of their names.
        sha256: of the file, for a single file; else of names, dtypes, shapes and bytes
            of all tensors.
        ignored: tensors of the file that belong to no part of the model.
    """

    format: Format
    config: ModelConfig
    parameters: dict[str, int]
    tensors: dict[str, int]
    dtypes: dict[str, tuple[str, ...]]
    sha256: str
    ignored: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Ten digits, as A1111 writes them under "Model hash"."""
        return self.sha256[:10]


def describe(path: str | Path, *, variant: str | None = None) -> Description:
    """Reads config, counts, dtypes and hash of a model; nothing goes to a device.

    Host memory: one tensor (an Orbax folder: a 64th of the model).

    Raises:
        SdjaxError: if the model is malformed, lacks a tensor or has one too many.
    """
    kind = detect(path)
    if kind == "orbax":
        return _describe_orbax(path)
    opened = open_model(path, variant=variant, needs_tokenizers=False)
    sources = opened.sources
    if kind == "single-file":
        digest = _hash_file(Path(path))
    else:
        hasher = hashlib.sha256()
        for component in sorted(sources):
            for source in sorted(sources[component], key=lambda s: s.entry.key):
                name = f"{component}.{source.entry.key}"
                _hash_array(hasher, name, source.read_torch())
        digest = hasher.hexdigest()
    return Description(
        format=kind,
        config=opened.config,
        parameters={
            name: sum(math.prod(source.entry.shape) for source in found)
            for name, found in sources.items()
        },
        tensors={name: len(found) for name, found in sources.items()},
        dtypes={
            name: tuple(sorted({source.tensor.dtype.name for source in found}))
            for name, found in sources.items()
        },
        sha256=digest,
        ignored=opened.ignored,
    )


def _describe_orbax(path: str | Path) -> Description:
    config = orbax_folder.read_config(path)
    leaves = orbax_folder.find_leaves(path, config)
    hasher = hashlib.sha256()
    for leaf, array in orbax_folder.read_leaves(path, leaves):
        # In torch's layout: a model has the same hash in both kinds of folder.
        name = f"{leaf.component}.{leaf.entry.key}"
        _hash_array(hasher, name, from_leaf(leaf.entry, array))
    components: dict[str, list[orbax_folder.Leaf]] = {}
    for leaf in leaves:
        components.setdefault(leaf.component, []).append(leaf)
    return Description(
        format="orbax",
        config=config,
        parameters={
            name: sum(math.prod(leaf.metadata.shape) for leaf in found)
            for name, found in components.items()
        },
        tensors={name: len(found) for name, found in components.items()},
        dtypes={
            name: tuple(sorted({np.dtype(leaf.metadata.dtype).name for leaf in found}))
            for name, found in components.items()
        },
        sha256=hasher.hexdigest(),
    )


def _hash_array(hasher, name: str, array: np.ndarray) -> None:
    hasher.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
    hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _hash_file(file: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                hasher.update(chunk)
    except OSError as error:
        raise SdjaxError(f"cannot read {file}: {error.strerror}") from None
    return hasher.hexdigest()
