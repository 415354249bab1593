"""Which files a model on disk consists of, and opening each by what it holds."""

import re
from pathlib import Path
from typing import Literal

from sdjax.errors import SdjaxError
from sdjax.weights.folder_write import weights_stem
from sdjax.weights.json_file import read_json
from sdjax.weights.safetensors_file import open_safetensors
from sdjax.weights.tensors import Tensor, TensorFile
from sdjax.weights.torch_file import open_torch

Format = Literal["diffusers", "single-file", "orbax"]

ORBAX_CONFIG = "sdjax.json"
URL_SCHEMES = ("gs", "s3", "az")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
MAX_TOKENIZER_FILE = 64 * 2**20


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL such as gs://bucket/model."""
    return "://" in str(path)


def check_url(path: str | Path) -> None:
    """Refuses a URL of a kind that Orbax knows nothing of.

    Raises:
        SdjaxError: naming the URL and the kinds that there are.
    """
    scheme = str(path).partition("://")[0]
    if is_remote(path) and scheme not in URL_SCHEMES:
        kinds = ", ".join(f"{name}://" for name in URL_SCHEMES)
        raise SdjaxError(
            f"{path} is a URL that sdjax cannot reach: give a local path, or an Orbax "
            f"folder at one of {kinds}"
        )


def detect(path: str | Path) -> Format:
    """Says what kind of checkpoint lies at `path`, by what it holds.

    Raises:
        SdjaxError: if nothing is there, or a folder that is no model.
    """
    if str(path) == "":
        raise SdjaxError("the path of the model is empty")
    if is_remote(path):
        check_url(path)
        return "orbax"
    place = Path(path)
    try:
        if place.is_file():
            return "single-file"
        if (place / "model_index.json").is_file():
            return "diffusers"
        if (place / ORBAX_CONFIG).is_file():
            return "orbax"
        exists = place.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SdjaxError(f"cannot read {str(path)!r:.200}: {reason}") from None
    if exists:
        raise SdjaxError(
            f"{place} has neither model_index.json (a diffusers folder) nor "
            f"{ORBAX_CONFIG} (an Orbax folder of sdjax)"
        )
    raise SdjaxError(f"there is no file or folder {place}")


def open_file(file: Path) -> TensorFile:
    """Opens a weights file by its first bytes, not by its name.

    Raises:
        SdjaxError: if it is malformed or of no known kind.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise SdjaxError(f"cannot read {file}: {error.strerror}") from None
    if head.startswith((b"version https", b"version ")):
        raise SdjaxError(f"{file} is a git-lfs pointer, not the weights themselves")
    if head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
        return open_torch(file)
    if len(head) == 9 and head[8:9] != b"{":
        raise SdjaxError(
            f"{file} is no model: it is neither safetensors nor a torch checkpoint"
        )
    return open_safetensors(file)


def component_tensors(
    folder: Path, component: str, variant: str | None
) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one component of a diffusers folder, and whether in `variant`.

    Raises:
        SdjaxError: if there is no weights file, or one of its shards is missing.
    """
    place = folder / component
    for tried in dict.fromkeys((variant, None)):
        for file in _candidates(component, tried):
            if (place / file).is_file():
                is_variant = tried == variant
                if ".index." in file:
                    return _sharded(place / file), is_variant
                return open_file(place / file).tensors, is_variant
    others = sorted(
        {
            match[1]
            for file in place.glob("*")
            if (match := re.search(r"model\.(\w+)\.(?:safetensors|bin)$", file.name))
        }
    )
    hint = f"; it has variant={others[0]!r}" if others else ""
    raise SdjaxError(f"{place} has no {_candidates(component, None)[0]}{hint}")


def _candidates(component: str, variant: str | None) -> list[str]:
    """Names a component's weights may have, best first."""
    stem = weights_stem(component)
    old = "pytorch_model" if stem == "model" else stem
    dot = f".{variant}" if variant else ""
    return [
        f"{stem}{dot}.safetensors",
        f"{stem}.safetensors.index{dot}.json",
        f"{old}{dot}.bin",
        f"{old}.bin.index{dot}.json",
    ]


def _sharded(index: Path) -> dict[str, Tensor]:
    """Follows an index's weight_map; shards lie beside it and nowhere else."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SdjaxError(f"{index}: weight_map must name a file for every tensor")
    shards: dict[str, TensorFile] = {}
    for name in weight_map.values():
        # A plain name, so that no index makes us open what is not the model's.
        if (
            not isinstance(name, str)
            or name in ("", ".", "..")
            or re.search(r"[/\\\x00]", name)
        ):
            raise SdjaxError(f"{index}: {name!r:.120} is not a file beside it")
        if name not in shards:
            if not (index.parent / name).is_file():
                raise SdjaxError(f"{index} names {name!r:.120}, which is missing")
            shards[name] = open_file(index.parent / name)
    tensors: dict[str, Tensor] = {}
    for key, name in weight_map.items():
        if key not in shards[name].tensors:
            raise SdjaxError(f"{index}: {name} does not hold {key!r:.120}")
        tensors[key] = shards[name].tensors[key]
    spare = {key for shard in shards.values() for key in shard.tensors} - set(tensors)
    if spare:
        raise SdjaxError(f"{index} does not list {min(spare)!r:.120}, which is there")
    return tensors


def tokenizer_files(folder: Path) -> dict[str, dict[str, bytes]]:
    """The tokenizers of a folder: component -> file name -> bytes.

    Raises:
        SdjaxError: if a tokenizer's file cannot be read or is too large.
    """
    result: dict[str, dict[str, bytes]] = {}
    for component in ("tokenizer", "tokenizer_2"):
        for name in TOKENIZER_FILES:
            file = folder / component / name
            if file.is_file():
                if file.stat().st_size > MAX_TOKENIZER_FILE:
                    raise SdjaxError(f"{file} is too large for a tokenizer's file")
                result.setdefault(component, {})[name] = file.read_bytes()
    return result
