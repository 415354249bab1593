"""The folder of a run: who trains in it, with what config, and with which versions.

    config.json      the config, every default and override resolved
    versions.jsonl   a line for each start: packages, devices, git revision
    losses.jsonl     a line for each step
    checkpoints/     see `sdjax.training.checkpoint`
    samples/         pictures drawn on the way
    tensorboard/     event files
    model/           the trained model, at the end

Nothing else is written to it but a lock.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sdjax.errors import SdjaxError
from sdjax.training.config import TrainConfig
from sdjax.training.overrides import config_to_json, differences

CONFIG, VERSIONS = "config.json", "versions.jsonl"
MAY_CHANGE = (
    "steps",
    "checkpoints",
    "samples",
    "log_every_steps",
    "on_nan",
    "data.num_workers",
    "data.max_bad_share",
)
"""What may differ from run to run in one folder: fields, or groups of them."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths inside the folder of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One folder for each checkpoint, named for its step."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """One picture for each time that samples were drawn."""
        return self.path / "samples"

    @property
    def losses(self) -> Path:
        """The metrics of every step."""
        return self.path / "losses.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Workdir]:
    """Makes the folder, and keeps every other process from training in it.

    Raises:
        SdjaxError: if it cannot be made, or another process trains in it.
    """
    place = Path(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SdjaxError(f"cannot train in {path}: {error.strerror}") from None
    try:
        _lock(descriptor, place)
        yield Workdir(place)
    finally:
        os.close(descriptor)  # opens the lock, as the kernel does if we are killed


def _lock(descriptor: int, place: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SdjaxError(
            f"another process trains in {place}: choose another --workdir"
        ) from None


def record_config(workdir: Workdir, config: TrainConfig) -> None:
    """Writes the config, or compares it with the one that the folder has.

    Raises:
        SdjaxError: if they differ in more than `MAY_CHANGE`, naming the fields.
    """
    file, data = workdir.path / CONFIG, config_to_json(config)
    if file.exists():
        changed = differences(_read(file), data)
        wrong = [one for one in changed if not _may_change(one[0])]
        if wrong:
            listed = "; ".join(
                f"{name} was {old!r:.60} and is now {new!r:.60}"
                for name, old, new in wrong
            )
            raise SdjaxError(
                f"{workdir.path} holds a run with another config: {listed}. Choose "
                "another --workdir, or the config of that run"
            )
        if not changed:
            return
    write_whole(file, (json.dumps(data, indent=2) + "\n").encode())


def record_versions(workdir: Workdir, step: int) -> None:
    """Appends a line that says what this start runs on."""
    versions = {name: _version(name) for name in ("sdjax", *PACKAGES)}
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "python": platform.python_version(),
        **versions,
        "git": git_revision(Path(__file__).parent),
        "devices": [device.device_kind for device in jax.local_devices()],
    }
    with open(workdir.path / VERSIONS, "a") as file:
        file.write(json.dumps(line) + "\n")


def git_revision(folder: Path) -> str | None:
    """The commit that `folder` is at, with "+" where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):  # not a checkout, or no git
        return None


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file whole or not at all, in place of what is there."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _may_change(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in MAY_CHANGE)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SdjaxError(f"{file} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise SdjaxError(f"{file} is damaged: it is no JSON object")
    return data


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
