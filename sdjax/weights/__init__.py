"""Checkpoints in and out: diffusers folders, single files, Orbax folders.

Torch's layouts and names exist here and nowhere else. Loading never runs code from a
file.
"""

from sdjax.weights.autoencoder_folder import read_autoencoder, write_autoencoder
from sdjax.weights.describe import Description, describe
from sdjax.weights.files import Format, detect
from sdjax.weights.read import Checkpoint, read
from sdjax.weights.write import check_destination, write

__all__ = [
    "Checkpoint",
    "Description",
    "Format",
    "check_destination",
    "describe",
    "detect",
    "read",
    "read_autoencoder",
    "write",
    "write_autoencoder",
]
