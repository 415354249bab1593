"""Records what diffusers and transformers compute, for tests without torch.

    python scripts/record_models.py

Writes tests/recorded/models_*.npz: the configuration, random parameters in float16,
inputs and float32 outputs of tiny networks. Needs the `parity` extra.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import torch

from sdjax.config import AutoencoderConfig, TextEncoderConfig, UNetConfig, to_json

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from torch_params import (  # noqa: E402
    to_params,
    torch_autoencoder,
    torch_text_encoder,
    torch_unet,
)

SD1 = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_depth=(1, 0),
    num_heads=(2, 2),
    context_dim=12,
    cross_attention_only=(False, False),
    norm_num_groups=4,
)
SDXL = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_depth=(0, 2),
    mid_transformer_depth=2,
    num_heads=(1, 2),
    context_dim=12,
    linear_projection=True,
    cross_attention_only=(False, False),
    vector="add_embedding",
    vector_dim=10,
    norm_num_groups=4,
)
VAE = AutoencoderConfig(
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    attention_levels=(False, False, True),
    norm_num_groups=4,
)
TEXT = TextEncoderConfig(
    vocab_size=64,
    width=16,
    num_layers=3,
    num_heads=2,
    mlp_dim=32,
    projection_dim=12,
    eos_token_id=63,
    pad_token_id=0,
    states="penultimate",
    final_norm=False,
)


def nchw(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def write(name, config, module, **arrays):
    paths, _ = jax.tree.flatten_with_path(to_params(module))
    for path, leaf in paths:
        key = "/".join(["params", *(part.key for part in path)])
        arrays[key] = np.asarray(leaf).astype(np.float16)
    file = TESTS / "recorded" / f"models_{name}.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, config=json.dumps(to_json(config)), **arrays)
    print(f"{file}: {file.stat().st_size} bytes")


def record_unet(name, config):
    rng = np.random.default_rng(0)
    module = torch_unet(config)
    x = rng.standard_normal((2, 6, 9, config.in_channels), np.float32)
    context = rng.standard_normal((2, 5, config.context_dim), np.float32)
    t = np.array([981.0, 3.5], np.float32)
    arrays, added = {}, None
    if config.vector_dim:
        arrays["vector"] = rng.standard_normal((2, config.vector_dim), np.float32)
        # No sizes to embed: the whole vector is handed in as the pooled text.
        vector = torch.tensor(arrays["vector"])
        added = {"text_embeds": vector, "time_ids": torch.zeros(2, 0)}
    out = module(
        nchw(x), torch.tensor(t), torch.tensor(context), added_cond_kwargs=added
    ).sample
    write(name, config, module, x=x, t=t, context=context, out=nhwc(out), **arrays)


def record_vae():
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3))
    images = images.astype(np.float32)
    module = torch_autoencoder(VAE)
    posterior = module.encode(nchw(images)).latent_dist
    write(
        "vae",
        VAE,
        module,
        images=images,
        mean=nhwc(posterior.mean),
        logvar=nhwc(posterior.logvar),
        decoded=nhwc(module.decode(posterior.mean).sample),
    )


def record_text():
    tokens = np.random.default_rng(0).integers(1, 62, (2, 20)).astype(np.int32)
    tokens[0, 7], tokens[1, 19] = 63, 63
    tokens[0, 8:] = 0
    module = torch_text_encoder(TEXT)
    out = module(torch.tensor(tokens), output_hidden_states=True)
    write(
        "clip",
        TEXT,
        module,
        tokens=tokens,
        states=out.hidden_states[-2].numpy(),
        pooled=out.text_embeds.numpy(),
    )


if __name__ == "__main__":
    with torch.no_grad():
        record_unet("unet_sd1", SD1)
        record_unet("unet_sdxl", SDXL)
        record_vae()
        record_text()
