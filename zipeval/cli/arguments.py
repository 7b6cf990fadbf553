"""Declare what a command takes, once: parsing, help, suggestions and shell completion all read the declaration.

    TABLE = Command("table", "print scores ...", settings=(RESULTS, Setting("format", "...", choices=FORMATS)))
    options = TABLE.parse(["results=runs", "--format", "csv"])
    options.format                                             # "csv"

Settings are written NAME=VALUE, as Hydra has them, or --NAME VALUE. argparse does the rest.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

from zipeval.cli.settings import (
    ASSIGNED,
    DASHED,
    LABEL_WIDTH,
    Operand,
    Section,
    Setting,
)
from zipeval.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A command, as it is declared.

    Attributes:
        name: behind `zipeval`.
        usage: what may stand behind the name.
        summary: one sentence for `zipeval --help`, and at the top of its own help.
        about: paragraphs of its own help.
        operands: what it takes without a name.
        misused: what is said where the operands are too few, too many, or not among the choices.
        settings: its own; a function where listing them imports something.
        heading: what stands above its settings in its help.
        passed_on: settings of `zipeval run` that it hands to the configuration, by name; `model.` is all within it.
        defaults: those among the settings handed on that are not as in `zipeval run`: name and value.
        idle: why it has no use for the other settings of `zipeval run`; empty: it knows nothing of them.
        more_sections: makes what its help shows beyond its own settings and those that it hands on.
        examples: command lines, each with a word on it.
    """

    name: str
    usage: str
    summary: str
    about: str = ""
    operands: tuple[Operand, ...] = ()
    misused: str = ""
    settings: tuple[Setting, ...] | Callable[[], tuple[Setting, ...]] = ()
    heading: str = "settings, as NAME=VALUE or --NAME VALUE"
    passed_on: tuple[str, ...] = ()
    defaults: tuple[tuple[str, str], ...] = ()
    idle: str = ""
    more_sections: Callable[[], list[Section]] | None = None
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def own_settings(self) -> tuple[Setting, ...]:
        """The settings that are not handed on."""
        return self.settings() if callable(self.settings) else self.settings

    @property
    def full_name(self) -> str:
        """The command with the word that always follows it, as in `zipeval analyze redundancy`."""
        name = f"zipeval {self.name}"
        # More than one choice is a choice: then no word always follows.
        choices = [operand.allowed for operand in self.operands]
        if len(choices) == 1 and len(choices[0]) == 1:
            name += f" {choices[0][0]}"
        return name

    @property
    def explains(self) -> str:
        """The end of an error."""
        return f"`zipeval {self.name} --help` explains it."

    def takes(self, name: str) -> bool:
        """Return whether a setting of `zipeval run` is handed on."""
        # In method@method.first=visionzip the place behind the @ lies within the group,
        # so that the dot stands for it.
        name = name.lstrip("+~").replace("@", ".@")
        if name in self.passed_on:
            return True
        prefixes = [prefix for prefix in self.passed_on if prefix.endswith(".")]
        return name.startswith(tuple(prefixes))

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Return the values by name, with `operands` and the `overrides` that are handed on, both in their order.

        Where help is asked for it is printed, and the process ends.

        Raises:
            UsageError: for what the command does not take; says what it does.
        """
        if asks_for_help(arguments):
            print(self.help(), end="")
            raise SystemExit(0)
        options = _Reader(self).read(arguments)
        self._check_operands(options.operands, arguments)
        return options

    def _check_operands(self, values: list[str], arguments: list[str]) -> None:
        """Raise UsageError where they are too few, too many, or not among the choices."""
        command_line = " ".join([self.name, *arguments])
        misused = self.misused or f"it takes nothing but NAME=VALUE. {self.explains}"
        if len(values) > len(self.operands):
            raise UsageError(f"{command_line}: {misused}")
        # An operand that is missing is checked like one that is empty, so that the error
        # lists the choices there are.
        for operand, value in zip_longest(self.operands, values, fillvalue=""):
            if not operand.accepts(value):
                hint = operand.suggest(value)
                raise UsageError(f"{command_line}: {misused}{hint}")

    def sections(self) -> list[Section]:
        """Return the settings as the help shows them."""
        sections = [Section(self.heading, self.own_settings)]
        if self.passed_on:
            from zipeval.cli.run_settings import shown

            # A setting of the command's own hides the one of `zipeval run`.
            others = {setting.name: setting for setting in shown(self.passed_on)}
            for setting in self.own_settings:
                others.pop(setting.name, None)
            for name, default in self.defaults:
                others[name] = replace(others[name], default_text=default)
            section = Section("settings as in `zipeval run`", tuple(others.values()))
            sections.append(section)
        if self.more_sections is not None:
            sections += self.more_sections()
        return [section for section in sections if section.settings]

    def help(self) -> str:
        """Return the text of `zipeval COMMAND --help`."""
        parser = _Parser(self)
        for section in self.sections():
            group = parser.add_argument_group(section.heading)
            for setting in section.settings:
                group.add_argument(
                    f"--{setting.name}", help=_escaped(setting.help)
                ).setting = setting
        return parser.format_help()


def asks_for_help(arguments: list[str]) -> bool:
    """Return whether a command is asked to explain itself."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--help" in before or "-h" in before


class _Parser(argparse.ArgumentParser):
    """argparse's, with zipeval's help and complaints."""

    def __init__(self, command: Command):
        paragraphs = [
            command.summary,
            command.about,
            _operand_lines(command.operands),
        ]
        super().__init__(
            prog=f"zipeval {command.name}",
            usage=_escaped(f"zipeval {command.name} {command.usage}".rstrip()),
            description=_escaped("\n\n".join(filter(None, paragraphs))),
            epilog=_escaped(_example_lines(command.examples)),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.command = command

    def error(self, message: str):
        raise UsageError(f"{self.command.name}: {message}. {self.command.explains}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's layout, with settings as they are typed: `results=DIR`."""

    def __init__(self, prog: str):
        width = _terminal_width()
        super().__init__(
            prog, max_help_position=min(LABEL_WIDTH, width // 3), width=width
        )

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill paragraphs; what is indented stays as it is."""
        filled = []
        for paragraph in text.split("\n\n"):
            # A list has line ends of its own, which filling would take away.
            if "\n" not in paragraph:
                paragraph = textwrap.fill(paragraph, width)
            filled.append(paragraph)
        return "\n\n".join(filled)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.setting.label


class _PassOn(argparse.Action):
    """Collect an override for the configuration."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.overrides = [
            *namespace.overrides,
            f"{option_string.removeprefix('--')}={values}",
        ]


class _Reader:
    """Reads one command line."""

    def __init__(self, command: Command):
        self.command = command
        self.settings = {setting.name: setting for setting in command.own_settings}
        self.parser = _Parser(command)
        # argparse refuses an option that is declared twice.
        self.handed_on: set[str] = set()
        for setting in self.settings.values():
            self.parser.add_argument(
                setting.dashed,
                dest=setting.name,
                type=setting.parse,
                default=setting.default,
            )
        self.parser.add_argument("operands", nargs="*")
        self.parser.set_defaults(overrides=[])

    def read(self, arguments: list[str]) -> argparse.Namespace:
        """Return argparse's result."""
        options: list[str] = []
        rest = list(arguments)
        # Behind `--` there are no settings: argparse takes all of it as operands.
        while rest and rest[0] != "--":
            options.append(self._as_option(rest.pop(0), rest))
        return self.parser.parse_intermixed_args(options + rest)

    def _as_option(self, argument: str, rest: list[str]) -> str:
        """Return an argument as argparse reads it: `results=runs` as `--results=runs`.

        Args:
            rest: the arguments behind it; a value that stands there is taken away.
        """
        written = ASSIGNED.fullmatch(argument) or DASHED.fullmatch(argument)
        if written is None:
            if argument.startswith("-"):
                raise UsageError(
                    f"{argument}: expected NAME=VALUE. {self.command.explains}"
                )
            return argument
        name, value = written["name"], written.groupdict().get("value")
        # In NAME=VALUE the name stands as it is, and the value may be empty.
        if not written["dashes"]:
            return f"{self._option(name, argument)}={value}"
        name = self._undashed(name)
        option = self._option(name, argument)
        if value is None:
            value = self._next_value(name, rest)
        if not value:
            raise UsageError(
                f"{argument.rstrip('=')}: needs a value. {self.command.explains}"
            )
        return f"{option}={value}"

    def _undashed(self, name: str) -> str:
        """Return the name of a setting that is written with dashes, such as max-drop."""
        underscored = name.replace("-", "_")
        return underscored if underscored in self.settings else name

    def _next_value(self, name: str, rest: list[str]) -> str:
        """Return the value of an option that stands alone; empty where there is none."""
        setting = self.settings.get(name)
        if setting is not None and setting.flag:
            return "true"
        # What begins with dashes is the next option, so that the value was forgotten.
        if rest and not rest[0].startswith("--"):
            return rest.pop(0)
        return ""

    def _option(self, name: str, argument: str) -> str:
        """Return argparse's option of a setting.

        Raises:
            UsageError: for a name that the command does not take.
        """
        if name in self.settings:
            return self.settings[name].dashed
        if not self.command.takes(name):
            raise self._refusal(name, argument)
        option = f"--{name}"
        if option not in self.handed_on:
            self.parser.add_argument(
                option, action=_PassOn, dest="overrides", default=argparse.SUPPRESS
            )
            self.handed_on.add(option)
        return option

    def _refusal(self, name: str, argument: str) -> UsageError:
        """Return the error for a name that the command does not take."""
        if self.command.idle:
            from zipeval.cli.run_settings import is_of_run

            if is_of_run(name):
                return UsageError(
                    f"{argument}: `zipeval {self.command.name}` has no use for it, {self.command.idle}. Leave it out."
                )
        # Options such as --config-dir have dashes, and are no settings.
        known = {name for name, setting in self.settings.items() if not setting.option}
        known |= {*self.command.passed_on}
        # `model` itself and what is in it are one suggestion.
        for node in [known_name for known_name in known if known_name.endswith(".")]:
            known.remove(node)
            if node.rstrip(".") not in known:
                known.add(f"{node}NAME")
        name = name.replace("-", "_")
        command = self.command.full_name
        hint = did_you_mean(name, known)
        return UsageError(f"{name}: no such setting of `{command}`.{hint}")


def _terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, 120) - 2


def _escaped(help_text: str) -> str:
    """Return a text that argparse prints as it is: it would fill in what stands behind a `%`."""
    return help_text.replace("%", "%%")


def _operand_lines(operands: tuple[Operand, ...]) -> str:
    """Return the paragraph of a help that explains the operands; empty without any."""
    lines = []
    for operand in operands:
        line = f"\n  {operand.name:<{LABEL_WIDTH - 4}}  {operand.meaning}"
        if len(operand.allowed) > 1:
            line += f": {', '.join(operand.allowed)}"
        lines.append(line)
    return "".join(lines)


def _example_lines(examples: tuple[tuple[str, str], ...]) -> str:
    """Return the end of a help: command lines, each with a word on it."""
    lines = []
    for command, meaning in examples:
        lines.append(f"  {command}")
        if meaning:
            lines.append(f"      {meaning}")
    return "\n".join(["examples:", *lines] if lines else [])
