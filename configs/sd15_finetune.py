r"""Stable Diffusion 1.5, trained further on one's own captioned pictures.

    sdjax train configs/sd15_finetune.py --set init_from=MODEL \
        --set data.path=PICTURES --workdir RUN

The recipe of Waifu-Diffusion: buckets of aspect ratios in steps of 64 pixels, one
caption in ten dropped, the learning rate small and falling along a cosine, an average
of the weights kept. `init_from` is any model that `sdjax.load` reads.

Hardware: one device of 80 GB. Parameters, gradients, AdamW and the average take 20
bytes for each of the U-Net's 860 million parameters, 17 GB; text encoder and
autoencoder 0.8 GB; the rest is activations, of which `--set optimizer.accumulation=4`
keeps a quarter. `--set ema_decay=none` saves 3.4 GB.

What to expect: 20,000 steps see 320,000 pictures. A step of 16 costs about 70 TFLOP:
for each picture 0.8 forward, four times that with gradients and rematerialisation, and
1.1 for the autoencoder's encoder.
"""

from sdjax.presets import SD15
from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    SampleGridConfig,
    TrainConfig,
)

STEPS = 20_000


def get_config() -> TrainConfig:
    """The run; `data.path` and `init_from` are the user's."""
    return TrainConfig(
        model=SD15,
        data=DataConfig(
            batch_size=16,
            resolution=512,
            bucket_step=64,
            flip=0.5,
            caption_dropout=0.1,
            num_workers=4,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-6,
            schedule="cosine",
            warmup_steps=STEPS // 20,
            clip_norm=1.0,
        ),
        samples=SampleGridConfig(
            every_steps=1000, prompts=("a portrait", "a landscape")
        ),
        checkpoints=CheckpointConfig(keep_every_steps=5000),
        steps=STEPS,
        ema_decay=0.9999,
        dtype="bfloat16",
        remat=True,
    )
