"""What the archive reader finds, against torch.jit.load; files of others in its place are refused and never run."""

import contextlib
import io
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from vtrain.visual import jit_archive
from vtrain.visual.jit_archive import read_jit_state, unpickle


class Leaf(nn.Module):
    """Tensors of many kinds, and attributes that are no part of the state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        self.register_buffer("part", torch.arange(12)[3:9:2])
        self.register_buffer("hidden", torch.tensor([True, False]), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("bytes_", torch.arange(4, dtype=torch.uint8))
        self.register_buffer("nothing", None)
        self.plain = torch.ones(2)
        self.names = ["a", "b"]
        self.numbers = [1, 70000, 2**40]
        self.floats = [1.5]
        self.flags = [True]
        self.tensors = [torch.ones(1)]
        self.table = {"x": 1.5}
        self.by_number = {3: "three"}
        self.five = (1, 2.0, "3", True, 5)
        self.device = torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.table["x"] + self.plain.sum() + self.numbers[0] + self.floats[0]


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = Leaf()
        self.again = self.one
        self.convs = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1))
        self.narrow = nn.Parameter(torch.randn(4, 3).half().t())
        self.brain = nn.Parameter(torch.randn(5).bfloat16(), requires_grad=False)
        self.listed = nn.ModuleList([nn.Linear(1, 1), nn.LayerNorm(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.narrow.sum() + self.brain.sum()


def saved(path, module):
    torch.jit.save(module, str(path))
    return path


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("jit") / "a.b.jit", torch.jit.script(Tree()))


def same(path):
    found, expected = read_jit_state(path), torch.jit.load(str(path)).state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    pointers = [t.untyped_storage().data_ptr() for t in found.values() if t.numel()]
    assert len(set(pointers)) == len(pointers)
    return found


def test_scripted_modules(scripted):
    found = same(scripted)
    assert found["narrow"].stride() == (1, 3)
    assert found["again.part"].tolist() == [3, 5, 7]
    assert "one.plain" not in found


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_modules(tmp_path):
    torch.manual_seed(0)
    convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    same(saved(tmp_path / "traced.jit", torch.jit.trace(convs, torch.randn(1, 3, 8, 8), check_trace=False)))
    shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared[1].weight = shared[0].weight
    same(saved(tmp_path / "shared.jit", torch.jit.trace(shared.half().float(), torch.randn(1, 2), check_trace=False)))


def test_a_module_without_tensors(tmp_path):
    assert same(saved(tmp_path / "none.jit", torch.jit.script(nn.Identity()))) == {}


def rewritten(source, target, **changes):
    """A copy of an archive in which the records of these names (without the root) are others; None = left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            short = info.filename.partition("/")[2]
            content = changes.get(short, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return target


def pickled(path):
    with zipfile.ZipFile(path) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


def refused(path, *parts):
    with pytest.raises(ValueError) as caught:
        read_jit_state(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") or message.startswith(f"{path}:"), message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_and_cut_files(scripted, tmp_path):
    refused(tmp_path / "none.jit", "no such file")
    whole, path = scripted.read_bytes(), tmp_path / "cut.jit"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "not a whole TorchScript file")


def test_no_changed_byte_gets_through(scripted, tmp_path):
    """A record that is read has a checksum; a storage of tensors that are not wanted may be damaged."""
    whole, path, expected = scripted.read_bytes(), tmp_path / "flipped.jit", read_jit_state(scripted)
    refusals = 0
    with zipfile.ZipFile(scripted) as file:
        for info in file.infolist():
            name_size, extra_size = struct.unpack("<26xHH", whole[info.header_offset :][:30])
            start = info.header_offset + 30 + name_size + extra_size
            copy = bytearray(whole)
            copy[start + info.file_size // 2 : start + info.file_size // 2 + 1] = b"\x91"
            path.write_bytes(copy)
            try:
                found = read_jit_state(path)
            except ValueError:
                refusals += 1
            else:
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), info.filename
    assert refusals > len({t.untyped_storage().data_ptr() for t in expected.values()}) / 2


def test_a_damaged_directory_is_refused_or_harmless(scripted, tmp_path):
    whole, path, expected = scripted.read_bytes(), tmp_path / "directory.jit", read_jit_state(scripted)
    draw = random.Random(0)
    start = whole.index(b"PK\x01\x02")
    for _ in range(200):
        copy = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            copy[draw.randrange(start, len(copy))] = draw.randrange(256)
        path.write_bytes(copy)
        with contextlib.suppress(ValueError):
            found = read_jit_state(path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data.pkl": None}, "not a TorchScript file: 0 data.pkl in it"),
        ({"data/0": None}, "data/0 is missing in it"),
        ({"data/0": b"abc"}, "data/0: 3 bytes; expected"),
        ({"code/__torch__/test_jit_archive.py": None}, "code/__torch__/test_jit_archive.py is missing in it"),
        ({"byteorder": b"big"}, "byteorder is not little"),
        ({"data.pkl": b""}, "data.pkl: "),
        ({"data.pkl": b"\x80\x02N."}, "data.pkl: no module"),
        ({"data.pkl": b"\x80\x04N."}, "pickle protocol 4; expected 2"),
        ({"data.pkl": b"\x80\x02NN"}, "data.pkl: byte"),
    ],
)
def test_records_that_are_wrong(scripted, tmp_path, changes, part):
    refused(rewritten(scripted, tmp_path / "w.jit", **changes), part)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (b"torch\nHalfStorage", b"torch\nMuchStorage", "a storage of torch.MuchStorage"),
        (b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_tensor_v9", "a call of torch._utils._rebuild_t"),
        (
            b"c__torch__.test_jit",
            b"c__other__.test_jit",
            "an object of __other__.test_jit_archive.Tree; expected a class of TorchScript",
        ),
        # half [3, 4] strides (1, 3) at 0: sizes, strides and offsets that leave the storage of 12
        (
            b"K\x00(K\x03K\x04t(K\x01K\x03t",
            b"K\x01(K\x03K\x04t(K\x01K\x03t",
            "narrow has size [3, 4], stride [1, 3] and o",
        ),
        (b"K\x00(K\x03K\x04t(K\x01K\x03t", b"K\x00(K\x03K\x05t(K\x01K\x03t", "narrow has size [3, 5]"),
        (b"K\x00(K\x03K\x04t(K\x01K\x03t", b"K\x00(K\x03K\x04t(K\x01K\x04t", "narrow has size [3, 4], stride [1, 4]"),
        (
            b"K\x00(K\x03K\x04t(K\x01K\x03t",
            b"K\x00(K\xffK\xfft(K\x00K\x00t",
            "narrow has size [255, 255], stride [0, 0]",
        ),
        (b"K\x00(K\x03K\x04t(K\x01K\x03t", b"K\x00(K\x03K\x04t(K\x01t", "narrow has size [3, 4], stride [1]"),
        # numbers that are none to torch: a bool, more than 64 bits
        (b"K\x00(K\x03K\x04t(K\x01K\x03t", b"K\x00(K\x03K\x04t(\x88K\x03t", "REDUCE finds something else"),
        (
            b"K\x00(K\x03K\x04t(K\x01K\x03t",
            b"K\x00(K\x01K\x04t(\x8a\x09" + b"\x01" * 9 + b"K\x03t",
            "narrow has size [1, 4], stride [18519084246547628289, 3]",
        ),
        (b"\x07\x00\x00\x00storage", b"\x07\x00\x00\x00strange", "a storage of torch."),
    ],
)
def test_pickles_that_say_something_else(scripted, tmp_path, old, new, part):
    data = pickled(scripted)
    assert old in data
    refused(rewritten(scripted, tmp_path / "p.jit", **{"data.pkl": data.replace(old, new)}), "data.pkl", part)


def test_numbers_below_zero_are_refused(scripted, tmp_path):
    data = pickled(scripted).replace(b"K\x00(K\x03K\x04t(K\x01K\x03t", b"K\x00(K\x03K\x04t(J\xff\xff\xff\xffK\x03t")
    refused(rewritten(scripted, tmp_path / "n.jit", **{"data.pkl": data}), "narrow has size [3, 4], stride [-1, 3]")


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_never_run(scripted, tmp_path, protocol):
    witness = tmp_path / "witness"
    data = pickle.dumps(Malicious(witness), protocol=protocol)
    refused(rewritten(scripted, tmp_path / "m.jit", **{"data.pkl": data}), "data.pkl: byte")
    refused(rewritten(scripted, tmp_path / "m.jit", **{"data.pkl": b"\x80\x02cos\nmkdir\n(X\x01\x00\x00\x00atR."}))
    assert not witness.exists()
    pickle.loads(data)
    assert witness.exists()


def test_a_module_inside_itself_ends(tmp_path):
    """m.m = m: the tree has no end, the reader has."""
    data = b"\x80\x02c__torch__\nM\n)\x81q\x00}(X\x01\x00\x00\x00mh\x00ub."
    tree = unpickle(data)
    assert tree.attributes["m"] is tree
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/code/__torch__.py", "class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n")
    path = tmp_path / "endless.jit"
    path.write_bytes(stream.getvalue())
    refused(path, "more than 10000 modules")


def test_tensors_far_larger_than_their_file_are_refused(tmp_path):
    """A few bytes that name one module ten times, and so its tensor."""

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(300, 300, bias=False)
            for i in range(10):
                setattr(self, f"m{i}", shared)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.m0(x)

    path = saved(tmp_path / "many.jit", torch.jit.trace(Many(), torch.zeros(1, 300), check_trace=False))
    refused(path, "data.pkl: tensors of 3600000 bytes in a file of ")


def test_a_part_does_not_keep_the_whole_storage(tmp_path):
    """Else a thousand numbers, each out of one large storage, would take a thousand times its memory."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(3000.0)
            for i in range(3):
                self.register_buffer(f"b{i}", whole[i * 7 : 900 + i * 7 : 300])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b0 + self.b1 + self.b2

    found = same(saved(tmp_path / "parts.jit", torch.jit.script(Parts())))
    assert found["b2"].tolist() == [14, 314, 614]
    assert {tensor.untyped_storage().nbytes() for tensor in found.values()} == {12}


def test_packed_storages_and_large_texts_are_refused(scripted, tmp_path, monkeypatch):
    """What is unpacked is never larger than the file, but for texts, which have a limit."""
    path = tmp_path / "deflated.jit"
    with zipfile.ZipFile(scripted) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    refused(path, "data/0: ", " bytes, packed; expected plain ones")
    monkeypatch.setattr(jit_archive, "MAX_TEXT_BYTES", 100)
    refused(path, "data.pkl: ", " bytes; expected at most 100")


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_torchscript_does_not_write_are_refused(scripted, tmp_path, packing):
    """Damaged LZMA raises an error that is none of zipfile's."""
    path = tmp_path / "packed.jit"
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("x/data.pkl", pickled(scripted))
    whole = bytearray(path.read_bytes())
    whole[60:80] = b"\x91" * 20
    path.write_bytes(whole)
    refused(path, f"data.pkl: packed in way {packing} of zip; expected one of (0, 8)")


OPCODES = [
    b"(",
    b")",
    b"]",
    b"}",
    b"N",
    b"K\x01",
    b"X\x01\x00\x00\x00a",
    b"t",
    b"\x85",
    b"\x87",
    b"R",
    b"b",
    b"u",
    b"e",
]
OPCODES += [b"\x81", b"Q", b"q\x00", b"h\x00", b"c__torch__\nM\n", b"ccollections\nOrderedDict\n", b".", b"\x88", b"0"]


@example(b"(NNNNNtQ.")
@settings(max_examples=150, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(OPCODES), max_size=30).map(b"".join), st.binary(max_size=60)))
def test_any_bytes_give_a_value_or_one_error(data):
    with contextlib.suppress(ValueError):
        unpickle(data)
