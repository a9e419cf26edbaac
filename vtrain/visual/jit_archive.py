"""The weights in a TorchScript file, without running any of it.

The file is a zip: data.pkl describes the module tree, data/<key> holds raw storages, code/**/*.py declares which
attributes are parameters and buffers. The pickle's opcodes are read one by one by a small machine that knows those
that TorchScript writes and builds plain data only; everything else is an error. Nothing is imported or called.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of zip: what TorchScript writes
MAX_TEXT_BYTES = 64 << 20  # of data.pkl and of one file of code, unpacked: of a network of 1e5 tensors it takes 20 MB
MAX_MODULES = 10_000
MAX_REPEATS = 8  # times the size of a file that its tensors may take: modules that are shared have several names

DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
LISTS = tuple(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor"))
_CLASS = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$", re.MULTILINE)


def read_jit_state(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{dotted name: tensor} of all parameters and buffers, as `torch.jit.load(path).state_dict()` would tell them.

    No two tensors share memory. ValueError names the file and what in it is damaged or not understood.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return _Archive(file, os.path.getsize(path)).state()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    # OSError: an offset before the file; RuntimeError: encrypted, or packed in another way.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole TorchScript file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Global(NamedTuple):
    """A name that the pickle would import."""

    name: str


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    count: int


class View(NamedTuple):
    """A tensor: offset and stride in elements of the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Instance:
    """An object of a class that code/ declares."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


class _Archive:
    """file: the open zip of `size` bytes."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self.file, self.size = file, size
        roots = [name for name in file.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise ValueError(f"not a TorchScript file: {len(roots)} data.pkl in it, expected one")
        self.root = roots[0].removesuffix("data.pkl")
        self.declared: dict[str, dict[str, list[str]]] = {}  # file of code -> class -> names of tensors

    def state(self) -> dict[str, torch.Tensor]:
        if f"{self.root}byteorder" in self.file.NameToInfo and self._text("byteorder") != b"little":
            raise ValueError("byteorder is not little")
        tree = unpickle(self._text("data.pkl"))
        if not isinstance(tree, Instance):
            raise ValueError("data.pkl: no module")
        views = self._views(tree)
        wanted = sum(abs(math.prod(view.size)) * view.storage.dtype.itemsize for view in views.values())
        if wanted > MAX_REPEATS * self.size:
            raise ValueError(f"data.pkl: tensors of {wanted} bytes in a file of {self.size}")
        return {name: self._tensor(name, view) for name, view in views.items()}

    def _views(self, tree: Instance) -> dict[str, View]:
        """The parameters and buffers of a module and of those inside it, in order."""
        found: dict[str, View] = {}
        waiting, seen = [("", tree)], 0
        while waiting:
            prefix, module = waiting.pop()
            names = self._tensor_names(module.kind)
            if names is None:  # an object that is no module: its tensors are no part of the state
                continue
            if (seen := seen + 1) > MAX_MODULES:  # a module inside itself never ends
                raise ValueError(f"data.pkl: more than {MAX_MODULES} modules")
            for name in names:
                value = module.attributes.get(name)
                if isinstance(value, View):
                    found[prefix + name] = value
                elif value is not None:
                    raise ValueError(f"data.pkl: {prefix}{name} is no tensor")
            inner = [(f"{prefix}{name}.", v) for name, v in module.attributes.items() if isinstance(v, Instance)]
            waiting += reversed(inner)
        return found

    def _tensor_names(self, kind: str) -> list[str] | None:
        """Parameters, then buffers of a class such as __torch__.torch.nn.modules.conv.Conv2d. None: not a module."""
        module, _, name = kind.rpartition(".")
        path = f"code/{module.replace('.', '/')}.py"
        if path not in self.declared:
            source = self._text(path).decode("utf-8", errors="replace")
            self.declared[path] = {c: re.findall(r'"([^"]*)"', f"{p} {b}") for c, p, b in _CLASS.findall(source)}
        return self.declared[path].get(name)

    def _tensor(self, name: str, view: View) -> torch.Tensor:
        storage = view.storage
        record = f"data/{storage.key}"
        info = self._info(record)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise ValueError(f"{record}: {info.file_size} bytes, packed; expected plain ones")
        expected = storage.count * storage.dtype.itemsize
        if info.file_size != expected:
            raise ValueError(f"{record}: {info.file_size} bytes; expected {expected}, {storage.count} {storage.dtype}")
        count = math.prod(view.size)
        last = view.offset + sum((side - 1) * step for side, step in zip(view.size, view.stride)) if count else 0
        numbers = (view.offset, *view.size, *view.stride)
        fits = len(view.size) == len(view.stride) and 0 <= min(numbers) <= max(numbers) < 1 << 63
        if not fits or max(last + bool(count), count) > storage.count:
            raise ValueError(
                f"data.pkl: {name} has size {list(view.size)}, stride {list(view.stride)} and offset {view.offset} "
                f"in {storage.count} elements"
            )
        data = bytearray(self.file.read(info))
        whole = torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
        part = whole.as_strided(view.size, view.stride, view.offset if count else 0)
        return part if count == storage.count else part.clone()  # a part must not keep the whole in memory

    def _text(self, record: str) -> bytes:
        info = self._info(record)
        if info.file_size > MAX_TEXT_BYTES:
            raise ValueError(f"{record}: {info.file_size} bytes; expected at most {MAX_TEXT_BYTES}")
        return self.file.read(info)

    def _info(self, record: str) -> zipfile.ZipInfo:
        try:
            info = self.file.getinfo(self.root + record)
        except KeyError:
            raise ValueError(f"{record} is missing in it") from None
        if info.compress_type not in PACKINGS:
            raise ValueError(f"{record}: packed in way {info.compress_type} of zip; expected one of {PACKINGS}")
        return info


def unpickle(data: bytes) -> Any:
    """What data.pkl describes: plain values, `View` for a tensor, `Instance` for an object. ValueError on the rest."""
    machine = _Machine()
    position, name = 0, "the first opcode"
    try:
        for opcode, argument, at in pickletools.genops(data):
            position, name = at, opcode.name
            if name == "STOP":
                return machine.pop()
            machine.step(name, argument)
    except ValueError as error:
        raise ValueError(f"data.pkl: byte {position}: {error}") from error
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"data.pkl: byte {position}: {name} finds something else on the stack") from error
    raise ValueError("data.pkl: no end")


class _Machine:
    """The stack, the memo and what each opcode does to them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        found, self.stack[start:] = self.stack[start:], []
        return found

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO":
                if argument != 2:
                    raise ValueError(f"pickle protocol {argument}; expected 2")
            case "MARK":
                self.marks.append(len(self.stack))
            case "GLOBAL":
                push(Global(argument.replace(" ", ".")))
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                push(argument)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                self.marks.append(_at_least(0, len(self.stack) - count))
                push(tuple(self.pop_to_mark()))
            case "APPENDS":
                items = self.pop_to_mark()
                _of(list, self.stack[-1]).extend(items)
            case "APPEND":
                item = self.pop()
                _of(list, self.stack[-1]).append(item)
            case "SETITEMS":
                items = self.pop_to_mark()
                keys = [_of((str, int, float), key) for key in items[::2]]
                _of(dict, self.stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINPERSID":
                push(_storage(self.pop()))
            case "NEWOBJ":
                arguments, kind = self.pop(), _of(Global, self.pop()).name
                if arguments != () or not kind.startswith("__torch__."):
                    raise ValueError(f"an object of {kind}; expected a class of TorchScript")
                push(Instance(kind))
            case "BUILD":
                attributes = self.pop()
                if not isinstance(attributes, dict):
                    raise ValueError("an object with a state of its own")
                _of(Instance, self.stack[-1]).attributes = attributes
            case "REDUCE":
                arguments, function = _of(tuple, self.pop()), _of(Global, self.pop()).name
                push(_reduced(function, arguments))
            case _:
                raise ValueError(f"opcode {name}, which TorchScript does not write")


def _reduced(function: str, arguments: tuple) -> Any:
    """The few calls that TorchScript writes, as data."""
    if function == "torch._utils._rebuild_tensor_v2":
        storage, offset, size, stride = arguments[:4]
        for numbers in (_of(tuple, size), _of(tuple, stride), (offset,)):
            for number in numbers:
                if type(number) is not int:  # a bool is one, too
                    raise TypeError
        return View(_of(Storage, storage), offset, size, stride)
    if function == "collections.OrderedDict" and not arguments:
        return {}
    if function == "torch.jit._pickle.restore_type_tag" or function in LISTS or function == "torch.device":
        return arguments[0]
    raise ValueError(f"a call of {function}, which is not known here")


def _storage(identity: Any) -> Storage:
    what, kind, key, _, count = _of(tuple, identity)
    name = _of(Global, kind).name
    if what != "storage" or name not in DTYPES:
        raise ValueError(f"a storage of {name}; expected one of {', '.join(DTYPES)}")
    return Storage(_of(str, key), DTYPES[name], _at_least(0, _of(int, count)))


def _of(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _at_least(least: int, value: int) -> int:
    if value < least:
        raise IndexError
    return value
