"""Checkpoints of torch: read right, and never executed."""

import collections
import copyreg
import io
import pathlib
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ngjax.torch_file import load_torch_file
from tests.torch_pickles import (
    KINDS,
    REBUILD,
    Call,
    Global,
    Raw,
    Storage,
    archive,
    checkpoint,
    encrypted,
    pickled,
    state_dict,
    tensor,
)


def read(content):
    return load_torch_file(io.BytesIO(content), name="model.pt")


FLOATS = np.arange(12, dtype=np.float32)
STORAGE = Storage("0", "FloatStorage", 12)
STORAGES = {"0": FLOATS.tobytes()}


# -- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
def test_dtypes(dtype):
    array = np.array([[0, 1, 0], [1, 1, 0]]).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    loaded = read(state_dict({"x": array}))["x"]
    assert loaded.dtype == array.dtype
    assert loaded.dtype.isnative
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("dtype", ["float32", "int16", "complex64", "bfloat16", "uint8"])
def test_big_endian(dtype):
    array = np.array([1, 258, 3]).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    swapped = array.view(np.uint16).byteswap() if dtype == "bfloat16" else array.byteswap()
    value = tensor(Storage("0", KINDS[dtype], 3), 0, (3,), (1,))
    loaded = read(checkpoint(value, {"0": swapped.tobytes()}, byteorder=b"big"))
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


def test_files_before_byte_orders_were_written():
    loaded = read(checkpoint(tensor(STORAGE, 0, (12,), (1,)), STORAGES, byteorder=None))
    np.testing.assert_array_equal(loaded, FLOATS)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "expected"),
    [
        (0, (3, 4), (4, 1), FLOATS.reshape(3, 4)),
        (0, (4, 3), (1, 4), FLOATS.reshape(3, 4).T),
        (5, (2, 2), (4, 1), FLOATS.reshape(3, 4)[1:, 1:3]),
        (11, (), (), FLOATS[11]),
        (2, (3,), (0,), np.full(3, 2.0)),
        (0, (2, 3, 2), (6, 2, 1), FLOATS.reshape(2, 3, 2)),
        (1, (4,), (3,), FLOATS[1::3]),
        (0, (0, 3), (3, 1), np.zeros((0, 3))),
        (12, (0,), (1,), np.zeros(0)),
    ],
)
def test_strides_and_offsets(offset, size, stride, expected):
    loaded = read(checkpoint(tensor(STORAGE, offset, size, stride), STORAGES))
    assert loaded.shape == expected.shape
    np.testing.assert_array_equal(loaded, expected)
    assert loaded.flags.c_contiguous
    assert loaded.flags.writeable


def test_arrays_have_memory_of_their_own():
    loaded = read(checkpoint([tensor(STORAGE, 0, (12,), (1,)), tensor(STORAGE, 4, (4,), (1,))], STORAGES))
    loaded[0][:] = -1
    np.testing.assert_array_equal(loaded[1], FLOATS[4:8])
    assert loaded[1].base is None


def test_a_tensor_in_two_places_is_one_array():
    # `q` remembers the tensor, `h` recalls it.
    remembered = Raw(pickled(tensor(STORAGE, 0, (12,), (1,))) + b"q\x07")
    loaded = read(checkpoint([remembered, Raw(b"h\x07")], STORAGES))
    assert loaded[0] is loaded[1]


def test_containers_and_numbers():
    value = {
        "state": collections.OrderedDict(a=1, b=(2.5, [None, True, "x"])),
        3: -(2**40),
        "size": Call(Global("torch", "Size"), ((3, 4),)),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"),
            (tensor(STORAGE, 0, (2,), (1,)), True, collections.OrderedDict()),
        ),
    }
    loaded = read(checkpoint(value, STORAGES))
    np.testing.assert_array_equal(loaded.pop("parameter"), [0, 1])
    assert loaded == {"state": {"a": 1, "b": (2.5, [None, True, "x"])}, 3: -(2**40), "size": (3, 4)}
    assert type(loaded["state"]) is dict


def test_version_numbers_of_state_dicts_are_dropped():
    state = Raw(b"ccollections\nOrderedDict\n)R" + b"X\x01\0\0\0aK\x01s" + b"}X\x09\0\0\0_metadata}sb")
    loaded = read(checkpoint(state))
    assert loaded == {"a": 1}
    assert not hasattr(loaded, "_metadata")


def test_from_a_path(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(state_dict({"x": FLOATS}, root="other root"))
    for source in (path, str(path)):
        np.testing.assert_array_equal(load_torch_file(source)["x"], FLOATS)
    with pytest.raises(FileNotFoundError):
        load_torch_file(tmp_path / "nothing.pt")
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{path} is not a whole zip archive"):
        load_torch_file(path)


# -- against torch ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def assert_same(loaded, expected, torch):
    if isinstance(expected, torch.Tensor):
        expected = expected.detach()
        if expected.dtype == torch.bfloat16:
            assert loaded.dtype == ml_dtypes.bfloat16
            loaded, expected = loaded.astype(np.float32), expected.float()
        expected = expected.numpy()
        assert (loaded.shape, loaded.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(loaded, expected)
    elif isinstance(expected, dict):
        assert list(loaded) == list(expected)
        for key, item in expected.items():
            assert_same(loaded[key], item, torch)
    elif isinstance(expected, (list, tuple)):
        assert len(loaded) == len(expected)
        for item, other in zip(loaded, expected, strict=True):
            assert_same(item, other, torch)
    else:
        assert loaded == expected


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_torch_saves(torch, tmp_path, protocol):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    value = {
        "transposed": base.T,
        "sliced": base[1:4, ::2],
        "row": base[2],
        "shared": [base, base.view(-1)[7:9]],
        "expanded": base[:1].expand(4, 5),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[0]),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "complex": torch.complex(base, base),
        "bool": base > 0,
        "shape": base.shape,
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "epoch": 3,
    }
    path = tmp_path / "value.pt"
    torch.save(value, path, pickle_protocol=protocol)
    assert_same(load_torch_file(path), value, torch)


def test_conjugated_tensors_of_torch_are_refused(torch, tmp_path):
    torch.save(torch.complex(torch.ones(2), torch.ones(2)).conj(), tmp_path / "value.pt")
    with pytest.raises(ValueError, match=r"properties .*conj.*, which are not read"):
        load_torch_file(tmp_path / "value.pt")


@pytest.mark.parametrize("what", ["module", "legacy", "storage"])
def test_other_files_of_torch_are_refused(torch, tmp_path, what):
    path = tmp_path / "value.pt"
    if what == "module":
        torch.save(torch.nn.Linear(2, 3), path)
        message = r"asks for torch.nn.modules.linear.Linear, which is refused"
    elif what == "legacy":
        torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        message = r"before version 1.6, .* torch.save\(torch.load"
    else:
        torch.save({"x": torch.ones(2).untyped_storage()}, path)
        message = "refused"
    with pytest.raises(ValueError, match=message) as raised:
        load_torch_file(path)
    assert str(path) in str(raised.value)


# -- hostile pickles --------------------------------------------------------------------------------------------------

COMMAND = "touch executed"


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        (Call(Global("os", "system"), (COMMAND,)), "os.system"),
        (Call(Global("posix", "system"), (COMMAND,)), "posix.system"),
        (Call(Global("builtins", "eval"), ("open('executed', 'w')",)), "builtins.eval"),
        (Call(Global("__builtin__", "eval"), ("open('executed', 'w')",)), "__builtin__.eval"),
        (Call(Global("builtins", "getattr"), (REBUILD, "__globals__")), "builtins.getattr"),
        (Call(Global("subprocess", "Popen"), (["touch", "executed"],)), "subprocess.Popen"),
        (Call(Global("torch", "load"), ("other.pt",)), "torch.load"),
        (Call(Global("torch._utils", "_rebuild_tensor_v2.__globals__"), ()), "_rebuild_tensor_v2.__globals__"),
        (Call(Global("numpy", "load"), ("other.npy",)), "numpy.load"),
        (Global("ngjax.torch_file", "_GLOBALS"), "ngjax.torch_file._GLOBALS"),
        (Global("collections", "OrderedDict.fromkeys"), "collections.OrderedDict.fromkeys"),
        (Storage("0", Global("builtins", "print"), 1), "builtins.print"),
        # Protocol 4's way to name something: both parts from the stack.
        (Raw(b"\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R"), "os.system"),
        # INST, and OBJ after GLOBAL: the oldest ways to call.
        (Raw(b"(X\x0e\0\0\0touch executedios\nsystem\n"), "os.system"),
        (Raw(b"(cos\nsystem\nX\x0e\0\0\0touch executedo"), "os.system"),
    ],
)
def test_other_globals_are_refused_by_name(tmp_path, monkeypatch, value, refused):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^model.pt, member archive/data.pkl: the pickle asks for .*{refused}, which"):
        read(checkpoint({"x": value}))
    assert not pathlib.Path("executed").exists()


DICT = Global("collections", "OrderedDict")
SIZE = Global("torch", "Size")
PARAMETER = Global("torch._utils", "_rebuild_parameter")
FLOAT = Global("torch", "FloatStorage")
GOOD = tensor(STORAGE, 0, (3,), (1,))


@pytest.mark.parametrize(
    "value",
    [
        Call(DICT, ([("a", 1)],)),
        Call(DICT, (GOOD,)),
        Call(SIZE, ()),
        Call(SIZE, (([1],),)),
        Call(SIZE, (3,)),
        Call(PARAMETER, (REBUILD,)),
        Call(PARAMETER, ()),
        Call(FLOAT, (3,)),
        Call(GOOD, ()),
        Call(REBUILD, ()),
        Call(REBUILD, (STORAGE, 0, (3,), (1,), False, {}, {"conj": True})),
        Call(REBUILD, (FLOAT, 0, (3,), (1,))),
        Call(REBUILD, ("0", 0, (3,), (1,))),
        Call(REBUILD, (STORAGE, -1, (3,), (1,))),
        Call(REBUILD, (STORAGE, 0.0, (3,), (1,))),
        Call(REBUILD, (STORAGE, True, (3,), (1,))),
        Call(REBUILD, (STORAGE, 0, [3], (1,))),
        Call(REBUILD, (STORAGE, 0, (-3,), (1,))),
        Call(REBUILD, (STORAGE, 11, (3,), (-1,))),
        Call(REBUILD, (STORAGE, 0, ("3",), (1,))),
        Call(REBUILD, (STORAGE, 0, (3,), (1, 1))),
        Call(REBUILD, (STORAGE, 0, (1,) * 65, (1,) * 65)),
        tensor(STORAGE, 0, (13,), (1,)),
        tensor(STORAGE, 10, (3,), (1,)),
        tensor(STORAGE, 0, (3, 4), (5, 1)),
        tensor(STORAGE, 2**62, (1,), (1,)),
        tensor(STORAGE, 0, (2,), (2**62,)),
        tensor(STORAGE, 0, (2**40,), (0,)),
        [tensor(STORAGE, 0, (2**12, 2**12), (0, 0))] * 9,
        tensor(Storage("0", "FloatStorage", 2**40), 0, (2**40,), (1,)),
        tensor(Storage("0", "FloatStorage", 11), 0, (3,), (1,)),
        tensor(Storage("0", "DoubleStorage", 12), 0, (3,), (1,)),
        tensor(Storage("0", "FloatStorage", -12), 0, (3,), (1,)),
        tensor(Storage("1", "FloatStorage", 12), 0, (3,), (1,)),
        tensor(Storage("../data.pkl", "FloatStorage", 12), 0, (3,), (1,)),
        tensor(Storage("/etc/passwd", "FloatStorage", 12), 0, (3,), (1,)),
        tensor(Storage(0, "FloatStorage", 12), 0, (3,), (1,)),
        tensor(Storage("0", DICT, 12), 0, (3,), (1,)),
        Raw(b"X\x01\0\0\0aQ"),  # a reference that is a string
        Raw(b"PX\n"),  # the same in text
        STORAGE,
        REBUILD,
        FLOAT,
        DICT,
        {"a": [1, (FLOAT,)]},
        Raw(b"}ctorch\nFloatStorage\nK\x01s"),  # as a key
        Raw(b"]q\x00h\x00a"),  # a list in itself
        Raw(b"]" * 100_000 + b"a" * 99_999),
        # BUILD on what pickles may name: attributes, also those in slots, of functions, types and dictionaries.
        Raw(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x05\0\0\0_callcos\nsystem\nsb"),
        Raw(b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\0\0\0_callK\x01s\x86b"),
        Raw(b"ctorch\nFloatStorage\nN}X\x05\0\0\0dtypeK\x01s\x86b"),
        Raw(b"ccollections\nOrderedDict\n}X\x08\0\0\0fromkeysK\x01sb"),
        Raw(b"ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb"),
        Raw(b"ccollections\nOrderedDict\n)RN}X\x05\0\0\0itemsK\x01s\x86b"),
        # NEWOBJ and NEWOBJ_EX call `__new__`.
        Raw(b"ccollections\nOrderedDict\n)\x81"),
        Raw(b"ctorch._utils\n_rebuild_tensor_v2\n)}\x92"),
        # Room for 2**40 bytes.
        Raw(b"\x96" + struct.pack("<Q", 2**40)),
        Raw(b"X\xff\xff\xff\xff"),
        Raw(b"\x97"),
        Raw(b"\x80\x09N"),
        Raw(b""),
        Raw(b"\xff"),
        Raw(b"0"),
    ],
)
def test_what_does_not_fit_together_is_refused(value):
    with pytest.raises(ValueError, match=r"^model.pt"):
        read(checkpoint(value, STORAGES))


def test_nothing_that_pickles_reach_was_changed():
    """After BUILD on the globals was refused they still work."""
    for value in (Raw(b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\0\0\0_callK\x01s\x86b"),):
        with pytest.raises(ValueError, match="sets attributes of a function"):
            read(checkpoint(value, STORAGES))
    np.testing.assert_array_equal(read(checkpoint(GOOD, STORAGES)), FLOATS[:3])


@pytest.mark.parametrize("code", [b"Nr\xff\xff\xff\x7f", b"Np2147483647\n"])
def test_no_room_is_made_for_objects_that_cannot_be_there(code):
    """The unpickler would allocate gigabytes for the list of what it remembers."""
    with pytest.raises(ValueError, match="it remembers an object as number 2147483647"):
        read(checkpoint(Raw(code)))


def test_registered_extensions_are_refused(tmp_path, monkeypatch):
    """A code that the process has registered and used before would be a way around the check of names."""
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("os", "getcwd", 241)
    try:
        copyreg._extension_cache[241] = lambda: pathlib.Path("executed").touch()
        with pytest.raises(ValueError, match="instruction EXT1"):
            read(checkpoint(Raw(b"\x82\xf1)R")))
    finally:
        copyreg.remove_extension("os", "getcwd", 241)
        copyreg._extension_cache.pop(241, None)
    assert not pathlib.Path("executed").exists()


def test_messages_name_the_place():
    with pytest.raises(
        ValueError, match=r"model.pt, member archive/data.pkl\['a'\]\[1\]: its storage archive/data/7 is"
    ):
        read(checkpoint({"a": [0, tensor(Storage("7", "FloatStorage", 12), 0, (3,), (1,))]}, STORAGES))
    with pytest.raises(
        ValueError, match=r"member archive/data/0: expected 44 bytes for 11 elements of float32, found 48"
    ):
        read(checkpoint(tensor(Storage("0", "FloatStorage", 11), 0, (3,), (1,)), STORAGES))
    with pytest.raises(
        ValueError, match=r"shape \[13\], strides \[1\] and offset 0 reaches up to element 13 of .* has 12"
    ):
        read(checkpoint(tensor(STORAGE, 0, (13,), (1,)), STORAGES))


# -- broken archives --------------------------------------------------------------------------------------------------


def compressed(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def twice():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", b"\x80\x02K\x01.")
    return buffer.getvalue()


WHOLE = checkpoint({"x": GOOD}, STORAGES)
BROKEN = {
    "empty": (b"", "not a whole zip archive"),
    "text": (b"no checkpoint", "not a whole zip archive"),
    "cut": (WHOLE[:-30], "not a whole zip archive"),
    "no pickle": (archive({"archive/data/0": b""}), r"expected one member <root>/data.pkl, found none"),
    "pickle at the top": (archive({"data.pkl": b"\x80\x02N."}), "found none"),
    "two pickles": (archive({"a/data.pkl": b"\x80\x02N.", "b/data.pkl": b"N."}), "found a/data.pkl, b/data.pkl"),
    "one name twice": (twice, "several members of one name"),
    "byte order": (checkpoint(None, byteorder=b"middle"), "member archive/byteorder: expected little or big"),
    "compressed": (compressed(WHOLE), "is compressed, expected it stored as it is"),
    "bomb": (
        compressed(checkpoint(tensor(Storage("0", "ByteStorage", 2**24), 0, (1,), (1,)), {"0": bytes(2**24)})),
        "is compr",
    ),
    "encrypted": (encrypted(WHOLE), "is encrypted"),
    "checksum": (WHOLE.replace(FLOATS.tobytes(), FLOATS[::-1].tobytes()), "archive/data/0 is not a whole .* CRC"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_archives(case):
    content, message = BROKEN[case]
    with pytest.raises(ValueError, match=f"^model.pt.*{message}"):
        read(content() if callable(content) else content)


def test_damage_anywhere_gives_a_clear_error_or_none():
    rng = random.Random(0)
    whole = state_dict({"weight": FLOATS.reshape(3, 4), "bias": FLOATS[:3], "label": 3})
    raised = 0
    for _ in range(600):
        content = bytearray(whole)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.randint(1, 3)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        message = ""
        try:
            read(bytes(content))
        except ValueError as error:
            message = str(error)
            raised += 1
        assert message.startswith("model.pt" if message else "")
    assert raised > 300
