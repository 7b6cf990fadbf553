"""`zipeval completion bash|zsh`, and the candidates that those scripts ask for when TAB is pressed.

The scripts know nothing of commands: they hand the line to `zipeval __complete`, which reads the declarations. So what
was just installed is completed, too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from zipeval.cli.arguments import Command
from zipeval.cli.run import config_dir_of, sweep_settings
from zipeval.cli.run_settings import completed, method_settings, run_settings
from zipeval.cli.settings import Operand, Setting
from zipeval.config.compose import GROUPS
from zipeval.config.directories import config_files

CANDIDATES = "__complete"
LIST_START = re.compile(r"(\[?(?:.*,)?)(.*)")

BASH = r"""# Completion of zipeval in bash: source <(zipeval completion bash)
_zipeval() {
    local line="${COMP_LINE:0:COMP_POINT}" word head IFS=$'\n'
    COMPREPLY=($("${COMP_WORDS[0]/#\~/$HOME}" __complete "$line" 2>/dev/null))
    # Where bash breaks words at "=", it replaces only what stands behind the last one.
    word="${line##*[[:space:]]}"
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        head="${word%"${word##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$head"}")
    fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]]; then
        compopt -o nospace
    fi
}
complete -o default -F _zipeval zipeval
"""

ZSH = r"""#compdef zipeval
# Completion of zipeval in zsh: source <(zipeval completion zsh), behind compinit
_zipeval() {
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a candidates open
    candidates=("${(@f)$(${~words[1]} __complete "$line" 2>/dev/null)}")
    candidates=(${candidates:#})
    open=(${(M)candidates:#*[=.]})
    candidates=(${candidates:#*[=.]})
    if (( ! $#candidates && ! $#open )); then
        [[ $PREFIX == *=* ]] && compset -P '*='
        _files
        return
    fi
    (( $#open )) && compadd -S '' -a open
    (( $#candidates )) && compadd -a candidates
}
compdef _zipeval zipeval
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}

COMPLETION = Command(
    "completion",
    "bash|zsh",
    "Print a script that completes commands, settings and their values in a shell.",
    operands=(Operand("SHELL", "one of", choices=tuple(SCRIPTS)),),
    misused="say which shell, `zipeval completion bash`.",
    examples=(
        ("echo 'source <(zipeval completion bash)' >> ~/.bashrc", ""),
        (
            "echo 'source <(zipeval completion zsh)' >> ~/.zshrc",
            "behind the line with compinit",
        ),
    ),
)


def completion(arguments: list[str]) -> None:
    """Run `zipeval completion bash|zsh`."""
    (shell,) = COMPLETION.parse(arguments).operands
    print(SCRIPTS[shell], end="")


def print_candidates(arguments: list[str], commands: dict[str, Command]) -> None:
    """Print what may stand at the end of a command line, one candidate a line.

    Args:
        arguments: the line up to the cursor, as one word.
    """
    line = arguments[0] if arguments else ""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is still open
        words = line.split()
    current = "" if not words or line[-1].isspace() else words.pop()
    for candidate in candidates(words[1:], current, commands):
        print(candidate)


def candidates(
    words: list[str], current: str, commands: dict[str, Command]
) -> list[str]:
    """Return what a word may become, sorted.

    Args:
        words: the ones before it, behind `zipeval`.
        current: what is typed of it.
    """
    if not words:
        return sorted(
            name
            for name in [*commands, "--help", "--version"]
            if name.startswith(current)
        )
    command = commands.get(words[0])
    if command is None:
        return []
    settings = _settings(command, words)
    name, assigned, typed = current.partition("=")
    previous = words[-1] if words[-1].startswith("--") else ""
    if assigned:
        values = _values(_named(name, settings), typed, words)
        return [f"{name}={value}" for value in values]
    if previous and (option := _named(previous, settings)) and not option.flag:
        return _values(option, current, words)
    if current.startswith("-"):
        return sorted(
            option
            for option in _options(
                command.own_settings if _takes_all(command) else settings
            )
            if option.startswith(current)
        )
    return sorted(
        {*_operands(command, words, current), *_names(settings, words, current)}
    )


def _settings(command: Command, words: list[str]) -> list[Setting]:
    """Return the settings of a command, each by its whole name."""
    settings = [*command.own_settings]
    is_hydra = _takes_all(command)
    settings += (
        [*run_settings(), *sweep_settings()]
        if is_hydra
        else completed(command.passed_on)
    )
    methods = [word.partition("=")[2] for word in words if word.startswith("method=")]
    if methods and (is_hydra or command.takes("method.")):
        settings += method_settings(methods[-1], config_dir_of(words))
    return settings


def _takes_all(command: Command) -> bool:
    """Return whether a command takes every setting of a run: Hydra reads them, as NAME=VALUE only."""
    return command.name in ("run", "plan")


def _named(name: str, settings: list[Setting]) -> Setting | None:
    """Return the setting of a name, with dashes or without."""
    for setting in settings:
        if name in (setting.name, setting.dashed, f"--{setting.name}", setting.short):
            return setting
    return None


def _values(setting: Setting | None, typed: str, words: list[str]) -> list[str]:
    """Return the values of a setting that begin with what is typed; of values with commas the last one is completed."""
    if setting is None:
        return []
    group = setting.name.lstrip("+")
    choices = setting.allowed
    if group in GROUPS:
        choices = [file.name for file in config_files(group, config_dir_of(words))]
    if setting.name == "tasks":  # a list: tasks=[pope,gqa]
        before, last = LIST_START.fullmatch(typed).groups()
        return [
            f"{before or '['}{choice}]" for choice in choices if choice.startswith(last)
        ]
    before, comma, last = typed.rpartition(",") if setting.several else ("", "", typed)
    taken = before.split(",")
    return [
        f"{before}{comma}{choice}"
        for choice in choices
        if choice.startswith(last) and choice not in taken
    ]


def _options(settings: list[Setting]) -> Iterator[str]:
    """Yield the options that begin with a dash."""
    yield "--help"
    for setting in settings:
        if "." not in setting.name and not setting.name.startswith("+"):
            yield setting.dashed
        if setting.short:
            yield setting.short


def _names(settings: list[Setting], words: list[str], current: str) -> Iterator[str]:
    """Yield the names of settings that begin with what is typed: `results=`, and at first `model.` of what is in it."""
    assigned = {word.partition("=")[0] for word in words}
    for setting in settings:
        if (
            setting.option
            or setting.name in assigned
            or not setting.name.startswith(current)
        ):
            continue
        dot = setting.name.find(".", len(current))
        yield f"{setting.name}=" if dot < 0 else setting.name[: dot + 1]


def _operands(command: Command, words: list[str], current: str) -> list[str]:
    """Return the words that may stand in an operand's place."""
    before = [
        word for word in words[1:] if "=" not in word and not word.startswith("-")
    ]
    if len(before) >= len(command.operands):
        return []
    return [
        value
        for value in command.operands[len(before)].offered
        if value.startswith(current)
    ]
