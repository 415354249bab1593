"""Any model, trained further on a folder of one's own captioned pictures.

    sdjax train configs/finetune.py --set data.path=PICTURES --workdir runs/mine
    sdjax generate --model runs/mine/model "..."

`docs/finetune.md` goes through it. PICTURES has files as cat.png with their captions
beside them as cat.txt; twenty are enough to teach one subject. `--set init_from=MODEL`
begins from another model than the bundled one: a diffusers folder, a .safetensors or
.ckpt file, or an Orbax folder. Pictures are brought to the model's own size.

Hardware: for the bundled model any CPU. For Stable Diffusion 1.5 a device of 40 GB,
with `--set dtype=bfloat16 --set remat=true --set optimizer.learning_rate=1e-5`.

What to expect: after 500 steps, 4,000 pictures seen, prompts worded as the captions
give the subject of the pictures; the loss itself falls little, since most of it is
noise that cannot be foretold.
"""

from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The run; `data.path` is the user's."""
    return TrainConfig(
        init_from="emoji",
        data=DataConfig(batch_size=8, resolution=None, caption_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20),
        checkpoints=CheckpointConfig(every_steps=100, keep=2),
        steps=500,
        ema_decay=0.995,
    )
