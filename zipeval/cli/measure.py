"""Commands that measure without a benchmark: `zipeval bench`, `analyze` and `visualize`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from zipeval.cli.arguments import Command
from zipeval.cli.output import hide_bars
from zipeval.cli.run_settings import names
from zipeval.cli.settings import CONFIG_DIR, Operand, Setting, path, positive, text
from zipeval.config.compose import compose
from zipeval.errors import UsageError
from zipeval.utils import ranks
from zipeval.utils.docstrings import attributes

OF_BENCH = (
    "init",
    "batch",
    "new_tokens",
    "prompt_tokens",
    "repeats",
    "results",
)  # zipeval.efficiency.bench.Settings


def bench_settings() -> tuple[Setting, ...]:
    """Return what `zipeval bench` takes, as zipeval.efficiency.bench.Settings documents it."""
    from zipeval.efficiency.bench import INITS, Settings

    explained = attributes(Settings)
    settings = [
        Setting(
            "method",
            "methods to compare with vanilla",
            "METHOD,...",
            text,
            "",
            "vanilla alone",
            names("method"),
            True,
        ),
        Setting(
            "tokens",
            "visual tokens that an image is left with",
            "N,...",
            text,
            "null",
            "",
        ),
    ]
    for field in fields(Settings):
        default = field.default
        shown = (
            ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        )
        choices = INITS if field.name == "init" else ()
        explanation = explained[field.name]
        settings.append(
            Setting(
                field.name,
                explanation.meaning,
                explanation.value,
                _read_bench,
                default,
                shown,
                choices,
            )
        )
    return (*settings, CONFIG_DIR)


def _read_bench(name: str, value: str) -> str | int | tuple[int, ...]:
    """Return a setting of zipeval.efficiency.bench.Settings.

    Raises:
        UsageError: for a number that is none.
    """
    if name in ("init", "results"):
        return value
    try:
        numbers = tuple(dict.fromkeys(map(int, value.split(","))))
        return numbers if name == "batch" else int(value)
    except ValueError:
        raise UsageError(
            f"{name}={value}: expected a whole number, such as {name}=8."
        ) from None


BENCH = Command(
    "bench",
    "model=MODEL method=METHOD,... tokens=N,... [NAME=VALUE ...]",
    "Measure speed and memory of methods beside vanilla's.",
    "Inputs are synthetic: it needs no data, and with init=random no weights either.",
    misused="expected NAME=VALUE. `zipeval bench --help` shows what it takes.",
    settings=bench_settings,
    passed_on=(
        "model",
        "model.",
        "method.",
        "budget",
        "packing",
        "projector",
        "seed",
        "runner.compile",
    ),
    defaults=(("budget", "final"),),
    idle="its inputs are synthetic",
    examples=(
        (
            "zipeval bench model=llava15 method=visionzip,fastv tokens=192,64 batch=1,8 init=random",
            "",
        ),
    ),
)


def bench(arguments: list[str]) -> None:
    """Run `zipeval bench`: composes the configuration of every method at every budget, vanilla's before them."""
    options = BENCH.parse(arguments)
    from zipeval.efficiency.bench import Settings, render
    from zipeval.efficiency.bench import bench as measure
    from zipeval.results.speed_records import read

    if ranks.here().count > 1:
        raise UsageError(
            f"{ranks.here().count} processes: they would disturb each other. Run this without torchrun."
        )
    settings = Settings(**{name: getattr(options, name) for name in OF_BENCH})
    methods = dict.fromkeys(["vanilla", *filter(None, options.method.split(","))])
    configs = []
    for method in methods:
        # final: for some methods on some models, nothing was published. method.x= is not of vanilla.
        shared = [
            o
            for o in options.overrides
            if method != "vanilla" or not o.startswith("method")
        ]
        for tokens in options.tokens.split(","):
            overrides = [
                "budget=final",
                *shared,
                f"method={method}",
                f"tokens={tokens}",
            ]
            configs.append(compose(overrides, options.config_dir))
    hide_bars()
    record = measure(configs, settings)
    print(f"{render(read(record))}\n\n{record}")


ANALYZE = Command(
    "analyze",
    "redundancy out=DIR [model=MODEL] [images=DIR] [limit=N]",
    "Measure how concentrated the attention is that visual tokens receive, layer by layer.",
    "It looks at the model as it is, without any method, and writes CSV files and plots.",
    operands=(Operand("redundancy", "what is measured", choices=("redundancy",)),),
    misused="say what of and where to, `zipeval analyze redundancy model=tiny_llava out=DIR`.",
    settings=(
        Setting("out", "directory of the CSV files and plots", "DIR", path),
        Setting(
            "images",
            "directory of pictures; without it the embedded ones are taken",
            "DIR",
            path,
        ),
        Setting("limit", "number of pictures", "N", positive, default_text="all"),
        CONFIG_DIR,
    ),
    passed_on=("model", "model."),
    idle="it looks at the model as it is",
)


def analyze(arguments: list[str]) -> None:
    """Run `zipeval analyze redundancy`."""
    options = ANALYZE.parse(arguments)
    if options.out is None:
        raise UsageError(f"{' '.join(['analyze', *arguments])}: {ANALYZE.misused}")
    from zipeval.analysis.redundancy import analyze as measure

    hide_bars()
    config = compose(options.overrides, options.config_dir)
    written = measure(config, options.images, options.limit, options.out)
    print("\n".join(map(str, written)))


VISUALIZE = Command(
    "visualize",
    "IMAGE QUESTION [method=METHOD,...] [tokens=N] [out=FILE.svg|pdf|png] [NAME=VALUE ...]",
    "Draw which tokens of an image methods keep, and what is then answered.",
    operands=(
        Operand("IMAGE", "a picture file"),
        Operand("QUESTION", "what the model is asked about it"),
    ),
    misused="name an image and a question, `zipeval visualize photo.jpg 'What is this?'`.",
    settings=(
        Setting(
            "method",
            "methods, a picture each",
            "METHOD,...",
            text,
            default_text="vanilla,visionzip,fastv,sparsevlm",
            choices=names("method"),
            several=True,
        ),
        Setting(
            "tokens",
            "visual tokens that the image is left with",
            "N",
            text,
            default_text="a ninth of all",
        ),
        Setting(
            "out",
            "what is drawn; its name says in which format",
            "FILE.svg|pdf|png",
            path,
            "visualize.svg",
        ),
        CONFIG_DIR,
    ),
    passed_on=("model", "model.", "method.", "budget", "packing", "seed", "projector"),
    defaults=(("budget", "final"),),
)


def visualize(arguments: list[str]) -> None:
    """Run `zipeval visualize IMAGE QUESTION`."""
    options = VISUALIZE.parse(arguments)
    image, question = options.operands
    if options.tokens and "," in options.tokens:
        raise UsageError(
            f"tokens={options.tokens}: a picture is of one budget. Run it for each."
        )
    methods = [*dict.fromkeys((options.method or "").split(","))]
    of_method = [
        override for override in options.overrides if override.startswith("method.")
    ]
    if of_method and (len(methods) > 1 or not methods[0]):
        raise UsageError(
            f"{of_method[0]}: of which method? Name a single one, such as method=chain."
        )
    budget = positive("tokens", options.tokens) if options.tokens else None
    from zipeval import models
    from zipeval.analysis.visualize import METHODS, picture

    hide_bars()
    shared = [
        "budget=final",
        *(override for override in options.overrides if override not in of_method),
    ]
    tokens = budget or max(
        1, models.find(compose(shared, options.config_dir).model).visual_tokens // 9
    )
    configs = []
    for method in methods if options.method is not None else METHODS:
        overrides = [*shared, f"method={method}", f"tokens={tokens}", *of_method]
        configs.append(compose(overrides, options.config_dir))
    print(picture(configs, Path(image).expanduser(), question, options.out))
