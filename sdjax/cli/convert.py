"""`sdjax convert`: a model in, the same model in another format out."""

import argparse
import os

import sdjax
from sdjax.errors import SdjaxError


def run(args: argparse.Namespace) -> None:
    """Converts the model and prints where it went."""
    destination = args.destination
    by_name = (
        "single-file" if destination.lower().endswith(".safetensors") else "diffusers"
    )
    # `save` would refuse too, but only after the model has been read.
    if os.path.isfile(destination) or _has_entries(destination):
        raise SdjaxError(f"{destination} exists already: choose a new name")
    model = sdjax.load(
        args.model,
        dtype=args.dtype,
        variant=args.variant,
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
    )
    sdjax.save(model, destination, format=args.format or by_name)
    print(destination)


def _has_entries(path: str) -> bool:
    try:
        return bool(os.listdir(path))
    except OSError:  # not there, or not a local folder
        return False
