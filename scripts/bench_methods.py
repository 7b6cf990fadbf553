"""What the methods themselves cost, as ratios of one interleaved run on a CPU with random weights.

    OMP_NUM_THREADS=1 python scripts/bench_methods.py [--rounds 5] [--batch 1 4] [--only encoder prefill first]

encoder  CLIP-L as in LLaVA-1.5 (24 layers of 1024, 577 tokens): VisionZip's reducer over the encoder, and the encoder
         with it over the stock one, both from its first kernel to the projector's.
prefill  the decoder under FastV and SparseVLM, over the same decoder whose layers are merely handed as many tokens: the
         time that their own counts predict.
first    time to the first token of every method at 64 of 576 visual tokens (budget=mean), over vanilla's, encoder
         included. The shape is bound by the decoder: 32 layers of 768 behind an encoder of 2 layers of 256.

A ratio is the median of the rounds' own ratios, with the smallest and the largest; a round takes all of its works in
turn, after one that is not counted. The exit code is 1 where one is over its bar.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import zipeval.methods
from zipeval.config.compose import compose
from zipeval.engine.budget import Shape
from zipeval.engine.decoder import DecoderMethod
from zipeval.methods import build
from zipeval.methods.visionzip import VisionZip

SIDE, PATCH, IMAGE, VOCABULARY = 24, 14, 999, 1000
BEFORE, BEHIND = 35, (25, 13, 40, 20)  # tokens of text around the image
TOKENS = 64  # of 576: one ninth
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
DECODER = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 12,
}


def llava(vision: dict, text: dict):
    """A random LLaVA of 576 visual tokens with SDPA."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **vision, image_size=SIDE * PATCH, patch_size=PATCH
        ),
        text_config=LlamaConfig(
            **text, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=None
        ),
        image_token_id=IMAGE,
        image_seq_length=SIDE**2,
    )
    return LlavaForConditionalGeneration(config).eval()


def prompts(batch: int) -> dict:
    """`batch` prompts with one image each, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    behind = [BEHIND[row % len(BEHIND)] for row in range(batch)]
    width = BEFORE + SIDE**2 + max(behind)
    ids = torch.randint(1, IMAGE, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row, text in enumerate(behind):
        padding = max(behind) - text
        mask[row, :padding] = ids[row, :padding] = 0
        ids[row, padding + BEFORE : padding + BEFORE + SIDE**2] = IMAGE
    pixels = torch.randn(batch, 3, SIDE * PATCH, SIDE * PATCH, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def method_of(name: str, layers: int, *overrides: str):
    """As `zipeval run` would make it."""
    shape = Shape(SIDE**2, SIDE**2, layers)
    more = ["method.first.tokens=192"] if name == "chain" else []
    return build(
        compose(
            [f"method={name}", f"tokens={TOKENS}", "budget=mean", *more, *overrides]
        ).method,
        "mean",
        shape,
    )


@contextmanager
def stopwatch(first, last) -> Iterator[list[float]]:
    """Seconds from before the module `first` to before the inner work of `last`, or behind it if they are one.

    A method calls the projector twice: with nothing at the end of the encoder's own path, and with what it leaves.
    """
    began: list[float] = []
    times: list[float] = []
    hooks = [
        first.register_forward_pre_hook(
            lambda *given: began.append(time.perf_counter())
        )
    ]

    def stop(*given):
        times[:] = [time.perf_counter() - began[-1]]

    hooks.append(
        last.register_forward_hook(stop)
        if first is last
        else last.register_forward_pre_hook(stop)
    )
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def cut(model, lengths: list[int]) -> Iterator[None]:
    """While open, layer i of the decoder is handed the last `lengths[i]` slots of what there is, and that is all."""

    def shorten(length):
        def hook(module, args, kwargs):
            hidden, mask, rotary = (
                args[0],
                kwargs["attention_mask"],
                kwargs["position_embeddings"],
            )
            shorter = {"position_embeddings": tuple(x[:, -length:] for x in rotary)}
            if mask is not None:
                shorter["attention_mask"] = mask[..., -length:, -length:]
            return (hidden[:, -length:], *args[1:]), {**kwargs, **shorter}

        return hook

    layers = model.model.language_model.layers
    hooks = [
        layer.register_forward_pre_hook(shorten(length), with_kwargs=True)
        for layer, length in zip(layers, lengths, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> list[dict]:
    """What every work returns, round by round."""
    return [{name: work() for name, work in works.items()} for _ in range(rounds + 1)][
        1:
    ]


def ratio(what: str, ratios: list[float], bar: float, seconds: float) -> bool:
    """Prints a line; whether the bar is met."""
    found = median(ratios)
    verdict = "met" if found <= bar else "NOT MET"
    print(
        f"{what:52} {found:6.3f} ({min(ratios):.3f} to {max(ratios):.3f}), bar {bar:.2f} {verdict}; of {seconds:.2f} s",
        flush=True,
    )
    return found <= bar


@torch.no_grad()
def encoder(batch: int, rounds: int) -> list[bool]:
    model, inputs = llava(CLIP_L, SMALL), prompts(batch)
    seconds: list[float] = []

    class Timed(VisionZip):
        def reduce(self, crops):
            start = time.perf_counter()
            try:
                return super().reduce(crops)
            finally:
                seconds.append(time.perf_counter() - start)

    def encode(method):
        with (
            method,
            stopwatch(
                model.model.vision_tower, model.model.multi_modal_projector
            ) as times,
        ):
            model(**inputs, logits_to_keep=1)
        return times[0]

    works = {
        "stock": lambda: encode(nullcontext()),
        "ours": lambda: encode(Timed(tokens=TOKENS).applied(model)),
    }
    found = interleaved(works, rounds)
    stock = median(f["stock"] for f in found)
    shares = [
        reducer / f["stock"] for reducer, f in zip(seconds[1:], found, strict=True)
    ]
    return [
        ratio(f"batch {batch}: VisionZip's reducer / encoder", shares, 0.03, stock),
        ratio(
            f"batch {batch}: encoder with VisionZip / stock",
            [f["ours"] / f["stock"] for f in found],
            1.05,
            stock,
        ),
    ]


@torch.no_grad()
def prefill(batch: int, rounds: int) -> list[bool]:
    model, inputs = llava(SMALL, DECODER), prompts(batch)
    decoder, layers = model.model.language_model, DECODER["num_hidden_layers"]
    methods: dict[str, DecoderMethod] = {
        "fastv": method_of("fastv", layers),
        "sparsevlm": method_of("sparsevlm", layers),
        "sparsevlm version 2": method_of("sparsevlm", layers, "method.version=2"),
    }
    text = inputs["input_ids"].shape[1] - SIDE**2

    def read(context):
        with context, stopwatch(decoder, decoder) as times:
            model(**inputs, logits_to_keep=1)
        return times[0]

    works = {}
    for name, method in methods.items():
        lengths = [text + visual for visual in method.schedule(SIDE**2, layers)]
        works[name] = lambda method=method: read(method.applied(model))
        works[name, "predicted"] = lambda lengths=lengths: read(cut(model, lengths))
    found = interleaved(works, rounds)
    return [
        ratio(
            f"batch {batch}: prefill of {name} / predicted",
            [f[name] / f[name, "predicted"] for f in found],
            1.10,
            median(f[name, "predicted"] for f in found),
        )
        for name in methods
    ]


@torch.no_grad()
def first(batch: int, rounds: int) -> list[bool]:
    model, inputs = llava(SMALL, DECODER), prompts(batch)
    names = sorted(
        path.stem for path in Path(zipeval.methods.__path__[0]).glob("[a-z]*.py")
    )
    methods = {name: method_of(name, DECODER["num_hidden_layers"]) for name in names}

    def answer(method):
        with method.applied(model):
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            return time.perf_counter() - start

    found = interleaved(
        {name: partial(answer, method) for name, method in methods.items()}, rounds
    )
    vanilla = median(f["vanilla"] for f in found)
    return [
        ratio(
            f"batch {batch}: first token of {name} / vanilla",
            [f[name] / f["vanilla"] for f in found],
            1.0,
            vanilla,
        )
        for name in names
        if name != "vanilla"
    ]


if __name__ == "__main__":
    parts = {"encoder": encoder, "prefill": prefill, "first": first}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts])
    given = parser.parse_args()
    met = [
        m
        for name in given.only
        for batch in given.batch
        for m in parts[name](batch, given.rounds)
    ]
    sys.exit(not all(met))
