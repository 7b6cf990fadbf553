"""Commands that measure without a benchmark: `zipeval bench`, `analyze` and `visualize`."""

from __future__ import annotations

from pathlib import Path

from zipeval import ranks
from zipeval.cli.arguments import count, settings
from zipeval.cli.output import hide_bars
from zipeval.composition import compose
from zipeval.errors import UsageError

IDLE_IN_BENCH = ("suite", "tasks", "limit", "batch_size", "judge", "data", "logger")


def bench(arguments: list[str]) -> None:
    """`zipeval bench`: composes the configuration of every method at every budget, vanilla's before them."""
    from dataclasses import fields

    from zipeval.bench import Settings, read, render
    from zipeval.bench import bench as measure

    if ranks.here().count > 1:
        raise UsageError(f"{ranks.here().count} processes: they would disturb each other. Run this without torchrun.")

    own, overrides = {"method": "vanilla", "tokens": "null"}, []
    for argument in arguments:
        name, assigned, value = argument.partition("=")
        if not assigned or name.startswith("-"):
            raise UsageError(f"{argument}: expected NAME=VALUE. `zipeval --help` shows what `zipeval bench` takes.")
        if name.partition(".")[0] in IDLE_IN_BENCH or (name.startswith("runner.") and name != "runner.compile"):
            raise UsageError(f"{argument}: `zipeval bench` has no use for it, its inputs are synthetic. Leave it out.")
        if name in (*own, *(field.name for field in fields(Settings))):
            own[name] = value
        else:
            overrides.append(argument)
    methods = dict.fromkeys(["vanilla", *own.pop("method").split(",")])
    budgets = own.pop("tokens").split(",")
    settings = Settings(**{name: _parsed(name, value) for name, value in own.items()})
    configs = []
    for method in methods:
        # final: for some methods on some models, nothing was published. method.x= is not of vanilla.
        its = ["budget=final", *(o for o in overrides if method != "vanilla" or not o.startswith("method"))]
        configs += [compose([*its, f"method={method}", f"tokens={tokens}"]) for tokens in budgets]
    hide_bars()
    path = measure(configs, settings)
    print(f"{render(read(path))}\n\n{path}")


def _parsed(name: str, value: str) -> str | int | tuple[int, ...]:
    """A setting of `zipeval bench`.

    Raises:
        UsageError: for a number that is none.
    """
    if name in ("init", "results"):
        return value
    try:
        numbers = tuple(dict.fromkeys(map(int, value.split(","))))
        return numbers if name == "batch" else int(value)
    except ValueError:
        raise UsageError(f"{name}={value}: expected a whole number, such as {name}=8.") from None


def analyze(arguments: list[str]) -> None:
    """`zipeval analyze redundancy`."""
    model = [a for a in arguments[1:] if a.startswith(("model=", "model."))]
    for argument in arguments[1:]:
        if argument.partition("=")[0].partition(".")[0] in ("method", "tokens", "budget"):
            raise UsageError(
                f"{argument}: `zipeval analyze` has no use for it, it looks at the model as it is. Leave it out."
            )
    own = [a for a in arguments[1:] if a not in model]
    given = settings("analyze redundancy", own, ("images", "limit", "out", "model"))
    if arguments[:1] != ["redundancy"] or not given.get("out"):
        raise UsageError(
            f"{' '.join(['analyze', *arguments])}: say what of and where to, "
            "`zipeval analyze redundancy model=tiny_llava out=DIR`."
        )
    from zipeval.redundancy import analyze as measure

    hide_bars()
    config = compose(model)
    images, limit = given.get("images"), given.get("limit")
    written = measure(
        config,
        Path(images).expanduser() if images else None,
        None if limit is None else count("limit", limit),
        Path(given["out"]).expanduser(),
    )
    print("\n".join(map(str, written)))


def visualize(arguments: list[str]) -> None:
    """`zipeval visualize IMAGE QUESTION`."""
    own = ("method", "tokens", "out")
    known = (*own, "model", "budget", "packing", "seed", "projector")
    image, question, *rest = [*arguments, "", ""]
    if not question or any(a.partition("=")[0] in known for a in (image, question)):
        raise UsageError(
            f"{' '.join(['visualize', *arguments])}: name an image and a question, "
            "`zipeval visualize photo.jpg 'What is this?'`."
        )
    of_model, of_method = ([a for a in rest if a.startswith(f"{group}.")] for group in ("model", "method"))
    given = settings("visualize", [a for a in rest if a and a not in (*of_model, *of_method)], known)
    if "," in given.get("tokens", ""):
        raise UsageError(f"tokens={given['tokens']}: a picture is of one budget. Run it for each.")
    named = [*dict.fromkeys(given.get("method", "").split(","))]
    if of_method and (len(named) > 1 or not named[0]):
        raise UsageError(f"{of_method[0]}: of which method? Name a single one, such as method=chain.")
    budget = count("tokens", given["tokens"]) if given.get("tokens") else None
    from zipeval import models
    from zipeval.visualize import METHODS, picture

    hide_bars()
    shared = ["budget=final", *(f"{k}={v}" for k, v in given.items() if k not in own), *of_model]
    tokens = budget or max(1, models.find(compose(shared).model).visual_tokens // 9)
    configs = [
        compose([*shared, f"method={method}", f"tokens={tokens}", *of_method])
        for method in (named if "method" in given else METHODS)
    ]
    print(picture(configs, Path(image).expanduser(), question, Path(given.get("out", "visualize.svg")).expanduser()))
