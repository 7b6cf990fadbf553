"""Several questions about one picture, asked as one conversation (section 4.3 of VisionZip).

The visual tokens that are left for the first question serve the later ones, from the cache: `cached`. Beside it every
later question is answered once more with the picture read anew for it, `fresh`, behind the same text: what a method
that looks at the question would have kept for this one. Both are greedy, and so differ in that choice alone.

With history, text before a question is what the conversation was: the questions so far, and what the model answered on
the cache. Without, a later question stands where the first one stood: that one and all answers are masked out, which is
exact, as no visual token has seen them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import DynamicCache

from zipeval.engine import hf_names
from zipeval.engine.logits import NOT_NUMBERS
from zipeval.engine.ragged import left_padded, visual_slots
from zipeval.errors import UsageError
from zipeval.inference.answering import Answer, Answering
from zipeval.inference.feed import Question
from zipeval.inference.generation import resolve

Message = dict
ANSWER = "@@the-answer@@"  # stands where the template puts it


def converse(
    model: Answering,
    batch: list[Question],
    first: list[list[Message]],
    rounds: Callable[[int, list[str]], list[Message] | None],
    options: dict,
) -> list[Answer]:
    """Of every conversation what its first question came to, with the texts of all rounds on the cache and behind them
    of the later ones with the picture read anew; `reread` is what entered the layers for these.

    Args:
        batch: the first questions.
        first: their messages.
        rounds: the messages of the next round, of the conversation with this place in the batch after these answers;
            None where it is over.
        options: lmms-eval's generation_kwargs, and whether there is `history`.

    Raises:
        torch.OutOfMemoryError: as Answering.answer.
        UsageError: for answers that are not greedy, and for a template without answers.
    """
    generation = resolve(options, conversation=True)
    if generation.sampled or generation.arguments["num_beams"] > 1:
        raise UsageError(
            f"generation_kwargs={options}: a conversation is answered greedily, without beams"
        )
    talk = _Talk(model, batch, first, options)
    answers, texts, fresh = talk.first, [[answer.text] for answer in talk.first], []
    failed = [answer.failed for answer in answers]
    while any(asked := [rounds(row, said) for row, said in enumerate(texts)]):
        said, again = talk.ask(asked)
        not_numbers = model.logits.failed(len(batch))
        failed = [
            NOT_NUMBERS if bad else before
            for bad, before in zip(not_numbers, failed, strict=True)
        ]
        for row in (row for row, messages in enumerate(asked) if messages):
            texts[row].append(said[row])
            fresh.append((row, again[row]))
    others: list[list[Answer]] = [[] for _ in batch]
    for start in range(0, len(fresh), len(batch)):
        some = fresh[start : start + len(batch)]
        for (row, _), answer in zip(
            some, model.answer([question for _, question in some], options), strict=True
        ):
            others[row].append(answer)
            failed[row] = failed[row] or answer.failed
    return [
        replace(
            answer,
            text=[*said, *(its.text for its in again)],
            reread=[its.visual for its in again],
            later_prompts=[its.entered[0] for its in again],
            failed=reason,
        )
        for answer, said, again, reason in zip(
            answers, texts, others, failed, strict=True
        )
    ]


class _Talk:
    """Conversations on one cache.

    Attributes:
        first: what their first questions came to.
    """

    def __init__(
        self,
        model: Answering,
        batch: list[Question],
        messages: list[list[Message]],
        options: dict,
    ):
        self.model, self.batch, self.messages, self.options = (
            model,
            batch,
            messages,
            options,
        )
        self.history = options.get("history", True)
        read = model.read(batch)
        inputs = dict(read.inputs)
        if (
            hf_names.given_cache(inputs) is None
        ):  # otherwise prompts share what was read of their pictures
            inputs |= hf_names.cache_argument(
                model.model, DynamicCache(config=model.model.config)
            )
        self.cache, self.mask = hf_names.given_cache(inputs), inputs["attention_mask"]
        self.ids = model.generated(inputs, options)
        self.first = model.answers(
            batch, read, self.ids[:, self.mask.shape[1] :], options
        )
        # Ids of every conversation so far, without padding, pictures as placeholders.
        self.said = [question.inputs["input_ids"][0] for question in batch]
        self.pieces = [ids[:0] for ids in self.said]
        if not self.history:
            counts = [_behind(ids, model.model.config) for ids in self.said]
            slots = torch.arange(self.mask.shape[1], 0, -1, device=self.mask.device)
            asked = slots <= torch.tensor(counts, device=self.mask.device)[:, None]
            self.mask = self.mask.masked_fill(asked, 0)
            self.said = [
                ids[: len(ids) - count]
                for ids, count in zip(self.said, counts, strict=True)
            ]

    def ask(
        self, asked: list[list[Message] | None]
    ) -> tuple[list[str], list[Question]]:
        """The answers to the next questions, and these with everything before them as questions of their own. Where a
        conversation is over, to its last one again.
        """
        self._answered()
        pairs = enumerate(zip(self.pieces, asked, strict=True))
        self.pieces = [
            piece if messages is None else self._piece(row, messages)
            for row, (piece, messages) in pairs
        ]
        whole = [torch.cat(pair) for pair in zip(self.said, self.pieces, strict=True)]
        if self.history:
            self.said = whole
        ids, mask = (
            x.to(self.ids.device) for x in left_padded(self.pieces, self.model.padding)
        )
        inputs = {
            "input_ids": torch.cat([self.ids, ids], 1),
            "attention_mask": torch.cat([self.mask, mask], 1),
        }
        if self.history:
            self.mask = inputs["attention_mask"]
        inputs |= hf_names.cache_argument(self.model.model, self.cache)
        self.ids = self.model.generated(inputs, self.options)
        new = self.ids[:, inputs["input_ids"].shape[1] :]
        again = [
            replace(
                question,
                inputs={
                    **question.inputs,
                    "input_ids": its[None],
                    "attention_mask": torch.ones_like(its)[None],
                },
            )
            for question, its in zip(self.batch, whole, strict=True)
        ]
        return self.model.texts(new, self.options), again

    def _answered(self) -> None:
        """What was generated last is a part of the conversation up to its end token, or masked out."""
        new = self.ids[:, self.mask.shape[1] :]
        if self.history:
            valid = (
                (~torch.isin(new, torch.tensor(self.model.ends, device=new.device)))
                .long()
                .cumprod(1)
            )
            self.said = [
                torch.cat([ids, row[its.bool()].cpu()])
                for ids, row, its in zip(self.said, new, valid, strict=True)
            ]
        else:
            valid = torch.zeros_like(new)
        self.mask = torch.cat([self.mask, valid.to(self.mask)], 1)

    def _piece(self, row: int, messages: list[Message]) -> torch.Tensor:
        """(n): the ids of a next question, from the end of the answer before it, or from the pictures."""
        session, tokenizer = self.model.session, self.model.tokenizer
        first, config = self.messages[row], self.model.model.config
        if self.history:
            answer = {
                "role": "assistant",
                "content": [{"type": "text", "text": ANSWER}],
            }
            *_, found, text = session.text([*first, answer, *messages]).rpartition(
                ANSWER
            )
            if not found:
                raise UsageError(
                    f"model.prompt={session.config.model.prompt}: this template shows no earlier answers"
                )
            return tokenizer(text, add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ][0]
        pictures = [part for part in first[-1]["content"] if part["type"] != "text"]
        text = session.text(
            [
                *first[:-1],
                {**first[-1], "content": [*pictures, *messages[-1]["content"]]},
            ]
        )
        place = f"<{pictures[-1]['type']}>"
        ids = tokenizer(
            place + text.rpartition(place)[2],
            add_special_tokens=False,
            return_tensors="pt",
        )["input_ids"][0]
        return ids[len(ids) - _behind(ids, config) :]


def _behind(ids: torch.Tensor, config) -> int:
    """Number of tokens behind the last visual one of ids (n)."""
    return len(ids) - 1 - int(visual_slots(ids, config).nonzero().max())
