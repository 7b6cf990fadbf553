"""What a configuration comes to: checkpoint, method, data and placement, found feasible before weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import fmean

from zipeval import benchmarks, methods, models
from zipeval.benchmarks import data_identity, stack, videoqa
from zipeval.benchmarks.data_identity import DataIdentity
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.checkpoints import projector, prompts
from zipeval.checkpoints.placement import place
from zipeval.config.schema import RunConfig
from zipeval.engine.budget import Shape, VisualInput
from zipeval.errors import BudgetError, MediaError, UsageError
from zipeval.inference.validation import check
from zipeval.methods._stages import stages
from zipeval.results.identity import run_id


class Session:
    """A configuration that was found feasible, with everything it names; the weights are loaded when needed.

    Args:
        checkpoint: in place of the one that the configuration names.

    Raises:
        UsageError: for what cannot run, before anything is loaded.
    """

    def __init__(self, config: RunConfig, checkpoint: models.Checkpoint | None = None):
        self.config = config = check(config)
        self.checkpoint = checkpoint or models.find(config.model)
        self._afford()
        self._check_aspect()
        found = self.checkpoint
        self.shape = Shape(
            found.visual_tokens, found.visual_tokens, found.layers, self._grids()
        )
        self.method = methods.build(config.method, config.budget, self.shape)
        self._check_it_reduces()
        self._check_budget()
        self.questions = {
            task: videoqa.questions(task, config.data.videos)
            for task in config.tasks
            if task in videoqa.SETS
        }
        stack.load(stack.DEVICE)
        self.placement = place(config.model)
        self._data: dict[str, DataIdentity] = {}

    def _afford(self) -> None:
        tokens, available = self.config.tokens, self.checkpoint.visual_tokens
        if tokens is not None and tokens > available:
            raise UsageError(
                f"tokens={tokens}: {self.config.model.name} has {available} visual tokens an image; "
                f"choose from 1 to {available}, such as tokens={max(1, available // 9)}."
            )

    def _grids(self) -> tuple[tuple[int, int], ...]:
        """Those of the checkpoint, with row ends if they are to be kept."""
        grids, packing = self.checkpoint.grids, self.config.packing
        if packing != "newline":
            return tuple(sorted({(crops, 0) for crops, _ in grids}))
        if not any(rows for _, rows in grids):
            raise UsageError(
                f"packing={packing}: the images of {self.config.model.name} have no row ends. Leave it out."
            )
        return grids

    def _check_it_reduces(self) -> None:
        """A setting beyond what is there would silently be vanilla under another name; tokens= all of them says so."""
        available = self.checkpoint.visual_tokens
        asked = {
            k: v
            for k, v in self.config.method.items()
            if k not in ("name", "_target_", "seed")
        }
        if asked and not self.reduces and self.config.tokens != available:
            settings = ", ".join(f"{k}={v}" for k, v in asked.items() if v is not None)
            raise UsageError(
                f"method={self.config.method['name']} ({settings}) removes nothing: {self.config.model.name} has "
                f"{available} visual tokens an image. `zipeval run method=vanilla` is the model as it is."
            )

    def _check_budget(self) -> None:
        """What the method's settings come to is what was asked for; whether it keeps to them is measured later."""
        tokens, entering = self.config.tokens, self.entering([self.shape.picture])
        reached = {"mean": fmean(entering), "final": entering[-1]}.get(
            self.config.budget
        )
        if None not in (tokens, reached) and abs(reached - tokens) > 1:
            raise BudgetError(
                f"method={self.config.method['name']}: its settings for tokens={tokens} budget={self.config.budget} "
                f"come to {reached:.1f}. The method's for_budget is wrong."
            )

    def _check_aspect(self) -> None:
        config, known = self.config.model, models.family(self.config.model).ASPECTS
        if config.image_aspect not in known:
            raise UsageError(
                f"model.image_aspect={config.image_aspect}: the images of {config.name} are prepared by "
                f"{' or '.join(known)}. Set model.image_aspect={known[0]}."
            )

    def entering(self, images: list[VisualInput]) -> list[int]:
        """Visual tokens that should enter each decoder layer, of a prompt with these images."""
        return self.method.tokens_per_layer(images, self.shape.layers)

    @cached_property
    def reduces(self) -> bool:
        """Whether the method removes anything of the model's largest picture."""
        return (
            self.entering([self.shape.picture])
            != [self.checkpoint.visual_tokens] * self.shape.layers
        )

    @cached_property
    def reuse(self) -> str:
        """What is really shared: inside the decoder methods look at the question, so that its prefix is its own."""
        asked, parts = self.config.runner.reuse, stages(self.method)
        if asked == "none" or parts is None:
            return "none"
        return "features" if parts[1] else asked

    @cached_property
    def resolved(self) -> dict:
        """What `auto`, the paths of weights and the budget came to."""
        found = {
            **asdict(self.placement),
            "fingerprint": self.checkpoint.fingerprint,
            "method": repr(self.method),
        }
        return found | ({} if self.projector is None else {"projector": self.projector})

    @cached_property
    def projector(self) -> str | None:
        """Hash of the tuned projector, if the method has one.

        Raises:
            UsageError: if it is not there, or was tuned for anything else than this.
        """
        return projector.check(self.config, self.checkpoint)

    @cached_property
    def run_id(self) -> str:
        """Of everything that the answers depend on."""
        return run_id(self.config, self.resolved)

    def record_id(self, task: str) -> str:
        """Return the name of everything that a task's record depends on, its judge too.

        Records of before had the port of the judge's server in their name. Where there is such a one, for the port
        that is named now, it keeps its name: it is finished, or gone on with.
        """
        if task not in PROTOCOLS:
            return self.run_id
        name, former = (
            run_id(self.config, self.resolved, judged=True, port=port)
            for port in (False, True)
        )
        results = Path(self.config.results).expanduser()
        has_begun = {
            run: any((results / run).glob(f"{task}.*json*")) for run in (name, former)
        }
        return former if has_begun[former] and not has_begun[name] else name

    def task_hash(self, task: str, folder: Path) -> str:
        """Of the task's definition and of its questions."""
        return benchmarks.task_hash(task, folder, self.questions.get(task))

    def data_identity(self, task: str, folder: Path) -> DataIdentity:
        """Return which data the task's questions of this run are about; loads it, once.

        Raises:
            UsageError: if it does not load.
        """
        if task not in self._data:
            self._data[task] = data_identity.identify(
                task, folder, *self._data_settings(task)
            )
        return self._data[task]

    def known_data_identity(self, task: str, folder: Path) -> DataIdentity | None:
        """Return the same for a record that is finished: without a download, and so None where the data is not here."""
        return self._data.get(task) or data_identity.known(
            task, folder, *self._data_settings(task)
        )

    def _data_settings(self, task: str) -> tuple:
        return self.config.data, self.questions.get(task), self.config.limit

    def load(self):
        """(model, processor)."""
        _ = self.projector  # refused before minutes of loading
        return models.load(self.config.model.family, self.checkpoint, self.placement)

    def decoded(self, messages: list[dict]) -> list[dict]:
        """Chat messages with images and frames in place of what a task names.

        Raises:
            MediaError: if one cannot be decoded.
            UsageError: for media that the model does not take.
        """
        from zipeval import media

        config, family, (_, processor) = (
            self.config.model,
            models.family(self.config.model),
            self.load(),
        )
        background = tuple(
            int(mean * 255) for mean in processor.image_processor.image_mean
        )

        def decode(part: dict) -> dict:
            if part["type"] == "text":
                for kind in family.MEDIA:
                    if f"<{kind}>" in part["text"]:
                        raise MediaError(
                            f"its text holds <{kind}>, which the processor takes for one"
                        )
                return part
            if part["type"] not in family.MEDIA:
                takes = ", ".join(family.MEDIA)
                raise UsageError(
                    f"model={config.name}: it takes text and {takes}, a task gave it {part['type']}."
                )
            if part["type"] == "video":
                if (
                    isinstance(part["url"], dict)
                    or part.get("start_time")
                    or part.get("end_time")
                ):
                    raise UsageError(
                        f"model={config.name}: it takes whole videos, a task gave it a part of one."
                    )
                return {**part, "url": media.frames(part["url"], family.FRAMES)}
            return {
                **part,
                "url": media.rgb(part["url"], config.image_aspect, background),
            }

        return [
            {**message, "content": [decode(part) for part in message["content"]]}
            for message in messages
        ]

    def inputs(self, conversations: list[list[dict]]):
        """Decoded chat messages -> the processor's batch, on the host."""
        _, processor = self.load()
        parts = [
            part
            for messages in conversations
            for message in messages
            for part in message["content"]
        ]
        given = {
            f"{kind}s": [part["url"] for part in parts if part["type"] == kind]
            for kind in ("image", "video")
        }
        texts = [self.text(messages) for messages in conversations]
        given = {name: found for name, found in given.items() if found}
        return processor(text=texts, **given, padding=True, return_tensors="pt")

    def text(self, messages: list[dict]) -> str:
        """Chat messages as a prompt, pictures as placeholders."""
        _, processor = self.load()
        template = prompts.TEMPLATES[self.config.model.prompt]
        return processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    def jpeg(self, pixels) -> bytes:
        """A picture of which the processor made `pixels` (..., 3, height, width); the first of its crops or frames."""
        from zipeval import media

        images = self.load()[1].image_processor
        first = pixels.flatten(0, -4)[0] if pixels.ndim > 3 else pixels
        return media.jpeg(
            first.float().cpu().numpy(), images.image_mean, images.image_std
        )

    def decode(self, ids) -> list[str]:
        return self.load()[1].batch_decode(ids, skip_special_tokens=True)
