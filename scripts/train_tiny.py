"""Make the embedded checkpoint `tiny_llava` and the test set of `zipeval_shapes` from nothing.

    python scripts/train_tiny.py            # about 75 minutes on 2 CPU cores, a few on a GPU

Two stages, as LLaVA has them. Stage 1 trains the vision tower alone, with heads that are thrown away: one tells from
the CLS token what the image holds, the others tell from each patch token what it lies on and where that is; CLS is
taught to attend to the middle of every thing. Stage 2 freezes the tower and trains the projector and the decoder on
answers. In half of its steps visual tokens are missing, because LLaVA's decoder tolerates that and one this small has
to be taught. docs/tiny_llava.md reports the result.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as parquet
import shapes
import torch
import torch.nn.functional as F
from shapes import CHARS, COLORS, GRID, MAX_OBJECTS, PATCH, SEEDS, SHAPES, SIZE, TYPES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
PATCHES = GRID * GRID
PROMPT, ANSWER = "USER: <image>\n{question} ASSISTANT:", " {answer}</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


# ---------------------------------------------------------------------------------------------- the untrained model


def make_tokenizer(vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the questions; the characters of signs stay single tokens."""
    corpus = [f" {c}" for c in CHARS] * 20
    corpus += [
        "Answer the question using a single word or phrase. Please answer yes or no."
    ] * 50
    for i in range(3000):
        _, scene = shapes.make_scene(SEEDS["tokenizer"], i)
        for kind, question, answer in shapes.questions(
            scene, np.random.default_rng([SEEDS["tokenizer"], i]), 8
        ):
            prompt = PROMPT.replace("<image>", "").format(question=question)
            corpus.append(prompt + ("" if kind == "text" else f" {answer}"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<unk>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<image>"},
    )


def make_processor(tokenizer) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    start_local(model.model.vision_tower)
    model.generation_config.update(
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def start_local(tower, scale: float = 0.4, gain: float = 1.4) -> None:
    """Sine-cosine position embeddings, and heads of the first three layers that begin by looking at a neighbour.

    Without this start a tower this small does not learn to read characters in the time there is. For a frequency w
    a head asks with (sin wx, cos wx) and is answered with (sin w(x' - d), cos w(x' - d)), whose product
    cos w(x + d - x') is largest at the patch d to the right.
    """
    width, heads = tower.config.hidden_size, tower.config.num_attention_heads
    quarter, head = width // 4, width // heads
    frequency = 2.5 * 0.06 ** (torch.arange(quarter) / quarter)
    place = torch.arange(GRID).float()
    y, x = (
        p.reshape(-1, 1) * frequency
        for p in torch.meshgrid(place, place, indexing="ij")
    )
    table = tower.embeddings.position_embedding.weight
    table.zero_()
    table[1:] = scale * torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    used = torch.linspace(0, quarter - 1, head // 4).round().long().tolist()
    cross, corners = (
        ((1, 0), (-1, 0), (0, 1), (0, -1)),
        ((1, 1), (-1, 1), (1, -1), (-1, -1)),
    )
    rings = (cross, corners, tuple((2 * x, 2 * y) for x, y in cross))
    for layer, offsets in zip(tower.encoder.layers, rings, strict=False):
        q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for h, offset in enumerate(offsets):
            for (j, f), axis in itertools.product(enumerate(used), (0, 1)):
                row = h * head + 4 * j + 2 * axis
                sin, cos = 2 * axis * quarter + f, (2 * axis + 1) * quarter + f
                turn = float(frequency[f]) * offset[axis]
                for weight in (q, k):
                    weight[row : row + 2] *= 0.3
                q[row, sin] += gain
                q[row + 1, cos] += gain
                k[row, sin] += gain * math.cos(turn)
                k[row, cos] -= gain * math.sin(turn)
                k[row + 1, cos] += gain * math.cos(turn)
                k[row + 1, sin] += gain * math.sin(turn)


# ------------------------------------------------------------------------------------------------------ the scenes


@dataclass
class Scenes:
    """N rendered scenes with what the heads of stage 1 are to tell."""

    pixels: np.ndarray  # (N, SIZE, SIZE, 3) uint8
    owners: np.ndarray  # (N, GRID, GRID, 3) as shapes.patch_owners
    scenes: list[shapes.Scene]

    def images(self, index, device) -> torch.Tensor:
        """(n, 3, SIZE, SIZE) as the processor would make them."""
        x = torch.from_numpy(self.pixels[index]).to(device).permute(0, 3, 1, 2)
        return x.float().div_(255).sub_(0.5).div_(0.25)


def _render(job):
    seed, index, split, crowded = job
    image, scene = shapes.make_scene(seed, index, split, crowded)
    return np.asarray(image), shapes.patch_owners(scene), scene


def render(name: str, count: int) -> Scenes:
    split = "train" if name in ("train", "crowded") else "test"
    jobs = [(SEEDS[name], i, split, name == "crowded") for i in range(count)]
    with multiprocessing.Pool() as pool:
        done = pool.map(_render, jobs, chunksize=64)
    pixels, owners, scenes = zip(*done, strict=True)
    return Scenes(np.stack(pixels), np.stack(owners), list(scenes))


def contents(scene: shapes.Scene) -> tuple[np.ndarray, int]:
    """What CLS is to know: 0/1 for colour-shape pairs, colours, shapes, characters by place; and how many things."""
    pair = np.zeros((len(SHAPES), len(COLORS)))
    char = np.zeros((2, len(CHARS)))
    for t in scene.things:
        pair[SHAPES.index(t.shape), list(COLORS).index(t.color)] = 1
    for sign in scene.signs:
        char[[0, 1], [CHARS.index(c) for c in sign.text]] = 1
    known = np.concatenate([pair.ravel(), pair.max(0), pair.max(1), char.ravel()])
    return known, len(scene.things)


def patch_targets(owners: np.ndarray, scene: shapes.Scene):
    """Per patch: shape, colour, character (0 = none); own place and its thing's centre in -1..1; is it the centre?"""
    owner, sign, glyph = owners.reshape(PATCHES, 3).T
    shape, color, char = (np.zeros(PATCHES, np.int64) for _ in range(3))
    y, x = (g.ravel() * PATCH + PATCH / 2 for g in np.mgrid[:GRID, :GRID])
    centre = np.stack([x, y], 1).astype(np.float32)
    place, is_centre = centre.copy(), np.zeros(PATCHES, np.float32)
    spots = [(owner == i + 1, (t.x, t.y)) for i, t in enumerate(scene.things)]
    for i, t in enumerate(scene.things):
        shape[owner == i + 1] = 1 + SHAPES.index(t.shape)
        color[owner == i + 1] = 1 + list(COLORS).index(t.color)
    for j, s in enumerate(scene.signs):
        shape[sign == j + 1] = 1 + len(SHAPES)
        for k, c in enumerate(s.text):
            left, top, right, bottom = s.glyph_box(k)
            on = (sign == j + 1) & (glyph == k + 1)
            char[on] = 1 + k * len(CHARS) + CHARS.index(c)
            spots.append((on, ((left + right) / 2, (top + bottom) / 2)))
    for on, (cx, cy) in spots:
        centre[on] = cx, cy
        is_centre[
            int(min(cy, SIZE - 1)) // PATCH * GRID + int(min(cx, SIZE - 1)) // PATCH
        ] = 1
    return (
        shape,
        color,
        char,
        np.concatenate([place, centre], 1) / (SIZE / 2) - 1,
        is_centre,
    )


# ------------------------------------------------------------------------------------------------ stage 1: the tower


class Heads(nn.Module):
    """Readouts that only training uses."""

    def __init__(self, width: int):
        super().__init__()
        known = len(SHAPES) * len(COLORS) + len(COLORS) + len(SHAPES) + 2 * len(CHARS)
        self.contents = nn.ModuleList(
            [nn.Linear(width, known + MAX_OBJECTS + 1) for _ in range(2)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.sizes = (len(SHAPES) + 2, len(COLORS) + 1, 2 * len(CHARS) + 1, 4, 1)
        self.patch = nn.Linear(width, sum(self.sizes))

    def losses(self, seen, cls_target, count, patch_target):
        hidden, last, attention = seen
        out = {}
        for name, norm, head, cls in zip(
            ("cls", "cls_last"), self.norms, self.contents, (hidden, last), strict=False
        ):
            logits = head(norm(cls[:, 0]))
            known = F.binary_cross_entropy_with_logits(
                logits[:, : cls_target.shape[1]], cls_target
            )
            number = F.cross_entropy(
                logits[:, cls_target.shape[1] :], count, ignore_index=-1
            )
            out[name] = 12 * known + (0.5 * number if (count >= 0).any() else 0)
        *classes, place, centre = self.patch(self.norms[2](hidden[:, 1:])).split(
            self.sizes, -1
        )
        for name, logits, target in zip(
            ("shape", "color", "char"), classes, patch_target, strict=False
        ):
            weight = torch.where(target == 0, 0.15, 1.0)
            each = F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="none"
            )
            out[name] = (each * weight.flatten()).sum() / weight.sum()
        out["place"] = 10 * F.smooth_l1_loss(place, patch_target[3], beta=0.1)
        out["centre"] = 3 * F.binary_cross_entropy_with_logits(
            centre[..., 0], patch_target[4]
        )
        goal = patch_target[4] / patch_target[4].sum(1, keepdim=True).clamp(min=1)
        out["attention"] = -0.3 * (goal * attention.clamp(min=1e-6).log()).sum(1).mean()
        return out


def tower_targets(data: Scenes, index, device):
    known, number = zip(*(contents(data.scenes[i]) for i in index), strict=True)
    count = torch.tensor([n if n <= MAX_OBJECTS else -1 for n in number], device=device)
    patch = zip(
        *(patch_targets(data.owners[i], data.scenes[i]) for i in index), strict=True
    )
    patch = [torch.from_numpy(np.stack(p)).to(device) for p in patch]
    return (
        torch.tensor(np.stack(known), dtype=torch.float32, device=device),
        count,
        patch,
    )


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024) with matrices of one shape orthogonalised together, its update scaled to AdamW's.

    torch.optim.Muon iterates in bfloat16, which is many times slower than float32 on CPUs without bfloat16 units.
    """

    def __init__(
        self, matrices, lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(
            matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes_of = lambda p: tuple(p.shape)  # noqa: E731
            with_grad = sorted(
                (p for p in group["params"] if p.grad is not None), key=shapes_of
            )
            for shape, same in itertools.groupby(with_grad, shapes_of):
                same = list(same)
                grad = torch.stack([p.grad for p in same])
                average = self.state[same[0]].setdefault(
                    "average", torch.zeros_like(grad)
                )
                average.lerp_(grad, 1 - group["momentum"])
                update = orthogonal(grad.lerp(average, group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, u in zip(same, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=rate)


def orthogonal(x, iterations: int = 5):
    """(n, rows, columns) with singular values moved near 1 by Muon's quintic Newton-Schulz iteration."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon for the matrices of the layers, AdamW for the rest, one cosine schedule with warm-up."""

    def __init__(self, modules, rate: float, steps: int, warmup: int):
        named = [(n, p) for m in modules for n, p in m.named_parameters()]
        matrix = [p for n, p in named if p.ndim == 2 and "layers" in n]
        chosen = {id(p) for p in matrix}
        rest = [p for _, p in named if id(p) not in chosen]
        self.all = matrix + rest
        self.optimizers = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrix:
            self.optimizers.append(Muon(matrix, lr=rate, weight_decay=0.05))

        def factor(step):
            return min(1, (step + 1) / warmup) * (
                0.02 + 0.49 * (1 + math.cos(math.pi * min(1, step / steps)))
            )

        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers
        ]

    def step(self, loss) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.all, 1.0)
        for part in (*self.optimizers, *self.schedules):
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def see(tower, images):
    """(hidden, last, attention): outputs of the last layer but one, which are LLaVA's features, and of the last,
    (n, 1 + PATCHES, D); share of CLS's attention in the last layer but one that each patch gets, (n, PATCHES)."""
    states = tower(images, output_hidden_states=True).hidden_states
    layer, heads = tower.encoder.layers[-2], tower.config.num_attention_heads
    before = layer.layer_norm1(states[-3])
    q = layer.self_attn.q_proj(before[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = layer.self_attn.k_proj(before).unflatten(-1, (heads, -1)).transpose(1, 2)
    attention = (q @ k.mT * layer.self_attn.scale).softmax(-1).mean(1)
    return states[-2], states[-1], attention[:, 0, 1:]


def train_tower(tower, crowded, train, validation, steps, batch, log, rng, device):
    heads = Heads(tower.config.hidden_size).to(device)
    optimizer = Optimizer([tower, heads], 1.5e-3, steps, 40)
    for step in range(steps):
        data = (
            crowded if step < 0.6 * steps else train
        )  # many things an image first, then the images of the task
        index = rng.integers(0, len(data.scenes), batch)
        losses = heads.losses(
            see(tower, data.images(index, device)), *tower_targets(data, index, device)
        )
        optimizer.step(sum(losses.values()))
        if step % 50 == 0 or step == steps - 1:
            log(1, step, sum(losses.values()), **losses)
        if (step + 1) % 300 == 0 or step == steps - 1:
            log(1, step, **judge_tower(tower, heads, validation, device))


@torch.no_grad()
def judge_tower(tower, heads, data, device, count=256, kept=14):
    """How well patches are told; and how many things and characters the `kept` patches CLS attends to most touch."""
    index = np.arange(min(count, len(data.scenes)))
    hidden, _, cls = see(tower, data.images(index, device))
    shape, _, char, place, _ = tower_targets(data, index, device)[2]
    told = heads.patch(heads.norms[2](hidden[:, 1:])).split(heads.sizes, -1)
    random = torch.rand(cls.shape, generator=torch.Generator().manual_seed(0)).to(
        device
    )

    def touched(score):
        top = (
            torch.zeros_like(score)
            .scatter(1, score.topk(kept, 1).indices, 1)
            .bool()
            .cpu()
            .numpy()
        )
        hit = total = 0
        for t, owners in zip(
            top, data.owners[index].reshape(-1, PATCHES, 3), strict=True
        ):
            units = {
                (o[0], 0, 0) if o[0] else (0, o[1], o[2])
                for o in owners.tolist()
                if o[0] or o[2]
            }
            got = {
                (o[0], 0, 0) if o[0] else (0, o[1], o[2])
                for o in owners[t].tolist()
                if o[0] or o[2]
            }
            hit, total = hit + len(got), total + len(units)
        return hit / total

    return {
        "patch_shape": float((told[0].argmax(-1) == shape)[shape > 0].float().mean()),
        "patch_char": float((told[2].argmax(-1) == char)[char > 0].float().mean()),
        "patch_place_error": float((told[3] - place).abs().mean()),
        "cls_touches": touched(cls),
        "random_touches": touched(random),
        "cls_perplexity": float(
            (-(p := cls / cls.sum(1, keepdim=True)) * p.log()).sum(1).exp().mean()
        ),
    }


# -------------------------------------------------------------------------------- stage 2: projector and the decoder


class Packer:
    """All questions of an image behind one copy of its visual tokens, each blind to the others."""

    def __init__(self, tokenizer, width: int):
        self.tokenizer, self.width = tokenizer, width
        head = tokenizer(PROMPT.split("{question}")[0])["input_ids"]
        at = head.index(tokenizer.convert_tokens_to_ids("<image>"))
        self.before, self.after = torch.tensor(head[:at]), torch.tensor(head[at + 1 :])
        self.known: dict = {}

    def encode(self, question, answer):
        if (question, answer) not in self.known:
            tail = PROMPT.split("\n")[1].format(question=question)
            parts = tail, ANSWER.format(answer=answer)
            self.known[question, answer] = [
                self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts
            ]
        return self.known[question, answer]

    def __call__(self, asked):
        """asked: per image a list of (type, question, answer) -> ids, offset, segment, target, each (n, width)."""
        ids = torch.full((len(asked), self.width), self.tokenizer.pad_token_id)
        offset, segment, target = (
            torch.zeros_like(ids),
            torch.full_like(ids, -1),
            torch.full_like(ids, -100),
        )
        for row, questions in enumerate(asked):
            at = 0
            for number, (_, question, answer) in enumerate(questions):
                tail, reply = self.encode(question, answer)
                end = at + len(tail) + len(reply) - 1
                if end > self.width:
                    continue
                ids[row, at:end] = torch.tensor((tail + reply)[:-1])
                offset[row, at:end] = torch.arange(end - at)
                segment[row, at:end] = number
                target[row, at + len(tail) - 1 : end] = torch.tensor(reply)
                at = end
        return ids, offset, segment, target


def answer_logits(model, packer, features, positions, ids, offset, segment):
    """features (n, k, D) before the projector and positions (n, k) of those tokens -> logits (n, width, vocabulary)."""
    device, n = features.device, len(features)
    embed = model.model.language_model.embed_tokens
    before, after = (
        embed(t.to(device)).expand(n, -1, -1) for t in (packer.before, packer.after)
    )
    inputs = torch.cat(
        [before, model.model.multi_modal_projector(features), after, embed(ids)], 1
    )
    end = positions.max() + 1
    start = torch.arange(len(packer.before), device=device).expand(n, -1)
    middle = (end + torch.arange(len(packer.after), device=device)).expand(n, -1)
    where = torch.cat([start, positions, middle, end + len(packer.after) + offset], 1)
    total, prefix = inputs.shape[1], inputs.shape[1] - ids.shape[1]
    allowed = (
        torch.ones(total, total, dtype=torch.bool, device=device)
        .tril()
        .expand(n, 1, -1, -1)
        .clone()
    )
    allowed[:, 0, prefix:, prefix:] &= segment[:, :, None] == segment[:, None, :]
    mask = torch.zeros(allowed.shape, device=device).masked_fill(
        ~allowed, torch.finfo(torch.float32).min
    )
    out = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=where, use_cache=False
    )
    return model.lm_head(out.last_hidden_state[:, prefix:])


def some_tokens(rank, kept: int, rng):
    """(n, kept) patches in raster order: at random, in half of the images with a leaning to a high `rank` in 0..1."""
    n = len(rank)
    leaning = 3 * rng.random((n, 1)) * (rng.random((n, 1)) < 0.5)
    score = rng.random((n, PATCHES)) + leaning * rank
    return torch.from_numpy(np.sort(np.argsort(-score, 1)[:, :kept], 1))


@torch.no_grad()
def all_features(tower, data, device, batch=128):
    """(N, PATCHES, D) float16 on the CPU, as the frozen tower has to look only once; (N, PATCHES) rank of the attention
    that a patch gets from CLS, 0 to 1."""
    parts, ranks = [], []
    for start in range(0, len(data.scenes), batch):
        index = np.arange(start, min(start + batch, len(data.scenes)))
        hidden, _, attention = see(tower, data.images(index, device))
        parts.append(hidden[:, 1:].half().cpu())
        ranks.append(attention.argsort(1).argsort(1).cpu().numpy() / PATCHES)
    return torch.cat(parts), np.concatenate(ranks)


def train_decoder(model, packer, train, validation, steps, batch, log, rng, device):
    tower = model.model.vision_tower.requires_grad_(False)
    (features, rank), (held_out, _) = (
        all_features(tower, d, device) for d in (train, validation)
    )
    trained = [
        model.model.multi_modal_projector,
        model.model.language_model,
        model.lm_head,
    ]
    optimizer = Optimizer(trained, 1.5e-3, steps, 100)
    first = len(packer.before)
    for step in range(steps):
        index = rng.integers(0, len(train.scenes), batch)
        ids, offset, segment, target = (
            t.to(device)
            for t in packer([shapes.questions(train.scenes[i], rng, 14) for i in index])
        )
        kept = (
            PATCHES if rng.random() < 0.5 else int(rng.integers(PATCHES // 14, PATCHES))
        )
        chosen = some_tokens(rank[index], kept, rng)
        x = (
            features[index]
            .gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))
            .float()
            .to(device)
        )
        # Vision-stage reduction closes the gaps in the rotary positions, decoder-stage reduction leaves them.
        spots = first + (
            chosen if rng.random() < 0.3 else torch.arange(kept).expand(batch, -1)
        )
        logits = answer_logits(model, packer, x, spots.to(device), ids, offset, segment)
        loss = F.cross_entropy(logits[target >= 0], target[target >= 0])
        optimizer.step(loss)
        if step % 50 == 0 or step == steps - 1:
            log(2, step, loss)
        if (step + 1) % 400 == 0 or step == steps - 1:
            log(2, step, **judge_answers(model, packer, held_out, validation, device))


@torch.no_grad()
def judge_answers(model, packer, features, data, device, batch=64):
    """Share of exactly right answers by type, each token given the right ones before it."""
    right, asked = dict.fromkeys(TYPES, 0), dict.fromkeys(TYPES, 0)
    positions = (len(packer.before) + torch.arange(PATCHES)).to(device)
    for start in range(0, len(data.scenes), batch):
        index = range(start, min(start + batch, len(data.scenes)))
        rounds = [
            shapes.questions(data.scenes[i], np.random.default_rng([11, i]), 10)
            for i in index
        ]
        ids, offset, segment, target = (t.to(device) for t in packer(rounds))
        x = features[start : index.stop].float().to(device)
        logits = answer_logits(
            model, packer, x, positions.expand(len(x), -1), ids, offset, segment
        )
        wrong = (logits.argmax(-1) != target) & (target >= 0)
        for row, questions in enumerate(rounds):
            for number, (kind, _, _) in enumerate(questions):
                mine = segment[row] == number
                if mine.any():
                    asked[kind] += 1
                    right[kind] += not (wrong[row] & mine).any()
    return {k: right[k] / max(1, asked[k]) for k in TYPES} | {
        "all": sum(right.values()) / sum(asked.values())
    }


# ------------------------------------------------------------------------------------------------------------ output


def write_test_set(path: Path, images: int, per_image: int) -> None:
    """The parquet file behind the task `zipeval_shapes`."""
    rows = []
    for i in range(images):
        image, scene = shapes.make_scene(SEEDS["test"], i, "test")
        buffer = io.BytesIO()
        image.save(
            buffer, "WEBP", quality=90
        )  # VP8 decoding is bit-exact, JPEG decoding is not
        asked = shapes.questions(
            scene, np.random.default_rng([SEEDS["test"], i]), per_image
        )
        for kind, question, answer in asked:
            row = {
                "image": {"bytes": buffer.getvalue(), "path": None},
                "image_id": f"{i:03d}",
            }
            rows.append(row | {"type": kind, "question": question, "answer": answer})
    text = datasets.Value("string")
    features = {
        "question_id": text,
        "image_id": text,
        "type": text,
        "question": text,
        "answer": text,
    }
    for number, row in enumerate(rows):
        row["question_id"] = f"{row['image_id']}-{number:04d}"
    table = datasets.Dataset.from_list(
        rows, datasets.Features({**features, "image": datasets.Image()})
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # One dictionary page for all of a column: an image that several questions share is stored once.
    parquet.write_table(
        table.data.table, path, compression="zstd", dictionary_pagesize_limit=2**26
    )


class Log:
    """The learning curve: printed as it grows, written as CSV."""

    def __init__(self, path: Path):
        self.path, self.rows, self.start = path, [], time.time()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage, step, loss=None, **values):
        row = {
            "stage": stage,
            "step": step,
            "minutes": round((time.time() - self.start) / 60, 2),
        }
        values = values if loss is None else {"loss": loss, **values}
        row |= {
            k: round(float(torch.as_tensor(v).detach()), 4) for k, v in values.items()
        }
        self.rows.append(row)
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        columns = list(dict.fromkeys(k for r in self.rows for k in r))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "zipeval/embedded/tiny_llava"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "tasks/shapes/test.parquet")
    parser.add_argument(
        "--curve", type=Path, default=ROOT / "docs/tiny_llava_curve.csv"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the images and steps, to try the script out",
    )
    parser.add_argument(
        "--tower", type=Path, help="skip stage 1 and take the tower of this checkpoint"
    )
    parser.add_argument("--tower-steps", type=int, default=1200)
    parser.add_argument("--decoder-steps", type=int, default=2600)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    torch.set_num_threads(os.cpu_count())
    some = lambda n: max(8, int(n * args.scale))  # noqa: E731
    log = Log(args.curve)
    write_test_set(args.data, 300, 5)
    tokenizer = make_tokenizer()
    crowded, train, validation = (
        render("crowded", some(16000)),
        render("train", some(28000)),
        render("validation", 400),
    )
    print(f"rendered after {(time.time() - log.start) / 60:.1f} minutes", flush=True)
    model = make_model(tokenizer).to(args.device)
    tower = model.model.vision_tower
    if args.tower:
        trained = LlavaForConditionalGeneration.from_pretrained(
            args.tower, dtype=torch.float32
        )
        tower.load_state_dict(trained.model.vision_tower.state_dict())
    else:
        train_tower(
            tower,
            crowded,
            train,
            validation,
            some(args.tower_steps),
            64,
            log,
            rng,
            args.device,
        )
    save(model, tokenizer, args.model)
    train_decoder(
        model,
        Packer(tokenizer, 160),
        train,
        validation,
        some(args.decoder_steps),
        16,
        log,
        rng,
        args.device,
    )
    save(model, tokenizer, args.model)


def save(model, tokenizer, path: Path) -> None:
    """Half precision on disk; the trained copy stays as it is."""
    import copy

    copy.deepcopy(model).to(device="cpu", dtype=torch.float16).save_pretrained(path)
    make_processor(tokenizer).save_pretrained(path)


if __name__ == "__main__":
    main()
