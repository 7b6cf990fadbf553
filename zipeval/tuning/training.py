"""The training behind `zipeval tune`: transformers' Trainer on a projector, in a model that reduces and is frozen."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zipeval.checkpoints import prompts
from zipeval.engine.images import join_pictures
from zipeval.engine.ragged import left_padded, visual_slots
from zipeval.engine.vision import IGNORED
from zipeval.errors import MediaError, RunError, UsageError
from zipeval.inference.feed import processes
from zipeval.utils import ranks
from zipeval.utils.progress import progress

MOST_TOKENS = (
    2048  # of a conversation as the decoder reads it: LLaVA-1.5's model_max_length
)
WARM_UP = 0.03  # of all steps
OFTEN = 0.05  # of all steps, between two checkpoints


class Conversations(Dataset):
    """Chat messages as the processor prepares them, with labels: every answer and its end token, nothing else."""

    def __init__(self, session, conversations: list[list[dict]]):
        self.session, self.conversations = session, conversations
        self.model, self.processor = session.load()
        self.template = prompts.TEMPLATES[session.config.model.prompt]
        self.most_text = MOST_TOKENS - session.entering([session.shape.picture])[0]

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """(L) input_ids and labels, and what the processor makes of the image.

        Raises:
            RunError: if that cannot be read.
        """
        messages = self.conversations[index]
        try:
            messages = self.session.decoded(messages)
        except MediaError as error:
            raise RunError(
                f"{messages[0]['content'][0]['url']}: {error}. Take it out of the data."
            ) from error
        text, answers = self.rendered(messages)
        image = messages[0]["content"][0]["url"]
        inputs = self.processor(
            text=[text],
            images=[image],
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        ids, (start, end) = (
            inputs.pop("input_ids")[0],
            inputs.pop("offset_mapping")[0].T,
        )
        inputs.pop("attention_mask")
        grown = int(end.max()) - len(
            text
        )  # the placeholder, which is before all answers, became as many as there are
        answered = torch.zeros_like(ids, dtype=torch.bool)
        for first, last in answers:
            answered |= (start >= first + grown) & (end <= last + grown) & (end > start)
        visual = visual_slots(ids, self.model.config)
        mask = visual | ((~visual).cumsum(0) <= self.most_text)
        return {
            "input_ids": ids[mask],
            "labels": ids.masked_fill(~answered, IGNORED)[mask],
            **inputs,
        }

    def rendered(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation in the model's template, and where in it the answers are, each up to its end token.

        Raises:
            UsageError: if the template does not end answers with that, or tells them another way.
        """
        text, answers, end = (
            self._text(messages),
            [],
            self.processor.tokenizer.eos_token,
        )
        for turn in range(1, len(messages), 2):
            question, answer = (
                self._text(messages[:turn], asks=True),
                self._text(messages[: turn + 1]),
            )
            if not (
                answer.startswith(question)
                and text.startswith(answer)
                and answer.endswith(end)
            ):
                raise UsageError(
                    f"model.prompt={self.session.config.model.prompt}: its answers do not end with {end}, so that "
                    "nothing could learn to end them. Choose another one, such as model.prompt=vicuna_v1."
                )
            answers.append((len(question), len(answer)))
        return text, answers

    def _text(self, messages: list[dict], asks: bool = False) -> str:
        return self.processor.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=asks,
        )

    def together(self, batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Several of them, left-padded."""
        ids, mask = left_padded(
            [row["input_ids"] for row in batch], self.processor.tokenizer.pad_token_id
        )
        labels, _ = left_padded([row["labels"] for row in batch], IGNORED)
        return _Batch(
            input_ids=ids, attention_mask=mask, labels=labels, **join_pictures(batch)
        )


class _Batch(dict):
    """Comes from a worker as bytes and not through shared memory, of which containers have little; then a dict."""

    def __reduce__(self):
        return pickle.loads, (pickle.dumps(dict(self)),)


class Projecting(torch.nn.Module):
    """A model of which the projector is trained; the rest is no part of this module and so of no checkpoint.

    Args:
        model: its own projector stays as it is: what is trained is a copy, at least in float32.
    """

    is_parallelizable = model_parallel = (
        True  # or the Trainer would copy it to all GPUs that it sees
    )

    def __init__(self, model):
        super().__init__()
        stock = model.base_model.multi_modal_projector
        dtype = torch.promote_types(next(stock.parameters()).dtype, torch.float32)
        self.projector = deepcopy(stock).to(dtype).requires_grad_(True)
        self._model = [model]  # in a list it is no submodule

    def forward(self, **inputs) -> dict[str, torch.Tensor]:
        """The loss of the processor's inputs with labels."""
        (model,) = self._model
        floating = {
            k: v.to(model.dtype) for k, v in inputs.items() if k.startswith("pixel")
        }
        return {"loss": model(**inputs | floating).loss}

    @property
    def finite(self) -> bool:
        """Return whether what is trained still is something, and no NaN."""
        return all(
            bool(parameter.isfinite().all())
            for parameter in self.projector.parameters()
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model projects by what is trained, and nothing else of it learns."""
        (model,) = self._model
        base, learning = (
            model.base_model,
            [p for p in model.parameters() if p.requires_grad],
        )
        stock = base.multi_modal_projector
        model.requires_grad_(False)
        base.multi_modal_projector = self.projector
        try:
            yield
        finally:
            base.multi_modal_projector = stock
            for parameter in learning:
                parameter.requires_grad_(True)


class _Progress(TrainerCallback):
    """Steps, as they are done."""

    def __init__(self, advance):
        self.advance = advance

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.advance(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(1)


class _Divergence(TrainerCallback):
    """Ends a training that nothing can become of. All ranks have the same weights, so that all of them end."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        control.should_training_stop |= not model.finite


def train(
    session, conversations: list[list[dict]], settings, checkpoints: Path
) -> dict[str, torch.Tensor]:
    """The tuned projector's tensors, on the host.

    Args:
        settings: a zipeval.tuning.tune.Settings with `accumulate`.
        checkpoints: directory; what is there of this training is gone on with.

    Raises:
        UsageError: for a template that does not end answers.
        RunError: if an image cannot be read, memory runs out, a worker is killed, or the training diverges; then
            nothing is left to go on with.
    """
    model, _ = session.load()
    examples = Conversations(session, conversations)
    examples.rendered(conversations[0])  # refused before anything is prepared
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # or tokenizers complain in every worker
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=WARM_UP,
        weight_decay=0.0,
        bf16=session.placement.dtype == "bfloat16",
        use_cpu=session.placement.device == "cpu",
        seed=session.config.seed,
        save_steps=OFTEN,
        save_total_limit=1,
        logging_steps=OFTEN,
        report_to=[session.config.logger] if session.config.logger else [],
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,  # which it would tell by this module's signature
        label_names=["labels"],
        dataloader_num_workers=processes(session, len(examples)),
    )
    projecting = Projecting(model)
    steps = (
        -(
            -len(examples)
            // (settings.batch_size * settings.accumulate * ranks.here().count)
        )
        * settings.epochs
    )
    trainer = Trainer(
        projecting.to(model.device), arguments, examples.together, examples
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Divergence())
    with (
        progress(f"tuning {session.config.model.name}", steps) as advance,
        projecting.in_place(),
    ):
        trainer.add_callback(_Progress(advance))
        with (
            session.method.applied(model),
            _told(settings, arguments.dataloader_num_workers, checkpoints),
        ):
            trainer.train(resume_from_checkpoint=_latest(checkpoints))
    if not projecting.finite:
        if ranks.first():
            shutil.rmtree(checkpoints)
        smaller = min(settings.lr / 10, type(settings).lr)
        raise RunError(
            f"lr={settings.lr}: the training diverged, its weights are no numbers. Set lr={smaller:g}."
        )
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in projecting.projector.state_dict().items()
    }


@contextmanager
def _told(settings, workers: int, checkpoints: Path) -> Iterator[None]:
    """A block whose errors are told in a sentence; of several ranks one has it alone, and ends them all."""
    try:
        yield
    except (
        UsageError,
        RunError,
    ) as error:  # a worker's comes with its traceback, of which it is the last line
        kind = type(error)
        shown = kind(
            str(error).strip().splitlines()[-1].partition(f"{kind.__name__}: ")[2]
            or str(error)
        )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(
            error
        ):
            shown = _too_large(settings, checkpoints)
        elif "DataLoader worker" in str(error):
            shown = RunError(
                f"runner.workers={workers}: one of them was ended, most likely for want of memory. "
                "Run this again with runner.workers=0: it goes on from the last checkpoint."
            )
        else:
            raise
    else:
        return
    if (
        ranks.here().count > 1
    ):  # the others wait for gradients, and would not hear of it
        sys.exit(f"zipeval: rank {ranks.here().rank}: {shown}")
    raise shown from None


def _too_large(settings, checkpoints: Path) -> RunError:
    """Return what to do where memory ran out."""
    size = settings.batch_size
    if size == 1:
        return RunError(
            "batch_size=1: memory ran out. Nothing is smaller: take a device with more of it."
        )
    half = f"batch_size={size // 2} accumulate={-(-settings.accumulate * size // (size // 2))}"
    first = (
        f"Delete {checkpoints}, as that is another tuning, and set"
        if _latest(checkpoints)
        else "Set"
    )
    return RunError(f"batch_size={size}: memory ran out. {first} {half}.")


def _latest(checkpoints: Path) -> str | None:
    """The last checkpoint that is complete: what was being written when the process died lacks its state."""
    complete = []
    for path in checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"):
        try:
            complete.append(
                (
                    json.loads(path.read_text(encoding="utf-8"))["global_step"],
                    str(path.parent),
                )
            )
        except (ValueError, KeyError):
            continue
    return max(complete, default=(0, None))[1]
