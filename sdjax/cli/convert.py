"""`sdjax convert`: a model in, the same model in another format out."""

import argparse

import sdjax
from sdjax import weights


def run(args: argparse.Namespace) -> None:
    """Converts the model and prints where it went."""
    destination = args.destination
    by_name = (
        "single-file" if destination.lower().endswith(".safetensors") else "diffusers"
    )
    # `save` would refuse too, but only after the model has been read.
    weights.check_destination(destination, args.format or by_name)
    model = sdjax.load(
        args.model,
        dtype=args.dtype,
        variant=args.variant,
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
    )
    sdjax.save(model, destination, format=args.format or by_name)
    print(destination)
