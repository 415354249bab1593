"""Progress from inside the compiled loop, Ctrl-C, and the persistent cache."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

import sdjax
from sdjax import parallel, progress


@jax.jit
def count(limit, number):
    def turn(state):
        i, _ = state
        return i + 1, progress.report(number, i + 1, platform="cpu")

    return jax.lax.while_loop(
        lambda state: (state[0] < limit) & ~state[1], turn, (0, False)
    )[0]


def test_each_step_is_heard_once_and_in_order():
    steps = []
    with progress.listening(steps.append) as listener:
        count(5, listener.number).block_until_ready()
    assert steps == [1, 2, 3, 4, 5]


def test_stop_ends_the_loop_at_its_next_turn():
    def on_step(step):
        listener.stop = step == 3

    with progress.listening(on_step) as listener:
        assert count(1000, listener.number) == 3


def test_an_error_in_the_listener_stops_the_loop_and_is_kept():
    def on_step(step):
        raise RuntimeError(f"at {step}")

    with progress.listening(on_step) as listener:
        assert count(1000, listener.number) == 1
    assert str(listener.error) == "at 1"


def test_nobody_listens():
    assert count(4, np.int32(progress.NOBODY)) == 4


def test_other_backends_report_through_a_host_callback():
    steps = []

    @jax.jit
    def twice(number):
        first = progress.report(number, jnp.int32(1), platform="tpu")
        return first | progress.report(number, jnp.int32(2), platform="tpu")

    with progress.listening(steps.append) as listener:
        assert not twice(listener.number)
    assert sorted(steps)[-1] == 2


@pytest.mark.parametrize("sampler", ["euler", "heun", "plms"])
def test_the_bar_reaches_its_end(sampler, capsys):
    mesh = parallel.make_mesh(jax.devices()[:2])
    sdjax.generate(
        ["a", "b"],
        model=tiny_model(),
        num_inference_steps=4,
        sampler=sampler,
        mesh=mesh,
        progress=True,
    )
    assert "4/4" in capsys.readouterr().err


def interrupt_main_thread():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_interrupt_stops_within_a_step(monkeypatch):
    steps = []

    def hear(listener, step):
        steps.append(step)
        if step == 5:
            interrupt_main_thread()
            while not listener.stop:  # the main thread has to notice it first
                time.sleep(0.001)
        return listener.stop

    monkeypatch.setattr(progress.Listener, "hear", hear)
    with pytest.raises(KeyboardInterrupt):
        sdjax.generate("a", model=tiny_model(), num_inference_steps=1000)
    assert max(steps) == 5


def test_a_run_that_lost_its_listener_stops():
    with progress.listening(lambda step: None) as listener:
        pass
    assert count(1000, listener.number) == 1


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, sys.argv[1])
    import jax
    from tiny import tiny_model
    import sdjax
    model = tiny_model()
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    sdjax.generate("a fox", model=model, num_inference_steps=1)
    print(hits.count("/jax/compilation_cache/cache_hits"))
    """
)


@pytest.mark.slow
def test_a_second_process_finds_the_program_in_the_cache(tmp_path):
    environment = os.environ | {"SDJAX_CACHE_DIR": str(tmp_path / "cache")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)]
    hits = [
        int(
            subprocess.run(
                command, env=environment, capture_output=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    assert hits[0] == 0
    assert hits[1] >= 1
    assert (tmp_path / "cache" / "compiled").stat().st_mode & 0o777 == 0o700
