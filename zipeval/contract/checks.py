"""The checks: each applies a method to a model, and raises BrokenError where the method breaks the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from zipeval.contract.subjects import IMAGES, LAYERS, Subject
from zipeval.contract.tiny_models import pictures_of, single
from zipeval.engine import decoder, hf_names
from zipeval.engine.ledger import record_prefill
from zipeval.engine.vision import VisionMethod
from zipeval.errors import UsageError

NEW_TOKENS = 3
# Of logits in float64, where two ways to the same number differ by rounding.
TOLERANCE = 1e-5
# Where torch keeps the hooks of a module.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_forward_hooks_with_kwargs",
)


class BrokenError(Exception):
    """A method that does not keep to the contract."""


class NotApplicable(Exception):
    """A check that has nothing to say of this method on this model."""


@dataclass(frozen=True)
class Candidate:
    """A method that is checked.

    Attributes:
        make: makes it for a subject, a number of tokens and what that counts; raises UsageError for what it refuses.
        has_budget: whether it takes a number of tokens.
    """

    make: Callable[[Subject, int, str], Any]
    has_budget: bool

    def on(self, subject: Subject, tokens: int | None = None, budget: str = "mean"):
        """Return the method; without a number of tokens it leaves as many as `tokens_on` says."""
        return self.make(subject, tokens or self.tokens_on(subject), budget)

    def tokens_on(self, subject: Subject) -> int:
        """Return a number of tokens that the method can leave: a third, or else the half or two thirds."""
        for tokens in (subject.third, subject.third * 3 // 2):
            # Methods that begin late cannot leave few tokens on average.
            with suppress(UsageError):
                self.make(subject, tokens, "mean")
                return tokens
        return subject.third * 2


def answer(model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return greedy tokens (batch, new tokens) and their logits (batch, new tokens, vocabulary)."""
    # A random model could answer with a placeholder.
    image = model.config.image_token_id
    video = getattr(model.config, "video_token_id", image)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [image, video],
    }
    # The embedded model could stop early.
    if model.generation_config.eos_token_id is not None:
        options["min_new_tokens"] = NEW_TOKENS
    out = model.generate(**inputs, **options)
    return out.sequences[:, -NEW_TOKENS:], torch.stack(out.logits, 1)


def snapshot(model) -> tuple:
    """Return everything that a method could leave behind: attributes and hooks of modules, parameters, buffers."""
    attributes, hooks, state = {}, {}, {}
    for name, module in model.named_modules():
        ids = {key: id(value) for key, value in vars(module).items()}
        attributes[name] = {key: ids[key] for key in ids.keys() - set(HOOKS)}
        # torch may replace these dicts: their number of hooks counts.
        hooks[name] = [len(vars(module)[kind]) for kind in HOOKS]
    for name, tensor in model.state_dict(keep_vars=True).items():
        # torch counts the writes into a tensor.
        state[name] = id(tensor), tensor._version
    return attributes, hooks, state, vars(type(model)).copy()


def _compare(answers: tuple, expected: tuple, what: str) -> None:
    """Raise BrokenError where tokens or logits are not the same."""
    difference = (answers[1] - expected[1]).abs().max().item()
    # `not ... <=`, so that logits that are not numbers break it, too.
    if answers[0].tolist() != expected[0].tolist() or not difference <= TOLERANCE:
        raise BrokenError(f"{what}: logits differ by up to {difference:.2g}")


def keeping_everything_is_stock(candidate: Candidate, subject: Subject) -> None:
    """Check that with a budget of all tokens, answers are the stock model's: exactly, in float32."""
    method = candidate.on(subject, subject.shape.image)
    # Some methods cannot keep everything, as they have no budget.
    announced = method.tokens_per_layer([subject.shape.picture], LAYERS)
    if set(announced) != {subject.shape.image}:
        if not candidate.has_budget:
            raise NotApplicable("it has no budget")
        raise BrokenError(
            f"tokens={subject.shape.image} is everything, and as the method says {announced} enter"
        )
    model, inputs = subject.model(torch.float32), subject.prompts(torch.float32)
    stock = answer(model, inputs)
    with method.applied(model):
        tokens, logits = answer(model, inputs)
    difference = (logits - stock[1]).abs().max().item()
    if not torch.equal(tokens, stock[0]) or difference != 0:
        raise BrokenError(
            f"tokens={subject.shape.image} keeps everything, and logits differ by {difference:.2g}"
        )


def budget_is_met(candidate: Candidate, subject: Subject) -> None:
    """Check that what enters each layer is what the method says, and comes to the budget."""
    for budget in ("mean", "final"):
        _check_budget(candidate, subject, budget)


def _check_budget(candidate: Candidate, subject: Subject, budget: str) -> None:
    model, inputs = subject.model(), subject.prompts()
    method = candidate.on(subject, budget=budget)
    with torch.no_grad(), method.applied(model), record_prefill(model) as prefills:
        model(**inputs)
    (prefill,) = prefills
    # Where the crops of a picture may be fewer, a method inside the decoder leaves a share of what enters.
    counts_whole = len(subject.shape.grids) == 1 or isinstance(method, VisionMethod)
    for row, pictures in enumerate(pictures_of(model, inputs, IMAGES)):
        entered, announced = (
            prefill.visual(row),
            method.tokens_per_layer(pictures, LAYERS),
        )
        if entered != announced:
            raise BrokenError(
                f"visual tokens {entered} entered the layers, and {announced} as the method says"
            )
        if not candidate.has_budget or not counts_whole:
            continue
        tokens = candidate.tokens_on(subject)
        requested = sum(min(tokens, picture.tokens) for picture in pictures)
        reached = {"mean": fmean(entered), "final": entered[-1]}[budget]
        # Each picture may round to a whole token.
        if abs(reached - requested) > len(pictures):
            raise BrokenError(
                f"budget={budget}: {reached:.1f} visual tokens for {requested} that were asked for"
            )


def half_precision_works(candidate: Candidate, subject: Subject) -> None:
    """Check that in bfloat16 and float16, as on a GPU, it leaves as many tokens and gives numbers."""
    # Scores that overflow or lose digits may choose other tokens, never another number of them.
    for dtype in (torch.bfloat16, torch.float16):
        model, inputs = subject.model(dtype), subject.prompts(dtype)
        method = candidate.on(subject)
        with method.applied(model), record_prefill(model) as prefills:
            _, logits = answer(model, inputs)
        if not logits.isfinite().all():
            raise BrokenError(f"{dtype}: logits are not finite")
        # Of the first prompt.
        announced = method.tokens_per_layer(
            pictures_of(model, inputs, IMAGES)[0], LAYERS
        )
        if prefills[0].visual(0) != announced:
            raise BrokenError(
                f"{dtype}: visual tokens {prefills[0].visual(0)} entered, and {announced} in float64"
            )


def order_is_preserved(candidate: Candidate, subject: Subject) -> None:
    """Check that tokens of the encoder that are kept stay in the encoder's order."""
    method = candidate.on(subject)
    # A decoder method has no such result.
    types = {
        type(part) for part in parts(method, subject) if isinstance(part, VisionMethod)
    }
    if not types:
        raise NotApplicable("nothing of it acts before the language model")
    # What `reduce` returned, of every call.
    results: list = []

    def recorded(reduce):
        def reduce_and_note(*arguments):
            results.append(reduce(*arguments))
            return results[-1]

        return reduce_and_note

    model = subject.model()
    with torch.no_grad(), replaced_reduce(types, recorded), method.applied(model):
        model(**subject.prompts())
    for reduced in results:
        if not (reduced.kept.diff(dim=1) > 0).all():
            raise BrokenError("Reduced.kept is not ascending")


def batch_equals_singles(candidate: Candidate, subject: Subject) -> None:
    """Check that a left-padded batch is answered as its prompts one by one."""
    model, inputs = subject.model(), subject.prompts()
    with candidate.on(subject).applied(model):
        tokens, logits = answer(model, inputs)
        for row in range(len(IMAGES)):
            alone = answer(model, single(model, inputs, IMAGES, row))
            # Still a batch, of one: [1, new tokens].
            in_batch = tokens[row : row + 1], logits[row : row + 1]
            _compare(in_batch, alone, f"prompt {row} of the batch")


def cached_equals_recomputed(candidate: Candidate, subject: Subject) -> None:
    """Check that decoding on one cache gives what reading the prompt anew gives at each step.

    Inside the decoder, what a prompt keeps is chosen when it is read, so there the answer so far is read in a second
    call; before it, everything is read at once.
    """
    model, inputs = subject.model(), subject.prompts()
    method = candidate.on(subject)
    reads_at_once = not isinstance(
        getattr(method, "second", method), decoder.DecoderMethod
    )
    with torch.no_grad(), method.applied(model):
        tokens, logits = answer(model, inputs)
        for step in range(1, NEW_TOKENS):
            again = _read_again(model, inputs, tokens[:, :step], reads_at_once)
            difference = (logits[:, step] - again).abs().max().item()
            if not difference <= TOLERANCE:
                raise BrokenError(
                    f"new token {step + 1}: logits differ by up to {difference:.2g}"
                )


def _read_again(
    model, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, at_once: bool
) -> torch.Tensor:
    """Return the logits (batch, vocabulary) behind the prompts and some tokens of their answers."""
    if at_once:
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
        ids = torch.cat([inputs["input_ids"], tokens], 1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
        return model(**inputs).logits[:, -1]
    with record_prefill(model) as prefills:
        cache = hf_names.returned_cache(model(**inputs, use_cache=True))
    # In the first layer nothing is dropped yet: a row's cache is its tokens, and padding to their left.
    rows = []
    for entered in prefills[0].entered:
        padding = cache.get_seq_length() - entered[0]
        rows.append([0] * padding + [1] * (entered[0] + tokens.shape[1]))
    again = hf_names.cache_argument(model, cache)
    out = model(input_ids=tokens, attention_mask=torch.tensor(rows), **again)
    return out.logits[:, -1]


def nothing_is_left(candidate: Candidate, subject: Subject) -> None:
    """Check that behind its block the model is as it was, after an exception, too."""
    model, inputs = subject.model(), subject.prompts()
    stock = answer(model, inputs)
    before = snapshot(model)
    with candidate.on(subject).applied(model):
        answer(model, inputs)
    _check_unchanged(model, before, "the block")
    try:
        with candidate.on(subject).applied(model):
            model(**inputs)
            raise InterruptedError
    except InterruptedError:
        _check_unchanged(model, before, "an exception in the block")
    _check_same_answers(model, inputs, stock)


def failing_leaves_nothing(candidate: Candidate, subject: Subject) -> None:
    """Check that where the method itself fails, the model is as it was."""
    method = candidate.on(subject)
    types = {type(part) for part in parts(method, subject)}
    if not types:
        raise NotApplicable("it reduces nothing")

    def failing(reduce):
        def fail(*arguments):
            raise InterruptedError

        return fail

    model, inputs = subject.model(), subject.prompts()
    # transformers notes things on a model at its first call.
    answer(model, inputs)
    before = snapshot(model)
    try:
        with replaced_reduce(types, failing), method.applied(model):
            answer(model, inputs)
    except InterruptedError:
        _check_unchanged(model, before, "an exception in `reduce`")
        return
    raise BrokenError(
        "an exception in `reduce` did not get out, or `reduce` was not called"
    )


def others_do_not_matter(candidate: Candidate, subject: Subject) -> None:
    """Check that what other methods did on the model before changes nothing."""
    from zipeval.methods.sparsevlm import SparseVLM
    from zipeval.methods.visionzip import VisionZip

    # Methods that note something on a class or a module would show here.
    model, inputs, tokens = subject.model(), subject.prompts(), subject.third
    stock = answer(model, inputs)
    with candidate.on(subject).applied(model):
        alone = answer(model, inputs)
    # One that acts before the decoder, and one inside it.
    for other in (VisionZip, SparseVLM):
        with other.for_budget(tokens, "mean", subject.shape).applied(model):
            answer(model, inputs)
        with candidate.on(subject).applied(model):
            _check_same_answers(model, inputs, alone, f"after {other.__name__}")
    _check_same_answers(model, inputs, stock)


def _check_unchanged(model, before: tuple, what: str) -> None:
    if snapshot(model) != before:
        raise BrokenError(
            f"after {what} something is left on the model: a hook, an attribute or a changed weight"
        )


def _check_same_answers(
    model, inputs, expected: tuple, what: str = "after the block"
) -> None:
    tokens, logits = answer(model, inputs)
    expected_tokens, expected_logits = expected
    # To the last bit: it is the same computation.
    is_same = torch.equal(tokens, expected_tokens)
    if not is_same or not torch.equal(logits, expected_logits):
        raise BrokenError(f"{what} the model answers otherwise than before")


def parts(method, subject: Subject) -> Iterator:
    """Yield the objects that do the work: both parts of a chain, and what stands for the crops of an image."""
    for part in (getattr(method, "first", method), getattr(method, "second", None)):
        if isinstance(part, VisionMethod):
            yield part.of_crops(subject.shape.picture)[0]
        elif isinstance(part, decoder.DecoderMethod):
            yield part


@contextmanager
def replaced_reduce(
    types: set[type], replacement: Callable[[Callable], Callable]
) -> Iterator[None]:
    """Replace `reduce` of some classes by a function that is made of it, while the block is open."""
    # None: the class inherits it.
    originals = {owner: vars(owner).get("reduce") for owner in types}
    # Before any is replaced: one of the classes may inherit from another.
    replacements = {owner: replacement(owner.reduce) for owner in types}
    try:
        for owner, reduce in replacements.items():
            owner.reduce = reduce
        yield
    finally:
        for owner, reduce in originals.items():
            if reduce is None:
                del owner.reduce
            else:
                owner.reduce = reduce


Check = Callable[[Candidate, Subject], None]
CHECKS: dict[str, Check] = {
    "keeping everything is the stock model": keeping_everything_is_stock,
    "the budget is what enters the layers": budget_is_met,
    "half precision works": half_precision_works,
    "order is preserved": order_is_preserved,
    "a batch equals single prompts": batch_equals_singles,
    "cached decoding equals recomputing": cached_equals_recomputed,
    "nothing is left on the model": nothing_is_left,
    "nothing is left where it fails": failing_leaves_nothing,
    "other methods do not matter": others_do_not_matter,
}
