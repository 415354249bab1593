r"""LDM-4 of ImageNet's 1000 classes at 256×256, for classifier-free guidance.

    sdjax train configs/ldm4_class_conditional.py --set autoencoder_from=VQ_F4 \
        --set data.path=IMAGENET --workdir RUN

cin256-v2 of Rombach et al. 2022, table 15, arXiv:2112.10752: latents 64×64×3 of the VQ
autoencoder with f = 4 (configs/ldm_vq_f4.py), a U-Net of 401 million parameters that
attends to one token for the class. One label in ten becomes class 1000, the
unconditional one. ε, L2, AdamW at 1e-4, no average of the weights, as in the published
checkpoint.

Hardware: 16 devices of 80 GB, 75 pictures on each; the paper's run took 271 days of one
V100.

What to expect: the paper's FID is 3.60 after 178,000 steps, with 250 DDIM steps and a
guidance scale of 1.5. No pictures are drawn on the way: `sdjax generate` draws from
captions alone, and so does training.
"""

from sdjax.presets import IMAGENET_256
from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The run; `data.path` and the autoencoder are the user's."""
    return TrainConfig(
        model=IMAGENET_256,
        data=DataConfig(
            batch_size=1200,
            resolution=256,
            flip=0.5,
            caption_dropout=0.0,
            num_workers=16,
        ),
        diffusion=DiffusionConfig(label_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=None),
        checkpoints=CheckpointConfig(keep_every_steps=10_000),
        steps=178_000,
        ema_decay=None,
        dtype="bfloat16",
        remat=True,
    )
