"""The smallest model and pictures that a whole training run takes."""

import jax
import numpy as np
from PIL import Image

import sdjax
from sdjax.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from sdjax.models import init_params
from sdjax.text import byte_vocabulary

MODEL = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(8,),
        layers_per_block=1,
        transformer_depth=(1,),
        num_heads=(1,),
        context_dim=8,
        cross_attention_only=(False,),
        norm_num_groups=4,
    ),
    vae=AutoencoderConfig(
        block_out_channels=(4, 4),
        layers_per_block=1,
        attention_levels=(False, False),
        norm_num_groups=2,
    ),
    text_encoder=TextEncoderConfig(
        vocab_size=514,
        width=8,
        num_layers=1,
        num_heads=1,
        mlp_dim=8,
        eos_token_id=513,
        pad_token_id=513,
    ),
    sample_size=16,
)


def save_tiny_model(folder, seed=0):
    params = init_params(MODEL, jax.random.key(seed))
    files = {"tokenizer": byte_vocabulary()}
    sdjax.save(sdjax.Model(MODEL, params, files, "tiny"), folder)


def make_pictures(folder, count=9):
    noise = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        pixels = noise.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"noise of the kind {i}")
