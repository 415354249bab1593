"""Rematerialisation: the same numbers, and less kept for the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import AutoencoderConfig, ModelConfig, UNetConfig
from sdjax.models import Autoencoder, UNet, abstract_params
from sdjax.typing import Conditioning

UNET = UNetConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    transformer_depth=(1, 0),
    num_heads=(2, 2),
    context_dim=12,
    cross_attention_only=(False, False),
)
PLAIN = dataclasses.replace(UNET, plain_attention=True, resnet_resampling=True)
VAE = AutoencoderConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    attention_levels=(False, True),
    codebook_size=30,
)


def draw(tree, seed=0):
    rng = np.random.default_rng(seed)
    values = lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32)
    return jax.tree.map(values, tree)


def unet_loss(config, batch=2, side=16):
    params = abstract_params(ModelConfig(unet=config), {"unet"})["unet"]
    context = None if config.plain_attention else jnp.ones((batch, 3, 12))
    x = draw(jax.ShapeDtypeStruct((batch, side, side, 4), np.float32), 1)

    def loss(params, remat):
        inputs = x, jnp.full(batch, 500.0), Conditioning(context)
        out = UNet(config, remat=remat).apply({"params": params}, *inputs)
        return jnp.square(out - 1).mean()

    return loss, params


def vae_loss(config, batch=2, side=32):
    params = abstract_params(ModelConfig(vae=config), {"vae"})["vae"]
    images = draw(jax.ShapeDtypeStruct((batch, side, side, 3), np.float32), 1)

    def loss(params, remat):
        module = Autoencoder(config, remat=remat)
        return jnp.square(module.apply({"params": params}, images) - images).mean()

    return loss, params


CASES = {
    "unet": lambda: unet_loss(UNET),
    "plain": lambda: unet_loss(PLAIN),
    "vae": lambda: vae_loss(VAE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_same_values_and_gradients(name):
    loss, shapes = CASES[name]()
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    params = draw(shapes)
    plain, gradient = run(params, False)
    again, same = run(params, True)
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert scale > 0
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
    jax.tree.map(close, same, gradient)


@pytest.mark.parametrize("name", CASES)
def test_less_is_kept_for_the_gradient(name):
    # XLA's CPU compiler undoes rematerialisation, so what counts is what the forward
    # pass hands to the backward one: the leaves of the pulled-back function.
    loss, shapes = CASES[name]()

    def kept(remat):
        pullback = lambda params: jax.vjp(lambda p: loss(p, remat), params)[1]
        leaves = jax.tree.leaves(jax.eval_shape(pullback, shapes))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert kept(True) - parameters < 0.25 * (kept(False) - parameters)
