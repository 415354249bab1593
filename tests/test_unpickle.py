"""Pickles that try to run code: none runs, each is refused in one line.

Every attack, if anything ran it, would make a file; none of the files is there after.
The pickles are written by hand, opcode by opcode, so no attack is lost to a pickler.
"""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from sdjax.errors import SdjaxError
from sdjax.weights.files import open_file
from sdjax.weights.torch_file import LEGACY_MAGIC, LEGACY_PROTOCOL


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def stack_global(module, name):
    return text(module) + text(name) + b"\x93"


def attacks(canary):
    """Name -> pickle; `canary` is the file that each would make."""
    path = str(canary)
    touch = text(f"touch {path}")
    source = text(f"open({path!r}, 'w').close()")
    system, run = b"cos\nsystem\n", b"cbuiltins\nexec\n"
    call = b"(" + touch + b"tR"
    quoted = repr(f"touch {path}").encode()
    ordered = b"ccollections\nOrderedDict\n"
    state = b"}" + text("__reduce__") + system + b"s"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    parameter = b"ctorch._utils\n_rebuild_parameter\n"
    return {
        "global reduce": system + call + b".",
        "global reduce, protocol 0": b"cos\nsystem\n(S" + quoted + b"\ntR.",
        "posix system": b"cposix\nsystem\n" + call + b".",
        "subprocess": b"csubprocess\ncall\n" + call + b".",
        "exec": run + b"(" + source + b"tR.",
        "eval": b"cbuiltins\neval\n(" + source + b"tR.",
        "old builtins": b"c__builtin__\neval\n(" + source + b"tR.",
        "open": b"cbuiltins\nopen\n(" + text(path) + text("w") + b"tR.",
        "io open": b"c_io\nopen\n(" + text(path) + text("w") + b"tR.",
        "getattr": b"cbuiltins\ngetattr\n(" + ordered + text("fromkeys") + b"tR.",
        "import": b"cbuiltins\n__import__\n(" + text("os") + b"tR.",
        "stack global": stack_global("os", "system") + call + b".",
        "stack global dotted": stack_global("torch", "os.system") + call + b".",
        "global dotted": b"ctorch\nos.system\n" + call + b".",
        "global through torch": b"ctorch.serialization\nos\n.",
        "torch load": b"ctorch\nload\n(" + text(path) + b"tR.",
        "torch hub": b"ctorch.hub\nload\n(" + text(path) + b"tR.",
        "runpy": b"crunpy\nrun_path\n(" + text(path) + b"tR.",
        "stack global from memo": text("os") + b"q\x00" + text("system") + b"q\x01"
        b"0" + b"0h\x00h\x01\x93" + call + b".",
        "inst": b"(S" + quoted + b"\nios\nsystem\n.",
        "inst of a known name": b"(icollections\nOrderedDict\n.",
        "obj": b"(" + system + touch + b"o.",
        "obj of a known name": b"(" + ordered + touch + b"o.",
        "newobj": system + b"(" + touch + b"t\x81.",
        "newobj_ex": system + b"(" + touch + b"t}\x92.",
        "newobj_ex of a known name": ordered + b")}\x92.",
        "ext1": b"\x82\x01.",
        "ext2": b"\x83\x01\x00.",
        "ext4": b"\x84\x01\x00\x00\x00.",
        "persid": b"P" + b"os.system\n.",
        "persistent id of an object": system + call + b"Q.",
        "persistent id with a global as type": b"("
        + text("storage") + system + text("0") + text("cpu") + b"K\x01tQ.",
        "build on a dict": ordered + b")R" + state + b"b" + b"cos\nsystem\n.",
        "build with slots": ordered + b")RN" + system + call + b"\x86b.",
        "build of a global": ordered + b"}" + text("f") + system + b"sb.",
        "setstate": b"cfunctools\npartial\n(" + system + b"tR.",
        "reduce of a reduced": ordered + b")R" + b"(" + touch + b"tR.",
        "reduce of text": text("os.system") + call + b".",
        "arguments that call": ordered + b"(" + system + call + b"tR.",
        "dict value that calls": b"}" + text("a") + system + call + b"s.",
        "list item that calls": b"]" + system + call + b"a.",
        "set item that calls": b"\x8f(" + system + call + b"\x90.",
        "operator": b"coperator\nmethodcaller\n(" + touch + b"tR.",
        "codecs by name": b"c_codecs\nlookup\n(" + touch + b"tR.",
        "numpy load": b"cnumpy\nload\n(" + text(path) + b"tR.",
        "numpy testing": b"cnumpy.testing._private.utils\nrunstring\n("
        + source + b"}tR.",
        "weights in a hook": tensor + b"(" + system + call + b"tR.",
        "parameter state": parameter + b"(" + system + call + b"tR.",
        "copyreg": b"ccopyreg\n_reconstructor\n(" + system + b"tR.",
        "next buffer": b"\x97.",
        "readonly buffer": b"\x97\x98.",
        "pytorch lightning in a dotted name": b"cpytorch_lightningx\nos\n.",
        "after a dropped value": b"N0" + system + call + b".",
        "hidden behind a mark": b"(" + system + call + b"1N.",
    }  # fmt: skip


NAMES = sorted(attacks("canary"))


def save_zip(file, data, storages=(), **extra):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, raw in dict(storages).items():
            archive.writestr(f"archive/data/{key}", raw)
        for name, raw in extra.items():
            archive.writestr(f"archive/{name}", raw)


def save_legacy(file, data, tail=b""):
    head = (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True})
    start = b"".join(pickle.dumps(value, protocol=2) for value in head)
    file.write_bytes(start + data + tail)


def refused(file):
    with pytest.raises(SdjaxError) as caught:
        open_file(file)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message and len(message) < 500
    return message


def test_there_are_enough_attacks():
    assert len(NAMES) >= 50


@pytest.mark.parametrize("protocol", [b"", b"\x80\x04"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container", [save_zip, save_legacy])
def test_no_pickle_runs_anything(tmp_path, name, protocol, container):
    canary, file = tmp_path / "canary", tmp_path / "model.ckpt"
    container(file, protocol + attacks(canary)[name])
    refused(file)
    assert not canary.exists()


@pytest.mark.parametrize("part", range(3))
def test_no_head_of_a_legacy_file_runs_anything(tmp_path, part):
    canary, file = tmp_path / "canary", tmp_path / "model.ckpt"
    head = [LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}]
    parts = [pickle.dumps(value, protocol=2) for value in head]
    parts[part] = b"\x80\x02" + attacks(canary)["global reduce"]
    file.write_bytes(b"".join(parts))
    refused(file)
    assert not canary.exists()


def test_the_attacks_would_work_elsewhere(tmp_path):
    """The canary is real: Python's own unpickler makes the file."""
    canary = tmp_path / "canary"
    pickle.loads(attacks(canary)["exec"])
    assert canary.exists()


def storage_id(kind="FloatStorage", key="0", numel=6):
    """The persistent id of a storage."""
    data = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key)
    return data + text("cpu") + b"J" + struct.pack("<i", numel) + b"tQ"


def tensor(offset=0, size=(2, 3), stride=(3, 1), **storage):
    """A pickled tensor."""
    numbers = [
        b"(" + b"".join(b"J" + struct.pack("<i", n) for n in axes) + b"t"
        for axes in (size, stride)
    ]
    start = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id(**storage)
    start += b"J" + struct.pack("<i", offset) + b"".join(numbers)
    return start + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(*tensors):
    items = b"".join(text(f"t{i}") + data for i, data in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


VALUES = np.arange(6, dtype="<f4")


def test_tensors_are_read(tmp_path):
    data = state_dict(
        tensor(), tensor(size=(3, 2), stride=(1, 3)), tensor(3, (3,), (1,))
    )
    save_zip(tmp_path / "model.ckpt", data, {"0": VALUES.tobytes()})
    tail = b"\x80\x02]" + text("0") + b"a." + struct.pack("<q", 6) + VALUES.tobytes()
    save_legacy(tmp_path / "old.ckpt", data, tail)
    for name in ("model.ckpt", "old.ckpt"):
        got = open_file(tmp_path / name).tensors
        np.testing.assert_array_equal(got["t0"].read(), VALUES.reshape(2, 3))
        np.testing.assert_array_equal(got["t1"].read(), VALUES.reshape(2, 3).T)
        np.testing.assert_array_equal(got["t2"].read(), VALUES[3:])


def test_training_leftovers_are_inert(tmp_path):
    callbacks = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text("f8")
    scalar += b"\x89\x88tR" + b"c_codecs\nencode\n(" + text("x") + text("latin1")
    scalar += b"tRtR"
    data = b"\x80\x02}(" + text("callbacks") + b"}" + callbacks + b"}s"
    data += text("lr") + scalar + text("global_step") + b"J" + struct.pack("<i", 875000)
    data += text("state_dict") + state_dict(tensor())[2:-1] + b"u."
    save_zip(tmp_path / "model.ckpt", data, {"0": VALUES.tobytes()})
    got = open_file(tmp_path / "model.ckpt")
    assert list(got.tensors) == ["t0"] and got.global_step == 875000


@pytest.mark.parametrize(
    "bad",
    [
        tensor(offset=1),
        tensor(offset=-1),
        tensor(size=(2, 4), stride=(4, 1)),
        tensor(size=(2**20, 2**10), stride=(0, 0)),
        tensor(size=(2, 3), stride=(2**30, 1)),
        tensor(size=(-2, 3)),
        tensor(size=(2, 3), stride=(-3, 1)),
        tensor(size=(2, 3), stride=(1,)),
        tensor(size=(1,) * 9, stride=(1,) * 9),
        tensor(numel=2**31 - 1, size=(2**31 - 1,), stride=(1,)),
        tensor(key="1"),
        tensor(kind="QInt8Storage"),
        tensor(kind="DoubleStorage"),
    ],
)
def test_tensors_that_lie(tmp_path, bad):
    save_zip(tmp_path / "model.ckpt", state_dict(bad), {"0": VALUES.tobytes()})
    refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"(((",
        b"0.",
        b"R.",
        b"}K\x01s.",
        b"h\x07.",
        b"K",
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
        b"\x8e" + struct.pack("<Q", 2**62),
        b"\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x95" + struct.pack("<Q", 2**60) + b"N.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"F1_0x\n.",
        b"S'unfinished\n.",
        b"X\x02\x00\x00\x00\xff\xfe.",
        b"](" * 20_000 + b".",
        b")" + b"\x85" * 100_000 + b".",
        b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
        b"]q\x00h\x00a.",
        b"]ccollections\nOrderedDict\nh.",
        b"N.",
        b"\x80\xff.",
        b"\xfe\xfd.",
    ],
)
@pytest.mark.parametrize("container", [save_zip, save_legacy])
def test_malformed_pickles(tmp_path, data, container):
    container(tmp_path / "model.ckpt", data)
    refused(tmp_path / "model.ckpt")


def test_malformed_archives(tmp_path):
    file = tmp_path / "model.ckpt"
    data = state_dict(tensor())
    file.write_bytes(b"PK\3\4")
    refused(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert "compressed" in refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "no checkpoint" in refused(file)
    save_zip(file, data, {"0": VALUES.tobytes()}, byteorder=b"big")
    assert "big-endian" in refused(file)
    save_zip(file, data, {"0": VALUES.tobytes()})
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        refused(file)
    file.write_bytes(b"\x80\x02N.")
    assert "neither" in refused(file)


def test_mutated_archives(tmp_path):
    file, rng = tmp_path / "model.ckpt", np.random.default_rng(0)
    save_zip(file, state_dict(tensor(), tensor()), {"0": VALUES.tobytes()})
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(500):
        changed = whole.copy()
        changed[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        file.write_bytes(changed.tobytes())
        try:
            for found in open_file(file).tensors.values():
                found.read()
        except SdjaxError as error:
            assert "\n" not in str(error)


def test_pickles_of_python_itself(tmp_path):
    """What Python's pickler writes at each protocol is understood."""
    value = collections.OrderedDict(a=[1, 2.5, None, True], b=(1, 2, 3), c={"d": b"e"})
    for protocol in range(5):
        data = io.BytesIO()
        pickle.Pickler(data, protocol).dump({"x": value, "n": 2**70, "e": ()})
        try:
            save_zip(tmp_path / "model.ckpt", data.getvalue())
            assert open_file(tmp_path / "model.ckpt").tensors == {}
        except SdjaxError as error:
            # Protocols 0 to 2 spell bytes as a call of _codecs.encode: inert.
            pytest.fail(f"protocol {protocol}: {error}")
