"""An autoencoder on its own, as the first phase of training leaves it.

    vae/config.json                             as in a diffusers folder
    vae/diffusion_pytorch_model.safetensors

It is what a folder of diffusers has under that name, and diffusers reads it.
"""

import json
from pathlib import Path

import jax

from sdjax.config import AutoencoderConfig
from sdjax.typing import Params
from sdjax.weights import layout, vae_names
from sdjax.weights.files import component_tensors, is_remote
from sdjax.weights.folder_config import read_vae
from sdjax.weights.folder_write import weights_stem, write_vae
from sdjax.weights.json_file import Fields, read_json
from sdjax.weights.read import as_dtype, nest, put_leaf, read
from sdjax.weights.write import (
    SHARD_SIZE,
    beside,
    check_destination,
    folder_tensor,
    write_bytes,
    write_component,
)


def read_autoencoder(path: str | Path) -> tuple[AutoencoderConfig, Params]:
    """Reads the autoencoder of a model, or one that stands alone, as float32.

    Args:
        path: as `sdjax.load` takes it, or a folder that `write_autoencoder` wrote.

    Raises:
        SdjaxError: if there is no autoencoder, or it is damaged.
    """
    folder = Path(path) / "vae"
    if is_remote(path) or not (folder / "config.json").is_file():
        checkpoint = read(path, dtype="float32", needs_tokenizers=False)
        return checkpoint.config.vae, checkpoint.params["vae"]
    config = read_vae(Fields(read_json(folder / "config.json"), folder / "config.json"))
    tensors, _ = component_tensors(folder.parent, "vae", None)
    entries = list(vae_names.vae_entries(config))
    sources = layout.match_folder("vae", entries, tensors, str(folder))
    dtype = as_dtype("float32")
    return config, nest(
        (
            source.entry.path,
            put_leaf(source.read(), source.entry.key, folder, dtype, jax.device_put),
        )
        for source in sources
    )


def write_autoencoder(
    path: str | Path, config: AutoencoderConfig, params: Params, *, sample_size: int
) -> None:
    """Writes an autoencoder whole or not at all; never over what is there.

    Args:
        path: of a new folder.
        config: describes `params`.
        params: its tree, in the layout of `sdjax.models.Autoencoder`.
        sample_size: side in pixels of the pictures that it learned from.

    Raises:
        SdjaxError: if the path exists, the disk is full, or `params` does not fit.
    """
    check_destination(path, "diffusers")
    entries = list(vae_names.vae_entries(config))
    pairs = layout.match_tree("vae", entries, params, "params")
    text = json.dumps(write_vae(config, sample_size), indent=2) + "\n"
    with beside(Path(path)) as place:
        write_bytes(place / "vae" / "config.json", text.encode())
        tensors = [folder_tensor("vae", entry, leaf, None) for entry, leaf in pairs]
        write_component(place / "vae", weights_stem("vae"), tensors, SHARD_SIZE)
