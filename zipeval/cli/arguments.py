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
        words = self.operands[0].allowed if len(self.operands) == 1 else ()
        return " ".join(["zipeval", self.name, *(words if len(words) == 1 else ())])

    @property
    def explains(self) -> str:
        """The end of an error."""
        return f"`zipeval {self.name} --help` explains it."

    def takes(self, name: str) -> bool:
        """Return whether a setting of `zipeval run` is handed on."""
        name, at, _ = name.lstrip("+~").partition("@")
        if at:  # method@method.first=visionzip: a configuration of the group, at a place within it
            name += "."
        prefixes = tuple(prefix for prefix in self.passed_on if prefix.endswith("."))
        return name in self.passed_on or name.startswith(prefixes)

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
        least = sum(operand.required for operand in self.operands)
        command_line = " ".join([self.name, *arguments])
        misused = self.misused or f"it takes nothing but NAME=VALUE. {self.explains}"
        for number, operand in enumerate(self.operands):
            value = values[number] if number < len(values) else ""
            is_wrong = value not in operand.allowed and (value or operand.required)
            if operand.allowed and is_wrong:
                hint = (
                    did_you_mean(value, operand.allowed)
                    if len(operand.allowed) > 1
                    else ""
                )
                raise UsageError(f"{command_line}: {misused}{hint}")
        if not least <= len(values) <= len(self.operands):
            raise UsageError(f"{command_line}: {misused}")

    def sections(self) -> list[Section]:
        """Return the settings as the help shows them."""
        sections = [Section(self.heading, self.own_settings)]
        if self.passed_on:
            from zipeval.cli.run_settings import shown

            own_names = {setting.name for setting in self.own_settings}
            defaults = dict(self.defaults)
            others = tuple(
                replace(
                    setting,
                    default_text=defaults.get(setting.name, setting.default_text),
                )
                for setting in shown(self.passed_on)
                if setting.name not in own_names
            )
            sections.append(Section("settings as in `zipeval run`", others))
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
        parts = [
            command.summary,
            *([command.about] if command.about else []),
            *_operand_lines(command.operands),
        ]
        super().__init__(
            prog=f"zipeval {command.name}",
            usage=_escaped(f"zipeval {command.name} {command.usage}".rstrip()),
            description=_escaped("\n\n".join(parts)),
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
        paragraphs = text.split("\n\n")
        filled = [
            part if "\n" in part else textwrap.fill(part, width) for part in paragraphs
        ]
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
        self.handed_on: set[str] = (
            set()
        )  # options of those that were declared to argparse
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
        while rest:
            argument = rest.pop(0)
            if argument == "--":  # no settings behind it
                options += [argument, *rest]
                break
            options.append(self._as_option(argument, rest))
        return self.parser.parse_intermixed_args(options)

    def _as_option(self, argument: str, rest: list[str]) -> str:
        """Return an argument as argparse reads it: `results=runs` as `--results=runs`.

        Args:
            rest: the arguments behind it; a value that stands there is taken away.
        """
        assigned, dashed = ASSIGNED.fullmatch(argument), DASHED.fullmatch(argument)
        if assigned and not assigned["dashes"]:
            return f"{self._option(assigned['name'], argument)}={assigned['value']}"
        if assigned:
            option = self._option(self._undashed(assigned["name"]), argument)
            value = assigned["value"]
        elif dashed:
            option = self._option(self._undashed(dashed["name"]), argument)
            value = self._next_value(dashed["name"], rest)
        elif argument.startswith("-"):
            raise UsageError(
                f"{argument}: expected NAME=VALUE. {self.command.explains}"
            )
        else:
            return argument
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
        setting = self.settings.get(self._undashed(name))
        if setting is not None and setting.flag:
            return "true"
        return rest.pop(0) if rest and not rest[0].startswith("--") else ""

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
        known = [
            setting.name for setting in self.settings.values() if not setting.option
        ]
        for passed_on in self.command.passed_on:
            if not passed_on.endswith("."):
                known.append(passed_on)
            elif passed_on.rstrip(".") not in known:
                known.append(f"{passed_on}NAME")
        name = name.replace("-", "_")
        return UsageError(
            f"{name}: no such setting of `{self.command.full_name}`.{did_you_mean(name, {*known})}"
        )


def _terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, 120) - 2


def _escaped(help_text: str) -> str:
    """Return a text that argparse prints as it is: it would fill in what stands behind a `%`."""
    return help_text.replace("%", "%%")


def _operand_lines(operands: tuple[Operand, ...]) -> list[str]:
    """Return the paragraph of a help that explains the operands, if there are any."""
    lines = []
    for operand in operands:
        choices = f": {', '.join(operand.allowed)}" if len(operand.allowed) > 1 else ""
        lines.append(f"  {operand.name:<{LABEL_WIDTH - 4}}  {operand.meaning}{choices}")
    return ["\n" + "\n".join(lines)] if lines else []


def _example_lines(examples: tuple[tuple[str, str], ...]) -> str:
    """Return the end of a help: command lines, each with a word on it."""
    lines = ["examples:"]
    for command, meaning in examples:
        lines += [f"  {command}", f"      {meaning}"] if meaning else [f"  {command}"]
    return "\n".join(lines) if examples else ""
