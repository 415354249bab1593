"""A learned vocabulary, against the definition of BPE and against transformers."""

import itertools
import json
from collections import Counter

from sdjax.text import Tokenizer
from sdjax.text.train_bpe import train_bpe

CAPTIONS = [
    "low low low low low",
    "lower lower",
    "newest newest newest newest newest newest",
    "widest widest widest",
]


def read_merges(files):
    return files["merges.txt"].decode().splitlines()[1:]


def naive_bpe(words: Counter, count: int) -> list[str]:
    """Counts every pair anew before each merge, as Sennrich et al. print it."""
    words = {tuple([*w[:-1], w[-1] + "</w>"]): n for w, n in words.items()}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(" ".join(best))
        joined = {}
        for word, n in words.items():
            text = "\0".join(word) + "\0"
            text = text.replace("\0".join(best) + "\0", "".join(best) + "\0")
            joined[tuple(text[:-1].split("\0"))] = n
        words = joined
    return merges


def test_the_merges_are_those_of_the_paper():
    words = Counter(word for caption in CAPTIONS for word in caption.split())
    files = train_bpe(CAPTIONS, vocab_size=514 + 10)
    assert read_merges(files) == naive_bpe(words, 10)


def test_transformers_reads_the_files_and_uses_the_merges():
    files = train_bpe(CAPTIONS, vocab_size=2048, max_length=16)
    vocabulary = json.loads(files["vocab.json"])
    end = vocabulary["<|endoftext|>"]
    tokenizer = Tokenizer.from_files(files, max_length=16, pad_token_id=end)
    assert tokenizer.clip.tokenize("Newest  LOW") == ["newest</w>", "low</w>"]
    assert tokenizer.vocab_size == len(vocabulary) == end + 1


def test_any_text_can_be_written():
    files = train_bpe(CAPTIONS, vocab_size=600)
    tokenizer = Tokenizer.from_files(files, max_length=64, pad_token_id=0)
    text = "größe 漢字 🙂 x1!"
    ids = tokenizer([text]).ids[0]
    end = ids.tolist().index(json.loads(files["vocab.json"])["<|endoftext|>"])
    assert tokenizer.clip.decode(ids[1:end]).replace(" ", "") == text.replace(" ", "")


def test_rare_pairs_and_a_full_vocabulary_end_it():
    assert read_merges(train_bpe(["ab"], vocab_size=600)) == []
    assert len(read_merges(train_bpe(CAPTIONS, vocab_size=514 + 3))) == 3
    assert read_merges(train_bpe([], vocab_size=600)) == []
