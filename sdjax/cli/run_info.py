"""What `sdjax info` says of the folder of a training run."""

import json
from pathlib import Path
from typing import Any

from sdjax.errors import SdjaxError


def is_run(path: str) -> bool:
    """Whether `sdjax train` has worked in a folder."""
    place = Path(path)
    return (place / "config.json").is_file() and (place / "checkpoints").is_dir()


def describe_run(path: str) -> dict[str, Any]:
    """The steps done, the checkpoints, the last loss, and what it is trained on.

    Raises:
        SdjaxError: if a file of the run is damaged.
    """
    place = Path(path)
    config = _read(place / "config.json")
    names = [one.name for one in (place / "checkpoints").iterdir()]
    checkpoints = sorted(int(name) for name in names if name.isdecimal())
    last = _last_line(place / "losses.jsonl")
    starts = place / "versions.jsonl"
    return {
        "path": path,
        "task": config.get("task"),
        "steps": f"{last.get('step', 0)} of {config.get('steps')}",
        "loss": last.get("loss"),
        "checkpoints": ", ".join(map(str, checkpoints)) or None,
        "starts": len(starts.read_bytes().splitlines()) if starts.is_file() else 0,
        "data": (config.get("data") or {}).get("path"),
        "began from": config.get("init_from"),
        "model": str(place / "model") if (place / "model").is_dir() else None,
    }


def _last_line(file: Path) -> dict[str, Any]:
    lines = file.read_bytes().splitlines() if file.is_file() else []
    try:
        return json.loads(lines[-1]) if lines else {}
    except ValueError:  # cut off by a kill
        return json.loads(lines[-2]) if len(lines) > 1 else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SdjaxError(f"{file} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise SdjaxError(f"{file} is damaged: it is no JSON object")
    return data
