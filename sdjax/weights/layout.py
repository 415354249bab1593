"""Which leaves a model has, component by component, and what they are called where.

Files are matched strictly: every tensor is a leaf, or on the list of what is ignored,
or an error.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.config import ModelConfig
from sdjax.errors import SdjaxError
from sdjax.weights import text_names, unet_names, vae_names
from sdjax.weights.entries import ROOT, Entry, embedding, to_leaf, unpack_heads
from sdjax.weights.tensors import Tensor

Tables = dict[str, list[Entry]]
"""Component -> its leaves."""

# Schedule buffers, EMA copies, losses and other networks of original-layout files.
_IGNORED_ORIGINAL = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar"
    r"|lvlb_weights|scale_factor|denoiser\..*|model_ema\..*|.*\.loss\..*"
    r"|.*\.position_ids|.*\.attn_mask|.*\.logit_scale|depth_model\..*|embedder\..*"
    r"|noise_augmentor\..*|low_scale_model\..*|control_model\..*)"
)
_IGNORED_FOLDER = re.compile(r"(text_model\.)?embeddings\.position_ids|logit_scale")


class Source(NamedTuple):
    """Where a leaf comes from; `transposed`: the file holds [in, out]."""

    entry: Entry
    tensor: Tensor
    transposed: bool = False

    def read(self) -> np.ndarray:
        """Reads the leaf, in our layout."""
        array = self.tensor.read()
        if self.transposed:
            return array.reshape(self.entry.leaf_shape)
        return to_leaf(self.entry, self._whole(array))

    def read_torch(self) -> np.ndarray:
        """Reads the leaf, in torch's layout."""
        array = self.tensor.read()
        if self.transposed:
            return np.ascontiguousarray(array.reshape(self.entry.leaf_shape).T)
        return self._whole(array)

    def _whole(self, array: np.ndarray) -> np.ndarray:
        """The leaf's own part of an array, in torch's layout."""
        if array.size == 3 * math.prod(self.entry.shape):
            return unpack_heads(self.entry, array)
        return array.reshape(self.entry.shape)


def text_layout(config: ModelConfig, component: str) -> text_names.TextLayout:
    """How a text tower is laid out in a single file of this model."""
    if component == "text_encoder_2":
        return "open_clip"
    if config.text_encoder_2 is not None:
        return "clip"
    tower = config.text_encoders[component]
    return "clip" if tower.activation == "quick_gelu" else "open_clip"


def tables(config: ModelConfig) -> Tables:
    """The name table of every component of `config`."""
    result = {
        name: list(text_names.text_entries(tower, text_layout(config, name)))
        for name, tower in config.text_encoders.items()
    }
    result["unet"] = list(unet_names.unet_entries(config.unet))
    result["vae"] = list(vae_names.vae_entries(config.vae))
    if config.class_embedder is not None:
        classes, width = config.class_embedder.num_classes, config.class_embedder.width
        result["class_embedder"] = list(embedding(ROOT.at("embedding"), classes, width))
    return result


def original_prefix(config: ModelConfig, component: str) -> str:
    """What stands before a component's keys in a single file."""
    if component == "unet":
        return unet_names.ORIGINAL_PREFIX
    if component == "vae":
        return vae_names.ORIGINAL_PREFIX
    if component == "class_embedder":
        return "cond_stage_model."
    is_open = text_layout(config, component) == "open_clip"
    tower = "model." if is_open else "transformer."
    if config.text_encoder_2 is None:
        return "cond_stage_model." + tower
    second = component == "text_encoder_2" and config.text_encoder is not None
    return f"conditioner.embedders.{int(second)}.{tower}"


def match_folder(
    component: str, entries: list[Entry], tensors: Mapping[str, Tensor], where: str
) -> list[Source]:
    """Matches a component's file or shards in a diffusers folder with its leaves."""
    is_text = component.startswith("text_encoder")
    rename = vae_names.modern_key if component == "vae" else _same
    if is_text:
        rename = _without_text_prefix
    projected = any(entry.key == "text_projection.weight" for entry in entries)

    def is_ignored(key: str) -> bool:
        # CLIPTextModel has no projection; some files carry it all the same.
        spare = is_text and not projected and key == "text_projection.weight"
        return spare or bool(_IGNORED_FOLDER.fullmatch(key))

    found = _renamed(tensors, rename, where)
    pairs = [(entry.key, entry) for entry in entries]
    _account(found, pairs, is_ignored, where)
    return [
        Source(entry, _fit(found[entry.key], entry.shape, entry.key, where))
        for entry in entries
    ]


def match_single(
    config: ModelConfig, all_entries: Tables, tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, list[Source]], list[str]]:
    """Matches an original-layout file with the leaves of all components.

    Returns:
        Component -> leaves with their tensors, and the keys that were ignored.
    """
    found = _renamed(tensors, original_key, where)
    pairs = [
        (original_prefix(config, component) + entry.original, entry)
        for component, entries in all_entries.items()
        for entry in entries
    ]
    ignored = _account(found, pairs, is_ignored_original, where)
    sources: dict[str, list[Source]] = {}
    for component, entries in all_entries.items():
        prefix, place = original_prefix(config, component), f"{where}, {component}"
        sources[component] = [
            _original(found, prefix + entry.original, entry, place) for entry in entries
        ]
    return sources, ignored


def is_ignored_original(key: str) -> bool:
    """Whether a key of a single file belongs to no part of the model."""
    return bool(_IGNORED_ORIGINAL.fullmatch(key))


def original_key(key: str) -> str:
    """A single file's key in its commonest spelling."""
    for prefix in ("cond_stage_model.", "conditioner.embedders.0."):
        tower = prefix + "transformer."
        rest = key.removeprefix(tower)
        if rest != key and rest.startswith(("embeddings.", "encoder.", "final_layer")):
            return tower + text_names.PREFIX + rest
    if key.startswith(vae_names.ORIGINAL_PREFIX):
        return vae_names.modern_original(key)
    return key


def match_tree(
    component: str, entries: list[Entry], tree: Mapping[str, Any], where: str
) -> list[tuple[Entry, Any]]:
    """Matches a nested dict of arrays with the leaves of one component."""
    found = dict(_flatten(tree))
    pairs = [(entry.path, entry) for entry in entries]
    _account(found, pairs, lambda path: False, f"{where}, {component}")
    for entry in entries:
        shape = tuple(found[entry.path].shape)
        if shape != entry.leaf_shape:
            name = "/".join(entry.path)
            raise SdjaxError(
                f"{where}, {component}: {name} has the shape {shape}, "
                f"the model's config needs {entry.leaf_shape}"
            )
    return [(entry, found[entry.path]) for entry in entries]


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _flatten(value, (*path, name))
    else:
        yield path, tree


def _same(key: str) -> str:
    return key


def _without_text_prefix(key: str) -> str:
    return key.removeprefix(text_names.PREFIX)


def _renamed(
    tensors: Mapping[str, Tensor], rename: Callable[[str], str], where: str
) -> dict[str, Tensor]:
    """The tensors under today's names; two under one name are an error."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = rename(key)
        if name in result:
            raise SdjaxError(f"{where} holds {name!r:.120} in two spellings")
        result[name] = tensor
    return result


def _account(
    found: Mapping[Any, Any],
    wanted: list[tuple[Any, Entry]],
    is_ignored: Callable[[Any], bool],
    where: str,
) -> list[Any]:
    """Demands that found = wanted + ignored; returns the ignored keys."""
    needed = {key for key, _ in wanted}
    missing = sorted(needed - set(found))
    rest = sorted(set(found) - needed)
    ignored = [key for key in rest if is_ignored(key)]
    unused = [key for key in rest if not is_ignored(key)]
    complaints = []
    if missing:
        complaints.append(f"lacks {len(missing)} tensors: {_first(missing)}")
    if unused:
        complaints.append(f"has {len(unused)} unknown tensors: {_first(unused)}")
    if complaints:
        raise SdjaxError(f"{where} {', and '.join(complaints)}")
    return ignored


def _first(keys: list[Any]) -> str:
    """The first ten names, on one line."""
    names = ["/".join(k) if isinstance(k, tuple) else repr(k)[1:-1] for k in keys[:10]]
    return ", ".join(name[:120] for name in names) + (", ..." if len(keys) > 10 else "")


def _original(
    found: Mapping[str, Tensor], key: str, entry: Entry, where: str
) -> Source:
    """A leaf that is an original array, or a third of it."""
    tensor = _fit(found[key], entry.original_shape, key, where)
    if entry.form == "packed":
        tensor = tensor.third(entry.part)
    return Source(entry, tensor, entry.form == "transposed")


def _fit(tensor: Tensor, shape: tuple[int, ...], key: str, where: str) -> Tensor:
    """Checks a tensor's shape; trailing axes of one do not matter."""
    if _squeezed(tensor.shape) != _squeezed(shape):
        raise SdjaxError(
            f"{where}: {key} has the shape {tensor.shape}, the config needs {shape}"
        )
    return tensor


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end and shape[end - 1] == 1:
        end -= 1
    return shape[:end]
