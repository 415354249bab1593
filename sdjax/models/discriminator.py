"""The patch discriminator, which judges each patch of a picture by itself.

Isola et al. 2017, section 3.2, arXiv:1611.07004, in the form of taming-transformers
(Esser et al. 2021, arXiv:2012.09841). 4×4 convolutions; BatchNorm with ε = 1e-5;
leaky ReLU with slope 0.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.errors import SdjaxError
from sdjax.models.layers import FeatureMap
from sdjax.typing import Params

EPSILON = 1e-5
SLOPE = 0.2
MAX_WIDTH = 8
"""Channels of the widest layer, as a multiple of the first one's."""
DEVIATION = 0.02
LEAST_PATCHES = 3
"""Side of the map after the strided layers that leaves the last two a single patch."""
STREAM = 17
"""Keeps its random numbers apart from those of other draws from the same seed."""


class BatchNorm(nn.Module):
    """Batch normalisation by the batch at hand, with float32 statistics.

    Ioffe & Szegedy 2015, arXiv:1502.03167. No running averages are kept: nothing ever
    reads them, because a discriminator is only run in training. Under `jit` with a
    sharded batch the statistics are those of the whole batch; under `shard_map` or
    `pmap` they would be each shard's own.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Normalises each channel over batch, height and width."""
        C = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        h = x.astype(jnp.float32)
        h = h - h.mean(axis=(0, 1, 2), keepdims=True)
        variance = jnp.square(h).mean(axis=(0, 1, 2), keepdims=True)
        h = h * jax.lax.rsqrt(variance + EPSILON) * scale.reshape(1, 1, 1, C)
        return (h + bias.reshape(1, 1, 1, C)).astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """Strided convolutions that double the width, then two of stride 1.

    Layers are named by their index in the original's `main`.

    Attributes:
        num_layers: strided layers; the patch has 70 pixels with 3, 34 with 2.
        channels: of the first layer.
    """

    num_layers: int = 3
    channels: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b h w 1"]:
        """Maps images in [−1, 1] to logits, positive where a patch looks true.

        Raises:
            SdjaxError: if a side of the images is too short for a single patch.
        """
        _, H, W, _ = images.shape
        least = LEAST_PATCHES * 2**self.num_layers
        if min(H, W) < least:
            raise SdjaxError(
                f"the discriminator with {self.num_layers} layers needs pictures of at "
                f"least {least} pixels a side, not {H}×{W}"
            )
        conv = functools.partial(
            nn.Conv, kernel_size=(4, 4), padding=1, dtype=self.dtype
        )
        h = conv(self.channels, strides=2, name="main_0")(images)
        for i in range(1, self.num_layers + 1):
            h = conv(
                self.channels * min(2**i, MAX_WIDTH),
                strides=2 if i < self.num_layers else 1,
                use_bias=False,  # the norm's takes its place
                name=f"main_{3 * i - 1}",
            )(nn.leaky_relu(h, SLOPE))
            h = BatchNorm(self.dtype, name=f"main_{3 * i}")(h)
        logits = conv(1, name=f"main_{3 * self.num_layers + 2}")(
            nn.leaky_relu(h, SLOPE)
        )
        return logits.astype(jnp.float32)


def init_discriminator(
    seed: int, *, num_layers: int = 3, image_channels: int = 3
) -> Params:
    """Draws a discriminator's parameters, float32, on the host as `init_params` does.

    Kernels are N(0, 0.02), norms' scales N(1, 0.02), biases zero.
    """
    side = LEAST_PATCHES * 2**num_layers
    images = jax.ShapeDtypeStruct((1, side, side, image_channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(PatchDiscriminator(num_layers).init, key, images)
    generator = np.random.default_rng([seed, STREAM])

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        if kind == "bias":
            return jnp.asarray(np.zeros(leaf.shape, np.float32))
        values = DEVIATION * generator.standard_normal(leaf.shape)
        return jnp.asarray((values + (kind == "scale")).astype(np.float32))

    return jax.tree.map_with_path(draw, shapes["params"])
