"""The smallest vocabulary that writes any text: CLIP's, without its merges.

512 tokens, the 256 bytes and the 256 bytes that end a word, and the two special ones.
Models with random weights use it, so that nothing has to be downloaded for them.
"""

import json


def byte_characters() -> list[str]:
    """Returns the printable character that stands for each byte, 256 of them.

    A byte that prints in Latin-1 stands for itself; the others take the code points
    from 256 on, in order (Radford et al. 2019, the byte-level BPE of GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def byte_vocabulary() -> dict[str, bytes]:
    """Makes a tokenizer folder of 514 tokens; ids 512 and 513 are BOS and EOS.

    Returns:
        File name to content: vocab.json, merges.txt and tokenizer_config.json.
    """
    # Sorting by code point gives CLIP's order: bytes that print come first.
    letters = sorted(byte_characters())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": b"#version: 0.2\n",
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
