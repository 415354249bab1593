"""`sdjax cache`: what a model's frozen parts make of a dataset, written once."""

import argparse
import sys

import tqdm

import sdjax
from sdjax import data
from sdjax.training.encode import cache_states


def run(args: argparse.Namespace) -> None:
    """Writes the cache, or goes on with one, and says where it is."""
    source = data.open_source(args.source)
    model = sdjax.load(args.model, tokenizer=args.tokenizer, dtype="float32")
    hidden = True if args.no_progress else None  # None: where there is no terminal
    with tqdm.tqdm(total=len(source), unit="picture", disable=hidden) as bar:
        written = cache_states(
            model,
            source,
            args.destination,
            resolution=args.resolution or model.config.sample_size,
            bucket_step=args.bucket_step,
            text=args.text,
            batch_size=args.batch_size,
            report=lambda done: bar.update(done - bar.n),
        )
    for shard, _, reason in written.skipped:
        print(f"sdjax: skipped in {shard}: {reason}", file=sys.stderr)
    print(args.destination)
