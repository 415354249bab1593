"""JSON files from strangers: read with a size limit, every value's type checked."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from sdjax.config import from_json
from sdjax.errors import SdjaxError
from sdjax.weights.limits import check_limits

MAX_JSON = 64 * 2**20


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        SdjaxError: if the file is missing, too large or no JSON object.
    """
    try:
        if file.stat().st_size > MAX_JSON:
            raise SdjaxError(
                f"{file} is larger than a config: {MAX_JSON} bytes at most"
            )
        return parse_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise SdjaxError(f"{file} is missing") from None
    except OSError as error:
        raise SdjaxError(f"cannot read {file}: {error.strerror}") from None


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """Parses a JSON object; `where` is named in errors."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SdjaxError(f"{where} is not valid JSON: {str(error)[:120]!r}") from None
    if not isinstance(data, dict):
        raise SdjaxError(f"{where} must hold a JSON object, not {data!r:.60}")
    return data


class Fields:
    """A config of diffusers or transformers; every getter checks the type.

    A key that is absent, or null, has its default.
    """

    def __init__(self, data: dict[str, Any], file: Path | str):
        self.data = data
        self.file = file

    def wrong(self, key: str, wanted: str) -> SdjaxError:
        """An error that names the file, the key and its value."""
        value = self.data.get(key)
        return SdjaxError(f"{self.file}: {key} is {value!r:.100}; sdjax takes {wanted}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def integer(
        self, key: str, default: int | None = None, *, most: int = 2**24
    ) -> int:
        """A number from 1 to `most`."""
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(key, f"an integer from 1 to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, options: tuple[str, ...], default: str) -> Any:
        """One of `options`."""
        value = self._get(key, default)
        if value not in options:
            raise self.wrong(key, " or ".join(map(repr, options)))
        return value

    def numbers(self, key: str, default: Any, *, length: int | None = None) -> tuple:
        """Integers or flags: a list, or one value for all `length` places."""
        value = self._get(key, default)
        scalar = type(value) in (int, bool)
        if scalar and length is not None:
            return (value,) * length
        fits = isinstance(value, list | tuple) and length in (None, len(value))
        if not fits or not all(map(_is_count, value)):
            raise self.wrong(key, "integers, one per level")
        return tuple(value)

    def names(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A list of names."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(
            isinstance(name, str) for name in value
        ):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def demand(self, allowed: dict[str, tuple[Any, ...]]) -> None:
        """Demands that each key, where present, has one of the allowed values."""
        for key, options in allowed.items():
            if self.data.get(key) is not None and self.data[key] not in options:
                wanted = " or ".join(map(repr, options)) or "no value here"
                raise self.wrong(key, wanted)


def _is_count(value: Any) -> bool:
    return type(value) in (int, bool) and 0 <= value < 2**24


def config_from_json(data: Any, where: str) -> Any:
    """The ModelConfig that `sdjax.config.to_json` wrote, with every type checked.

    Raises:
        SdjaxError: if a field is unknown, missing or of the wrong type.
    """
    try:
        config = from_json(data)
    except (TypeError, ValueError, StopIteration, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise SdjaxError(f"{where}: not a model config: {reason:.150}") from None
    _check(config, type(config), where, "config")
    check_limits(config, where)
    return config


def _check(value: Any, annotation: Any, where: str, name: str) -> None:
    if not _fits(value, annotation):
        raise SdjaxError(f"{where}: {name} is {value!r:.80}, not a {annotation}")
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            _check(inner, hints[field.name], where, f"{name}.{field.name}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin is tuple:
        return type(value) is tuple and all(_fits(v, arguments[0]) for v in value)
    if annotation is int:
        return type(value) is int and 0 <= value < 2**24
    if annotation is float:
        return type(value) in (int, float) and abs(value) < float("inf")
    return type(value) is annotation
