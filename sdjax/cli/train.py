"""`sdjax train`: a config and a folder in, a trained model out."""

import argparse
import os
import sys

from sdjax.training.overrides import load_config, override
from sdjax.training.run import Outcome, train


def run(args: argparse.Namespace) -> None:
    """Trains, prints where the model is, or where to go on.

    Raises:
        SystemExit: with 128 and the signal's number, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C.
    """
    config = override(load_config(args.config), args.settings)
    outcome = train(config, args.workdir, show=not args.no_progress)
    if not args.no_progress:
        for line in _report(outcome):
            print(line, file=sys.stderr)
    if outcome.stopped_by is None:
        print(outcome.model)
        return
    saved = f"step {outcome.step} is saved; the same command goes on from it"
    if outcome.stopped_by.name == "SIGINT":
        raise KeyboardInterrupt(saved)
    print(f"sdjax: stopped by {outcome.stopped_by.name}: {saved}", file=sys.stderr)
    sys.stderr.flush()
    raise SystemExit(128 + outcome.stopped_by)


def _report(outcome: Outcome) -> list[str]:
    lines = [f"waited for data {outcome.waiting_share:.1%} of the time"]
    if outcome.skipped:
        lines.append(f"{outcome.skipped} steps left out: see finite in losses.jsonl")
    unread = sum(len(keys) for keys in outcome.unread.values())
    if unread:
        shards = ", ".join(sorted(map(os.path.basename, outcome.unread))[:5])
        lines.append(f"{unread} pictures could not be read, in {shards}")
    return lines
