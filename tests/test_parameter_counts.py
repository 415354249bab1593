"""Parameters and tensors of the published models, from their shapes alone."""

import dataclasses

import jax
import numpy as np
import pytest

from sdjax import presets
from sdjax.config import ModelConfig
from sdjax.models import Autoencoder, abstract_params, init_params

# Counted on diffusers' and transformers' models on the meta device.
UNETS = {
    "SD15": (859_520_964, 686),
    "SD15_INPAINTING": (859_535_364, 686),
    "SD15_IP2P": (859_532_484, 686),
    "SD2_BASE": (865_910_724, 686),
    "SD2": (865_910_724, 686),
    "SD2_INPAINTING": (865_925_124, 686),
    "SD2_DEPTH": (865_913_604, 686),
    "SD2_UNCLIP_H": (870_173_124, 690),
    "X4_UPSCALER": (473_398_020, 687),
    "SDXL_BASE": (2_567_463_684, 1680),
    "SDXL_INPAINTING": (2_567_478_084, 1680),
    "SDXL_REFINER": (2_259_526_660, 1220),
    "LCM_SD15": (859_602_884, 687),
    "LCM_SDXL": (2_567_545_604, 1681),
}
KL_F8 = {"encoder": 34_163_592, "decoder": 49_490_179, "convolutions": 92}
VAES = {
    "KL_F4": {"encoder": 22_351_238, "decoder": 32_960_771, "convolutions": 54},
    "KL_F8": KL_F8,
    "KL_F16": {"encoder": 28_265_760, "decoder": 41_343_875, "convolutions": 1_328},
    "KL_F32": {"encoder": 42_614_656, "decoder": 61_244_803, "convolutions": 20_672},
}
TINY_VAE = dataclasses.replace(
    presets.KL_F8, block_out_channels=(32,), attention_levels=(False,)
)


SMALL_UNET = dataclasses.replace(
    presets.SD15.unet,
    block_out_channels=(32,),
    transformer_depth=(1,),
    num_heads=(2,),
    cross_attention_only=(False,),
)


def count(tree):
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size for leaf in leaves), len(leaves)


# They differ from another one by one kernel.
SLOW = {
    "SD15_IP2P",
    "SD2",
    "SD2_INPAINTING",
    "SD2_DEPTH",
    "SDXL_INPAINTING",
    "LCM_SDXL",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in UNETS],
)
def test_unet(name):
    config = getattr(presets, name)
    config = ModelConfig(unet=config.unet, vae=TINY_VAE, text_encoder=None)
    assert count(abstract_params(config)["unet"]) == UNETS[name]


def test_every_preset_is_counted():
    models = {n for n, c in vars(presets).items() if isinstance(c, ModelConfig)}
    assert models == set(UNETS)


@pytest.mark.parametrize("name", VAES)
def test_autoencoder(name):
    module = Autoencoder(getattr(presets, name))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(module.init, key, images)["params"]
    convolutions = params["quant_conv"], params["post_quant_conv"]
    assert {
        "encoder": count(params["encoder"])[0],
        "decoder": count(params["decoder"])[0],
        "convolutions": count(convolutions)[0],
    } == VAES[name]


def test_components():
    sd15 = abstract_params(presets.SD15)
    assert set(sd15) == {"unet", "vae", "text_encoder"}
    assert count(sd15["vae"]) == (83_653_863, 248)
    assert count(sd15["text_encoder"]) == (123_060_480, 196)
    leaf = sd15["unet"]["down_blocks_0"]["attentions_1"]["proj_in"]["kernel"]
    assert (leaf.shape, leaf.dtype) == ((1, 1, 320, 320), np.float32)
    assert type(sd15["unet"]) is dict


def test_text_towers_and_upscaler():
    x4 = abstract_params(dataclasses.replace(presets.X4_UPSCALER, unet=SMALL_UNET))
    assert count(x4["vae"])[0] == 55_325_927
    assert count(x4["text_encoder"])[0] == 340_387_840
    tiny = {"unet": SMALL_UNET, "vae": TINY_VAE}
    refiner = abstract_params(dataclasses.replace(presets.SDXL_REFINER, **tiny))
    assert set(refiner) == {"unet", "vae", "text_encoder_2"}
    assert count(refiner["text_encoder_2"]) == (694_659_840, 517)
    projected = dataclasses.replace(presets.SD15.text_encoder, projection_dim=768)
    sd15 = dataclasses.replace(presets.SD15, text_encoder=projected, **tiny)
    assert count(abstract_params(sd15)["text_encoder"]) == (123_650_304, 197)


def test_initial_values():
    config = ModelConfig(unet=SMALL_UNET, vae=TINY_VAE, text_encoder=None)
    shapes, params = abstract_params(config), init_params(config, jax.random.key(3))
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert described == shapes
    again = init_params(config, jax.random.key(3))
    other = init_params(config, jax.random.key(4))
    conv = lambda p: p["unet"]["mid_block"]["resnets_0"]["conv1"]
    np.testing.assert_array_equal(conv(params)["kernel"], conv(again)["kernel"])
    assert not np.array_equal(conv(params)["kernel"], conv(other)["kernel"])
    np.testing.assert_allclose(
        conv(params)["kernel"].std(), (9 * 32) ** -0.5, rtol=0.05
    )
    assert not np.any(conv(params)["bias"])
    assert np.all(np.asarray(params["unet"]["conv_norm_out"]["scale"]) == 1)
