"""CLIP's tokenizer: a prompt becomes [BOS, tokens, EOS, padding], 77 ids.

The ids are those of `transformers.CLIPTokenizer`, which diffusers uses as well.
Radford et al. 2021, section 2.4, arXiv:2103.00020.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from sdjax.errors import SdjaxError

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", None)
# The rest of tokenizer_config.json would reach transformers' constructors unasked.
_CONFIG_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
)
_HINT = "pass tokenizer= (--tokenizer) the tokenizer folder of a Stable Diffusion model"


class Encoded(NamedTuple):
    """Prompts as ids.

    Attributes:
        ids: one row per prompt, padded to the tokenizer's length.
        dropped: per prompt, the text that found no room; "" where all of it did.
    """

    ids: Int32[np.ndarray, "b l"]
    dropped: list[str]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps prompts to ids; build it with `from_files` or `from_folder`.

    Attributes:
        clip: the `transformers.CLIPTokenizer` that does the work.
        max_length: ids per prompt, BOS and EOS included.
        pad_token_id: fills a row after EOS.
    """

    clip: Any
    max_length: int
    pad_token_id: int

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        *,
        max_length: int = 77,
        pad_token_id: int,
        source: str = "the model",
    ) -> "Tokenizer":
        """Builds the tokenizer from the files of a folder, held in memory.

        Args:
            files: name to content; those that are not in `FILES` are left alone.
            max_length: ids per prompt.
            pad_token_id: where the files name no padding token.
            source: what errors call the place the files come from.

        Raises:
            SdjaxError: if files are missing, malformed, or of another tokenizer.
        """
        files = _checked(files, source)
        try:
            clip = _load(files)
        # The Rust tokenizers raise bare Exception for a malformed vocabulary.
        except Exception as error:
            reason = str(error).split("\n", 1)[0]
            raise SdjaxError(
                f"{source} holds a tokenizer that cannot be read ({reason}); {_HINT}"
            ) from error
        if _names_padding(files):
            pad_token_id = clip.pad_token_id
        return cls(clip, max_length, pad_token_id)

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, max_length: int = 77, pad_token_id: int
    ) -> "Tokenizer":
        """Builds the tokenizer of a folder; arguments as for `from_files`."""
        return cls.from_files(
            read_tokenizer_files(path),
            max_length=max_length,
            pad_token_id=pad_token_id,
            source=str(path),
        )

    @property
    def vocab_size(self) -> int:
        """The smallest embedding table that has a row for every id."""
        return max(self.clip.get_vocab().values()) + 1

    def __call__(self, prompts: Sequence[str]) -> Encoded:
        """Encodes each prompt; one that is too long keeps its beginning and EOS.

        Raises:
            SdjaxError: if `prompts` is no sequence of strings of Unicode text.
        """
        _check_prompts(prompts)
        ids = np.full((len(prompts), self.max_length), self.pad_token_id, np.int32)
        dropped = []
        room = self.max_length - 2
        for row, prompt in zip(ids, prompts, strict=True):
            encoding = self.clip(
                prompt,
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            tokens = encoding["input_ids"]
            kept = [self.clip.bos_token_id, *tokens[:room], self.clip.eos_token_id]
            row[: len(kept)] = kept
            fits = len(tokens) <= room
            start = len(prompt) if fits else encoding["offset_mapping"][room][0]
            dropped.append(prompt[start:].strip())
        return Encoded(ids, dropped)


def read_tokenizer_files(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Reads the tokenizer files of a folder, or of the folder `tokenizer` inside it.

    Raises:
        SdjaxError: if there are none.
    """
    for folder in (Path(path), Path(path) / "tokenizer"):
        try:
            present = [name for name in FILES if (folder / name).is_file()]
            files = {name: (folder / name).read_bytes() for name in present}
        except OSError as error:
            raise SdjaxError(
                f"cannot read the tokenizer in {folder}: {error.strerror}"
            ) from error
        if files:
            return files
    raise SdjaxError(f"{path} holds no tokenizer (vocab.json and merges.txt); {_HINT}")


def _checked(files: Mapping[str, bytes], source: str) -> dict[str, bytes]:
    """Keeps what a CLIP tokenizer is made of, and refuses what is none."""
    files = {name: files[name] for name in FILES if name in files}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= {*files}:
        raise SdjaxError(
            f"{source} holds no tokenizer (vocab.json and merges.txt); {_HINT}"
        )
    config = _json(files, "tokenizer_config.json", source)
    if "auto_map" in config:
        raise SdjaxError(
            f"{source}: tokenizer_config.json asks to run code (auto_map), which sdjax "
            f"never does; {_HINT}"
        )
    if config.get("tokenizer_class") not in _CLASSES:
        raise SdjaxError(
            f"{source}: the tokenizer is a {config['tokenizer_class']}, not a "
            f"CLIPTokenizer; {_HINT}"
        )
    for name in FILES:
        if name.endswith(".json"):
            _json(files, name, source)
    _check_vocabulary(_json(files, "vocab.json", source), source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            kept = _json(files, name, source)
            kept = {key: kept[key] for key in _CONFIG_KEYS if key in kept}
            files[name] = json.dumps(kept).encode()
    return files


def _check_vocabulary(vocabulary: dict[str, Any], source: str) -> None:
    """Refuses entries that transformers would pass over, or wrap at 32 bits."""
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise SdjaxError(
                f"{source}: vocab.json gives {token!r:.80} the id {number!r:.80}: ids "
                "are whole numbers from 0"
            )


def _json(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """Parses a file that must hold a JSON object; an absent one is empty."""
    try:
        data = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise SdjaxError(f"{source}: {name} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SdjaxError(f"{source}: {name} must hold a JSON object")
    return data


def _names_padding(files: Mapping[str, bytes]) -> bool:
    names = ("tokenizer_config.json", "special_tokens_map.json")
    return any(json.loads(files.get(name, b"{}")).get("pad_token") for name in names)


def _load(files: Mapping[str, bytes]) -> Any:
    """Hands the files to transformers, which reads folders only."""
    # Without torch, transformers says at import that it can make no models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory(prefix="sdjax-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise SdjaxError(f"prompts must be a sequence of strings, not {prompts!r:.80}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise SdjaxError(f"a prompt must be a string, not {prompt!r:.80}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise SdjaxError(
                f"a prompt must be Unicode text; character {error.start} of "
                f"{prompt!r:.80} is none"
            ) from error
