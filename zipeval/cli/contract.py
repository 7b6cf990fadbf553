"""`zipeval test-method`."""

from __future__ import annotations

from zipeval.cli.arguments import Command
from zipeval.cli.output import hide_bars
from zipeval.cli.run_settings import names
from zipeval.cli.settings import CONFIG_DIR, Operand
from zipeval.errors import RunError

TEST_METHOD = Command(
    "test-method",
    "NAME [--config-dir DIR] [method.OPTION=VALUE ...]",
    "Check that a method keeps what every method has to keep.",
    "It is applied to small random models of each family and to the embedded one: its budget is what enters the "
    "layers, a batch equals single prompts, nothing is left on the model, and so on. Exit code 1 where a check fails.",
    operands=(
        Operand(
            "NAME", "a method of `zipeval list methods`", suggestions=names("method")
        ),
    ),
    misused="name one method, `zipeval test-method NAME [--config-dir DIR]`.",
    settings=(CONFIG_DIR,),
    passed_on=("method.", "seed"),
    examples=(
        (
            "PYTHONPATH=. zipeval test-method norms --config-dir configs",
            "a method outside of zipeval",
        ),
    ),
)


def test_method(arguments: list[str]) -> None:
    """Run `zipeval test-method NAME`: exit code 1 where a check fails, or none has anything to say."""
    options = TEST_METHOD.parse(arguments)
    (name,) = options.operands
    hide_bars()
    from zipeval.config.compose import compose

    compose(
        [f"method={name}", *options.overrides], options.config_dir
    )  # refused before torch is imported
    from zipeval.contract.candidates import candidate
    from zipeval.contract.run import FAILED, PASSED, run_checks, show

    outcomes = list(
        run_checks(candidate(name, tuple(options.overrides), options.config_dir))
    )
    show(name, outcomes)
    results = {outcome.result for outcome in outcomes}
    if FAILED in results:
        raise RunError(
            f"method={name}: it breaks the contract. docs/adding-a-method.md says what a method has to keep."
        )
    if PASSED not in results:
        raise RunError(
            f"method={name}: no check had anything to say. Set the options that it needs, method.OPTION=."
        )


test_method.__test__ = (
    False  # pytest takes what is called test_ for a test where it is imported
)
