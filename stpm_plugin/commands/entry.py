"""The command `stpm`: its sub-commands, each a dataclass whose fields are the options and whose docstring is the help.

Only the sub-command that was asked for is imported, so that `stpm score` needs neither torch nor anomalib.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
import warnings
from argparse import Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from .. import __version__
from ..errors import STPMError
from .score import STOPPED

PASSED_ON = ("--model.", "--data.", "--trainer.")  # begin the options of `anomalib train`


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with paragraphs, and without the types' names in Python."""

    def _get_help_string(self, action: Action) -> str:  # argparse's own way to be changed
        return action.help or ""


class Command(Protocol):
    """A sub-command with its options."""

    def run(self) -> int:
        """Do it; returns the exit code."""


#: Name of each sub-command: where its class is, and what it does.
COMMANDS = {
    "demo": ("demo:Demo", "train, test, export and report on generated images"),
    "train": ("train:Train", "train on a folder of good images, and set the threshold"),
    "score": ("score:Score", "score images with an exported model, to a CSV"),
    "report": ("report:Report", "write a page of scores and pictures, for reviewing them and choosing the threshold"),
    "threshold": ("threshold:Threshold", "show or move the threshold of an exported model"),
    "export": ("export:Export", "export a trained model to OpenVINO, in float or INT8"),
    "verify": ("verify:Verify", "compare an exported model with its checkpoint"),
    "explain": ("explain:Explain", "draw what a trained model sees, layer by layer"),
    "doctor": ("doctor:Doctor", "report what this machine can do and what is missing"),
    "config": ("config:Config", "write a packaged YAML of settings, for `anomalib train`"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 after an error, 2 if the command line itself is wrong, 130 after Ctrl-C, or what the sub-command says.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries', of their own parts
        warnings.filterwarnings("always", "STPM: ")
    try:
        return parse(given).run()
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return STOPPED
    except ArgumentError as error:
        name = next((word for word in given if word in COMMANDS), "")
        print(f"{in_a_sentence(error)}. See `{f'stpm {name}'.strip()} --help`.", file=sys.stderr)
        return 2
    except STPMError as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"{error.name or error} is missing, and this command needs it: install it with pip.", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}.", file=sys.stderr)
        return 1


def parse(given: Sequence[str]) -> Command:
    """Read a command line.

    Raises:
        ArgumentError: It is wrong.
        SystemExit: Help or the version was asked for, and printed.
    """
    name = next((word for word in given if not word.startswith("-")), None)
    parser = ArgumentParser(
        prog="stpm",
        version=__version__,
        description="Find anomalies in images: train on good ones, score new ones, review the results.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands()
    for each, (_, summary) in COMMANDS.items():
        own = parser_of(each) if each == name else ArgumentParser()
        commands.add_subcommand(each, own, help=summary)
        own.prog = f"stpm {each}"
    if not given:
        parser.print_help()
        raise SystemExit(2)
    if name not in COMMANDS:
        parser.parse_args(list(given))  # --help, --version, or the error that names all commands
    command = class_of(str(name))
    kept, passed_on = split(given) if "passed_on" in command.__dataclass_fields__ else (list(given), [])
    refuse_twice(kept)
    found = parser.parse_args(file_first(kept, str(name)))[str(name)]
    made = command(**{key: value for key, value in vars(found).items() if key != "config_file"})
    if passed_on:
        made.passed_on = passed_on
    return made


def class_of(name: str) -> Any:
    """Import the class of a sub-command."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    return getattr(import_module(f".{module}", __package__), attribute)


def parser_of(name: str) -> ArgumentParser:
    """Build the parser of a sub-command: fields without a default are positional, lists among them take several."""
    command = class_of(name)
    described = parse_docstring(command.__doc__)
    helps = {each.arg_name: " ".join((each.description or "").split()) for each in described.params}
    parser = ArgumentParser(
        description=described.description, formatter_class=Help, exit_on_error=False, print_config=None
    )
    parser.add_argument("--config-file", action="config", help="YAML file with these options.")
    kinds = typing.get_type_hints(command)
    for field in (each for each in dataclasses.fields(command) if each.init):
        option: dict[str, Any] = {"help": helps[field.name], "type": kinds[field.name]}
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if typing.get_origin(option["type"]) is list:
            option |= {"nargs": "+", "type": typing.get_args(option["type"])[0]}
        if required:
            parser.add_argument(field.name, **option)
            continue
        option["default"] = field.default_factory() if callable(field.default_factory) else field.default
        if isinstance(option["default"], str | int | float | Path) and not isinstance(option["default"], bool):
            option["help"] += f" (default: {option['default']})"
        if option["type"] is bool:
            del option["type"], option["default"]
            option["action"] = "store_true"
        parser.add_argument("--" + field.name.replace("_", "-"), **option)
    return parser


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate a sub-command's own words from the options, with their values, that go to anomalib."""
    own: list[str] = []
    passed_on: list[str] = []
    value = False
    for word in given:
        here = word.startswith(PASSED_ON) or (value and not word.startswith("--"))
        value = word.startswith(PASSED_ON) and "=" not in word
        (passed_on if here else own).append(word)
    return own, passed_on


def file_first(given: Sequence[str], name: str) -> list[str]:
    """Move ``--config-file`` before the options, which count more than what the file holds."""
    words = list(given)
    at = next((index for index, word in enumerate(words) if word.partition("=")[0] == "--config-file"), None)
    if at is None:
        return words
    moved = words[at : at + (1 if "=" in words[at] else 2)]
    del words[at : at + len(moved)]
    start = words.index(name) + 1
    return [*words[:start], *moved, *words[start:]]


def refuse_twice(given: Sequence[str]) -> None:
    """Refuse an option that is given twice, since the first value would be lost.

    Raises:
        ArgumentError: There is one.
    """
    names = [word.partition("=")[0] for word in given if word.startswith("--")]
    for name in names:
        if names.count(name) > 1:
            msg = f"{name} is given twice"
            raise ArgumentError(None, msg)


def in_a_sentence(error: ArgumentError) -> str:
    """Turn an error of the parser into one line, with the option as it is typed."""
    text = " ".join(str(error).split()).rstrip(".")
    if text.startswith("Option '") and "is required" in text:
        return f"{text.split(chr(39))[1].rpartition('.')[2].upper()} is missing"
    if "invalid choice: '" in text and text.startswith("argument subcommand"):
        return f"{text.split(chr(39))[1]} is not a command; the commands are {', '.join(COMMANDS)}"
    if "Unrecognized arguments:" in text:
        return f"there is no option {text.partition('Unrecognized arguments:')[2].split()[0]}"
    if text.startswith('Parser key "'):
        key, _, rest = text.removeprefix('Parser key "').partition('":')
        text = f"--{key.rpartition('.')[2].replace('_', '-')}:{rest}"
    for kind in ("typing.", "<class '", "'>"):
        text = text.replace(kind, "")
    return text


def moved(name: str) -> typing.Callable[[], int]:
    """An entry of the old form, `python -m stpm_plugin.NAME`: it names the new command, and runs it."""

    def run() -> int:
        print(f"`python -m stpm_plugin.{name}` is now `stpm {name}`; 0.4 drops the old form.", file=sys.stderr)
        return main([name, *sys.argv[1:]])

    return run
