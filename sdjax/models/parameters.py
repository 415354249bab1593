"""The parameters of a whole model: their shapes, and random initial values."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, PyTree

from sdjax.config import ModelConfig, UNetConfig
from sdjax.models.clip import CLIPTextEncoder
from sdjax.models.conditioning import takes_context
from sdjax.models.unet import UNet
from sdjax.models.vae import Autoencoder
from sdjax.typing import Conditioning, Params, PRNGKey


def abstract_params(config: ModelConfig) -> Params:
    """Gives the shape of every parameter, float32, without making any.

    The result is {component: tree of jax.ShapeDtypeStruct}, plain dicts, components
    named as in `ModelConfig`; text towers that the model lacks are absent.
    """
    unet, vae = UNet(config.unet), Autoencoder(config.vae)
    params = {
        "unet": _shapes(unet, *_unet_inputs(config.unet)),
        "vae": _shapes(vae, _floats(1, 32, 32, config.vae.in_channels)),
    }
    for name, tower in config.text_encoders.items():
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        params[name] = _shapes(CLIPTextEncoder(tower), tokens)
    return params


def init_params(config: ModelConfig, key: PRNGKey) -> Params:
    """Draws initial parameters, float32, in the layout of `abstract_params`.

    Kernels are normal with variance 1 / inputs (LeCun et al. 1998), embeddings with
    deviation 0.02 (CLIP); norms start as the identity and biases at zero. `key` must
    be concrete: the values are drawn on the host, leaf by leaf, because XLA takes
    most of a minute to compile a generator for each.
    """
    seed = np.asarray(jax.random.key_data(key)).tolist()
    params = {}
    for i, (name, shapes) in enumerate(sorted(abstract_params(config).items())):
        generator = np.random.default_rng([i, *seed])
        params[name] = jax.tree.map_with_path(partial(_draw, generator), shapes)
    return params


def _draw(
    generator: np.random.Generator, path: tuple, leaf: jax.ShapeDtypeStruct
) -> Array:
    kind = path[-1].key
    if kind == "scale":
        return jnp.asarray(np.ones(leaf.shape, np.float32))
    if kind == "bias":
        return jnp.asarray(np.zeros(leaf.shape, np.float32))
    deviation = 0.02 if kind == "embedding" else math.prod(leaf.shape[:-1]) ** -0.5
    values = generator.standard_normal(leaf.shape, np.float32)
    values *= np.float32(deviation)
    return jnp.asarray(values)


def _shapes(module: nn.Module, *inputs: PyTree) -> Params:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(module.init, key, *inputs)["params"]


def _unet_inputs(
    config: UNetConfig,
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
    """Gives inputs of the smallest shapes that a U-Net takes."""
    vector: Any = None
    guidance = context = None
    if config.vector == "class_embedding":
        vector = jax.ShapeDtypeStruct((1,), jnp.int32)
    elif config.vector_dim is not None:
        vector = _floats(1, config.vector_dim)
    if config.guidance_dim is not None:
        guidance = _floats(1, config.guidance_dim)
    if takes_context(config):
        context = _floats(1, 1, config.context_dim)
    conditioning = Conditioning(context, vector, guidance=guidance)
    return _floats(1, 8, 8, config.in_channels), _floats(1), conditioning


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
