r"""LDM-4 without conditioning: faces of CelebA-HQ or FFHQ at 256×256.

    sdjax train configs/ldm4_unconditional.py --set autoencoder_from=VQ_F4 \
        --set data.path=PICTURES --workdir RUN

Rombach et al. 2022, table 12, arXiv:2112.10752: latents 64×64×3 of the VQ autoencoder
with f = 4 (configs/ldm_vq_f4.py), a U-Net of 274 million parameters with plain
self-attention, ε, L2, AdamW at 2e-6 for each picture of the batch.

Hardware: one device of 80 GB; the paper's runs took 14.4 (CelebA-HQ) and 26 days
(FFHQ) of one V100.

What to expect: the paper's FID is 5.11 on CelebA-HQ after 410,000 steps (500 DDIM
steps), and 4.98 on FFHQ after 635,000 with batches of 42 (200 DDIM steps). No pictures
are drawn on the way: `sdjax generate` draws from captions alone, and so does training.
"""

from sdjax.presets import UNCONDITIONAL_256
from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)

BATCH = 48


def get_config() -> TrainConfig:
    """The run; `data.path` and the autoencoder are the user's."""
    return TrainConfig(
        model=UNCONDITIONAL_256,
        data=DataConfig(
            batch_size=BATCH, resolution=256, caption_dropout=0.0, num_workers=4
        ),
        optimizer=OptimizerConfig(learning_rate=2e-6 * BATCH, clip_norm=None),
        checkpoints=CheckpointConfig(keep_every_steps=50_000),
        steps=410_000,
        ema_decay=0.9999,
        dtype="bfloat16",
    )
