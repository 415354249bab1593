"""The published models, as configurations.

Single files in the original layout carry no configuration; they are recognised by
their shapes and take it from here. SD: Rombach et al. 2022, arXiv:2112.10752; SDXL:
Podell et al. 2023, arXiv:2307.01952; LCM: Luo et al. 2023, arXiv:2310.04378.
"""

from dataclasses import replace

from sdjax.config import (
    AutoencoderConfig,
    ClassEmbedderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)

KL_F4 = AutoencoderConfig(
    latent_channels=3,
    block_out_channels=(128, 256, 512),
    attention_levels=(False,) * 3,
    scaling_factor=1.0,
)
KL_F8 = AutoencoderConfig()
KL_F16 = AutoencoderConfig(
    latent_channels=16,
    block_out_channels=(128, 128, 256, 256, 512),
    attention_levels=(False, False, False, False, True),
    scaling_factor=1.0,
)
KL_F32 = AutoencoderConfig(
    latent_channels=64,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    attention_levels=(False, False, False, False, True, True),
    scaling_factor=1.0,
)
VQ_F4 = replace(KL_F4, codebook_size=8192)
VQ_F4_NOATTN = replace(VQ_F4, mid_attention=False)
VQ_F8 = AutoencoderConfig(
    block_out_channels=(128, 256, 256, 512),
    attention_levels=(False, False, False, True),
    codebook_size=16_384,
    scaling_factor=1.0,
)
VQ_F8_N256 = replace(VQ_F8, codebook_size=256)
VQ_F16 = replace(KL_F16, latent_channels=8, codebook_size=16_384)

# One step offset and a last ᾱ taken from the table, not 1: so the SD family samples.
_SD_SCHEDULE = ScheduleConfig(sampler="plms", steps_offset=1, set_alpha_to_one=False)
_V_SCHEDULE = replace(_SD_SCHEDULE, sampler="ddim", prediction_type="v_prediction")
_SDXL_SCHEDULE = ScheduleConfig(
    sampler="euler", timestep_spacing="leading", steps_offset=1
)
_LCM_SCHEDULE = ScheduleConfig(sampler="lcm")

SD15 = ModelConfig(schedule=_SD_SCHEDULE)
SD15_INPAINTING = replace(SD15, unet=UNetConfig(in_channels=9))
SD15_IP2P = replace(SD15, unet=UNetConfig(in_channels=8))
LCM_SD15 = replace(SD15, unet=UNetConfig(guidance_dim=256), schedule=_LCM_SCHEDULE)

# OpenCLIP ViT-H/14 without its last layer, which SD 2 does not read.
_VIT_H = TextEncoderConfig(
    width=1024,
    num_layers=23,
    num_heads=16,
    mlp_dim=4096,
    activation="gelu",
    pad_token_id=0,
)
_SD2_UNET = UNetConfig(
    num_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True
)

SD2_BASE = ModelConfig(unet=_SD2_UNET, text_encoder=_VIT_H, schedule=_SD_SCHEDULE)
SD2 = replace(SD2_BASE, schedule=_V_SCHEDULE, sample_size=768)
SD2_INPAINTING = replace(SD2_BASE, unet=replace(_SD2_UNET, in_channels=9))
SD2_DEPTH = replace(SD2_BASE, unet=replace(_SD2_UNET, in_channels=5))
SD2_UNCLIP_H = replace(
    SD2, unet=replace(_SD2_UNET, vector="class_projection", vector_dim=2048)
)
X4_UPSCALER = ModelConfig(
    unet=UNetConfig(
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        transformer_depth=(0, 1, 1, 1),
        context_dim=1024,
        linear_projection=True,
        cross_attention_only=(True, True, True, False),
        vector="class_embedding",
        vector_dim=1000,
    ),
    vae=AutoencoderConfig(
        block_out_channels=(128, 256, 512),
        attention_levels=(False,) * 3,
        scaling_factor=0.08333,
    ),
    text_encoder=_VIT_H,
    schedule=replace(_V_SCHEDULE, beta_start=0.0001, beta_end=0.02),
    sample_size=512,
)

_VIT_L_PENULTIMATE = TextEncoderConfig(states="penultimate", final_norm=False)
_VIT_BIGG = TextEncoderConfig(
    width=1280,
    num_layers=32,
    num_heads=20,
    mlp_dim=5120,
    activation="gelu",
    projection_dim=1280,
    pad_token_id=0,
    states="penultimate",
    final_norm=False,
)
_SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    transformer_depth=(0, 2, 10),
    mid_transformer_depth=10,
    num_heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    cross_attention_only=(False,) * 3,
    vector="add_embedding",
    vector_dim=2816,
)

SDXL_BASE = ModelConfig(
    unet=_SDXL_UNET,
    vae=AutoencoderConfig(scaling_factor=0.13025),
    text_encoder=_VIT_L_PENULTIMATE,
    text_encoder_2=_VIT_BIGG,
    schedule=_SDXL_SCHEDULE,
    sample_size=1024,
    zero_empty_negative=True,
)
SDXL_INPAINTING = replace(SDXL_BASE, unet=replace(_SDXL_UNET, in_channels=9))
LCM_SDXL = replace(
    SDXL_BASE, unet=replace(_SDXL_UNET, guidance_dim=256), schedule=_LCM_SCHEDULE
)
SDXL_REFINER = replace(
    SDXL_BASE,
    unet=UNetConfig(
        block_out_channels=(384, 768, 1536, 1536),
        transformer_depth=(0, 4, 4, 0),
        mid_transformer_depth=4,
        num_heads=(6, 12, 24, 24),
        context_dim=1280,
        linear_projection=True,
        vector="add_embedding",
        vector_dim=2560,
    ),
    text_encoder=None,
    zero_empty_negative=False,
    aesthetic_score=True,
)

# SD 2 as MLPerf's training benchmark defines it (v3.1 to v5.0): 16 groups in the U-Net.
MLPERF_SD2 = replace(
    SD2_BASE, unet=replace(_SD2_UNET, norm_num_groups=16), schedule=_V_SCHEDULE
)

_LDM_SCHEDULE = replace(
    _SD_SCHEDULE, sampler="ddim", beta_start=0.0015, beta_end=0.0195
)
# LDM-4 of CelebA-HQ, FFHQ and LSUN-bedrooms: 32 channels a head.
UNCONDITIONAL_256 = ModelConfig(
    unet=UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(224, 448, 672, 896),
        transformer_depth=(0, 1, 1, 1),
        plain_attention=True,
        num_heads=(7, 14, 21, 28),
    ),
    vae=VQ_F4,
    text_encoder=None,
    schedule=_LDM_SCHEDULE,
    sample_size=256,
)
# LDM-8 of LSUN-churches, whose scaling factor is measured when training begins.
CHURCHES_256 = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(192, 384, 384, 768, 768),
        transformer_depth=(1, 1, 1, 1, 0),
        plain_attention=True,
        num_heads=(8,) * 5,
        cross_attention_only=(False,) * 5,
        scale_shift_norm=True,
        resnet_resampling=True,
    ),
    vae=replace(KL_F8, scaling_factor=1.0),
    text_encoder=None,
    schedule=replace(_LDM_SCHEDULE, beta_end=0.0155),
    sample_size=256,
)
# LDM-4 of ImageNet (cin256-v2): class 1000 is the unconditional one.
IMAGENET_256 = ModelConfig(
    unet=UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        transformer_depth=(0, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        context_dim=512,
    ),
    vae=VQ_F4,
    text_encoder=None,
    class_embedder=ClassEmbedderConfig(num_classes=1001, width=512),
    schedule=_LDM_SCHEDULE,
    sample_size=256,
)
