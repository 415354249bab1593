"""Progress out of a compiled loop, and a stop into it.

`report` stands inside the loop: each turn tells the host which step it is at and
learns whether to go on. On the CPU it is a typed foreign call (XLA's FFI), found by
name, so that the program can stay in JAX's persistent compilation cache; JAX never
caches a program that holds one of its own host callbacks, which other backends use.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Int

NOBODY = 0
"""In place of a listener's number: the program runs to its end."""

_TARGET = "sdjax_progress"


@dataclasses.dataclass
class Listener:
    """Hears the steps of one running program.

    Attributes:
        number: what the program is told, so that its reports come here.
        on_step: called with the steps completed, never twice for one of them.
        stop: set it to end the loop at its next turn.
        error: what `on_step` raised; it ends the loop too.
    """

    number: int
    on_step: Callable[[int], None]
    stop: bool = False
    error: BaseException | None = None
    _seen: int = -1
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def hear(self, step: int) -> bool:
        """Takes one report; returns whether the loop is to stop."""
        with self._lock:  # several devices report the same step
            if step > self._seen:
                self._seen = step
                self._tell(step)
        return self.stop

    def _tell(self, step: int) -> None:
        try:
            self.on_step(step)
        except BaseException as error:  # nothing may unwind through XLA's frames
            self.error, self.stop = error, True


_listeners: dict[int, Listener] = {}
_numbers = itertools.count(1)


@contextlib.contextmanager
def listening(on_step: Callable[[int], None]) -> Iterator[Listener]:
    """Registers a listener for as long as the program runs."""
    listener = Listener(next(_numbers) % (2**31 - 1) + 1, on_step)
    _listeners[listener.number] = listener
    try:
        yield listener
    finally:
        del _listeners[listener.number]


def report(
    number: Int[Array, ""], step: Int[Array, ""], *, platform: str
) -> Bool[Array, ""]:
    """Reports from a compiled loop that `step` steps are done.

    Args:
        number: that of the listener, or `NOBODY`.
        step: steps completed so far.
        platform: the one it will run on: "cpu", "gpu" or "tpu".

    Returns:
        Whether the loop is to stop; so it is where the listener has gone away.
    """
    message = jnp.stack([number, step]).astype(jnp.int32)
    if platform == "cpu":
        _register()
        result = jax.ShapeDtypeStruct((), jnp.int32)
        stop = jax.ffi.ffi_call(_TARGET, result, has_side_effect=True)(message)
        return stop != 0
    return io_callback(
        lambda message: np.bool_(_hear(*message)),
        jax.ShapeDtypeStruct((), jnp.bool_),
        message,
    )


def _hear(number: int, step: int) -> bool:
    listener = _listeners.get(int(number))
    if listener is None:  # a run whose listener is gone is one that was interrupted
        return int(number) != NOBODY
    return listener.hear(int(step))


# What follows restates the part of XLA's C interface (xla/ffi/api/c_api.h, version
# 0.x) that a handler with one argument and one result touches.

_Size = ctypes.c_size_t
_Pointer = ctypes.c_void_p
_METADATA_EXTENSION = 1
_EXECUTE = 3


class _Extension(ctypes.Structure):
    pass


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", _Size),
        ("extension_start", _Pointer),
        ("dtype", ctypes.c_int),
        ("data", ctypes.POINTER(ctypes.c_int32)),
        ("rank", ctypes.c_int64),
        ("dims", _Pointer),
    )


class _Buffers(ctypes.Structure):
    """XLA_FFI_Args and XLA_FFI_Rets, which are laid out alike."""

    _fields_ = (
        ("struct_size", _Size),
        ("extension_start", _Pointer),
        ("size", ctypes.c_int64),
        ("types", _Pointer),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ApiVersion(ctypes.Structure):
    _fields_ = (
        ("struct_size", _Size),
        ("extension_start", _Pointer),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", _Size), ("api_version", _ApiVersion))


_Extension._fields_ = (
    ("struct_size", _Size),
    ("type", ctypes.c_int),
    ("next", _Pointer),
    ("metadata", ctypes.POINTER(_Metadata)),
)


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", _Size),
        ("extension_start", ctypes.POINTER(_Extension)),
        ("api", _Pointer),
        ("ctx", _Pointer),
        ("stage", ctypes.c_int),
        ("args", _Buffers),
        ("rets", _Buffers),
    )


@ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_CallFrame))
def _handler(frame_pointer):
    """Answers XLA's question for the interface version, or takes one report."""
    frame = frame_pointer.contents
    if frame.extension_start:
        extension = frame.extension_start.contents
        if extension.type == _METADATA_EXTENSION:
            version = extension.metadata.contents.api_version
            version.major, version.minor = 0, 1
            return None
    if frame.stage == _EXECUTE:
        number, step = frame.args.buffers[0].contents.data[:2]
        frame.rets.buffers[0].contents.data[0] = _hear(number, step)
    return None


@functools.cache
def _register() -> None:
    handler = ctypes.cast(_handler, _Pointer).value
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (_Pointer, ctypes.c_char_p, _Pointer)
    jax.ffi.register_ffi_target(
        _TARGET, new_capsule(handler, None, None), platform="cpu"
    )
