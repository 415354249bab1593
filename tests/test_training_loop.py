"""The loop, on a toy: what stops it, what it writes, and how it goes on."""

import dataclasses
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
import toy_run
from toy_run import Points

from sdjax.errors import SdjaxError
from sdjax.training import logging
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.config import CheckpointConfig, DataConfig, OptimizerConfig
from sdjax.training.resume import batch_mesh


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy_run.use_toy(monkeypatch)


def result(folder):
    """Everything that must be the same, as bytes."""
    with Checkpoints(folder / "checkpoints", keep=9) as checkpoints:
        restored = checkpoints.restore()
    arrays = {name: array.tobytes() for name, array in restored.arrays.items()}
    losses = (folder / "losses.jsonl").read_bytes()
    return restored.step, arrays, restored.run, losses


def lines(folder):
    text = (folder / "losses.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def interrupting(monkeypatch, step, number=signal.SIGTERM, times=1):
    """Sends the process a signal when step `step` is logged."""
    write = logging.LossLog.write

    def write_and_signal(self, at, metrics, **more):
        write(self, at, metrics, **more)
        for _ in range(times * (at == step)):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(logging.LossLog, "write", write_and_signal)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        toy_run.use_toy(monkeypatch)
        toy_run.run(folder)
    return result(folder)


def test_it_learns_and_logs_every_step(tmp_path):
    going = toy_run.run(tmp_path, steps=120)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == list(range(1, 121))
    assert logged[-1]["loss"] < 0.1 < logged[0]["loss"]
    np.testing.assert_allclose(going.learned()["line"], [1, -2, 0.5], atol=0.2)
    assert going.learned()["slope"].shape == (3,)
    assert os.listdir(tmp_path / "tensorboard")


@pytest.mark.parametrize("step", [1, 3, 4, 11])
def test_stopped_anywhere_it_goes_on_as_if_never(
    tmp_path, monkeypatch, undisturbed, step
):
    with monkeypatch.context() as patch:
        interrupting(patch, step)
        stopped = toy_run.run(tmp_path)
    assert stopped.step == step and len(lines(tmp_path)) == step
    assert toy_run.run(tmp_path).step == 12
    assert result(tmp_path) == undisturbed


def test_lines_after_the_checkpoint_are_cut(tmp_path, undisturbed):
    toy_run.run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "00000012")  # as if killed before
    again = toy_run.run(tmp_path)
    assert again.log_size == len(undisturbed[3])
    assert result(tmp_path) == undisturbed


def test_the_second_interrupt_ends_it_at_once(tmp_path, monkeypatch):
    interrupting(monkeypatch, 3, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        toy_run.run(tmp_path)


def test_a_loss_that_is_not_finite_stops_and_saves_the_step_before(tmp_path):
    with pytest.raises(SdjaxError, match=r"step 6 is nan.*point 5\.0") as caught:
        toy_run.run(tmp_path, Points(bad=(5,)))
    assert "on_nan=skip" in str(caught.value)
    assert result(tmp_path)[0] == 5 and len(lines(tmp_path)) == 5
    stopped = toy_run.run(tmp_path / "5", steps=5)  # the same five steps alone
    with Checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        arrays = checkpoints.restore().arrays
    np.testing.assert_array_equal(arrays["params.line"], stopped.state.params["line"])
    assert arrays["step"] == 5
    skipped = toy_run.run(tmp_path, Points(bad=(5,)), on_nan="skip")
    assert skipped.step == 12 and skipped.skipped == 1


def test_skipping_counts_names_and_resumes_alike(tmp_path, monkeypatch):
    bad = (2, 7)
    whole = toy_run.run(tmp_path / "whole", Points(bad=bad), on_nan="skip")
    assert whole.skipped == 2
    logged = lines(tmp_path / "whole")
    assert logged[2]["loss"] == "nan" and logged[2]["keys"][0] == "point 2.0"
    assert "keys" not in logged[3]
    with monkeypatch.context() as patch:
        interrupting(patch, 5)
        toy_run.run(tmp_path / "cut", Points(bad=bad), on_nan="skip")
    toy_run.run(tmp_path / "cut", Points(bad=bad), on_nan="skip")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_frozen_components_must_be_those_it_began_with(tmp_path, monkeypatch):
    toy_run.run(tmp_path, steps=4)
    init = toy_run.init_state

    def changed(config, params):
        return init(config, {**params, "slope": params["slope"] + 1})

    monkeypatch.setattr(toy_run, "init_state", changed)
    toy_run.use_toy(monkeypatch)
    with pytest.raises(SdjaxError, match=r"^slope of this run changed"):
        toy_run.run(tmp_path)


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(SdjaxError, match="no data left"):
        toy_run.run(tmp_path, Points(last=6))


def test_unreadable_data_stops_with_the_state_saved(tmp_path):
    class Broken(Points):
        def __next__(self):
            if self.at == 6:
                raise SdjaxError("too many bad pictures in shard 3")
            return super().__next__()

    with pytest.raises(SdjaxError, match="shard 3"):
        toy_run.run(tmp_path, Broken())
    assert result(tmp_path)[0] == 6


def test_minutes_save_too(tmp_path):
    often = CheckpointConfig(every_steps=None, every_minutes=1e-9, keep=20)
    going = toy_run.run(tmp_path, checkpoints=often)
    assert going.checkpoints.steps() == list(range(1, 13))


def test_as_many_devices_are_used_as_divide_the_batch(tmp_path):
    assert jax.local_device_count() == 8
    config = lambda batch, parts=1: dataclasses.replace(
        toy_run.CONFIG,
        data=DataConfig(path="points", batch_size=batch),
        optimizer=OptimizerConfig(accumulation=parts),
    )
    assert batch_mesh(config(8)).size == batch_mesh(config(32, 4)).size == 8
    for wrong, used in ((config(6), 6), (config(7), 7), (config(32, 8), 4)):
        with pytest.warns(UserWarning, match=f"{used} of 8 devices"):
            assert batch_mesh(wrong).size == used


def test_devices_share_a_batch_without_changing_the_result(tmp_path, monkeypatch):
    spread = toy_run.run(tmp_path / "8")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    alone = toy_run.run(tmp_path / "1")
    assert (spread.mesh.size, alone.mesh.size) == (8, 1)
    one, other = (going.state.params["line"] for going in (spread, alone))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_signals_are_left_alone_in_other_threads(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    failed = []

    def work():
        try:
            toy_run.run(tmp_path, steps=2)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGTERM) == before
