r"""The bundled model: emoji of 64×64 pixels from their names.

    python scripts/train_tokenizer.py EMOJI/train runs/emoji-tokenizer \
        --vocab-size 2048 --max-length 32
    sdjax train configs/emoji_autoencoder.py --set data.path=EMOJI/train \
        --workdir runs/emoji-autoencoder
    sdjax cache EMOJI/train runs/emoji-cache --model runs/emoji-autoencoder/model
    sdjax train configs/emoji.py --set data.cache=runs/emoji-cache \
        --set autoencoder_from=runs/emoji-autoencoder/model \
        --set tokenizer=runs/emoji-tokenizer --workdir runs/emoji
    sdjax convert runs/emoji/model emoji --dtype float16

Data: Noto Emoji, 3,393 pictures with their Unicode names, as tar shards. Left out are
75 whose combination of subject and skin tone occurs nowhere in the rest; they are what
`sdjax evaluate` tests on.

The size is set by the package: 14.7 million parameters in float16 are 29.5 MB, of which
the U-Net has 10.7, the autoencoder 2.8 and the text tower 1.2 million, all three from
scratch. Captions are short, so the U-Net has to know its pictures by heart. It reads
six captions in ten inside a sentence, and one in ten not at all. Zero terminal SNR,
since the color of the background is part of the picture.

Hardware: two CPU cores; 0.4 to 1.2 s a step, an hour in all. On Linux,
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment makes a step a quarter faster.

What to expect: about what the README says of the bundled model. That one was trained in
two parts, the last 170 steps with all of TEMPLATES, before this file was settled.
"""

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    SampleGridConfig,
    TrainConfig,
)

ARTICLES = ("a {}", "the {}", "one {}", "some {}")
SENTENCES = ("a picture of {}", "a drawing of {}", "a photo of {}", "an emoji of {}")
PARTS = ("a slice of {}", "a piece of {}")
TEMPLATES = ("{}",) * 7 + ARTICLES + SENTENCES + PARTS


def get_config() -> TrainConfig:
    """The run; data, autoencoder and tokenizer are the user's."""
    return TrainConfig(
        model=ModelConfig(
            unet=UNetConfig(
                in_channels=32,
                out_channels=32,
                block_out_channels=(160, 160),
                layers_per_block=1,
                transformer_depth=(1, 1),
                num_heads=(5, 5),
                context_dim=160,
                linear_projection=True,
                cross_attention_only=(False, False),
            ),
            vae=AutoencoderConfig(
                latent_channels=32,
                block_out_channels=(16, 32, 64, 128),
                layers_per_block=1,
                norm_num_groups=8,
            ),
            text_encoder=TextEncoderConfig(
                vocab_size=1923,
                width=160,
                num_layers=3,
                num_heads=5,
                mlp_dim=640,
                max_length=32,
                eos_token_id=1922,
                pad_token_id=1922,
            ),
            schedule=ScheduleConfig(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                sampler="ddim",
                timestep_spacing="trailing",
            ),
            sample_size=64,
            guidance_scale=1.5,
            num_inference_steps=25,
        ),
        data=DataConfig(
            batch_size=64,
            resolution=64,
            caption_dropout=0.1,
            caption_templates=TEMPLATES,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=100,
            final_share=0.01,
            b2=0.98,
        ),
        diffusion=DiffusionConfig(train_text_encoder=True),
        samples=SampleGridConfig(
            every_steps=500,
            prompts=("a slice of pizza", "red heart", "volcano", "angry face"),
            num_inference_steps=25,
            guidance_scale=1.5,
        ),
        checkpoints=CheckpointConfig(every_steps=500, every_minutes=5.0),
        steps=3300,
        ema_decay=0.999,
    )
