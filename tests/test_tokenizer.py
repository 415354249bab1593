"""The tokenizer against transformers' own, and the byte vocabulary by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sdjax.errors import SdjaxError
from sdjax.text import Tokenizer, byte_vocabulary, read_tokenizer_files

BOS, EOS = 512, 513
BYTES = byte_vocabulary()
MERGES = ["a n", "t h", "e r</w>", "an d</w>", "th e</w>", "an d", "r and"]
PROMPTS = [
    "",
    " ",
    "the hand and Anderson",
    "It's 2023 &amp; café 日本 🙂",
    "Hello,   WORLD!!! don't\tthey'll\n\n",
    "a<|endoftext|>b <|startoftext|>",
    "Å and A\u030a, ﬁ, ǅ, ẞ",
    "the " * 73 + "rand 🙂 Two  THREE",
    "x" * 200,
]
GOLDEN = {
    "a photo of an astronaut riding a horse on mars": (
        [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]
    ),
    "a  virus monster is playing guitar, oil on canvas": (
        [320, 11808, 6060, 533, 1629, 5084, 267, 2870, 525, 7483]
    ),
    "Hello,   WORLD!!! don't": [3306, 267, 1002, 995, 847, 713],
    "It's 2023 & café 日本 🙂": (
        [585, 568, 273, 271, 273, 274, 261, 15304, 39121, 19277, 361, 14860]
    ),
    "!": [256],
}


def merged_vocabulary(**config) -> dict[str, bytes]:
    """The byte vocabulary with a few merges, so that tokens span bytes."""
    vocabulary = json.loads(BYTES["vocab.json"])
    tokens = [token for token in vocabulary if not token.startswith("<|")]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *MERGES, ""]).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def reference(folder):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def reference_ids(folder, prompts):
    encoded = reference(folder)(
        prompts, padding="max_length", truncation=True, max_length=77
    )
    return np.array(encoded["input_ids"])


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_ids_are_those_of_transformers(tmp_path, pad_token):
    files = merged_vocabulary(pad_token=pad_token)
    folder = write(tmp_path / "tokenizer", files)
    ids = Tokenizer.from_files(files, pad_token_id=7)(PROMPTS).ids
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, reference_ids(folder, PROMPTS))


@pytest.mark.parametrize("kept", [["tokenizer.json"], None])
def test_newer_folders(tmp_path, kept):
    old = write(tmp_path / "old", merged_vocabulary(pad_token="!"))
    clip = reference(old)
    clip(["the"], padding="max_length", truncation=True, max_length=5)
    clip.save_pretrained(tmp_path / "new")
    files = read_tokenizer_files(tmp_path / "new")
    files = {name: files[name] for name in kept or files}
    ids = Tokenizer.from_files(files, pad_token_id=0)(PROMPTS).ids
    np.testing.assert_array_equal(ids, reference_ids(old, PROMPTS))


def test_special_tokens_map_names_the_padding(tmp_path):
    files = merged_vocabulary(pad_token="<|endoftext|>")
    files["special_tokens_map.json"] = b'{"pad_token": {"content": "!"}}'
    tokenizer = Tokenizer.from_files(files, pad_token_id=9)
    assert tokenizer.pad_token_id == 0
    folder = write(tmp_path, files)
    np.testing.assert_array_equal(
        tokenizer(PROMPTS).ids, reference_ids(folder, PROMPTS)
    )


def test_added_tokens_get_their_ids():
    files = BYTES | {"added_tokens.json": b'{"<cat>": 514}'}
    tokenizer = Tokenizer.from_files(files, pad_token_id=0)
    assert tokenizer.vocab_size == 515
    assert 514 in tokenizer(["a <cat>"]).ids


def test_byte_vocabulary_by_hand():
    vocabulary = json.loads(BYTES["vocab.json"])
    assert sorted(vocabulary.values()) == list(range(514))
    tokenizer = Tokenizer.from_files(BYTES, max_length=8, pad_token_id=0)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (514, EOS)
    ids, dropped = tokenizer(["ab", "é", ""])
    first, end = vocabulary["a"], vocabulary["b</w>"]
    assert ids[0].tolist() == [BOS, first, end, *[EOS] * 5]
    # é is the bytes C3 A9, which print in Latin-1 and so stand for themselves.
    e_acute = [vocabulary["Ã"], vocabulary["©</w>"]]
    assert ids[1].tolist() == [BOS, *e_acute, *[EOS] * 5]
    assert ids[2].tolist() == [BOS, *[EOS] * 7]
    assert dropped == ["", "", ""]


def test_padding_is_the_argument_where_no_file_names_one():
    files = {name: BYTES[name] for name in ("vocab.json", "merges.txt")}
    tokenizer = Tokenizer.from_files(files, max_length=6, pad_token_id=3)
    assert tokenizer(["a"]).ids[0, 2:].tolist() == [EOS, 3, 3, 3]


def test_dropped_text_is_named():
    tokenizer = Tokenizer.from_files(BYTES, pad_token_id=0)
    prompt = "x " * 73 + "ab Two  THREE, 日本"
    ids, dropped = tokenizer([prompt, "x " * 75, "x " * 76])
    assert dropped == ["Two  THREE, 日本", "", "x"]
    assert (ids[:, -1] == EOS).all()
    assert (ids[:, 0] == BOS).all()


def test_text_and_recipes_import_no_jax():
    code = "import sys, sdjax.text, sdjax.recipe; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_prompts():
    assert Tokenizer.from_files(BYTES, pad_token_id=0)([]).ids.shape == (0, 77)


@pytest.mark.parametrize("prompts", ["a fox", [b"a fox"], [None], [3], ["\ud800"]])
def test_prompts_must_be_text(prompts):
    with pytest.raises(SdjaxError, match="prompt"):
        Tokenizer.from_files(BYTES, pad_token_id=0)(prompts)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer="),
        ({"vocab.json": BYTES["vocab.json"]}, "holds no tokenizer"),
        (BYTES | {"vocab.json": b"{"}, "vocab.json is not JSON"),
        (BYTES | {"vocab.json": b"[" * 10**5}, "vocab.json is not JSON"),
        (BYTES | {"vocab.json": b"\xff\xfe\x00"}, "vocab.json is not JSON"),
        (BYTES | {"vocab.json": b"[1]"}, "must hold a JSON object"),
        (BYTES | {"vocab.json": b'{"a": "b"}'}, "gives 'a' the id 'b'"),
        (BYTES | {"vocab.json": b'{"a": true}'}, "the id True"),
        (BYTES | {"vocab.json": b'{"a": 9999999999}'}, "the id 9999999999"),
        (BYTES | {"merges.txt": b"#version: 0.2\nno such"}, "cannot be read"),
        (BYTES | {"merges.txt": b"\xff\xff\n"}, "cannot be read"),
        (BYTES | {"tokenizer.json": b'{"added_tokens": 3}'}, "cannot be read"),
        (BYTES | {"tokenizer_config.json": b'{"auto_map": {}}'}, "run code"),
        (
            BYTES | {"tokenizer_config.json": b'{"tokenizer_class": "T5Tokenizer"}'},
            "T5Tokenizer",
        ),
    ],
)
def test_bad_files_are_one_sentence(files, message):
    with pytest.raises(SdjaxError, match=message) as error:
        Tokenizer.from_files(files, pad_token_id=0, source="some/folder")
    assert str(error.value).startswith("some/folder")
    assert "\n" not in str(error.value)


def test_config_cannot_reach_the_constructor(tmp_path):
    canary = tmp_path / "canary"
    config = {"vocab_file": str(canary), "vocab": {"x": 0}, "trust_remote_code": True}
    files = BYTES | {"tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.from_files(files, pad_token_id=0)
    assert tokenizer.vocab_size == 514


def test_folders(tmp_path):
    inside = write(tmp_path / "tokenizer", BYTES | {"unrelated.bin": b"x"})
    assert read_tokenizer_files(inside) == BYTES
    assert read_tokenizer_files(tmp_path) == BYTES
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "none", inside / "vocab.json"):
        with pytest.raises(SdjaxError, match="holds no tokenizer") as error:
            Tokenizer.from_folder(missing, pad_token_id=0)
        assert str(missing) in str(error.value)


@pytest.mark.parity
def test_golden_ids_of_the_real_vocabulary():
    folder = os.environ.get("SDJAX_CLIP_TOKENIZER")
    if not folder:
        pytest.skip("SDJAX_CLIP_TOKENIZER names no folder of CLIP's vocabulary")
    tokenizer = Tokenizer.from_folder(folder, pad_token_id=0)
    assert tokenizer.vocab_size == 49408
    for row, tokens in zip(tokenizer([*GOLDEN]).ids, GOLDEN.values(), strict=True):
        padding = [49407] * (76 - len(tokens))
        assert row.tolist() == [49406, *tokens, *padding]
    np.testing.assert_array_equal(
        tokenizer(PROMPTS).ids, reference_ids(folder, PROMPTS)
    )
