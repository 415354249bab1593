"""Learns a vocabulary from captions, in the form of CLIP's tokenizer.

Byte-pair encoding (Sennrich et al. 2016, algorithm 1, arXiv:1508.07909) over bytes,
lower case, with a mark at the end of each word. The trainer of the `tokenizers` library
breaks ties by chance; here the same captions give the same vocabulary.
"""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from sdjax.text.byte_vocabulary import byte_vocabulary

# CLIP splits at these before it merges: contractions, words, single digits, the rest.
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BYTES = 512

Word = tuple[str, ...]
Pair = tuple[str, str]


def train_bpe(
    captions: Iterable[str],
    *,
    vocab_size: int,
    max_length: int = 77,
    min_frequency: int = 2,
) -> dict[str, bytes]:
    """Learns merges from `captions`.

    Any text can be written in the result: its first 512 tokens are the bytes, alone and
    at the end of a word.

    Args:
        captions: read once.
        vocab_size: ids at most, the bytes and the two special tokens included.
        max_length: ids per prompt that the tokenizer's config names.
        min_frequency: a pair seen less often is not merged.

    Returns:
        File name to content: vocab.json, merges.txt and tokenizer_config.json.
    """
    files = byte_vocabulary()
    letters = list(json.loads(files["vocab.json"]))[:_BYTES]
    merges = _learn(_words(captions), vocab_size - _BYTES - 2, min_frequency)
    tokens = [*letters, *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    config = json.loads(files["tokenizer_config.json"])
    config["model_max_length"] = max_length
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(lines).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _words(captions: Iterable[str]) -> Counter[Word]:
    """Counts words, each as its bytes' characters, the last one marked."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = [normalizers.NFC(), normalizers.Lowercase()]
    normalize = normalizers.Sequence(steps).normalize_str
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ).pre_tokenize_str
    words: Counter[Word] = Counter()
    for caption in captions:
        for text, _ in split(normalize(caption)):
            words[(*text[:-1], text[-1] + "</w>")] += 1
    return words


def _learn(counts: Counter[Word], most: int, min_frequency: int) -> list[Pair]:
    """The most frequent pair first, of equals the first in the alphabet."""
    words = [list(word) for word in counts]
    weights = list(counts.values())
    frequency: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            frequency[pair] += weights[i]
            places[pair].add(i)
    merges: list[Pair] = []
    while len(merges) < most and frequency:
        pair = min(frequency, key=lambda p: (-frequency[p], p))
        if frequency[pair] < min_frequency:
            break
        merges.append(pair)
        for i in places.pop(pair):
            merged = _merge(words[i], pair)
            for old in itertools.pairwise(words[i]):
                frequency[old] -= weights[i]
            for new in itertools.pairwise(merged):
                frequency[new] += weights[i]
                places[new].add(i)
            words[i] = merged
        del frequency[pair]
    return merges


def _merge(word: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
