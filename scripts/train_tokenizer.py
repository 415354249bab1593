"""Learns a small vocabulary from a dataset's captions, as a tokenizer folder.

python scripts/train_tokenizer.py DATA DST --vocab-size 2048 --max-length 32
"""

import argparse
from pathlib import Path

from sdjax.data import open_source
from sdjax.text.train_bpe import train_bpe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="what `sdjax train` reads")
    parser.add_argument("destination", type=Path, help="a new folder")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=77)
    args = parser.parse_args()
    source = open_source(args.data)
    captions = (source[i].caption for i in range(len(source)))
    files = train_bpe(captions, vocab_size=args.vocab_size, max_length=args.max_length)
    args.destination.mkdir(parents=True)
    for name, content in files.items():
        (args.destination / name).write_bytes(content)
    print(args.destination)


if __name__ == "__main__":
    main()
