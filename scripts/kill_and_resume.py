"""Shows that a killed run loses nothing: it ends with the bytes of one left alone.

    python scripts/kill_and_resume.py --repeats 100

A tiny diffusion model trains for 40 steps, undisturbed. Then, in each repeat, it trains
again twice: stopped by SIGTERM at every tenth step; and killed by SIGKILL at 20 random
moments, at least a third of them inside a save. What is compared byte for byte is every
array of the last checkpoint (parameters, optimizer, EMA), the key, the position in the
data, the logged losses and the files of the model. A table says what differed.

Each life of a run is a fork of this process, which has imported everything and never
used JAX, and all share one cache of compiled programs: a life costs about a second.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  imported once, for all lives
import tensorboardX  # noqa: F401
from PIL import Image
from transformers import CLIPTokenizer  # noqa: F401

import sdjax
from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.models import init_params
from sdjax.text import byte_vocabulary
from sdjax.training import logging
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from sdjax.training.run import train

STEPS, STOPS, KILLS = 40, 10, 20
MODEL = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(8,),
        layers_per_block=1,
        transformer_depth=(1,),
        num_heads=(1,),
        context_dim=8,
        cross_attention_only=(False,),
        norm_num_groups=4,
    ),
    vae=AutoencoderConfig(
        block_out_channels=(4, 4),
        layers_per_block=1,
        attention_levels=(False, False),
        norm_num_groups=2,
    ),
    text_encoder=TextEncoderConfig(
        vocab_size=514,
        width=8,
        num_layers=1,
        num_heads=1,
        mlp_dim=8,
        max_length=8,
        eos_token_id=513,
        pad_token_id=513,
    ),
    sample_size=16,
)
ASPECTS = ("parameters", "optimizer", "ema", "keys", "position", "losses", "model")


def run_config(root: Path) -> TrainConfig:
    """40 steps over 23 pictures, a save at every third: epochs end inside batches."""
    return TrainConfig(
        init_from=str(root / "origin"),
        data=DataConfig(
            path=str(root / "pictures"),
            batch_size=4,
            resolution=16,
            crop="random",
            flip=0.5,
        ),
        optimizer=OptimizerConfig(warmup_steps=10, schedule="cosine"),
        checkpoints=CheckpointConfig(every_steps=3, every_minutes=None, keep=3),
        steps=STEPS,
        log_every_steps=10,
    )


def make_inputs(root: Path) -> None:
    """A model of random weights, and pictures."""
    files = {"tokenizer": byte_vocabulary()}
    params = init_params(MODEL, jax.random.key(0))
    sdjax.save(sdjax.Model(MODEL, params, files, ""), root / "origin")
    folder = root / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(23):
        pixels = noise.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"noise of the kind {i}")


def live(root: Path, workdir: Path, stops: int | None = None) -> None:
    """One life of a run; with `stops`, it gets SIGTERM at each multiple of it."""
    if stops is not None:
        write = logging.LossLog.write

        def write_and_stop(self, step, metrics, **more):
            write(self, step, metrics, **more)
            if step % stops == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        logging.LossLog.write = write_and_stop
    train(run_config(root), workdir, show=False)


def summarise(workdir: Path, file: Path) -> None:
    """Writes the digest of everything that must be the same, by aspect and name."""
    digest = lambda data: hashlib.sha256(data).hexdigest()
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore()
    assert restored is not None and restored.step == STEPS
    found: dict[str, dict[str, str]] = {aspect: {} for aspect in ASPECTS}
    groups = {"params": "parameters", "opt_state": "optimizer", "step": "optimizer"}
    for name, array in restored.arrays.items():
        aspect = groups.get(name.split(".")[0], "ema")
        found[aspect][name] = f"{array.dtype} {array.shape} {digest(array.tobytes())}"
    found["keys"]["key"] = str(restored.run.pop("key"))
    found["position"] = {name: str(value) for name, value in restored.run.items()}
    found["losses"]["file"] = digest((workdir / "losses.jsonl").read_bytes())
    for path in sorted((workdir / "model").rglob("*")):
        if path.is_file():
            name = str(path.relative_to(workdir))
            found["model"][name] = digest(path.read_bytes())
    file.write_text(json.dumps(found))


class Nursery:
    """Forks lives, and lends them one cache of compiled programs."""

    def __init__(self, root: Path):
        self.root = root
        os.environ["SDJAX_CACHE_DIR"] = str(root / "cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def fork(self, function: Callable[..., None], *arguments) -> int:
        """Runs a function in a process of its own, and returns its id."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def call(self, function: Callable[..., None], *arguments) -> None:
        """Runs a function in a process of its own, to its end."""
        self.expect_success(os.waitpid(self.fork(function, *arguments), 0)[1])

    def expect_success(self, status: int) -> None:
        """Ends everything with what a life wrote, where its status is not 0."""
        if status != 0:
            log = (self.root / "log").read_text()[-4000:]
            raise SystemExit(f"a life ended with status {status}:\n{log}")

    def summary(self, workdir: Path) -> dict[str, dict[str, str]]:
        """What a run left, see `summarise`."""
        file = self.root / "summary.json"
        self.call(summarise, workdir, file)
        return json.loads(file.read_text())


@dataclasses.dataclass
class Count:
    """What was done to the runs of a repeat, and what came of it."""

    stops: int = 0
    kills: int = 0
    kills_in_saves: int = 0
    differences: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def lacks_kills(self) -> bool:
        """Whether there were too few, or less than a third of them in saves."""
        return self.kills < KILLS or 3 * self.kills_in_saves < self.kills


def stopped_run(nursery: Nursery, workdir: Path, count: Count) -> None:
    """Trains to the end, stopped by SIGTERM at every tenth step."""
    for _ in range(STEPS // STOPS):
        nursery.call(live, nursery.root, workdir, STOPS)
        count.stops += 1


def killed_run(
    nursery: Nursery, workdir: Path, count: Count, chance: random.Random
) -> None:
    """Trains to the end, killed by SIGKILL at random moments.

    A life that ends before it is killed ends the run; the next one takes up the rest.
    """
    while count.lacks_kills:
        cut_off = saving(workdir)  # by the kill before, and still lying there
        pid = nursery.fork(live, nursery.root, workdir)
        in_save = chance.random() < 0.5 or 3 * count.kills_in_saves < count.kills
        saves = chance.randint(1, 2)
        seen: set[str] = set()
        until = time.monotonic() + (60 if in_save else chance.uniform(0, 3))
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                nursery.expect_success(status)
                return
            now = saving(workdir) - cut_off
            seen |= {name for name, _, _ in now}
            if in_save and len(seen) >= saves and now:
                time.sleep(chance.uniform(0, 0.03))
                break
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        if os.WIFEXITED(status := os.waitpid(pid, 0)[1]):
            nursery.expect_success(status)
            return
        count.kills += 1
        count.kills_in_saves += bool(saving(workdir) - cut_off)
    nursery.call(live, nursery.root, workdir)


def saving(workdir: Path) -> set[tuple[str, int, int]]:
    """The checkpoints that are being written, or whose writing was cut off.

    Each by its folder's name, number and time of change, which tell two saves of one
    step from each other.
    """
    found = set()
    for path in (workdir / "checkpoints").glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # renamed at this moment
            status = path.stat()
            found.add((path.name, status.st_ino, status.st_mtime_ns))
    return found


def compare(wanted: dict, found: dict, count: Count) -> None:
    for aspect in ASPECTS:
        names = wanted[aspect].keys() | found[aspect].keys()
        differ = [n for n in names if wanted[aspect].get(n) != found[aspect].get(n)]
        count.differences[aspect] = count.differences.get(aspect, 0) + len(differ)


def repeat(nursery: Nursery, number: int, wanted: dict, seed: int) -> Count:
    count, chance = Count(), random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory(dir=nursery.root) as folder:
        runs = [Path(folder) / "stopped"]
        stopped_run(nursery, runs[0], count)
        while count.lacks_kills:
            runs.append(Path(folder) / f"killed-{len(runs)}")
            killed_run(nursery, runs[-1], count, chance)
        for run in runs:
            compare(wanted, nursery.summary(run), count)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fork.*")
    print("repeat  stops  kills  in saves  " + "  ".join(ASPECTS) + "  seconds")
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        nursery = Nursery(Path(folder))
        nursery.call(make_inputs, nursery.root)
        nursery.call(live, nursery.root, nursery.root / "undisturbed")
        wanted = nursery.summary(nursery.root / "undisturbed")
        for number in range(1, arguments.repeats + 1):
            began = time.monotonic()
            count = repeat(nursery, number, wanted, arguments.seed)
            found = [count.differences[aspect] for aspect in ASPECTS]
            total += sum(found)
            cells = [number, count.stops, count.kills, count.kills_in_saves, *found]
            widths = [6, 5, 5, 8, *map(len, ASPECTS)]
            row = "  ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True))
            print(f"{row}  {time.monotonic() - began:7.1f}", flush=True)
    print(f"{arguments.repeats} repeats, {total} differences")
    sys.exit(total != 0)


if __name__ == "__main__":
    main()
