"""Several questions about one picture, asked as one conversation (section 4.3 of VisionZip).

The visual tokens that are left for the first question serve the later ones, from the cache: `cached`. Beside it every
later question is answered once more with the picture read anew for it, `fresh`, behind the same text: what a method
that looks at the question would have kept for this one. Both are greedy, and so differ in that choice alone.

With history, text before a question is what the conversation was: the questions so far, and what the model answered on
the cache. Without, a later question stands where the first one stood: that one and all answers are masked out, which is
exact, as no visual token has seen them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import DynamicCache

from zipeval.engine import hf_names
from zipeval.engine.logits import NOT_NUMBERS
from zipeval.engine.ragged import left_padded, visual_slots
from zipeval.errors import UsageError
from zipeval.inference.answering import Answer, BatchGenerator
from zipeval.inference.feed import PreparedPrompt
from zipeval.inference.generation import resolve

Message = dict
# Stands in the template's text where an answer would be.
ANSWER = "@@the-answer@@"


def converse(
    model: BatchGenerator,
    batch: list[PreparedPrompt],
    first: list[list[Message]],
    rounds: Callable[[int, list[str]], list[Message] | None],
    options: dict,
) -> list[Answer]:
    """Answer all questions of conversations, on the cache and with the pictures read anew.

    Args:
        batch: the first questions.
        first: their messages.
        rounds: the messages of the next round, of the conversation with this place in the batch after these answers;
            None where it is over.
        options: lmms-eval's generation_kwargs, and whether there is `history`.

    Returns:
        The answer to every first question, with the texts of all rounds on the cache and behind them those of the later
        rounds with the picture read anew; `reread` is what entered the layers for these.

    Raises:
        torch.OutOfMemoryError: as BatchGenerator.answer.
        UsageError: for answers that are not greedy, and for a template without answers.
    """
    generation = resolve(options, conversation=True)
    if generation.is_sampled or generation.arguments["num_beams"] > 1:
        raise UsageError(
            f"generation_kwargs={options}: a conversation is answered greedily, without beams"
        )
    kind = _WithHistory if options.get("history", True) else _WithoutHistory
    conversations = kind(model, batch, first, options)
    texts = [[answer.text] for answer in conversations.first_answers]
    failures = [[answer.failed] for answer in conversations.first_answers]
    # Later questions with all that stands before them, as (place in the batch, prompt).
    later: list[tuple[int, PreparedPrompt]] = []
    while True:
        questions = [rounds(row, replies) for row, replies in enumerate(texts)]
        if not any(questions):
            break
        replies, prompts = conversations.ask(questions)
        not_numbers = model.logits.failed(len(batch))
        for row, question in enumerate(questions):
            failures[row].append(NOT_NUMBERS if not_numbers[row] else None)
            if question:
                texts[row].append(replies[row])
                later.append((row, prompts[row]))
    fresh = _answer_anew(model, later, len(batch), options)
    answers = []
    for row, answer in enumerate(conversations.first_answers):
        failures[row] += [again.failed for again in fresh[row]]
        complete = replace(
            answer,
            text=[*texts[row], *(again.text for again in fresh[row])],
            reread=[again.visual for again in fresh[row]],
            later_prompts=[again.entered[0] for again in fresh[row]],
            failed=next(filter(None, failures[row]), None),
        )
        answers.append(complete)
    return answers


def _answer_anew(
    model: BatchGenerator,
    later: list[tuple[int, PreparedPrompt]],
    size: int,
    options: dict,
) -> list[list[Answer]]:
    """Answer later questions with the picture read anew; returns the answers of each conversation.

    Args:
        later: prompts, each with the place of its conversation.
        size: of the batch, which is known to fit into memory.
    """
    answers: list[list[Answer]] = [[] for _ in range(size)]
    # Rounds stand behind each other, so that a batch may hold several of one conversation.
    for start in range(0, len(later), size):
        rows, prompts = zip(*later[start : start + size], strict=True)
        for row, answer in zip(rows, model.answer([*prompts], options), strict=True):
            answers[row].append(answer)
    return answers


class _Conversations(ABC):
    """A batch of conversations on one cache.

    Attributes:
        first_answers: to their first questions.
        contexts: ids of each conversation before its next question, without padding, pictures as placeholders.
        questions: ids of each one's latest later question.
        ids: [batch, tokens] everything that the cache holds, and the last token.
        mask: [batch, tokens] which of them later questions see; without the latest answers.
    """

    def __init__(
        self,
        model: BatchGenerator,
        batch: list[PreparedPrompt],
        messages: list[list[Message]],
        options: dict,
    ):
        self.model = model
        self.batch = batch
        self.messages = messages
        self.options = options
        prompts = model.prepare(batch)
        inputs = dict(prompts.inputs)
        # Prompts that share what was read of their pictures have a cache already.
        if hf_names.given_cache(inputs) is None:
            cache = DynamicCache(config=model.model.config)
            inputs |= hf_names.cache_argument(model.model, cache)
        self.cache = hf_names.given_cache(inputs)
        self.mask = inputs["attention_mask"]
        self.ids = model.generate(inputs, options)
        new = self.ids[:, self.mask.shape[1] :]
        self.first_answers = model.collect_answers(batch, prompts, new, options)
        self.contexts = [prompt.inputs["input_ids"][0] for prompt in batch]
        self.questions = [ids[:0] for ids in self.contexts]

    def ask(
        self, questions: list[list[Message] | None]
    ) -> tuple[list[str], list[PreparedPrompt]]:
        """Answer the next questions on the cache; where a conversation is over, its last one again.

        Returns:
            The answers, and the questions with everything before them as prompts of their own.
        """
        self._end_round()
        for row, messages in enumerate(questions):
            if messages is not None:
                self.questions[row] = self._question_ids(row, messages)
        pairs = zip(self.contexts, self.questions, strict=True)
        whole = [torch.cat(pair) for pair in pairs]
        ids, mask = left_padded(self.questions, self.model.padding)
        # [batch, tokens so far + tokens of the longest question]
        ids = torch.cat([self.ids, ids.to(self.ids.device)], 1)
        mask = torch.cat([self.mask, mask.to(self.ids.device)], 1)
        self._note_question(whole, mask)
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= hf_names.cache_argument(self.model.model, self.cache)
        self.ids = self.model.generate(inputs, self.options)
        texts = self.model.decode_texts(self.ids[:, ids.shape[1] :], self.options)
        return texts, list(map(_with_ids, self.batch, whole))

    @abstractmethod
    def _end_round(self) -> None:
        """Extend the mask over what was generated last."""

    @abstractmethod
    def _question_ids(self, row: int, messages: list[Message]) -> torch.Tensor:
        """Return the ids of a next question, (tokens), as they stand behind the context."""

    @abstractmethod
    def _note_question(self, whole: list[torch.Tensor], mask: torch.Tensor) -> None:
        """Note that a question was asked: the ids of each conversation with it, and its mask."""

    def _tokenize(self, text: str) -> torch.Tensor:
        """Return the ids of a text, (tokens), without BOS."""
        encoding = self.model.tokenizer(
            text, add_special_tokens=False, return_tensors="pt"
        )
        return encoding["input_ids"][0]


class _WithHistory(_Conversations):
    """Conversations in which a question stands behind all questions and answers so far."""

    def _end_round(self) -> None:
        """Take what was generated last into the context, up to its end token; the rest is masked out."""
        new = self.ids[:, self.mask.shape[1] :]
        ends = torch.tensor(self.model.ends, device=new.device)
        # [batch, new tokens]: 1 before the first end token, 0 from there on.
        valid = (~torch.isin(new, ends)).long().cumprod(1)
        for row, is_valid in enumerate(valid.bool()):
            answer = new[row][is_valid].cpu()
            self.contexts[row] = torch.cat([self.contexts[row], answer])
        self.mask = torch.cat([self.mask, valid.to(self.mask)], 1)

    def _question_ids(self, row: int, messages: list[Message]) -> torch.Tensor:
        """Return the ids from the end of the answer before the question.

        Raises:
            UsageError: for a template that shows no earlier answers.
        """
        session = self.model.session
        # The template of the whole conversation, cut behind the place of the answer.
        content = [{"type": "text", "text": ANSWER}]
        answer = {"role": "assistant", "content": content}
        text = session.text([*self.messages[row], answer, *messages])
        _, placeholder, question = text.rpartition(ANSWER)
        if not placeholder:
            raise UsageError(
                f"model.prompt={session.config.model.prompt}: this template shows no earlier answers"
            )
        return self._tokenize(question)

    def _note_question(self, whole: list[torch.Tensor], mask: torch.Tensor) -> None:
        self.contexts, self.mask = whole, mask


class _WithoutHistory(_Conversations):
    """Conversations in which every question stands where the first one stood, right behind the pictures."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        config = self.model.model.config
        lengths = [_text_length(ids, config) for ids in self.contexts]
        # Prompts are left-padded, so that the first question is what ends a row:
        # [tokens], counted from the end, against [batch, 1].
        device = self.mask.device
        from_end = torch.arange(self.mask.shape[1], 0, -1, device=device)
        is_question = from_end <= torch.tensor(lengths, device=device)[:, None]
        # Exact, as no visual token has seen what stands behind it.
        self.mask = self.mask.masked_fill(is_question, 0)
        for row, length in enumerate(lengths):
            ids = self.contexts[row]
            self.contexts[row] = ids[: len(ids) - length]

    def _end_round(self) -> None:
        """Mask out the last question and its answer."""
        new = self.ids[:, self.mask.shape[1] :]
        self.mask = torch.cat([self.mask, torch.zeros_like(new).to(self.mask)], 1)

    def _question_ids(self, row: int, messages: list[Message]) -> torch.Tensor:
        """Return the ids from the pictures on, of a prompt with the question in place of the first one."""
        *before, last = self.messages[row]
        pictures = [part for part in last["content"] if part["type"] != "text"]
        content = [*pictures, *messages[-1]["content"]]
        text = self.model.session.text([*before, {**last, "content": content}])
        # The picture's own token is tokenized with the text, as its neighbour decides
        # how the text begins, and then left out.
        placeholder = f"<{pictures[-1]['type']}>"
        _, _, question = text.rpartition(placeholder)
        ids = self._tokenize(placeholder + question)
        return ids[len(ids) - _text_length(ids, self.model.model.config) :]

    def _note_question(self, whole: list[torch.Tensor], mask: torch.Tensor) -> None:
        """Note nothing: the next question stands where this one stood."""


def _with_ids(prompt: PreparedPrompt, ids: torch.Tensor) -> PreparedPrompt:
    """Return a prompt about the same pictures with other ids (tokens)."""
    # A batch of one, [1, tokens], as the processor makes it.
    mask = torch.ones_like(ids)
    inputs = {**prompt.inputs, "input_ids": ids[None], "attention_mask": mask[None]}
    return replace(prompt, inputs=inputs)


def _text_length(ids: torch.Tensor, config) -> int:
    """Return the number of tokens behind the last visual one of ids (tokens)."""
    return len(ids) - 1 - int(visual_slots(ids, config).nonzero().max())
