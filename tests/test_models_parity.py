"""The networks against diffusers and transformers, with tiny random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from torch_params import (
    to_params,
    torch_autoencoder,
    torch_text_encoder,
    torch_unet,
)

from sdjax.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from sdjax.models import Autoencoder, CLIPTextEncoder, UNet
from sdjax.models.layers import sinusoidal_embedding
from sdjax.typing import Conditioning

pytestmark = pytest.mark.parity

SD1 = UNetConfig(
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    transformer_depth=(1, 1, 0),
    num_heads=(4, 4, 4),
    context_dim=24,
    cross_attention_only=(False,) * 3,
)
SD2 = dataclasses.replace(SD1, num_heads=(1, 2, 2), linear_projection=True)
UNETS = {
    "sd1": SD1,
    "sd1_two_layers": dataclasses.replace(
        SD1, layers_per_block=2, transformer_depth=(1, 1, 1)
    ),
    "sd2": SD2,
    "inpainting": dataclasses.replace(SD1, in_channels=9),
    "depth": dataclasses.replace(SD2, in_channels=5),
    "unclip": dataclasses.replace(SD2, vector="class_projection", vector_dim=12),
    "x4": dataclasses.replace(
        SD2,
        in_channels=7,
        transformer_depth=(0, 1, 1),
        cross_attention_only=(True, True, False),
        vector="class_embedding",
        vector_dim=50,
    ),
    "sdxl": UNetConfig(
        block_out_channels=(32, 64, 64),
        transformer_depth=(0, 2, 3),
        mid_transformer_depth=3,
        num_heads=(1, 2, 2),
        context_dim=24,
        linear_projection=True,
        cross_attention_only=(False,) * 3,
        vector="add_embedding",
        vector_dim=16 + 6 * 8,
    ),
    "refiner": UNetConfig(
        block_out_channels=(32, 64, 64, 64),
        transformer_depth=(0, 2, 2, 0),
        mid_transformer_depth=2,
        num_heads=(1, 2, 2, 2),
        context_dim=24,
        linear_projection=True,
        vector="add_embedding",
        vector_dim=16 + 5 * 8,
    ),
    "lcm": dataclasses.replace(SD1, guidance_dim=16),
}


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error < tolerance


def unet_case(config, size, batch=2):
    """Inputs of a U-Net, and diffusers' keyword arguments for the same."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    extra = config.in_channels - 4
    given = {"context": normal(batch, 7, config.context_dim)}
    theirs = {"encoder_hidden_states": torch.tensor(given["context"])}
    if extra:
        given["concat"] = normal(batch, *size, extra)
    if config.guidance_dim:
        given["guidance"] = normal(batch, config.guidance_dim)
        theirs["timestep_cond"] = torch.tensor(given["guidance"])
    if config.vector == "class_embedding":
        given["vector"] = np.array([3, 41], np.int32)
        theirs["class_labels"] = torch.tensor(given["vector"])
    if config.vector == "class_projection":
        given["vector"] = normal(batch, config.vector_dim)
        theirs["class_labels"] = torch.tensor(given["vector"])
    if config.vector == "add_embedding":
        pooled, sizes = normal(batch, 16), rng.integers(0, 1024, (batch, 6))
        sizes = sizes[:, : (config.vector_dim - 16) // 8].astype(np.float32)
        embedded = sinusoidal_embedding(jnp.asarray(sizes), 8).reshape(batch, -1)
        given["vector"] = np.concatenate([pooled, embedded], axis=-1)
        added = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(sizes)}
        theirs["added_cond_kwargs"] = added
    x, t = normal(batch, *size, 4), np.array([981.0, 3.5], np.float32)
    return x, t, Conditioning(**given), theirs


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    config = UNETS[name]
    reference = torch_unet(config)
    params = to_params(reference)
    sizes = ((9, 14), (8, 8)) if name in ("sd1", "sd2", "sdxl") else ((9, 14),)
    for size in sizes:
        x, t, conditioning, theirs = unet_case(config, size)
        inputs = x
        if conditioning.concat is not None:
            inputs = np.concatenate([x, conditioning.concat], axis=-1)
        with torch.no_grad():
            expected = reference(nchw(inputs), torch.tensor(t), **theirs).sample
        apply = jax.jit(UNet(config).apply)
        out = apply({"params": params}, x, t, conditioning)
        assert_close(out, nhwc(expected))


def test_unet_residuals():
    config, size = SD1, (8, 16)
    reference = torch_unet(config)
    x, t, conditioning, theirs = unet_case(config, size)
    rng = np.random.default_rng(1)
    shapes = [(8, 16, 32)] * 2 + [(4, 8, 32), (4, 8, 64)] + [(2, 4, 64)] * 3
    residuals = tuple(rng.standard_normal((2, *s), np.float32) for s in shapes)
    with torch.no_grad():
        expected = reference(
            nchw(x),
            torch.tensor(t),
            down_block_additional_residuals=tuple(map(nchw, residuals[:-1])),
            mid_block_additional_residual=nchw(residuals[-1]),
            **theirs,
        ).sample
    conditioning = conditioning._replace(residuals=residuals)
    apply = jax.jit(UNet(config).apply)
    out = apply({"params": to_params(reference)}, x, t, conditioning)
    assert_close(out, nhwc(expected))


VAES = {
    "f4": AutoencoderConfig(
        latent_channels=3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        attention_levels=(False,) * 3,
    ),
    "f8": AutoencoderConfig(
        block_out_channels=(32, 32, 64, 64), attention_levels=(False,) * 4
    ),
    "f16": AutoencoderConfig(
        latent_channels=16,
        block_out_channels=(32, 32, 32, 32, 64),
        layers_per_block=1,
        attention_levels=(False, False, False, True, True),
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_autoencoder(name):
    config = VAES[name]
    reference, module = torch_autoencoder(config), Autoencoder(config)
    params = {"params": to_params(reference)}
    rng = np.random.default_rng(0)
    for size in ((32, 32), (50, 39)):
        images = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            posterior = reference.encode(nchw(images)).latent_dist
            decoded = reference.decode(posterior.mean).sample
        ours = jax.jit(lambda p, x: module.apply(p, x, method="encode"))(params, images)
        assert_close(ours.mean, nhwc(posterior.mean))
        assert_close(ours.logvar, nhwc(posterior.logvar))
        assert_close(ours.kl(), posterior.kl().numpy())
        decode = jax.jit(lambda p, z: module.apply(p, z, method="decode"))
        assert_close(decode(params, nhwc(posterior.mean)), nhwc(decoded))


TOWER = TextEncoderConfig(
    vocab_size=200,
    width=32,
    num_layers=3,
    num_heads=4,
    mlp_dim=64,
    max_length=77,
    eos_token_id=199,
    pad_token_id=199,
)
BIG = dataclasses.replace(TOWER, activation="gelu", projection_dim=24, pad_token_id=0)
SKIPPED = {"states": "penultimate", "final_norm": False}
# config, clip_skip, index into transformers' hidden states, final norm
TOWERS = {
    "sd1": (TOWER, 0, -1, True),
    "sd1_clip_skip": (TOWER, 1, -2, True),
    "sd2": (dataclasses.replace(TOWER, activation="gelu"), 0, -1, True),
    "sdxl": (dataclasses.replace(TOWER, **SKIPPED), 0, -2, False),
    "sdxl_2": (dataclasses.replace(BIG, **SKIPPED), 0, -2, False),
    "sdxl_2_clip_skip": (dataclasses.replace(BIG, **SKIPPED), 1, -3, False),
    "old_eos": (dataclasses.replace(BIG, eos_token_id=2), 0, -1, True),
}


@pytest.mark.parametrize("name", TOWERS)
def test_text_encoder(name):
    config, clip_skip, index, norm = TOWERS[name]
    reference = torch_text_encoder(config)
    params = {"params": to_params(reference)}
    tokens = np.random.default_rng(0).integers(3, 198, (3, 77)).astype(np.int32)
    tokens[:, 0] = 198
    for row, end in enumerate((1, 20, 76)):
        tokens[row, end] = 199
        tokens[row, end + 1 :] = config.pad_token_id
    for length in (77, 23):
        ids = tokens[:2, :length]
        with torch.no_grad():
            out = reference(torch.tensor(ids), output_hidden_states=True)
            states = out.hidden_states[index]
            tower = getattr(reference, "text_model", reference)
            states = tower.final_layer_norm(states) if norm else states
        pooled = out.text_embeds if config.projection_dim else out.pooler_output
        apply = jax.jit(CLIPTextEncoder(config).apply, static_argnames="clip_skip")
        ours = apply(params, ids, clip_skip=clip_skip)
        assert_close(ours.states, states.numpy())
        assert_close(ours.pooled, pooled.numpy())
