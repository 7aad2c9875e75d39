"""The parser of the command line: errors of one line, which propose the name that was meant."""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import Any, NoReturn

from fast_essl.config import Config
from fast_essl.config_io import options_of, unknown_option
from fast_essl.nearest import proposal

NO_OVERRIDES = ("convert", "export", "transformations", "report", "doctor")
"""Commands that do not take `--section.field VALUE`."""


class Parser(argparse.ArgumentParser):
    """argparse's, and that of its subcommands."""

    def __init__(self, *, any_order: bool = False, **options: Any) -> None:
        """`any_order`: options may stand between optional positional arguments, too."""
        super().__init__(**options)
        self._any_order = any_order

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse has a way to take options anywhere, but never goes it for a subcommand."""
        if not self._any_order:
            return super().parse_known_args(args, namespace)
        self._any_order = False  # the other way calls this one
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._any_order = True

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and a line."""
        self.exit(2, f"fast-essl: error: {message}; see `{self.prog} --help`\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """A word that is no choice gets the nearest; for a command, those within the commands are choices too."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            names = list(map(str, action.choices or ()))
            if isinstance(action, argparse._SubParsersAction):
                names += [f"{name} {inner}" for name in names for inner in _within(action.choices[name])]
            error.message += proposal(str(value), names)
            raise


def check_options(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Refuse the first option that a command does not have, before one of its values is taken for another word.

    Errors: `ConfigError` with the nearest of all that the command has; the parser's own exit where it has no fields.
    """
    command: tuple[str, ...] = ()
    options: list[str] = list(parser._option_string_actions)
    while words and words[0] in (inner := _within(parser)):
        parser, command, words = inner[words[0]], (*command, words[0]), words[1:]
        # `bench plan` refuses bench's options itself; those of `fast-essl` stand before the command.
        options = [*(options if len(command) > 1 else []), *parser._option_string_actions]
    unknown = [
        position
        for position, word in enumerate(words)
        if word.startswith("--") and word.partition("=")[0] not in options
    ]
    fields = _fields(command) if unknown else []
    for position in unknown:
        option, *value = words[position].split("=", 1)
        # Underscores are as good as hyphens in a field's name, and only there.
        if option.replace("_", "-") in fields:
            continue
        names = [name for name in (*options, *fields) if name.startswith("--")]
        if not command:
            behind = "; a command comes first, its options behind it"
            parser.error(f"unrecognized arguments: {option}{proposal(option, names) or behind}")
        if not fields:
            parser.error(f"unrecognized arguments: {option}{proposal(option, names)}")
        values = takewhile(lambda word: not word.startswith("--"), words[position + 1 :])
        raise unknown_option(" ".join([option, *value, *values]), names)


def _within(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands within a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return parser.get_default("within") or {}


def _fields(command: tuple[str, ...]) -> list[str]:
    """The options that are fields of a command's configuration."""
    if not command or command[0] in NO_OVERRIDES or command == ("bench", "plan"):
        return []
    if command[0] == "photonics":
        from fast_essl.photonics.config import PhotonicsConfig

        return options_of(PhotonicsConfig)
    return options_of(Config)
