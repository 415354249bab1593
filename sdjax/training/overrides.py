"""A config from its file, single fields replaced, and two configs compared.

`--set optimizer.learning_rate=1e-4` names a field of nested frozen dataclasses by its
path; the text after "=" is read as the field's own type.
"""

import ast
import dataclasses
import difflib
import math
import runpy
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from sdjax.config import from_json, to_json
from sdjax.errors import SdjaxError
from sdjax.training.config import TrainConfig

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_WANTED = {bool: "true or false", int: "a whole number", float: "a finite number"}


def load_config(path: str) -> TrainConfig:
    """Runs a config file and returns what its `get_config()` gives.

    Raises:
        SdjaxError: if the file cannot be read or run, or gives no TrainConfig.
    """
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise SdjaxError(f"cannot read the config {path}: {error.strerror}") from None
    except SdjaxError:
        raise
    except Exception as error:  # whatever the user's own file raises
        reason = f"{type(error).__name__}: {error}"
        raise SdjaxError(f"the config {path} fails with {reason}") from error
    if not callable(names.get("get_config")):
        raise SdjaxError(f"the config {path} defines no function get_config()")
    config = names["get_config"]()
    if not isinstance(config, TrainConfig):
        raise SdjaxError(
            f"get_config() of {path} gives {config!r:.80}, but must give a "
            "sdjax.training.config.TrainConfig"
        )
    return config


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Replaces fields: each setting is "path.to.field=value".

    Values are read by the field's type: true or false; numbers; none where the field
    may be None; tuples as `a,b` or as Python writes them, `("a, b", "c")`.

    Raises:
        SdjaxError: if there is no such field, or the value is not of its type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise SdjaxError(
                f"--set {setting}: must be a field and its value, as steps=1000"
            )
        path = path.strip()
        config = _replaced(config, path.split("."), text.strip(), path)
    return config


def differences(
    before: dict[str, Any], after: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Fields, by path, in which two configs as JSON differ, with both values."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON has it: tuples are lists."""
    return _listed(to_json(config))


def config_from_json(data: Any) -> TrainConfig:
    """The config that `config_to_json` gave.

    Raises:
        SdjaxError: if it has a field that a TrainConfig lacks.
    """
    return from_json(data, TrainConfig)


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(one) for name, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, tuple) else value


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _replaced(config: Any, path: list[str], text: str, whole: str) -> Any:
    """`config` with the field at `path` read from `text`."""
    types_of = typing.get_type_hints(type(config))
    name, *rest = path
    if name not in types_of:
        raise _unknown(config, name, whole)
    value = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(value):
            raise SdjaxError(f"--set {whole}: {name} is {value!r:.80}, with no fields")
        new = _replaced(value, rest, text, whole)
    else:
        new = _parse(text, types_of[name], whole)
    return dataclasses.replace(config, **{name: new})


def _unknown(config: Any, name: str, whole: str) -> SdjaxError:
    fields = [field.name for field in dataclasses.fields(config)]
    prefix = whole[: whole.rindex(name)] if "." in whole else ""
    everywhere = dict(_leaves(to_json(config), prefix))
    close = difflib.get_close_matches(name, fields, 3)
    inside = [other for other in everywhere if other.split(".")[-1] == name]
    near = [prefix + one for one in close] + inside
    hint = f"did you mean {' or '.join(near[:3])}?" if near else ""
    hint = hint or f"it can be {', '.join(prefix + field for field in fields)}"
    return SdjaxError(f"--set {whole}: there is no field {whole!r}; {hint}")


def _parse(text: str, annotation: Any, name: str) -> Any:
    """Reads `text` as a value of the type `annotation`."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(annotation)
        if text.lower() == "none" and type(None) in options:
            return None
        return _parse(text, next(o for o in options if o is not type(None)), name)
    if origin is Literal:
        options = typing.get_args(annotation)
        if text not in options:
            raise SdjaxError(f"--set {name}={text}: it can be {', '.join(options)}")
        return text
    if origin is tuple:
        return _parse_tuple(text, typing.get_args(annotation)[0], name)
    if dataclasses.is_dataclass(annotation):
        raise SdjaxError(f"--set {name}: it has fields of its own; set those")
    return _scalar(text, annotation, name)


def _parse_tuple(text: str, element: Any, name: str) -> tuple[Any, ...]:
    parts: list[Any] = [part.strip() for part in text.split(",")] if text else []
    if text[:1] in ("(", "["):
        try:
            parts = list(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError):
            raise SdjaxError(
                f"--set {name}={text}: is no tuple as Python writes it"
            ) from None
    return tuple(_parse(str(part), element, name) for part in parts)


def _scalar(text: str, kind: type, name: str) -> Any:
    if kind is str:
        return text
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        value = float(text)
        if kind is int:
            value = int(text) if text.lstrip("+-").isdigit() else int(value)
            if value != float(text):
                raise ValueError
        if math.isfinite(value):
            return value
    except (ValueError, KeyError, OverflowError):
        pass
    raise SdjaxError(f"--set {name}={text}: must be {_WANTED[kind]}")
