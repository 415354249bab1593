"""LPIPS: how different two pictures look, as the features of VGG16 tell it.

d = Σ_l mean_hw Σ_c w_lc (ŷ_lc − ŷ'_lc)², ŷ the features of layer l, of unit length over
the channels. Zhang et al. 2018, eq. 1, arXiv:1801.03924; VGG16: Simonyan & Zisserman
2015, arXiv:1409.1556.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.errors import SdjaxError
from sdjax.models.layers import FeatureMap
from sdjax.typing import Params

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and number of convolutions, per stage; between stages the size halves."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
LEAST_SIDE = 2 ** (len(STAGES) - 1)


class LPIPS(nn.Module):
    """The distance; its parameters are given, not learned.

    Convolutions are named by torchvision's index (`features_0`, …), the weights w_l
    of the layers `lin0` … `lin4`.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b height width 3"],
        others: Float[Array, "b height width 3"],
    ) -> Float[Array, " b"]:
        """Compares pictures in [−1, 1]; 0 where they are the same.

        Raises:
            SdjaxError: if a side is shorter than 16 pixels.
        """
        B, H, W, _ = images.shape
        if min(H, W) < LEAST_SIDE:
            raise SdjaxError(
                f"the perceptual loss needs pictures of at least {LEAST_SIDE} pixels "
                f"a side, not {H}×{W}"
            )
        h = jnp.concatenate([images, others])  # [2B, H, W, 3]
        h = (h - jnp.reshape(jnp.array(SHIFT), (1, 1, 1, 3))) / jnp.reshape(
            jnp.array(SCALE), (1, 1, 1, 3)
        )
        total = jnp.zeros(B)
        index = 0
        for stage, (width, count) in enumerate(STAGES):
            if stage:
                h = nn.max_pool(h, (2, 2), (2, 2))  # [2B, H/2, W/2, C]
                index += 1
            for _ in range(count):
                h = nn.relu(
                    nn.Conv(
                        width,
                        (3, 3),
                        padding=1,
                        dtype=self.dtype,
                        name=f"features_{index}",
                    )(h)
                )
                index += 2
            ours, theirs = jnp.split(unit_length(h.astype(jnp.float32)), 2)
            weigh = nn.Conv(1, (1, 1), use_bias=False, name=f"lin{stage}")
            total += weigh(jnp.square(ours - theirs)).mean(axis=(1, 2, 3))
        return total


def abstract_lpips() -> Params:
    """Gives the shape of every parameter of LPIPS, float32."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, LEAST_SIDE, LEAST_SIDE, 3), jnp.float32)
    return jax.eval_shape(LPIPS().init, key, images, images)["params"]


def unit_length(x: FeatureMap) -> FeatureMap:
    """Divides by the norm over the channels; zero stays zero, also backwards."""
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    # √ has no slope at 0, where every feature of a pixel is off.
    is_zero = squares == 0
    length = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares)))
    return x / (length + EPSILON)
