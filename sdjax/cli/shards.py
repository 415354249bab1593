"""`sdjax shards`: pictures and captions in, TFDS ArrayRecord shards out."""

import argparse
import sys

import tqdm

from sdjax import data


def run(args: argparse.Namespace) -> None:
    """Writes the shards, and says where they are and what was left out."""
    data.check_new_folder(args.destination)
    source = data.open_source(args.source)
    hidden = True if args.no_progress else None  # None: where there is no terminal
    with tqdm.tqdm(total=len(source), unit="picture", disable=hidden) as bar:
        written = data.write_shards(
            source, args.destination, report=lambda done: bar.update(done - bar.n)
        )
    for shard, _, reason in written.skipped:
        print(f"sdjax: skipped in {shard}: {reason}", file=sys.stderr)
    if written.skipped:
        total = len(source)
        print(f"sdjax: {len(written.skipped)} of {total} skipped", file=sys.stderr)
    print(args.destination)
