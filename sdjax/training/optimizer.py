"""AdamW or Muon, with the learning rate over time, as optax builds them."""

from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array, Int

from sdjax.training.config import OptimizerConfig
from sdjax.typing import Params

MUON_RMS = 0.2
"""Size of Muon's updates against the learning rate: about that of AdamW's, so that one
learning rate serves both (Liu et al. 2025, section 2.2, arXiv:2502.16982)."""

TEXT_ENCODERS = {"text_encoder", "text_encoder_2"}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each update: up from 0, then constant or down.

    The first of `warmup_steps` updates has rate 0; `final_share` of the rate is
    reached after the last of `steps` updates.
    """
    return _schedule(config.learning_rate, config, steps)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clips the gradient's norm, then AdamW or Muon.

    The norm is that of the whole gradient. Components named `text_encoder` and
    `text_encoder_2` have their own learning rate where the config gives one.
    """
    update = _update(config.learning_rate, config, steps)
    if config.text_encoder_learning_rate is not None:
        of_text = _update(config.text_encoder_learning_rate, config, steps)
        update = optax.partition({"text": of_text, "rest": update}, _groups)
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def updates_done(opt_state: Any) -> Int[Array, ""]:
    """How many updates an optimizer of `make_optimizer` has made.

    Fewer than calls of the step, where some were left out as not finite.
    """
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_adam)
    return next(node.count for node in nodes if is_adam(node))


def _schedule(peak: float, config: OptimizerConfig, steps: int) -> optax.Schedule:
    last = config.final_share
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, last * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, last),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def _update(
    peak: float, config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
    if config.name == "muon":
        return optax.contrib.muon(
            _schedule(peak, config, steps),
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=MUON_RMS,
        )
    return optax.adamw(
        _schedule(peak, config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def _matrices(params: Params) -> Params:
    """Tells Muon which parameters are matrices, and how: kernels, inputs to outputs."""

    def numbers(path: tuple, leaf: Array) -> Any:
        if path[-1].key != "kernel":
            return None
        last = leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)

    return jax.tree.map_with_path(numbers, params)


def _groups(params: Params) -> Params:
    """Names the group of every parameter, in a tree of the same structure."""

    def group(path: tuple, _: Array) -> str:
        return "text" if path[0].key in TEXT_ENCODERS else "rest"

    return jax.tree.map_with_path(group, params)
