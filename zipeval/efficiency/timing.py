"""Measure how long a model takes to read a prompt and to answer, stage by stage: what `zipeval bench` measures.

Nothing here waits for the device between the start of a prompt and the last token of its answer (methods inside the
decoder do, once, behind its head): stages are bounded by CUDA events, or by the clock on a CPU, where nothing is
asynchronous.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch

from zipeval.engine import flops, hf_names
from zipeval.engine.compiled import compile_blocks
from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.images import PIXELS, TOWERS, pictures, tower
from zipeval.engine.ledger import record_prefill
from zipeval.engine.ragged import visual_slots
from zipeval.errors import BudgetError

# Disjoint. encoder: all before the projector but the reducer; other: between projector and decoder.
STAGES = ("encoder", "reducer", "projector", "prefill", "other")
WARM_UP = 2  # rounds that are not kept
PRODUCTS = 10  # of one measurement of the device's rate


@dataclass(frozen=True)
class Case:
    """A method at a batch size.

    Attributes:
        row: of the record; what is measured is put there.
        compile: whether the model's blocks run compiled.
    """

    method: object
    batch: int
    row: dict
    compile: bool = False


class Clock:
    """When each stage of a prompt began.

    Attributes:
        running: hooks of decoding steps come by here too, and are not to be timed.
    """

    def __init__(self, device: torch.device):
        self.cuda, self.marks, self.running = device.type == "cuda", [], True

    def mark(self, stage: str) -> None:
        """A stage begins, and the one before it ends."""
        if self.running:
            self.marks.append((stage, self._now()))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spans(self) -> Iterator[tuple[str, float]]:
        """(stage, milliseconds) of all but the last mark, once the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        for (stage, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            yield stage, start.elapsed_time(end) if self.cuda else 1000 * (end - start)


def prompts(
    model, noise: Callable, batch: int, text: int, seed: int
) -> dict[str, torch.Tensor]:
    """The processor's inputs: `batch` prompts of one picture each, which text stands before and behind.

    Args:
        noise: of the family, (config, count) -> pixels.
        text: its tokens, drawn at random; at least one stands behind the picture.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = noise(model.config, batch)
        vocabulary = torch.arange(model.config.get_text_config().vocab_size)[None]
        words = vocabulary[~visual_slots(vocabulary, model.config)]
        words = words[torch.randint(len(words), (batch, text))]
    kind = next(kind for kind, names in PIXELS.items() if inputs.keys() & {*names})
    media = torch.full(
        (batch, pictures(model, inputs, kind)[0].tokens),
        getattr(model.config, f"{kind}_token_id"),
    )
    ids = torch.cat([words[:, : text // 2], media, words[:, text // 2 :]], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        k: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype)
        for k, x in inputs.items()
    }


def on(device: torch.device) -> AbstractContextManager:
    """While open, CUDA events are of this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def measure(
    model,
    cases: list[Case],
    inputs: dict[int, dict],
    new_tokens: int,
    repeats: int,
    seed: int,
) -> Iterator[float]:
    """Counts of every case, and then in each of `repeats` rounds its times, in another order every round.

    What does not fit into memory is said in its row and not tried again.

    Args:
        inputs: by batch size.

    Yields:
        behind every round, operations per second of large matrix products in it.

    Raises:
        BudgetError: if other numbers of tokens enter the decoder than the method says.
    """
    order = random.Random(seed)
    for case in cases:
        _attempt(case, lambda case: count(model, case, inputs[case.batch]))
    length = inputs[min(inputs)]["input_ids"].numel()
    for number in range(-WARM_UP, repeats):
        rate = matrix_rate(model, length)
        for place, case in enumerate(order.sample(cases, len(cases))):
            measured = _attempt(
                case, lambda case: times(model, case, inputs[case.batch], new_tokens)
            )
            if number >= 0 and measured:
                case.row["rounds"].append({"round": number, "place": place, **measured})
        if number >= 0:
            yield rate


def _attempt(case: Case, call: Callable[[Case], dict | None]) -> dict | None:
    """`call(case)`; None where it did not fit into memory, now or before."""
    if "failed" in case.row:
        return None
    try:
        return call(case)
    except RuntimeError as error:
        if not isinstance(
            error, torch.OutOfMemoryError
        ) and "DefaultCPUAllocator" not in str(error):
            raise
        case.row["failed"] = "out of memory"
    gc.collect()  # behind the block: the error holds what did fit
    torch.cuda.empty_cache()
    return None


@torch.inference_mode()
def count(model, case: Case, inputs: dict) -> None:
    """Put into the case's row what does not depend on time: the visual tokens that enter each layer, the bytes of keys
    and values, and the operations of all prompts.

    Raises:
        BudgetError: if the tokens are not those that the method says.
    """
    with (
        case.method.applied(model),
        record_prefill(model) as prefills,
        flops.before_decoder(model) as before,
    ):
        cache = hf_names.returned_cache(
            model(**inputs, use_cache=True, logits_to_keep=1)
        )
    (prefill,) = prefills
    layers = [prefill.visual(number) for number in range(case.batch)]
    batch_pictures = []
    for kind in PIXELS:
        batch_pictures += pictures(model, inputs, kind)
    for visual, picture in zip(layers, batch_pictures, strict=True):
        expected = case.method.tokens_per_layer([picture], len(visual))
        if visual != expected:
            raise BudgetError(
                f"{case.method}: {visual} visual tokens entered the layers, {expected} should have."
            )
    config = model.config.get_text_config()
    case.row["visual_tokens"] |= {
        "layers": layers[0],
        "mean": fmean(layers[0]),
        "final": layers[0][-1],
    }
    case.row["kv_bytes"] = hf_names.bytes_in(cache)
    case.row["flops"] = before | {
        "decoder": sum(flops.exact(entered, config) for entered in prefill.entered)
    }


@torch.inference_mode()
def times(model, case: Case, inputs: dict, new_tokens: int) -> dict[str, float | None]:
    """Return the milliseconds of every stage, of their sum `ttft`, and of `decode`, all tokens but the first.

    `peak_bytes` are those over the weights, with the inputs; None on a CPU.
    """
    clock, peak = Clock(model.device), None
    with (
        staged(model, case.method, clock),
        compile_blocks(model, case.method) if case.compile else nullcontext(),
    ):
        if clock.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - sum(
                x.nbytes for x in inputs.values()
            )
        answer(model, inputs, new_tokens, clock)
        milliseconds = dict.fromkeys((*STAGES, "decode"), 0.0)
        for stage, span in clock.spans():
            milliseconds[stage] += span
        if clock.cuda:
            peak = torch.cuda.max_memory_allocated() - before
    first_token = sum(milliseconds[stage] for stage in STAGES)
    return milliseconds | {"ttft": first_token, "peak_bytes": peak}


def answer(model, inputs: dict, new_tokens: int, clock: Clock) -> list[torch.Tensor]:
    """`new_tokens` tokens (B, 1), the likeliest ones, whether an answer ends or not: as `generate`, without the work
    that it does around the model.
    """
    clock.mark("other")
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    clock.mark("decode")
    clock.running = False
    for _ in range(new_tokens - 1):
        cache = hf_names.cache_argument(model, hf_names.returned_cache(out))
        out = model(input_ids=tokens[-1], use_cache=True, logits_to_keep=1, **cache)
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    clock.running = True
    clock.mark("end")
    return tokens


@contextmanager
def staged(model, method, clock: Clock) -> Iterator[None]:
    """While open, the method is applied and the clock told of every stage. Hooks run in the order in which they were
    registered: what a method does at the projector and between layers is bounded by ours before and behind its own.
    """
    base, decoder, projection = (
        model.base_model,
        hf_names.decoder(model),
        hf_names.projector(model),
    )
    inside = getattr(method, "second", method)  # of a chain
    layers = (
        inside.layers(len(decoder.layers)) if isinstance(inside, DecoderMethod) else ()
    )
    with ExitStack() as stack:

        def begins(stage, register):
            stack.callback(register(lambda *_: clock.mark(stage)).remove)

        def projector(module, args):
            """Mark what is left of crops, not the nothing that a method ends the encoder's own path with."""
            if args[0].numel():
                clock.mark("projector")

        def projected(module, args, output):
            clock.mark("other" if output.numel() else "reducer")

        for kind in PIXELS:
            if any(hasattr(base, name) for name in TOWERS[kind]):
                begins("encoder", tower(model, kind).register_forward_pre_hook)
        begins("reducer", projection.register_forward_pre_hook)
        stack.callback(projection.linear_1.register_forward_pre_hook(projector).remove)
        stack.callback(projection.register_forward_hook(projected).remove)
        begins("prefill", decoder.register_forward_pre_hook)
        for layer in layers:
            begins("reducer", decoder.layers[layer].register_forward_pre_hook)
        stack.enter_context(method.applied(model))
        for layer in layers:
            begins("prefill", decoder.layers[layer].register_forward_pre_hook)
        yield


@torch.inference_mode()
def matrix_rate(model, rows: int) -> float:
    """Operations per second of the products of the decoder's feed-forward network, (rows, d) x (d, m) and back, in the
    model's dtype: what the device can do at best.
    """
    config, clock = model.config.get_text_config(), Clock(model.device)
    options = {"device": model.device, "dtype": model.dtype}
    x = torch.randn(rows, config.hidden_size, **options)
    up, down = (
        torch.randn(config.intermediate_size, config.hidden_size, **options) * 0.01
        for _ in range(2)
    )
    for _ in range(2):  # the first time warms up
        clock.marks.clear()
        clock.mark("products")
        for _ in range(PRODUCTS):
            torch.mm(torch.mm(x, up.mT), down)
        clock.mark("end")
    ((_, span),) = clock.spans()
    return 4 * PRODUCTS * up.numel() * rows / span * 1000
