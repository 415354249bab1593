"""The networks, and the shapes and initial values of their parameters."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdjax.config import ModelConfig, UNetConfig
from sdjax.models.clip import CLIPTextEncoder, TextStates
from sdjax.models.unet import UNet
from sdjax.models.vae import Autoencoder, Posterior
from sdjax.typing import Conditioning, Params, PRNGKey

__all__ = [
    "Autoencoder",
    "CLIPTextEncoder",
    "Posterior",
    "TextStates",
    "UNet",
    "abstract_params",
    "init_params",
]


def abstract_params(config: ModelConfig) -> Params:
    """Gives the shape of every parameter, float32, without making any.

    The result is {component: tree of jax.ShapeDtypeStruct}, plain dicts, components
    named as in `ModelConfig`; text towers that the model lacks are absent.
    """
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def init_params(config: ModelConfig, key: PRNGKey) -> Params:
    """Draws initial parameters, float32, in the layout of `abstract_params`."""
    image = jnp.zeros((1, *2 * [config.vae.downsample_factor], config.vae.in_channels))
    x, t, conditioning = _unet_inputs(config.unet)
    components: dict[str, tuple[nn.Module, tuple]] = {
        "unet": (UNet(config.unet), (x, t, conditioning)),
        "vae": (Autoencoder(config.vae), (image, key)),
    }
    for name, tower in config.text_encoders.items():
        components[name] = CLIPTextEncoder(tower), (jnp.zeros((1, 1), jnp.int32),)
    keys = jax.random.split(key, len(components))
    return {
        name: module.init(key, *inputs)["params"]
        for key, (name, (module, inputs)) in zip(
            keys, sorted(components.items()), strict=True
        )
    }


def _unet_inputs(config: UNetConfig) -> tuple[jax.Array, jax.Array, Conditioning]:
    """The smallest inputs that a U-Net takes."""
    vector = None
    if config.vector == "class_embedding":
        vector = jnp.zeros(1, jnp.int32)
    elif config.vector_dim is not None:
        vector = jnp.zeros((1, config.vector_dim))
    has_text = any((*config.transformer_depth, config.mid_transformer_depth))
    conditioning = Conditioning(
        context=jnp.zeros((1, 1, config.context_dim)) if has_text else None,
        vector=vector,
        guidance=jnp.zeros((1, config.guidance_dim)) if config.guidance_dim else None,
    )
    return jnp.zeros((1, 8, 8, config.in_channels)), jnp.zeros(1), conditioning
