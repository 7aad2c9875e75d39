"""Reads the pickles of CIFAR-10: dictionaries, lists, numbers, text, and arrays of bytes. Runs nothing of them.

A pickle is a program. Python's own reader calls what it names; and even where nothing may be named, a file can make
it ask for any amount of memory, recurse until it crashes, or run for ever. This reader knows only the instructions
that such files have, and counts them.
"""

from __future__ import annotations

import pickletools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MAX_INSTRUCTIONS: Final = 250_000
"""A batch of CIFAR-10 has about 30,000: a number, a name and a note to remember it for each of 10,000 images."""
_INTEGERS: Final = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4")
_TEXTS: Final = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# What numpy's pickles of arrays name.
_NAMES: Final = {
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}


class PickleError(ValueError):
    """What is wrong with a pickle, in words that follow its name."""


def read_plain_pickle(data: bytes) -> dict[str, Any]:
    """The dictionary that a binary pickle (protocols 1 to 4) holds, its keys as text.

    Text that Python 2 wrote comes as bytes, an array as a read-only uint8 array of its shape.

    Errors: PickleError if it is damaged, holds anything else, or takes more than 250,000 instructions.
    """
    try:
        values = _Reader().read(data)
        if not isinstance(values, dict):
            raise PickleError("it is not a dictionary")
        return {
            _text(key): _array(value) if isinstance(value, _Part) else value for key, value in values.items()
        }
    except PickleError:
        raise
    except Exception as error:  # the parser raises anything at all on damaged bytes
        raise PickleError(" ".join(str(error).split())[:200] or type(error).__name__) from error


class _Part:
    """Something of numpy that is named in a pickle, or an array in the making."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


class _Reader:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == MAX_INSTRUCTIONS:
                raise PickleError(f"it takes more than {MAX_INSTRUCTIONS:,} instructions")
            if opcode.name in _INTEGERS or opcode.name in _TEXTS:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif not (self._make(opcode.name, argument) or self._combine(opcode.name)):
                raise PickleError(f"it holds the instruction {opcode.name}, which no batch of CIFAR-10 does")
        return self._stack.pop()

    def _make(self, name: str, argument: Any) -> bool:
        """Instructions that put something on the stack or remember it; whether this was one."""
        stack, memo = self._stack, self._memo
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1"))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                self._marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case _:
                return False
        return True

    def _combine(self, name: str) -> bool:
        """Instructions that take from the stack what they put together; whether this was one."""
        stack = self._stack
        match name:
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_named(module, attribute))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "APPEND":
                value = stack.pop()
                _expect(list, stack[-1]).append(value)
            case "APPENDS":
                values = self._since_mark()
                _expect(list, stack[-1]).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(dict, stack[-1])[_text(key)] = value
            case "SETITEMS":
                values = self._since_mark()
                _expect(dict, stack[-1]).update(zip(map(_text, values[::2]), values[1::2], strict=True))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_called(_expect(_Part, called), _expect(tuple, arguments)))
            case "BUILD":
                state = stack.pop()
                _expect(_Part, stack[-1]).state = state
            case _:
                return False
        return True

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values


def _named(module: Any, attribute: Any) -> _Part:
    kind = _NAMES.get((_text(module), _text(attribute)))
    if kind is None:
        raise PickleError(f"it names {module!s:.100}.{attribute!s:.100}, which no batch of CIFAR-10 does")
    return _Part(kind)


def _called(part: _Part, arguments: tuple[Any, ...]) -> _Part:
    if part.kind == "dtype" and arguments and _text(arguments[0]) in ("u1", "|u1"):
        return _Part("uint8")
    if part.kind == "reconstruct":
        return _Part("array")
    raise PickleError("it holds an array of something else than bytes")


def _array(part: _Part) -> npt.NDArray[np.uint8]:
    """The array that numpy would make: its state is (version, shape, dtype, column-major, bytes)."""
    if part.kind != "array":
        raise PickleError("it holds something else than arrays")
    _, shape, dtype, is_column_major, content = _expect(tuple, part.state)
    if _expect(_Part, dtype).kind != "uint8":
        raise PickleError("it holds an array of something else than bytes")
    return np.frombuffer(_expect(bytes, content), np.uint8).reshape(
        shape, order="F" if is_column_major else "C"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else _expect(str, value)


def _expect(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"it holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value
