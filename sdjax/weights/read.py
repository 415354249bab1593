"""Checkpoints in: a diffusers folder, a single file or an Orbax folder.

Leaf by leaf onto the device: one tensor is read, laid out, cast, checked and put, and
its host copy dropped before the next one is read.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import jax
import ml_dtypes
import numpy as np

from sdjax.config import ModelConfig, PredictionType
from sdjax.errors import SdjaxError
from sdjax.typing import Params
from sdjax.weights import layout, orbax_folder
from sdjax.weights.files import (
    component_tensors,
    detect,
    open_file,
    tokenizer_files,
)
from sdjax.weights.folder_config import read_folder_config
from sdjax.weights.json_file import config_from_json, parse_json, read_json
from sdjax.weights.single_config import infer_config

METADATA_KEY = "sdjax"
"""Where single files of ours carry their config, in the safetensors metadata."""

_CHUNK = 2**20
# Exponent bits: all set means infinite or not a number.
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it was read.

    Attributes:
        params: component -> nested dict of arrays on the device.
        tokenizers: component -> file name -> bytes; empty for single files.
        ignored: tensors of the file that belong to no part of the model.
    """

    config: ModelConfig
    params: dict[str, Params]
    tokenizers: dict[str, dict[str, bytes]]
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on disk with every tensor found, and none read yet."""

    config: ModelConfig
    sources: dict[str, list[layout.Source]]
    tokenizers: dict[str, dict[str, bytes]]
    ignored: tuple[str, ...] = ()


def read(
    path: str | Path,
    *,
    variant: str | None = None,
    dtype: Any = None,
    prediction_type: PredictionType | None = None,
    needs_tokenizers: bool = True,
    device_put: Callable[[Any], Any] = jax.device_put,
) -> Checkpoint:
    """Reads a model, leaf by leaf onto the device.

    Host memory: the largest leaf twice (Orbax: a 64th of the model), beside what
    `device_put` keeps.

    Args:
        path: a diffusers folder, a single file in the original layout (safetensors or
            torch), or an Orbax folder of sdjax, which may be a gs:// URL.
        variant: of a diffusers folder's files, such as "fp16".
        dtype: of the parameters; None: as stored.
        prediction_type: overrides the model's; a single SD 2 file does not say it.
        needs_tokenizers: whether it is an error that a folder lacks one it names.
        device_put: takes one numpy array to the device.

    Raises:
        SdjaxError: if the model is malformed, lacks a tensor, has one too many, or a
            weight that is not finite.
    """
    target = as_dtype(dtype)
    if target is not None and not _is_float(target):
        raise SdjaxError(f"dtype is {target}; parameters are floating point")
    kinds = get_args(PredictionType)
    if prediction_type is not None and prediction_type not in kinds:
        raise SdjaxError(
            f"prediction_type is {prediction_type!r:.40}; it can be {', '.join(kinds)}"
        )
    if detect(path) == "orbax":
        return _read_orbax(path, prediction_type, target, device_put)
    opened = open_model(
        path,
        variant=variant,
        prediction_type=prediction_type,
        needs_tokenizers=needs_tokenizers,
    )
    params = {
        component: nest(
            (s.entry.path, put_leaf(s.read(), s.entry.key, path, target, device_put))
            for s in sources
        )
        for component, sources in opened.sources.items()
    }
    return Checkpoint(opened.config, params, opened.tokenizers, opened.ignored)


def _read_orbax(
    path: str | Path,
    prediction_type: PredictionType | None,
    dtype: np.dtype | None,
    device_put: Callable[[Any], Any],
) -> Checkpoint:
    config = orbax_folder.read_config(path)
    leaves = orbax_folder.find_leaves(path, config)
    params = nest(
        (
            (leaf.component, *leaf.entry.path),
            put_leaf(array, leaf.entry.key, path, dtype, device_put),
        )
        for leaf, array in orbax_folder.read_leaves(path, leaves)
    )
    config = _with_prediction(config, prediction_type)
    return Checkpoint(config, params, orbax_folder.read_tokenizers(path))


def open_model(
    path: str | Path,
    *,
    variant: str | None = None,
    prediction_type: PredictionType | None = None,
    needs_tokenizers: bool = True,
) -> Opened:
    """Finds every tensor of a diffusers folder or a single file, reading none.

    The arguments are those of `read`.

    Raises:
        SdjaxError: if the model is malformed, lacks a tensor or has one too many.
    """
    place = Path(path)
    if detect(path) == "single-file":
        return _open_single(place, prediction_type)
    config = _with_prediction(read_folder_config(place), prediction_type)
    index = read_json(place / "model_index.json")
    tokenizers = tokenizer_files(place)
    for name in ("tokenizer", "tokenizer_2"):
        named = index.get(name)
        lacking = isinstance(named, list) and named[-1] and name not in tokenizers
        if lacking and needs_tokenizers:
            raise SdjaxError(
                f"{place / name} is missing, but model_index.json names it: pass "
                "tokenizer= (on the command line --tokenizer), a folder with "
                "vocab.json and merges.txt"
            )
    sources, variants = {}, []
    for component, entries in layout.tables(config).items():
        tensors, is_variant = component_tensors(place, component, variant)
        variants.append(is_variant)
        where = str(place / component)
        sources[component] = layout.match_folder(component, entries, tensors, where)
    if not any(variants):
        raise SdjaxError(f"{place} has no variant {variant!r} of any component")
    return Opened(config, sources, tokenizers)


def _open_single(file: Path, prediction_type: PredictionType | None) -> Opened:
    opened, where = open_file(file), str(file)
    if METADATA_KEY in opened.metadata:
        data = parse_json(opened.metadata[METADATA_KEY], f"{where}, metadata")
        config = config_from_json(data, f"{where}, metadata")
        config = _with_prediction(config, prediction_type)
    else:
        renamed = {layout.original_key(k): t for k, t in opened.tensors.items()}
        config = infer_config(
            renamed,
            where,
            prediction_type=prediction_type,
            global_step=opened.global_step,
        )
    tables = layout.tables(config)
    sources, ignored = layout.match_single(config, tables, opened.tensors, where)
    return Opened(config, sources, {}, tuple(ignored))


def as_dtype(dtype: Any) -> np.dtype | None:
    """A dtype from its name, or None.

    Raises:
        SdjaxError: if there is no such dtype.
    """
    try:
        return None if dtype is None else np.dtype(dtype)
    except TypeError:
        raise SdjaxError(
            f"dtype is {dtype!r:.40}; it can be float32, bfloat16, float16"
        ) from None


def _with_prediction(
    config: ModelConfig, prediction_type: PredictionType | None
) -> ModelConfig:
    if prediction_type is None:
        return config
    schedule = dataclasses.replace(config.schedule, prediction_type=prediction_type)
    return dataclasses.replace(config, schedule=schedule)


def put_leaf(
    array: np.ndarray,
    name: str,
    where: str | Path,
    dtype: np.dtype | None,
    device_put: Callable[[Any], Any],
) -> Any:
    """Casts, checks and puts one leaf."""
    if not _is_float(array.dtype):
        raise SdjaxError(f"{where}: {name} has the dtype {array.dtype}, not a float")
    if not is_finite(array):
        raise SdjaxError(f"{where}: {name} has weights that are NaN or infinite")
    if dtype is not None and array.dtype != dtype:
        with np.errstate(over="ignore"):
            array = array.astype(dtype)
        if not is_finite(array):
            raise SdjaxError(f"{where}: {name} has weights too large for {dtype}")
    # Waiting keeps at most one leaf on the host, whatever the device's speed.
    return jax.block_until_ready(device_put(array))


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; memory: a few megabytes."""
    bits = _EXPONENT.get(array.dtype.name)
    flat = array.reshape(-1)
    if bits is not None:
        flat = flat.view(np.dtype(f"u{array.dtype.itemsize}"))
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if bits is None:
            bad = not np.isfinite(chunk.astype(np.float64)).all()
        else:
            bad = ((chunk & chunk.dtype.type(bits)) == bits).any()
        if bad:
            return False
    return True


def _is_float(dtype: np.dtype) -> bool:
    # ml_dtypes has its own finfo: numpy's knows neither bfloat16 nor float8.
    try:
        return math.isfinite(float(ml_dtypes.finfo(dtype).max))
    except ValueError:
        return False


def nest(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> Params:
    """Paths and leaves as a nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
