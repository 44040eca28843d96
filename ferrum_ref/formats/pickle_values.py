"""Plain values out of a pickle, by an interpreter of its own that cannot run code.

There is no import, no call and no attribute access in here: a GLOBAL must be one of the names that the caller knows,
and becomes a `Global`; a REDUCE of it becomes what the caller's `reduce` makes of its arguments.  Memory is bounded by
the bytes of the stream, whatever it declares.  Clauses: WL-PICKLE-1..4 (specs/weights.md).
Source: pickletools' description of the opcodes; protocols 0 to 5 as far as tensors need them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn

from ferrum_ref.errors import FerrumError
from ferrum_ref.formats.complaint import invalid, quoted, unsupported

MAX_STREAM_BYTES: Final = 64 * 2**20
_SCALARS: Final = (str, int, float, bool, bytes, type(None))
_MARK: Final = object()


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the stream mentions; nothing is imported for it."""

    module: str
    name: str


Reduce = Callable[[Global, tuple[Any, ...]], Any]
PersistentLoad = Callable[[Any], Any]


class PickleReader:
    """Reads pickles out of `data`, one behind the other."""

    def __init__(
        self,
        data: bytes,
        source: str,
        *,
        knows: Callable[[Global], bool],
        reduce: Reduce,
        persistent_load: PersistentLoad,
        offset: int = 0,
    ) -> None:
        self.offset = offset
        self._data, self._source = data, source
        self._knows, self._reduce_hook, self._persistent_load = knows, reduce, persistent_load
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next pickle's value; `offset` moves behind it.  [WL-PICKLE-1..4]

        Raises InvalidFormatError (not a pickle, or a broken one), UnsupportedError (a global or an opcode that weights
        do not need).
        """
        self._stack, self._memo = [], {}
        try:
            while (opcode := self._take(1)[0]) != _STOP:
                action = _ACTIONS.get(opcode)
                if action is None:
                    self._unsupported("opcode", f"{bytes([opcode])!r} at byte {self.offset - 1}", "those of plain data")
                action(self)
            if len(self._stack) != 1:
                self._fail("end", f"{len(self._stack)} values", "one value")
            return self._pop()
        except FerrumError:
            raise
        except (TypeError, AttributeError, IndexError, KeyError, ValueError, OverflowError, struct.error) as error:
            self._fail(f"opcode before byte {self.offset}", type(error).__name__, "well-formed pickle operations")

    def _fail(self, field: str, got: object, expected: str) -> NoReturn:
        raise invalid("pickle", self._source, field, got, expected)

    def _unsupported(self, field: str, got: object, expected: str) -> NoReturn:
        raise unsupported("pickle", self._source, field, got, f"{expected}; nothing in the file was executed")

    def _take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self._data):
            self._fail(
                f"byte {self.offset}", f"{count} bytes asked for", f"at most the {len(self._data)} of the stream"
            )
        piece = self._data[self.offset : end]
        self.offset = end
        return piece

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.offset, self.offset + 1024)
        if end < 0:
            self._fail(f"byte {self.offset}", "no end of line", "a name of at most 1024 bytes")
        return self._take(end + 1 - self.offset)[:-1].decode("utf-8")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._fail(f"byte {self.offset}", "an empty stack", "an operand")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while position >= 0 and self._stack[position] is not _MARK:
            position -= 1
        if position < 0:
            self._fail(f"byte {self.offset}", "no mark", "a mark on the stack")
        items = self._stack[position + 1 :]
        del self._stack[position:]
        return items

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            self._fail(f"byte {self.offset}", "another value", f"a {kind.__name__} to fill")
        return self._stack[-1]

    def _text(self, width: int) -> str:
        return self._take(self._unsigned(width)).decode("utf-8", "surrogatepass")

    def _put(self, index: int) -> None:
        if not self._stack:
            self._fail(f"byte {self.offset}", "an empty stack", "a value to remember")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            self._fail(f"byte {self.offset}", f"memo {index}", "one that was stored")
        self._stack.append(self._memo[index])

    def _global(self, module: str, name: str) -> None:
        found = Global(module, name)
        if not self._knows(found):
            self._unsupported("global", f"{quoted(module)}.{quoted(name)}", "tensors and plain data only")
        self._stack.append(found)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self._fail(f"byte {self.offset}", "a global without a name", "two texts")
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self._fail(f"byte {self.offset}", "a call of something else", "a known name and a tuple")
        self._stack.append(self._reduce_hook(function, arguments))

    def _build(self) -> None:
        """State of an OrderedDict (state_dict's `_metadata`): read and dropped.  Nothing else may have state."""
        state = self._pop()
        if not isinstance(state, dict) or not self._stack or type(self._stack[-1]) is not dict:
            self._fail(f"byte {self.offset}", "state for an object", "none but an OrderedDict's")

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        self._fill(self._top(dict), items)

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        if len(items) % 2:
            self._fail(f"byte {self.offset}", "a key without a value", "pairs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _SCALARS):
                self._unsupported("key", type(key).__name__, "a text or a number")
            target[key] = value
        return target

    def _pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple([self._pop() for _ in range(count)][::-1])


_STOP: Final = ord(".")
_Action = Callable[[PickleReader], Any]


def _push(make: Callable[[PickleReader], Any]) -> _Action:
    return lambda reader: reader._stack.append(make(reader))


def _actions() -> dict[int, _Action]:
    """Opcode -> what it does to the stack."""
    scalars: dict[bytes, Callable[[PickleReader], Any]] = {
        b"(": lambda r: _MARK,
        b"N": lambda r: None,
        b"\x88": lambda r: True,
        b"\x89": lambda r: False,
        b"J": lambda r: struct.unpack("<i", r._take(4))[0],
        b"K": lambda r: r._unsigned(1),
        b"M": lambda r: r._unsigned(2),
        b"\x8a": lambda r: int.from_bytes(r._take(r._unsigned(1)), "little", signed=True),
        b"G": lambda r: struct.unpack(">d", r._take(8))[0],
        b"X": lambda r: r._text(4),
        b"\x8c": lambda r: r._text(1),
        b"\x8d": lambda r: r._text(8),
        b"T": lambda r: r._take(r._unsigned(4)).decode("latin-1"),
        b"U": lambda r: r._take(r._unsigned(1)).decode("latin-1"),
        b"B": lambda r: r._take(r._unsigned(4)),
        b"C": lambda r: r._take(r._unsigned(1)),
        b"\x8e": lambda r: r._take(r._unsigned(8)),
        b")": lambda r: (),
        b"]": lambda r: [],
        b"}": lambda r: {},
        b"\x85": lambda r: r._pop_many(1),
        b"\x86": lambda r: r._pop_many(2),
        b"\x87": lambda r: r._pop_many(3),
        b"t": lambda r: tuple(r._pop_to_mark()),
        b"l": lambda r: r._pop_to_mark(),
        b"d": lambda r: r._fill({}, r._pop_to_mark()),
        b"Q": lambda r: r._persistent_load(r._pop()),
    }
    others: dict[bytes, _Action] = {
        b"\x80": lambda r: r._unsigned(1),  # protocol: the opcodes say themselves what they need
        b"\x95": lambda r: r._unsigned(8),  # frame: a hint for buffering
        b"0": lambda r: r._pop(),
        b"1": lambda r: r._pop_to_mark(),
        b"2": lambda r: r._stack.append(r._top(object)),
        b"c": lambda r: r._global(r._line(), r._line()),
        b"\x93": lambda r: r._stack_global(),
        b"R": lambda r: r._reduce(),
        b"b": lambda r: r._build(),
        b"q": lambda r: r._put(r._unsigned(1)),
        b"r": lambda r: r._put(r._unsigned(4)),
        b"\x94": lambda r: r._put(len(r._memo)),
        b"h": lambda r: r._get(r._unsigned(1)),
        b"j": lambda r: r._get(r._unsigned(4)),
        b"a": lambda r: r._append([r._pop()]),
        b"e": lambda r: r._append(r._pop_to_mark()),
        b"s": lambda r: r._set_items([*r._pop_many(2)]),
        b"u": lambda r: r._set_items(r._pop_to_mark()),
    }
    return {opcode[0]: action for opcode, action in others.items()} | {
        opcode[0]: _push(make) for opcode, make in scalars.items()
    }


_ACTIONS: Final[Mapping[int, _Action]] = MappingProxyType(_actions())
