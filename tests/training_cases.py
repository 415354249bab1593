"""A diffusion model small enough to train in a test, and batches for it."""

import dataclasses
import functools

import numpy as np
from tiny import numpy_params

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.training.config import DiffusionConfig, OptimizerConfig, TrainConfig

TOKENS = 7
TEXT = TextEncoderConfig(
    vocab_size=60,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=32,
    max_length=TOKENS,
    eos_token_id=59,
    pad_token_id=59,
)
UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    transformer_depth=(1, 0),
    num_heads=(2, 2),
    context_dim=16,
    cross_attention_only=(False, False),
    norm_num_groups=4,
)
VAE = AutoencoderConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_levels=(False, False),
    norm_num_groups=4,
)
MODEL = ModelConfig(unet=UNET, vae=VAE, text_encoder=TEXT, sample_size=16)


def train_config(
    model: ModelConfig = MODEL, *, prediction_type="epsilon", zero_snr=False, **changes
) -> TrainConfig:
    """A run of 10 steps; `changes` are of its diffusion and optimizer configs too."""
    schedule = ScheduleConfig(
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    model = dataclasses.replace(model, schedule=schedule)
    parts = {"diffusion": DiffusionConfig(), "optimizer": OptimizerConfig()}
    for name, part in parts.items():
        fields = {field.name for field in dataclasses.fields(part)} & set(changes)
        own = {field: changes.pop(field) for field in fields}
        parts[name] = dataclasses.replace(part, **own)
    return TrainConfig(model=model, steps=10, **parts, **changes)


def make_batch(kind="moments", text="tokens", *, size=4, seed=0):
    """Random pictures or moments of `size` rows, with tokens or text states."""
    rng = np.random.default_rng(seed)
    batch = {}
    if kind == "moments":
        batch["moments"] = rng.standard_normal((size, 8, 8, 8), np.float32)
    else:
        batch["image"] = rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8)
    if text == "tokens":
        tokens = rng.integers(1, 58, (size, TOKENS)).astype(np.int32)
        tokens[:, -2:] = TEXT.eos_token_id
        batch["tokens"] = {"text_encoder": tokens}
    if text == "context":
        batch["context"] = rng.standard_normal((size, TOKENS, 16), np.float32)
    return batch


ONE_LEVEL = UNetConfig(
    block_out_channels=(8,),
    layers_per_block=1,
    transformer_depth=(1,),
    num_heads=(1,),
    context_dim=16,
    cross_attention_only=(False,),
    norm_num_groups=2,
)
SMALL = dataclasses.replace(MODEL, unet=ONE_LEVEL)
BARE = dataclasses.replace(
    SMALL,
    unet=dataclasses.replace(
        ONE_LEVEL, transformer_depth=(0,), mid_transformer_depth=0
    ),
    text_encoder=None,
)
"""The least there is to train: unconditional, on one level."""

random_params = functools.cache(numpy_params)
