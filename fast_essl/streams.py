"""Standard output and standard error that never end a command: not when closed, full or broken, nor by a character.

Python's own raise in the middle of a run because its progress bar cannot be shown, do not exist where the shell closed
them (`2>&-`), and end a command that has done its work with code 120.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from typing import Any

READABLE = {
    "λ": "lambda",
    "ε": "epsilon",
    "π": "pi",
    "ω": "omega",
    "σ": "sigma",
    "Γ": "Gamma",
    "Σ": "sum",
    "µ": "u",
    "×": "x",
    "·": "*",
    "±": "+-",
    "−": "-",
    "–": "-",
    "—": "-",
    "→": "->",
    "≠": "!=",
    "≤": "<=",
    "≥": ">=",
    "√": "sqrt",
    "∈": "in",
    "°": " degrees",
    "½": "1/2",
    "²": "^2",
    "³": "^3",
    "‖": "||",
    "⟨": "<",
    "⟩": ">",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "─": "-",
    "│": "|",
    "├": "+",
    "└": "+",
    "┘": "+",
    "┬": "+",
    "▶": ">",
}
"""What stands for a character that a terminal does not have; for others their letter without its accent, or `?`."""
_ERRORS = "fast_essl.readable"


class Output(io.FileIO):
    """An open file descriptor; what cannot be written to it is dropped, and the reason kept."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """All that is given, or nothing."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            return memoryview(data).nbytes


def prepare_streams() -> Output | None:
    """Replace `sys.stdout` and `sys.stderr`, unless someone else has already.

    Returns: the new standard output's descriptor, whose `error` says why something could not be written.
    """
    codecs.register_error(_ERRORS, _readable)
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that is opened gets the number, and whatever a library prints is written into it.
            # Results that go nowhere are an error, so standard output is opened for reading.
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
            os.set_inheritable(descriptor, True)
    output = None
    if sys.stdout is sys.__stdout__:
        output = Output(1, "wb", closefd=False)
        sys.stdout = _text(output, sys.__stdout__)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(Output(2, "wb", closefd=False), sys.__stderr__)
    return output


def _text(raw: Output, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    encoding, at_once = "utf-8", raw.fileno() == 2
    if before is not None:
        encoding = before.encoding
        at_once = at_once or before.line_buffering or before.write_through
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, _ERRORS, line_buffering=at_once)


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """What to write in place of the characters that an encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    # A byte of a file's name that is not UTF-8 is written as it was read.
    if all("\udc80" <= character <= "\udcff" for character in characters):
        return characters.encode("ascii", "surrogateescape"), error.end
    return "".join(map(_plain, characters)), error.end


def _plain(character: str) -> str:
    plain = READABLE.get(character) or unicodedata.normalize("NFKD", character)
    return plain.encode("ascii", "ignore").decode() or "?"
