"""Parameters and tensors of the published models, from their shapes alone."""

import dataclasses

import jax
import numpy as np
import pytest

from sdjax import presets
from sdjax.config import ClassEmbedderConfig, ModelConfig
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
    "MLPERF_SD2": (865_910_724, 686),
    "UNCONDITIONAL_256": (274_056_163, 432),
    "CHURCHES_256": (294_966_916, 604),
    "IMAGENET_256": (400_920_579, 688),
}
KL_F8 = {"encoder": 34_163_592, "decoder": 49_490_179, "convolutions": 92}
VAES = {
    "KL_F4": {"encoder": 22_351_238, "decoder": 32_960_771, "convolutions": 54},
    "KL_F8": KL_F8,
    "KL_F16": {"encoder": 28_265_760, "decoder": 41_343_875, "convolutions": 1_328},
    "KL_F32": {"encoder": 42_614_656, "decoder": 61_244_803, "convolutions": 20_672},
    "VQ_F4": {"encoder": 22_337_411, "decoder": 32_960_771, "convolutions": 24},
    "VQ_F4_NOATTN": {"encoder": 21_285_763, "decoder": 31_909_123, "convolutions": 24},
    "VQ_F8": {"encoder": 27_397_764, "decoder": 40_253_955, "convolutions": 40},
    "VQ_F8_N256": {"encoder": 27_397_764, "decoder": 40_253_955, "convolutions": 40},
    "VQ_F16": {"encoder": 28_155_144, "decoder": 41_307_011, "convolutions": 144},
}
# Of the whole autoencoder, codebook and all.
VQ_TOTALS = {
    "VQ_F4": 55_322_782,
    "VQ_F4_NOATTN": 53_219_486,
    "VQ_F8": 67_717_295,
    "VQ_F8_N256": 67_652_783,
    "VQ_F16": 69_593_371,
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
    "MLPERF_SD2",
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
    if name in VQ_TOTALS:
        assert count(params)[0] == VQ_TOTALS[name]


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
    alone = init_params(config, jax.random.key(3), {"vae"})
    assert set(alone) == {"vae"}
    jax.tree.map(np.testing.assert_array_equal, alone["vae"], params["vae"])


def zeros_of(config):
    """Modules of the U-Net whose kernel begins as zero."""
    params = init_params(config, jax.random.key(0), {"unet"})["unet"]
    return {
        "/".join(key.key for key in path[:-1])
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key == "kernel" and not np.any(leaf)
    }


def test_what_begins_as_zero():
    # zero_module of latent-diffusion's openaimodel.py and attention.py.
    sides = "down_blocks_0/{}_0", "down_blocks_0/{}_1", "mid_block/{}_0"
    sides += "up_blocks_0/{}_0", "up_blocks_0/{}_1", "up_blocks_0/{}_2"
    resnets = {f"{site.format('resnets')}/conv2" for site in sides}
    resnets.add("mid_block/resnets_1/conv2")
    transformers = {f"{site.format('attentions')}/proj_out" for site in sides}
    tiny = ModelConfig(unet=SMALL_UNET, vae=TINY_VAE, text_encoder=None)
    assert zeros_of(tiny) == resnets | transformers | {"conv_out"}
    unet = dataclasses.replace(
        SMALL_UNET,
        block_out_channels=(32, 32),
        transformer_depth=(1, 1),
        num_heads=(2, 2),
        cross_attention_only=(False, False),
        plain_attention=True,
        resnet_resampling=True,
    )
    zeros = zeros_of(dataclasses.replace(tiny, unet=unet))
    assert "down_blocks_0/downsamplers_0/conv2" in zeros
    assert "up_blocks_0/upsamplers_0/conv2" in zeros
    assert {n.rpartition("/")[2] for n in zeros} == {"conv2", "to_out_0", "conv_out"}


def test_initial_codes_and_classes():
    vae = dataclasses.replace(TINY_VAE, codebook_size=500)
    embedder = ClassEmbedderConfig(num_classes=100, width=64)
    config = ModelConfig(unet=SMALL_UNET, vae=vae, class_embedder=embedder)
    names = {"vae", "class_embedder"}
    params = init_params(config, jax.random.key(0), names)
    assert set(params) == names
    codes = np.asarray(params["vae"]["quantize"]["embedding"]["embedding"])
    assert codes.shape == (500, 4)
    assert 0.99 / 500 < np.abs(codes).max() <= 1 / 500
    np.testing.assert_allclose(codes.std(), 1 / 500 / np.sqrt(3), rtol=0.05)
    classes = np.asarray(params["class_embedder"]["embedding"]["embedding"])
    assert classes.shape == (100, 64)
    np.testing.assert_allclose(classes.std(), 1, rtol=0.05)
