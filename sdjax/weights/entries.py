"""One leaf under its three names: sdjax path, diffusers key, original key.

A name table is a generator of `Entry`; `unet_names`, `vae_names` and `text_names` hold
one each. Torch layouts end here: conv OIHW <-> HWIO, linear [out, in] <-> [in, out].
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["conv", "linear", "norm", "embedding", "bias"]
Form = Literal["same", "pointwise", "conv1d", "transposed", "packed", "by_head"]

_LEAF = {
    "conv": "kernel",
    "linear": "kernel",
    "norm": "scale",
    "embedding": "embedding",
    "bias": "bias",
}


class Entry(NamedTuple):
    """One leaf.

    Attributes:
        key: name in a diffusers folder (text towers: without "text_model.").
        original: name in a single file, without the component's prefix.
        shape: in torch's layout, as in a diffusers folder.
        kind: what decides the layout and the leaf's name.
        form: how the original array differs: "pointwise" has two trailing axes of
            one, "conv1d" has one, "transposed" is [in, out], "packed" is a third of q,
            k and v, "by_head" the same where each head has its own three.
        part: which third.
        heads: how many, in the form "by_head".
    """

    key: str
    original: str
    shape: tuple[int, ...]
    kind: Kind
    form: Form = "same"
    part: int = 0
    heads: int = 1

    @property
    def path(self) -> tuple[str, ...]:
        """Where the leaf is in the parameter tree."""
        *names, _ = self.key.split(".")
        path: list[str] = []
        for name in names:
            if name.isdigit():
                path[-1] += f"_{name}"
            else:
                path.append(name)
        return *path, _LEAF[self.kind]

    @property
    def original_shape(self) -> tuple[int, ...]:
        """Shape of the original array that this leaf is, or is a third of."""
        if self.form == "pointwise":
            return *self.shape, 1, 1
        if self.form == "conv1d":
            return *self.shape, 1
        if self.form == "by_head":
            return 3 * self.shape[0], *self.shape[1:], *(1,) * (len(self.shape) - 1)
        if self.form == "transposed":
            return self.shape[::-1]
        if self.form == "packed":
            return 3 * self.shape[0], *self.shape[1:]
        return self.shape

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape in the parameter tree."""
        if self.kind == "conv":
            out, in_, height, width = self.shape
            return height, width, in_, out
        return self.shape[::-1] if self.kind == "linear" else self.shape


def to_leaf(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Torch's layout to ours."""
    if entry.kind == "conv":
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))  # [H, W, I, O]
    if entry.kind == "linear":
        return np.ascontiguousarray(array.T)  # [I, O]
    return array


def from_leaf(entry: Entry, leaf: np.ndarray) -> np.ndarray:
    """Our layout to torch's."""
    if entry.kind == "conv":
        return np.ascontiguousarray(leaf.transpose(3, 2, 0, 1))  # [O, I, H, W]
    if entry.kind == "linear":
        return np.ascontiguousarray(leaf.T)  # [O, I]
    return leaf


def unpack_heads(entry: Entry, array: np.ndarray) -> np.ndarray:
    """One of q, k and v out of an original array whose rows are [head, 3, size]."""
    rows, *rest = entry.shape
    array = array.reshape(entry.heads, 3, rows // entry.heads, *rest)
    return np.ascontiguousarray(array[:, entry.part].reshape(entry.shape))


def pack_heads(entry: Entry, parts: list[np.ndarray]) -> np.ndarray:
    """The original array of q, k and v, given in this order."""
    rows, *rest = entry.shape
    split = [p.reshape(entry.heads, rows // entry.heads, *rest) for p in parts]
    return np.stack(split, axis=1).reshape(entry.original_shape)


class Site(NamedTuple):
    """A module's two names, to hang submodules on."""

    key: str
    original: str

    def at(self, key: str, original: str | None = None) -> "Site":
        """The submodule `key`; `original` where the original name differs."""
        other = key if original is None else original
        return Site(f"{self.key}{key}.", f"{self.original}{other}.")


ROOT = Site("", "")


def conv(site: Site, in_: int, out: int, size: int) -> Iterator[Entry]:
    """A square convolution with bias."""
    shape = (out, in_, size, size)
    yield Entry(f"{site.key}weight", f"{site.original}weight", shape, "conv")
    yield from bias(site, out)


def linear(
    site: Site, in_: int, out: int, *, has_bias: bool = True, form: Form = "same"
) -> Iterator[Entry]:
    """A linear layer."""
    names = f"{site.key}weight", f"{site.original}weight"
    yield Entry(*names, (out, in_), "linear", form)
    if has_bias:
        yield from bias(site, out)


def embedding(site: Site, rows: int, width: int) -> Iterator[Entry]:
    """A table of vectors."""
    names = f"{site.key}weight", f"{site.original}weight"
    yield Entry(*names, (rows, width), "embedding")


def norm(site: Site, width: int) -> Iterator[Entry]:
    """A group or layer norm."""
    yield Entry(f"{site.key}weight", f"{site.original}weight", (width,), "norm")
    yield from bias(site, width)


def bias(site: Site, width: int) -> Iterator[Entry]:
    """A bias alone."""
    yield Entry(f"{site.key}bias", f"{site.original}bias", (width,), "bias")
