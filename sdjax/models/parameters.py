"""The parameters of a whole model: their shapes, and random initial values."""

import math
import re
import zlib
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, PyTree

from sdjax.config import ModelConfig, UNetConfig
from sdjax.models.class_embedder import ClassEmbedder
from sdjax.models.clip import CLIPTextEncoder
from sdjax.models.conditioning import takes_context
from sdjax.models.unet import UNet
from sdjax.models.vae import Autoencoder
from sdjax.typing import Conditioning, Params, PRNGKey

# What the reference draws as zero, so that every res block, attention and the whole
# U-Net begin as nothing added: openaimodel.py and attention.py of latent-diffusion.
_ZERO = re.compile(
    r"(.*/)?(resnets|downsamplers|upsamplers)_\d+/conv2"
    r"|.*/attentions_\d+/(proj_out|to_out_0)|conv_out"
)


def abstract_params(
    config: ModelConfig, components: Collection[str] | None = None
) -> Params:
    """Gives the shape of every parameter, float32, without making any.

    Args:
        config: of the whole model.
        components: those that are wanted; None: all that the model has.

    Returns:
        {component: tree of jax.ShapeDtypeStruct}, plain dicts, components named as in
        `ModelConfig`; what the model lacks is absent.
    """
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    modules: dict[str, tuple[nn.Module, tuple]] = {
        "unet": (UNet(config.unet), _unet_inputs(config.unet)),
        "vae": (Autoencoder(config.vae), (_floats(1, 32, 32, config.vae.in_channels),)),
    }
    for name, tower in config.text_encoders.items():
        modules[name] = CLIPTextEncoder(tower), (integers(1, 1),)
    if config.class_embedder is not None:
        embedder = ClassEmbedder(config.class_embedder)
        modules["class_embedder"] = embedder, (integers(1),)
    return {
        name: _shapes(module, *inputs)
        for name, (module, inputs) in modules.items()
        if components is None or name in components
    }


def init_params(
    config: ModelConfig, key: PRNGKey, components: Collection[str] | None = None
) -> Params:
    """Draws initial parameters, float32, in the layout of `abstract_params`.

    Kernels are normal with variance 1 / inputs (LeCun et al. 1998), embeddings with
    deviation 0.02 (CLIP), of classes 1; codebooks are uniform within ±1 / their size;
    norms start as the identity and biases at zero. Zero, too, are the last layer of the
    U-Net and of each of its res blocks and attentions, as in latent-diffusion, so that
    the U-Net begins by predicting zero. `key` must be concrete: the values are drawn on
    the host, leaf by leaf, because XLA takes most of a minute to compile a generator
    for each. A component is the same whichever others are drawn.
    """
    seed = np.asarray(jax.random.key_data(key)).tolist()
    params = {}
    for name, shapes in abstract_params(config, components).items():
        # Its name tells a component's generator from the others'.
        generator = np.random.default_rng([zlib.crc32(name.encode()), *seed])
        params[name] = jax.tree.map_with_path(partial(_draw, generator, name), shapes)
    return params


def _draw(
    generator: np.random.Generator,
    component: str,
    path: tuple,
    leaf: jax.ShapeDtypeStruct,
) -> Array:
    *parents, kind = (key.key for key in path)
    module = "/".join(parents)
    if kind == "scale":
        return jnp.asarray(np.ones(leaf.shape, np.float32))
    if kind == "bias" or (component == "unet" and _ZERO.fullmatch(module)):
        return jnp.asarray(np.zeros(leaf.shape, np.float32))
    if module == "quantize/embedding":
        values = generator.uniform(-1, 1, leaf.shape) / leaf.shape[0]
        return jnp.asarray(values.astype(np.float32))
    deviation = math.prod(leaf.shape[:-1]) ** -0.5
    if kind == "embedding":
        deviation = 1.0 if component == "class_embedder" else 0.02
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
    side = 2 ** (len(config.block_out_channels) - 1)  # what any kind of halving takes
    return _floats(1, side, side, config.in_channels), _floats(1), conditioning


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
