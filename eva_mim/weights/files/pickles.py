"""A reader of foreign pickles that runs none of their code.

`torch.load(weights_only=True)` runs no code of a file either, but a hundred bytes can make it fill the memory (`bytearray(n)`) or
hash a nested tuple for ever, and it reads every tensor. This interpreter builds plain values and descriptions of tensors, and
calls no function that a file names.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.weights.files.allowlist import DTYPES, RE_SAVE, Rebuild, Storage, Stored, Stub, find_global

MAX_BYTES = 128 * 2**20
"""Bytes of one pickle. A state dict takes about 150 per tensor."""
MAX_STEPS = 8_000_000
"""Instructions in one pickle: some 250,000 tensors at about 30 each. A pickle of that length takes seconds, and 1 GB if each
instruction makes a list."""
MAX_WORD = 2**63
"""Upper bound of integers; larger ones can be chosen so that all have the same hash."""
_WORD = struct.Struct("<I").unpack_from
_PLAIN = (str, int, float, bool, bytes, type(None))


def read_pickle(data: bytes, source: str) -> Any:
    """Returns the value of a pickle. Raises UserError for a damaged pickle, and for an instruction or a global outside the
    allowlist."""
    machine = _Machine(data)
    try:
        return machine.run()
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # a damaged pickle may break any rule of the format
        raise UserError(f"{source}: damaged pickle ({type(error).__name__} at byte {machine.at})") from None


def _key(value: Any) -> Any:
    """Returns a key of a dict. Raises UserError for nested and long tuples, whose hash can take for ever or overflow the
    stack."""
    if type(value) in _PLAIN or type(value) is Stub:
        return value
    if type(value) is tuple and len(value) < 9 and all(type(item) in _PLAIN for item in value):
        return value
    raise UserError(f"a {type(value).__name__} as the key of a dict is not supported")


class _Machine:
    """The stack machine of Python's pickle format, protocols 2 to 4 (docs: pickletools)."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, instructions, stop = self.data, _INSTRUCTIONS, pickle.STOP[0]
        for _ in range(MAX_STEPS):
            code = data[self.at]
            self.at += 1
            if code == stop:
                return self.stack.pop()
            instruction = instructions[code]
            if instruction is None:
                raise UserError(f"damaged pickle, or a kind that no state dict needs (instruction {code} at byte {self.at - 1})")
            instruction(self)
        raise UserError(f"more than {MAX_STEPS:,} pickle instructions; split it, or save it as safetensors")

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise UserError("the pickle ends too early; the file is truncated or damaged")
        self.at += count
        return found

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise UserError("damaged pickle: a global without an end")
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def word(self) -> int:
        self.at += 4
        return _WORD(self.data, self.at - 4)[0]  # type: ignore[no-any-return]

    def number(self, form: str, size: int) -> Any:
        self.at += size
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def put(self) -> None:
        self.memo[self.data[self.at]] = self.stack[-1]
        self.at += 1

    def put_far(self) -> None:
        self.memo[_WORD(self.data, self.at)[0]] = self.stack[-1]
        self.at += 4

    def get(self) -> None:
        self.stack.append(self.memo[self.data[self.at]])
        self.at += 1

    def get_far(self) -> None:
        self.stack.append(self.memo[_WORD(self.data, self.at)[0]])
        self.at += 4

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        made: Any
        if type(function) is Stub and function.arguments is None:
            made = Stub(function.name, arguments)
        elif type(function) is Rebuild and len(arguments) < 9:
            made = function.build(*arguments)
        else:
            raise UserError(f"asks to call a {type(function).__name__}, which is refused; {RE_SAVE}")
        self.stack.append(made)

    def state(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if type(value) is Stub:
            value.state = state
        elif type(value) not in (dict, Stored):  # the attributes of an OrderedDict or a parameter are no weights
            raise UserError(f"asks to change a {type(value).__name__}, which is refused; {RE_SAVE}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Stub:  # a Counter or defaultdict
            return
        if type(target) is not dict:
            raise UserError(f"asks to put items into a {type(target).__name__}, which is refused; {RE_SAVE}")
        for index in range(0, len(items), 2):
            target[_key(items[index])] = items[index + 1]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UserError(f"asks to append to a {type(self.stack[-1]).__name__}, which is refused; {RE_SAVE}")
        self.stack[-1].extend(items)

    def persistent(self) -> None:
        mark, dtype, key, _, count, *view = self.stack.pop()[:7]
        if isinstance(key, bytes):
            key = key.decode()
        known = type(dtype) is str and dtype in DTYPES and type(key) is str and type(count) is int and count >= 0
        if not known or mark != "storage" or view not in ([], [None]):
            raise UserError("a kind of stored tensor that is not supported")
        self.stack.append(self.storages.setdefault(key, Storage(key, dtype, count)))

    def integer(self, size: int) -> None:
        value = int.from_bytes(self.take(size), "little", signed=True)
        if not -MAX_WORD <= value < 2 * MAX_WORD:
            raise UserError("an integer of more than 64 bits is not supported")
        self.stack.append(value)

    def make_tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def fixed(self, size: int) -> None:
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise UserError("damaged pickle: a global without a name")
        self.stack.append(find_global(module, name))

    def text(self, size: int) -> None:
        self.stack.append(self.take(size).decode("utf-8", "surrogatepass"))


def _push(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make())


_TABLE: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: _Machine.mark,
    pickle.POP: lambda m: m.stack.pop() if m.stack else m.marked(),
    pickle.NONE: _push(lambda: None),
    pickle.NEWTRUE: _push(lambda: True),
    pickle.NEWFALSE: _push(lambda: False),
    pickle.EMPTY_DICT: _push(dict),
    pickle.EMPTY_LIST: _push(list),
    pickle.EMPTY_SET: _push(list),
    pickle.EMPTY_TUPLE: _push(tuple),
    pickle.BININT: lambda m: m.stack.append(m.number("<i", 4)),
    pickle.BININT1: lambda m: m.stack.append(m.byte()),
    pickle.BININT2: lambda m: m.stack.append(m.number("<H", 2)),
    pickle.BINFLOAT: lambda m: m.stack.append(m.number(">d", 8)),
    pickle.LONG1: lambda m: m.integer(m.byte()),
    pickle.BINUNICODE: lambda m: m.text(m.word()),
    pickle.SHORT_BINUNICODE: lambda m: m.text(m.byte()),
    pickle.BINSTRING: lambda m: m.text(m.word()),
    pickle.SHORT_BINSTRING: lambda m: m.text(m.byte()),
    pickle.BINBYTES: lambda m: m.stack.append(m.take(m.word())),
    pickle.SHORT_BINBYTES: lambda m: m.stack.append(m.take(m.byte())),
    pickle.TUPLE: lambda m: m.make_tuple(m.marked()),
    pickle.TUPLE1: lambda m: m.fixed(1),
    pickle.TUPLE2: lambda m: m.fixed(2),
    pickle.TUPLE3: lambda m: m.fixed(3),
    pickle.APPEND: lambda m: m.append([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append(m.marked()),
    pickle.ADDITEMS: lambda m: m.append(m.marked()),
    pickle.SETITEM: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    pickle.SETITEMS: lambda m: m.set_items(m.marked()),
    pickle.BINPUT: _Machine.put,
    pickle.LONG_BINPUT: _Machine.put_far,
    pickle.MEMOIZE: _Machine.memoize,
    pickle.BINGET: _Machine.get,
    pickle.LONG_BINGET: _Machine.get_far,
    pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.find(m.stack.pop(-2), m.stack.pop()),
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.call,
    pickle.BUILD: _Machine.state,
    pickle.BINPERSID: _Machine.persistent,
}
_INSTRUCTIONS: list[Callable[[_Machine], Any] | None] = [_TABLE.get(bytes([code])) for code in range(256)]
