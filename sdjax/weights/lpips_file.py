"""The weights of LPIPS from torch's files.

They come in three shapes: torchvision's VGG16 beside the few weights of the `lpips`
package, one state dict of that package, or an original-layout autoencoder checkpoint,
whose loss holds them.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import SdjaxError
from sdjax.models.lpips import abstract_lpips
from sdjax.typing import Params
from sdjax.weights.files import open_file
from sdjax.weights.read import is_finite
from sdjax.weights.tensors import Tensor

_CONV = re.compile(r"(?:.*\.)?(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"(?:.*\.)?lin(?:s\.)?(\d)\.model\.1\.weight")
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def read_lpips(path: str | Path) -> Params:
    """Reads LPIPS's parameters, float32, from a file or from a folder of files.

    What the files hold besides (VGG16's classifier, an autoencoder) is passed over.

    Raises:
        SdjaxError: if a file is malformed, a weight is missing, of another shape or
            not finite.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for file in _files(Path(path)):
        for key, tensor in open_file(file).tensors.items():
            leaf = _leaf(key)
            if leaf is not None:
                # The lpips package lists its linear layers twice; first come.
                found.setdefault(leaf, tensor)
    shapes = abstract_lpips()
    params: dict[str, Any] = {}
    for name, leaves in shapes.items():
        params[name] = {
            kind: _read(found, name, kind, leaf.shape, path)
            for kind, leaf in leaves.items()
        }
    return params


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise SdjaxError(
            f"{place} has no file that ends in {', '.join(SUFFIXES)}: give VGG16's "
            "weights and those of lpips"
        )
    return files


def _leaf(key: str) -> tuple[str, str] | None:
    """Where a tensor belongs, or None."""
    match = _CONV.fullmatch(key)
    if match:
        kind = {"weight": "kernel", "bias": "bias"}[match[2]]
        return f"features_{match[1]}", kind
    match = _LINEAR.fullmatch(key)
    return (f"lin{match[1]}", "kernel") if match else None


def _read(
    found: dict[tuple[str, str], Tensor],
    name: str,
    kind: str,
    shape: tuple[int, ...],
    path: str | Path,
) -> jax.Array:
    tensor = found.get((name, kind))
    if tensor is None:
        what = "lpips's linear layers" if name.startswith("lin") else "VGG16"
        raise SdjaxError(
            f"{path} lacks {name.replace('_', '.')} of {what}: LPIPS needs VGG16's "
            "features and lpips's linear layers, in one file or in a folder"
        )
    in_torch = shape if kind == "bias" else (shape[3], shape[2], *shape[:2])
    if tensor.shape != in_torch:
        raise SdjaxError(
            f"{tensor.file}: {name} has the shape {tensor.shape}, VGG16's LPIPS "
            f"{in_torch}"
        )
    array = tensor.read().astype(np.float32)
    if not is_finite(array):
        raise SdjaxError(f"{tensor.file}: {name} is NaN or infinite somewhere")
    return jnp.asarray(array if kind == "bias" else array.transpose(2, 3, 1, 0))
