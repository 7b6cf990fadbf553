"""A configuration that can run: checkpoint, method, data and placement, checked before weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from zipeval import benchmarks, methods, models
from zipeval.benchmarks import data_identity, stack, videoqa
from zipeval.benchmarks.data_identity import DataIdentity
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.checkpoints import projector, prompts
from zipeval.checkpoints.placement import place
from zipeval.config.schema import RunConfig
from zipeval.engine.budget import Shape, VisualInput
from zipeval.errors import BudgetError, UsageError
from zipeval.inference.validation import check, method_options
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
        # Refused by its name, before a method is built for such a budget.
        self._check_tokens()
        self._check_aspect()
        tokens, layers = self.checkpoint.visual_tokens, self.checkpoint.layers
        self.shape = Shape(tokens, tokens, layers, self._grids())
        self.method = methods.build(config.method, config.budget, self.shape)
        self._check_it_reduces()
        self._check_budget()
        self.questions: dict[str, list[dict]] = {}
        for task in config.tasks:
            if task in videoqa.SETS:
                self.questions[task] = videoqa.questions(task, config.data.videos)
        # From here on torch is needed, whose import takes seconds.
        stack.load(stack.DEVICE)
        self.placement = place(config.model)
        self._data: dict[str, DataIdentity] = {}

    def _check_tokens(self) -> None:
        """Refuse a budget of more tokens than an image has."""
        tokens, available = self.config.tokens, self.checkpoint.visual_tokens
        if tokens is not None and tokens > available:
            raise UsageError(
                f"tokens={tokens}: {self.config.model.name} has {available} visual tokens an image; "
                f"choose from 1 to {available}, such as tokens={max(1, available // 9)}."
            )

    def _grids(self) -> tuple[tuple[int, int], ...]:
        """Return the (crops, row ends) of the checkpoint's images; no row ends unless they are to be kept."""
        grids, packing = self.checkpoint.grids, self.config.packing
        if packing != "newline":
            # Images of as many crops are alike then, however their tiles are arranged.
            return tuple(sorted({(crops, 0) for crops, _ in grids}))
        if not any(rows for _, rows in grids):
            raise UsageError(
                f"packing={packing}: the images of {self.config.model.name} have no row ends. Leave it out."
            )
        return grids

    def _check_it_reduces(self) -> None:
        """Refuse a setting beyond what is there: it would silently be vanilla under another name.

        A budget of all tokens says so itself, and is let through.
        """
        available = self.checkpoint.visual_tokens
        options = method_options(self.config)
        if not options or self.reduces or self.config.tokens == available:
            return
        settings = [f"{k}={v}" for k, v in options.items() if v is not None]
        raise UsageError(
            f"method={self.config.method['name']} ({', '.join(settings)}) removes nothing: {self.config.model.name} has "
            f"{available} visual tokens an image. `zipeval run method=vanilla` is the model as it is."
        )

    def _check_budget(self) -> None:
        """Check that the method's settings come to what was asked for; what really enters is measured later.

        Raises:
            BudgetError: if they do not.
        """
        # Of the largest image, which a budget is of.
        tokens, entering = self.config.tokens, self.entering([self.shape.picture])
        reached = {"mean": fmean(entering), "final": entering[-1]}
        if tokens is None or self.config.budget not in reached:
            return
        # Rounding to whole tokens may move it by one.
        count = reached[self.config.budget]
        if abs(count - tokens) > 1:
            raise BudgetError(
                f"method={self.config.method['name']}: its settings for tokens={tokens} budget={self.config.budget} "
                f"come to {count:.1f}. The method's for_budget is wrong."
            )

    def _check_aspect(self) -> None:
        config, known = self.config.model, models.family(self.config.model).aspects
        if config.image_aspect not in known:
            raise UsageError(
                f"model.image_aspect={config.image_aspect}: the images of {config.name} are prepared by "
                f"{' or '.join(known)}. Set model.image_aspect={known[0]}."
            )

    def entering(self, images: list[VisualInput]) -> list[int]:
        """Return the visual tokens that should enter each decoder layer, (layers), of a prompt with these images."""
        return self.method.tokens_per_layer(images, self.shape.layers)

    @cached_property
    def reduces(self) -> bool:
        """Return whether the method removes anything of the model's largest picture."""
        return set(self.entering([self.shape.picture])) != {
            self.checkpoint.visual_tokens
        }

    @cached_property
    def reuse(self) -> str:
        """Return what prompts about one picture really share.

        Methods inside the decoder look at the question, so that what they leave of the
        picture belongs to that question alone, and only the encoder's features are shared.
        """
        reuse, parts = self.config.runner.reuse, stages(self.method)
        if reuse == "none" or parts is None:
            return "none"
        _, inside_decoder = parts
        return "features" if inside_decoder else reuse

    @cached_property
    def resolved(self) -> dict:
        """Return the values that `auto`, the paths of weights and the budget came to."""
        # Records state what was used, and not what was asked for.
        values = asdict(self.placement)
        values["fingerprint"] = self.checkpoint.fingerprint
        values["method"] = repr(self.method)
        if self.projector is not None:
            values["projector"] = self.projector
        return values

    @cached_property
    def projector(self) -> str | None:
        """Return the hash of the tuned projector, if the method has one.

        Raises:
            UsageError: if it is not there, or was tuned for anything else than this.
        """
        return projector.check(self.config, self.checkpoint)

    @cached_property
    def run_id(self) -> str:
        """Return the hash of everything that the answers depend on."""
        return run_id(self.config, self.resolved)

    def record_id(self, task: str) -> str:
        """Return the name of everything that a task's record depends on, its judge too.

        Records of before had the port of the judge's server in their name. Where there is such a one, for the port
        that is named now, it keeps its name: it is finished, or gone on with.
        """
        if task not in PROTOCOLS:
            return self.run_id
        name = run_id(self.config, self.resolved, judged=True, port=False)
        former = run_id(self.config, self.resolved, judged=True, port=True)
        results = Path(self.config.results).expanduser()
        # A record, or the journal of one that is not finished.
        has_begun = any((results / name).glob(f"{task}.*json*"))
        had_begun = any((results / former).glob(f"{task}.*json*"))
        return former if had_begun and not has_begun else name

    def task_hash(self, task: str, folder: Path) -> str:
        """Return the hash of the task's definition and of its questions."""
        return benchmarks.task_hash(task, folder, self.questions.get(task))

    def data_identity(self, task: str, folder: Path) -> DataIdentity:
        """Return which data the task's questions of this run are about; loads it, once.

        Raises:
            UsageError: if it does not load.
        """
        if task not in self._data:
            settings = self._data_settings(task)
            self._data[task] = data_identity.identify(task, folder, *settings)
        return self._data[task]

    def known_data_identity(self, task: str, folder: Path) -> DataIdentity | None:
        """Return the same for a record that is finished: without a download, and so None where the data is not here."""
        if task in self._data:
            return self._data[task]
        return data_identity.known(task, folder, *self._data_settings(task))

    def _data_settings(self, task: str) -> tuple:
        """Return the arguments of data_identity's functions behind the task and its folder."""
        return self.config.data, self.questions.get(task), self.config.limit

    def load(self) -> tuple:
        """Return (model, processor)."""
        # A projector that does not fit is refused before minutes of loading.
        _ = self.projector
        return models.load(self.config.model.family, self.checkpoint, self.placement)

    @property
    def processor(self):
        """Return the model's processor."""
        return self.load()[1]

    def decoded(self, messages: list[dict]) -> list[dict]:
        """Return chat messages with images and frames in place of what a task names.

        Raises:
            MediaError: if one cannot be decoded.
            UsageError: for media that the model does not take.
        """
        # Imported here: a run is refused without the seconds of the image libraries.
        from zipeval.inference.preprocessing import MediaDecoder

        image_mean = self.processor.image_processor.image_mean
        return MediaDecoder(self.config.model, image_mean).decode_messages(messages)

    def inputs(self, conversations: list[list[dict]]):
        """Return the processor's batch of decoded chat messages, on the host: ids and mask [batch, tokens]."""
        pictures: dict[str, list] = {"image": [], "video": []}
        messages = chain.from_iterable(conversations)
        for part in chain.from_iterable(message["content"] for message in messages):
            if part["type"] in pictures:
                pictures[part["type"]].append(part["url"])
        # The processor takes no empty list of pictures.
        media: dict[str, Any] = {
            f"{kind}s": urls for kind, urls in pictures.items() if urls
        }
        # One prompt for each conversation; pictures are in reading order over all of them.
        texts = [self.text(messages) for messages in conversations]
        return self.processor(text=texts, **media, padding=True, return_tensors="pt")

    def text(self, messages: list[dict]) -> str:
        """Return chat messages as a prompt, pictures as placeholders."""
        template = prompts.TEMPLATES[self.config.model.prompt]
        return self.processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    def jpeg(self, pixels) -> bytes:
        """Return a picture as a JPEG file: the first of its crops or frames.

        Args:
            pixels: (..., 3, height, width) as the processor made them.
        """
        from zipeval import media

        images = self.processor.image_processor
        # Crops or frames stand in the dimensions before the channels.
        first = pixels.flatten(0, -4)[0] if pixels.ndim > 3 else pixels
        array = first.float().cpu().numpy()
        return media.jpeg(array, images.image_mean, images.image_std)

    def decode(self, ids) -> list[str]:
        """Return the text of token ids (batch, tokens), without special tokens."""
        return self.processor.batch_decode(ids, skip_special_tokens=True)
