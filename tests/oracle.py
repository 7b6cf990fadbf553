"""Decoder-stage reduction as plainly and slowly as it can be written, to hold the engine against.

One prompt at a time, the whole sequence again for every new token: no cache, no batch, no hooks, no gather. Shares no
code with zipeval.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def normed(x, weight, config):
    gain = 1 + weight if config.model_type == "gemma" else weight
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def turned(x, positions, theta):
    """Rotary embedding of x (heads, S, d)."""
    half = x.shape[-1] // 2
    angle = torch.tensor(positions).float()[:, None] / theta ** (
        torch.arange(half) / half
    )
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def block(layer, config, x, positions):
    """(output (S, D), attention probabilities (heads, S, S)) of a decoder layer over x (S, D)."""
    attention = layer.self_attn
    theta, heads = config.rope_parameters["rope_theta"], config.num_attention_heads
    h = normed(x, layer.input_layernorm.weight, config)
    q, k, v = (
        p(h).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for p in projections(attention)
    )
    q, k = turned(q, positions, theta), turned(k, positions, theta)
    share = heads // k.shape[0]
    rows = []
    for head in range(heads):
        logits = q[head] @ k[head // share].T / math.sqrt(attention.head_dim)
        later = torch.ones_like(logits).triu(1).bool()
        rows.append(logits.masked_fill(later, float("-inf")).softmax(-1))
    probabilities = torch.stack(rows)
    mixed = torch.cat(
        [probabilities[head] @ v[head // share] for head in range(heads)], -1
    )
    x = x + attention.o_proj(mixed)
    h = normed(x, layer.post_attention_layernorm.weight, config)
    mlp = layer.mlp
    gate = mlp.gate_proj(h)
    gate = (
        F.gelu(gate, approximate="tanh")
        if config.model_type == "gemma"
        else F.silu(gate)
    )
    return x + mlp.down_proj(gate * mlp.up_proj(h)), probabilities


def projections(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj


def logits_of(model, x, kinds, method):
    """Last logits of embeddings x (S, D); kinds: per slot 'text', 'visual' or 'answer'."""
    decoder = model.model.language_model
    slots = [{"kind": kind, "position": i, "born": i} for i, kind in enumerate(kinds)]
    given = x
    probabilities = None
    for number, layer in enumerate(decoder.layers):
        x, slots = method(number, x, slots, probabilities, given)
        x, probabilities = block(
            layer, decoder.config, x, [s["position"] for s in slots]
        )
    return model.lm_head(normed(x[-1], decoder.norm.weight, decoder.config))


@torch.no_grad()
def greedy(model, ids, pixels, method, steps):
    """(tokens, logits (steps, V)) for ids (S,) with one image, pixels (1, 3, h, w)."""
    base, config = model.model, model.config
    states = base.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = base.multi_modal_projector(states[config.vision_feature_layer][:, 1:])[0]
    embed = base.language_model.embed_tokens
    x, features = embed(ids).clone(), list(features)
    kinds = ["visual" if i == config.image_token_id else "text" for i in ids.tolist()]
    for slot, kind in enumerate(kinds):
        if kind == "visual":
            x[slot] = features.pop(0)
    tokens, logits = [], []
    for _ in range(steps):
        logits.append(logits_of(model, x, kinds, method))
        tokens.append(int(logits[-1].argmax()))
        x = torch.cat([x, embed(torch.tensor([tokens[-1]]))])
        kinds = [*kinds, "answer"]
    return tokens, torch.stack(logits)


def visual_of(slots):
    return [i for i, s in enumerate(slots) if s["kind"] == "visual"]


def best(score, candidates, count):
    """The `count` of `candidates` with the highest score, in their order."""
    return sorted(sorted(candidates, key=lambda i: -float(score[i]))[:count])


def fastv(K, keep, mean=False):
    def method(number, x, slots, probabilities, given):
        if number != K:
            return x, slots
        prompt = [i for i, s in enumerate(slots) if s["kind"] != "answer"]
        rows = prompt if mean else prompt[-1:]
        score = sum(probabilities[:, row].mean(0) for row in rows)
        visual = visual_of(slots)
        dropped = set(visual) - set(best(score, visual, keep))
        left = [i for i in range(len(slots)) if i not in dropped]
        return x[left], [slots[i] for i in left]

    return method


def sparsevlm(counts, after):
    """Without density noise."""
    raters = Raters()

    def method(number, x, slots, probabilities, given):
        if number - 1 not in after:
            return x, slots
        rows = raters.rows(given, slots)
        score = sum(probabilities[:, row].mean(0) for row in rows) / len(rows)
        visual = visual_of(slots)
        kept = best(
            score, visual, min(counts[after.index(number - 1)], len(visual) - 1)
        )
        dropped = [i for i in visual if i not in kept]
        recycled = sorted(dropped, key=lambda i: -float(score[i]))[
            : int(len(dropped) * 0.3) + 1
        ]
        merged = clustered(x[recycled], len(recycled) // 10 + 1)
        left = [i for i in range(visual[-1] + 1) if i not in dropped]
        after_image = list(range(visual[-1] + 1, len(slots)))
        x = torch.cat([x[left], merged, x[after_image]])
        new = [{"kind": "visual", "born": None} for _ in merged]
        slots = [*(slots[i] for i in left), *new, *(slots[i] for i in after_image)]
        return x, [{**s, "position": i} for i, s in enumerate(slots)]

    return method


def sparsevlm_plus(counts, after, heads, width):
    """Version 2: nothing merged or renumbered; attention over what distance alone makes of heads `width` wide."""
    raters = Raters()

    def method(number, x, slots, probabilities, given):
        if number - 1 not in after:
            return x, slots
        rows, visual = raters.rows(given, slots), visual_of(slots)
        corrected = probabilities[:, rows][:, :, visual].clone()
        for a, row in enumerate(rows):
            for b, column in enumerate(visual):
                distance = slots[row]["position"] - slots[column]["position"]
                turns = [
                    math.cos(distance / 10000.0 ** (2 * k / width))
                    for k in range(width // 2)
                ]
                corrected[:, a, b] /= 2 * sum(turns) / math.sqrt(width)
        chosen = sorted(
            range(len(corrected)), key=lambda head: -float(corrected[head].sum())
        )[:heads]
        score = corrected[chosen].mean((0, 1))
        kept = {
            visual[place]
            for place in best(
                score, range(len(visual)), counts[after.index(number - 1)]
            )
        }
        left = [i for i in range(len(slots)) if i in kept or i not in visual]
        return x[left], [slots[i] for i in left]

    return method


class Raters:
    """Text of the prompt behind the image that stands out against it, chosen when a prompt is first read."""

    born = None

    def rows(self, given, slots):
        """Where they are now."""
        if self.born is None:
            visual = visual_of(slots)
            text = [
                i for i, s in enumerate(slots) if s["kind"] == "text" and i > visual[-1]
            ]
            shares = (given[visual] @ given[text].T).softmax(-1).mean(0)
            self.born = [
                t
                for t, share in zip(text, shares, strict=True)
                if share > shares.mean()
            ]
        return [i for i, s in enumerate(slots) if s["born"] in self.born]


def clustered(x, count):
    """Density peaks: (n, D) -> (count, D)."""
    n = len(x)
    distance = [
        [float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for j in range(n)]
        for i in range(n)
    ]
    density = [
        math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in distance
    ]
    furthest = max(map(max, distance))
    reach = [
        min(
            [distance[i][j] for j in range(n) if density[j] > density[i]],
            default=furthest,
        )
        for i in range(n)
    ]
    centres = sorted(range(n), key=lambda i: -reach[i] * density[i])[:count]
    members = [[] for _ in centres]
    for i in range(n):
        home = (
            centres.index(i)
            if i in centres
            else min(range(count), key=lambda c: distance[centres[c]][i])
        )
        members[home].append(i)
    return torch.stack([x[m].mean(0) for m in members])
