"""Random torch models for a configuration, and their parameters as our trees.

For the parity tests and `scripts/record_models.py`: independent of `sdjax.weights`.
"""

import diffusers
import jax.numpy as jnp
import torch
import transformers

from sdjax.config import AutoencoderConfig, TextEncoderConfig, UNetConfig

TABLES = ("token_embedding", "position_embedding", "class_embedding", "embedding")


def to_params(module):
    """Restates a torch module's state by the naming rule of the parameter tree."""
    tree = {}
    for key, tensor in module.state_dict().items():
        path = []
        for part in key.removeprefix("text_model.").split("."):
            if part.isdigit():
                path[-1] += f"_{part}"
            else:
                path.append(part)
        value = tensor.numpy()
        if path[-1] == "weight":
            if path[-2] in TABLES:
                path[-1] = "embedding"
            elif value.ndim == 1:
                path[-1] = "scale"
            else:
                path[-1] = "kernel"
                value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        *parents, leaf = path
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        assert leaf not in node, key
        node[leaf] = jnp.asarray(value)
    return tree


def randomise(module, seed=0):
    """Redraws every parameter, norms and biases too, in values that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                noise *= (p[0].numel()) ** -0.5
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.2
            p.copy_(noise.half().float())
    return module.eval()


def torch_unet(config: UNetConfig):
    """Makes the diffusers U-Net that `config` describes."""
    depth = config.transformer_depth
    assert depth[-1] in (0, config.mid_transformer_depth)  # diffusers has one number
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depth[::-1]]
    options = {}
    if config.vector == "class_embedding":
        options = {"num_class_embeds": config.vector_dim}
    if config.vector == "class_projection":
        options = {"class_embed_type": "projection"}
    if config.vector == "add_embedding":
        options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    if config.vector in ("class_projection", "add_embedding"):
        options["projection_class_embeddings_input_dim"] = config.vector_dim
    return randomise(
        diffusers.UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=config.block_out_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=config.layers_per_block,
            transformer_layers_per_block=[
                *(max(d, 1) for d in depth[:-1]),
                config.mid_transformer_depth,
            ],
            attention_head_dim=list(config.num_heads),
            cross_attention_dim=config.context_dim,
            use_linear_projection=config.linear_projection,
            only_cross_attention=list(config.cross_attention_only),
            norm_num_groups=config.norm_num_groups,
            time_cond_proj_dim=config.guidance_dim,
            **options,
        )
    )


def torch_autoencoder(config: AutoencoderConfig):
    """Makes the diffusers autoencoder that `config` describes."""
    levels = config.attention_levels
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in levels]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in levels[::-1]]
    return randomise(
        diffusers.AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
        )
    )


def torch_vq(config: AutoencoderConfig):
    """Makes the diffusers VQModel that `config` describes."""
    levels = config.attention_levels
    down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in levels]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in levels[::-1]]
    return randomise(
        diffusers.VQModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            num_vq_embeddings=config.codebook_size,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_attention,
        )
    )


def torch_plain_unet(config: UNetConfig):
    """Makes the diffusers U-Net without context that `config` describes."""
    size = {
        c // n for c, n in zip(config.block_out_channels, config.num_heads, strict=True)
    }
    assert config.plain_attention and len(size) == 1
    depth = config.transformer_depth
    bare = "Resnet{}sampleBlock2D" if config.resnet_resampling else "{}Block2D"
    down = ["AttnDownBlock2D" if d else bare.format("Down") for d in depth]
    up = ["AttnUpBlock2D" if d else bare.format("Up") for d in depth[::-1]]
    kind = "resnet" if config.resnet_resampling else "conv"
    norm = "scale_shift" if config.scale_shift_norm else "default"
    return randomise(
        diffusers.UNet2DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=config.block_out_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            layers_per_block=config.layers_per_block,
            attention_head_dim=size.pop(),
            downsample_type=kind,
            upsample_type=kind,
            norm_num_groups=config.norm_num_groups,
            attn_norm_num_groups=config.norm_num_groups,
            resnet_time_scale_shift=norm,
            add_attention=bool(config.mid_transformer_depth),
        )
    )


def torch_text_encoder(config: TextEncoderConfig):
    """Makes the transformers text tower that `config` describes."""
    settings = transformers.CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        projection_dim=config.projection_dim or 512,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        hidden_act=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        bos_token_id=config.vocab_size - 2,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    has_projection = config.projection_dim is not None
    cls = (
        transformers.CLIPTextModelWithProjection
        if has_projection
        else transformers.CLIPTextModel
    )
    return randomise(cls(settings))
