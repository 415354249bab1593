"""`sdjax info`: what a model, a checkpoint or an image is."""

import argparse
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from sdjax import config, recipe
from sdjax.cli.run_info import describe_run, is_run
from sdjax.config import AutoencoderConfig, TextEncoderConfig, UNetConfig

if TYPE_CHECKING:
    from sdjax.weights import Description

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run(args: argparse.Namespace) -> None:
    """Prints lines for people, or JSON."""
    if _is_png(args.path):
        made = recipe.read_recipe(args.path)
        lines = [(name, value) for name, value in dataclasses.asdict(made).items()]
        print(json.dumps(dict(lines), indent=2) if args.json else _table(lines))
        return
    if is_run(args.path):
        found = describe_run(args.path)
        print(json.dumps(found, indent=2) if args.json else _table([*found.items()]))
        return
    # Both import JAX, which an image does not need.
    from sdjax import weights
    from sdjax.model import locate

    model = weights.describe(locate(args.path), variant=args.variant)
    if args.json:
        print(json.dumps(_model_json(args.path, model), indent=2))
    else:
        print(_table(_model_lines(args.path, model)))


def _is_png(path: str) -> bool:
    named = path.lower().endswith(".png")
    if not os.path.isfile(path):  # a folder, a remote path, or nothing
        return named and not os.path.exists(path)
    try:
        with open(path, "rb") as file:
            return named or file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
    except OSError:  # the reader will say why
        return named


def _table(lines: list[tuple[str, Any]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(
        f"{name:{width}}  {'-' if value is None else value}" for name, value in lines
    )


def _model_json(path: str, model: "Description") -> dict[str, Any]:
    return {
        "path": path,
        "format": model.format,
        "sha256": model.sha256,
        "parameters": model.parameters,
        "dtypes": model.dtypes,
        "ignored": list(model.ignored),
        "config": config.to_json(model.config),
    }


def _model_lines(path: str, model: "Description") -> list[tuple[str, Any]]:
    lines = [("path", path), ("format", model.format), ("sha256", model.sha256)]
    for name, count in model.parameters.items():
        described = _component(getattr(model.config, name))
        lines.append((name, f"{count:,} parameters, {' '.join(model.dtypes[name])}"))
        lines += [(f"  {key}", value) for key, value in described.items()]
    schedule = model.config.schedule
    side = model.config.sample_size
    return [
        *lines,
        ("total", f"{sum(model.parameters.values()):,} parameters"),
        ("predicts", schedule.prediction_type),
        ("betas", _betas(schedule)),
        ("sampler", schedule.sampler),
        ("image size", f"{side} x {side} pixels"),
        ("ignored", f"{len(model.ignored)} tensors of no part of the model"),
    ]


def _betas(schedule: config.ScheduleConfig) -> str:
    steps = f"{schedule.num_train_timesteps} steps"
    if schedule.trained_betas is not None:
        return f"listed in the model, {steps}"
    zero_snr = ", zero terminal SNR" if schedule.rescale_betas_zero_snr else ""
    return (
        f"{schedule.beta_schedule} from {schedule.beta_start:g} to "
        f"{schedule.beta_end:g}, {steps}{zero_snr}"
    )


def _component(
    part: UNetConfig | AutoencoderConfig | TextEncoderConfig,
) -> dict[str, str]:
    if isinstance(part, TextEncoderConfig):
        return {
            "vocabulary": f"{part.vocab_size:,} tokens, {part.max_length} per prompt",
            "width": f"{part.width}, {part.num_layers} layers, {part.num_heads} heads",
            "activation": part.activation,
            "projection": str(part.projection_dim or "none"),
        }
    if isinstance(part, AutoencoderConfig):
        return {
            "channels": _row(part.block_out_channels),
            "latents": f"{part.latent_channels} channels at 1/{part.downsample_factor} "
            f"of the size, scaled by {part.scaling_factor:g}",
        }
    return {
        "channels": f"{_row(part.block_out_channels)}, {part.in_channels} in, "
        f"{part.out_channels} out",
        "heads": _row(part.num_heads),
        "transformers": f"{_row(part.transformer_depth)}, "
        f"{part.mid_transformer_depth} in the middle",
        "context": str(part.context_dim),
        "vector": f"{part.vector} of {part.vector_dim}" if part.vector else "none",
    }


def _row(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
