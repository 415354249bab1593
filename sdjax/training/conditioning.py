"""What a batch conditions the U-Net on: text, cached states, classes, sizes."""

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdjax.errors import SdjaxError
from sdjax.models import ClassEmbedder
from sdjax.text_conditioning import encode_tokens, size_vector
from sdjax.training.config import TrainConfig
from sdjax.typing import Conditioning, Context, Params


def check_batch(batch: dict[str, Any], config: TrainConfig) -> None:
    """Checks that a batch has what the model is conditioned on; at trace time.

    Raises:
        SdjaxError: at the first array that is missing or contradicts the config.
    """
    model = config.model
    if config.diffusion.train_text_encoder and "tokens" not in batch:
        raise SdjaxError(
            "diffusion.train_text_encoder is set, but the batch has no tokens: states "
            "from a cache are those of a text encoder that does not learn"
        )
    wanted: dict[str, tuple[str, ...]] = {}
    if model.text_encoders:
        wanted["text"] = ("tokens", "context")
    if model.class_embedder is not None or model.unet.vector == "class_embedding":
        wanted["classes"] = ("label",)
    if model.unet.vector == "add_embedding":
        wanted["image sizes"] = ("size",)
        if "context" in batch:
            wanted["pooled text"] = ("pooled",)
    for what, names in wanted.items():
        if not any(name in batch for name in names):
            raise SdjaxError(
                f"the model is conditioned on {what}, but the batch has no "
                f"{' or '.join(map(repr, names))}; it has {', '.join(batch)}"
            )


def condition(
    params: Params,
    batch: dict[str, Any],
    unlabelled: Bool[Array, " b"] | None,
    config: TrainConfig,
) -> Conditioning:
    """Runs the text towers or the class embedder, unless the batch has their states.

    Args:
        params: the whole model's, by component.
        batch: one that `check_batch` let pass.
        unlabelled: whose label gives way to the unconditional one; None: nobody's.
        config: of the run.
    """
    model = config.model
    context, pooled = _states(params, batch, config)
    vector = label = None
    if "label" in batch:
        label = _dropped(batch["label"], unlabelled, config)
    if model.class_embedder is not None:
        embedder = ClassEmbedder(model.class_embedder, dtype=jnp.dtype(config.dtype))
        embedded = embedder.apply({"params": params["class_embedder"]}, label)
        context = cast(Array, embedded)
    if model.unet.vector == "class_embedding":
        vector = label
    if model.unet.vector == "add_embedding" and pooled is not None:
        vector = size_vector(pooled, batch["size"])
    return Conditioning(context=context, vector=vector)


def _states(
    params: Params, batch: dict[str, Any], config: TrainConfig
) -> tuple[Context | None, Float[Array, "b e"] | None]:
    if "context" in batch:
        return batch["context"], batch.get("pooled")
    if "tokens" in batch and config.model.text_encoders:
        return encode_tokens(params, batch["tokens"], config.model, dtype=config.dtype)
    return None, None


def _dropped(
    label: Int[Array, " b"], unlabelled: Bool[Array, " b"] | None, config: TrainConfig
) -> Int[Array, " b"]:
    """Labels, some of which are replaced by the last class, which stands for none."""
    if unlabelled is None:
        return label
    embedder = config.model.class_embedder
    rows = config.model.unet.vector_dim if embedder is None else embedder.num_classes
    return jnp.where(unlabelled, cast(int, rows) - 1, label)
