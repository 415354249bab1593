"""Writes a model with random weights, in diffusers' folder layout.

    python scripts/random_model.py tiny FOLDER     # 2 million parameters, seconds
    python scripts/random_model.py sd15 FOLDER     # full size, for timings

What it draws is noise, but it takes every step that a trained model takes: the tool
to try the program, measure it or test a pipeline without a download. The tokenizer
knows single bytes.
"""

import argparse
import dataclasses
import os

import jax
import numpy as np

import sdjax
from sdjax import presets
from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.models import init_params
from sdjax.text import byte_vocabulary
from sdjax.typing import Params

TINY = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_depth=(1, 0),
        num_heads=(2, 4),
        context_dim=32,
        cross_attention_only=(False, False),
    ),
    vae=AutoencoderConfig(
        block_out_channels=(32, 32, 32, 64), attention_levels=(False,) * 4
    ),
    text_encoder=TextEncoderConfig(width=32, num_layers=2, num_heads=2, mlp_dim=64),
    sample_size=256,
)
MODELS = {
    "tiny": TINY,
    "sd15": presets.SD15,
    "sd2": presets.SD2,
    "sdxl": presets.SDXL_BASE,
}


def with_byte_vocabulary(config: ModelConfig) -> ModelConfig:
    """Gives each text tower the 514 tokens of the byte vocabulary."""
    towers = {
        name: dataclasses.replace(
            tower,
            vocab_size=514,
            eos_token_id=513,
            pad_token_id=513 if tower.pad_token_id else 0,
        )
        for name, tower in config.text_encoders.items()
    }
    return dataclasses.replace(config, **towers)


def without_zeros(params: Params) -> Params:
    """Draws the kernels that training begins with as zero: else prompts do nothing."""
    generator = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key != "kernel" or np.any(leaf):
            return leaf
        values = generator.standard_normal(leaf.shape, np.float32)
        return jax.numpy.asarray(values / np.sqrt(np.float32(leaf[..., 0].size)))

    return jax.tree.map_with_path(draw, params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if os.path.exists(os.path.join(arguments.folder, "model_index.json")):
        print(f"{arguments.folder} is there already")
        return
    config = with_byte_vocabulary(MODELS[arguments.model])
    files = {
        name.replace("text_encoder", "tokenizer"): byte_vocabulary()
        for name in config.text_encoders
    }
    params = without_zeros(init_params(config, jax.random.key(arguments.seed)))
    model = sdjax.Model(config, params, files, arguments.folder)
    sdjax.save(model, arguments.folder)
    print(arguments.folder)


if __name__ == "__main__":
    main()
