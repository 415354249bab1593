r"""The autoencoder of the bundled model: 64×64 pictures, f = 8, 32 channels.

    sdjax train configs/emoji_autoencoder.py --set data.path=EMOJI/train \
        --workdir runs/emoji-autoencoder

Kept small, since it travels with the package: 2.8 million parameters. Flat colours and
sharp edges want no discriminator; L2 alone is what PSNR measures. Muon takes about
half the steps of AdamW here, and residual branches that begin at zero some fewer.

Hardware: two CPU cores, about 10 minutes.

What to expect: 29.9 dB on pictures that were not trained on (the published weights; 27
dB after 600 steps). A linear map of 8×8 patches to 32 numbers, the best there is (PCA),
has 26.5 dB.
"""

from sdjax.config import AutoencoderConfig, ModelConfig
from sdjax.training.config import (
    AutoencoderLossConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    SampleGridConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The run; `data.path` is the user's."""
    return TrainConfig(
        task="autoencoder",
        model=ModelConfig(
            vae=AutoencoderConfig(
                latent_channels=32,
                block_out_channels=(16, 32, 64, 128),
                layers_per_block=1,
                norm_num_groups=8,
            ),
            text_encoder=None,
            sample_size=64,
        ),
        data=DataConfig(
            batch_size=16, resolution=64, shift=2, flip=0.5, caption_dropout=0.0
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=50,
            final_share=0.02,
            b2=0.99,
            weight_decay=0.0,
            clip_norm=None,
        ),
        autoencoder=AutoencoderLossConfig(
            pixel="l2",
            reduction="mean",
            kl_weight=5e-8,
            discriminator_weight=0.0,
        ),
        samples=SampleGridConfig(every_steps=250),
        checkpoints=CheckpointConfig(every_steps=250, every_minutes=2.0),
        steps=1000,
        ema_decay=0.998,
    )
