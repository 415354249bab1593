"""The networks, and the shapes and initial values of their parameters."""

from sdjax.models.class_embedder import ClassEmbedder
from sdjax.models.clip import CLIPTextEncoder, TextStates
from sdjax.models.parameters import abstract_params, init_params
from sdjax.models.quantizer import Codes
from sdjax.models.unet import UNet
from sdjax.models.vae import Autoencoder, Posterior

__all__ = [
    "Autoencoder",
    "CLIPTextEncoder",
    "ClassEmbedder",
    "Codes",
    "Posterior",
    "TextStates",
    "UNet",
    "abstract_params",
    "init_params",
]
