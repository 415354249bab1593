"""Reads the data in a pickle without running anything in it.

A pickle is a program for a small stack machine. `pickle.Unpickler` looks names up and
calls what it finds; this machine has no such operation. A global is a pair of strings,
checked against the list below; "calling" one of the listed names builds a plain dict,
tuple or `TensorRef`, and every other name is refused before anything is done with it.
Opcodes that only code needs (INST, OBJ, EXT, PERSID, buffers, ...) are refused too.
"""

import pickletools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

from sdjax.errors import SdjaxError

MAX_OPCODES = 50_000_000


class Global(NamedTuple):
    """A name in a pickle: never looked up, only compared."""

    module: str
    name: str


class Opaque:
    """Stands for a value that is of no use here, and takes whatever is put in it."""


class StorageRef(NamedTuple):
    """A run of elements in a checkpoint; `start` in elements from its record."""

    kind: str
    key: str
    numel: int
    start: int = 0


class TensorRef(NamedTuple):
    """A strided view of a storage; offset and stride in elements."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(Exception):
    """Why a pickle is not read; becomes one SdjaxError with the file's name."""


_MARK = object()
_OPAQUE = Opaque()
_SCALARS = (str, bytes, int, float, bool, type(None), Global)


class Readable(Protocol):
    """What a pickle is read from."""

    def read(self, count: int = ..., /) -> bytes:
        """Reads at most `count` bytes."""
        ...

    def readline(self) -> bytes:
        """Reads up to the next newline."""
        ...

    def tell(self) -> int:
        """Where it is."""
        ...


def read_pickle(
    stream: Readable, file: Path, storage: Callable[[Any], StorageRef] | None = None
) -> Any:
    """Reads one pickle from `stream` up to its STOP.

    Args:
        stream: positioned at the pickle.
        file: named in errors.
        storage: turns the tuple of a persistent id into a storage, or raises
            ValueError.

    Raises:
        SdjaxError: if the pickle names anything but tensors and plain data, or is
            malformed.
    """
    machine = _Machine(storage)
    # Odd escapes in old text opcodes would otherwise warn.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return _run(machine, stream, file)


def _run(machine: "_Machine", stream: Readable, file: Path) -> Any:
    try:
        for count, (opcode, argument, _) in enumerate(
            pickletools.genops(cast(IO[bytes], stream))
        ):
            if opcode.name == "STOP":
                return machine.pop()
            if count > MAX_OPCODES:
                raise _Refused("it has too many opcodes")
            machine.step(opcode.name, argument)
    except _Refused as error:
        raise SdjaxError(f"{file} is not safe to read: {error}") from None
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise SdjaxError(f"{file}: malformed pickle: {reason:.150}") from None
    raise SdjaxError(f"{file}: malformed pickle: it has no end")


class _Machine:
    """The stack machine: values, marks and memo."""

    def __init__(self, storage: Callable[[Any], StorageRef] | None):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storage = storage

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise _Refused(f"opcode {name} has no place in a checkpoint")

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("the stack is empty")
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        items = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)
        raise ValueError("no mark on the stack")

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise ValueError(f"APPEND to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, Opaque):
            raise ValueError(f"SETITEM on a {type(target).__name__}")

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise _Refused("it names a global by something that is no text")
        found = Global(module, name)
        if not _is_known(found):
            raise _Refused(f"it names {module:.60}.{name:.60}, which is no tensor data")
        self.stack.append(found)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def construct(self) -> None:
        arguments, target = self.pop(), self.pop()
        if not (isinstance(target, Global) and isinstance(arguments, tuple)):
            raise _Refused("it calls something that is no name")
        builder = _BUILDERS.get(target)
        if builder is None and not _is_inert(target):
            raise _Refused(f"it calls {target.module:.60}.{target.name:.60}")
        self.stack.append(builder(*arguments) if builder else _OPAQUE)

    def persistent(self) -> None:
        identifier = self.pop()
        if self.storage is None:
            raise _Refused("it refers to data outside the pickle")
        self.stack.append(self.storage(identifier))


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    """Keys with their values; keys are flat, since hashing recurses."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    keys = items[::2]
    if not all(type(key) in _SCALARS for key in keys):
        raise ValueError("a key that is neither text nor number")
    return list(zip(keys, items[1::2], strict=True))


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """torch._utils._rebuild_tensor_v2, as data."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, StorageRef) or len(size) != len(stride):
        raise ValueError("a tensor without a storage, or size and stride that differ")
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor with a negative or odd size, stride or offset")
    return TensorRef(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _ordered_dict(items: Any = (), *_: Any) -> dict[Any, Any]:
    return dict(_pairs([value for key, item in items for value in (key, item)]))


def _size(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _opaque(*_: Any) -> Opaque:
    return _OPAQUE


_PUSH = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
    "SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": Opaque,
    "MARK": lambda: _MARK,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "POP": lambda m, a: m.stack.pop(),
    "POP_MARK": lambda m, a: m.pop_mark(),
    "DUP": lambda m, a: m.stack.append(m.top()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "LIST": lambda m, a: m.stack.append(m.pop_mark()),
    "DICT": lambda m, a: m.stack.append(dict(_pairs(m.pop_mark()))),
    "FROZENSET": lambda m, a: (m.pop_mark(), m.stack.append(_OPAQUE)),
    "APPEND": lambda m, a: m.append([m.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, a: m.append(m.pop_mark()),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "PUT": lambda m, a: m.put(a),
    "BINPUT": lambda m, a: m.put(a),
    "LONG_BINPUT": lambda m, a: m.put(a),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "GET": lambda m, a: m.get(a),
    "BINGET": lambda m, a: m.get(a),
    "LONG_BINGET": lambda m, a: m.get(a),
    # pickletools joins the two lines of GLOBAL with one space.
    "GLOBAL": lambda m, a: m.push_global(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.construct(),
    "NEWOBJ": lambda m, a: m.construct(),
    # State of an object (a dict's _metadata, a callback's fields): not wanted.
    "BUILD": lambda m, a: (m.pop(), m.top()),
    "BINPERSID": lambda m, a: m.persistent(),
}

_BUILDERS: dict[Global, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): _size,
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    # Bookkeeping of training scripts, present in old .ckpt files.
    Global("torch", "device"): _opaque,
    Global("_codecs", "encode"): _opaque,
    Global("numpy", "dtype"): _opaque,
    Global("numpy", "ndarray"): _opaque,
    **{
        Global(module, name): _opaque
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("scalar", "_reconstruct")
    },
    **{Global(module, "set"): _opaque for module in ("builtins", "__builtin__")},
}
_TORCH_VALUES = frozenset(
    "float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 bool "
    "FloatStorage HalfStorage BFloat16Storage DoubleStorage LongStorage IntStorage "
    "ShortStorage CharStorage ByteStorage BoolStorage".split()
)
_INERT_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric")


def _is_inert(name: Global) -> bool:
    """Callbacks that Lightning leaves in checkpoints: kept as opaque values."""
    return name.module.split(".")[0] in _INERT_PACKAGES


def _is_known(name: Global) -> bool:
    torch_value = name.module == "torch" and name.name in _TORCH_VALUES
    return torch_value or name in _BUILDERS or _is_inert(name)
