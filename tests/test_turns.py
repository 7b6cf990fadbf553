"""Later turns on the cache of a reduced prompt: every kind of method on every model family, against an oracle."""

from __future__ import annotations

import gc
import weakref
from functools import cache, partial

import oracle
import pytest
import torch
import transformers
from packaging.version import Version
from tiny import IMAGE, VIDEO, llava, llava_next, mini_gemini, prompts, video_llava
from tiny_methods import snapshot
from transformers import DynamicCache

from zipeval.engine.vision import KeepAll
from zipeval.methods.chain import Chain
from zipeval.methods.fastv import FastV
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.visionzip import VisionZip

FAMILIES = {
    "llava": llava,
    "llava_next": llava_next,
    "mini_gemini": mini_gemini,
    "video_llava": video_llava,
}
QUESTIONS, IMAGES = [[5, 9, 11], [7, 8, 21, 30, 31], [50, 51]], [1, 1, 1]
NEXT = torch.tensor([[33, 34, 35], [36, 37, 38], [0, 39, 41]])
SAID = torch.tensor(
    [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
)  # the second prompt's first answer is a token shorter
NEW = 3
STAGES, AFTER = (
    (45, 20, 9),
    (0, 1, 2),
)  # 29 or fewer leave at once: what two clusters make of ties is noise
INSIDE = {
    "fastv": (FastV(keep=7, K=2), lambda: oracle.fastv(2, 7)),
    "sparsevlm": (
        SparseVLM(STAGES, AFTER, noise=0),
        lambda: oracle.sparsevlm(STAGES, AFTER),
    ),
    "sparsevlm-2": (
        SparseVLM((9, 5, 3), AFTER, version=2, heads=2),
        lambda: oracle.sparsevlm_plus((9, 5, 3), AFTER, 2, 12),
    ),
}
METHODS = {
    "visionzip": (VisionZip(tokens=6), lambda: unreduced),
    **INSIDE,
    "chain": (
        Chain(VisionZip(tokens=12), INSIDE["sparsevlm"][0]),
        INSIDE["sparsevlm"][1],
    ),
}


def unreduced(number, x, slots, probabilities, given):
    return x, slots


@cache
def tiny(family):
    return FAMILIES[family](side=4, layers=4, gain=1.0).double()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def ask(model, images=IMAGES):
    given = prompts(model, QUESTIONS[: len(images)], images)
    return {
        name: x.double() if name.startswith("pixel") else x for name, x in given.items()
    }


def generate(model, inputs, new=NEW, **options):
    """(ids of the conversation so far, logits (B, new, V), cache)."""
    options |= {
        "max_new_tokens": new,
        "do_sample": False,
        "suppress_tokens": [IMAGE, VIDEO],
    }
    out = model.generate(
        **inputs, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def second(first, mask, said=SAID, asked=NEXT):
    """The next turn's inputs behind what `generate` returned."""
    mask = torch.cat([mask, said[: len(mask)], (asked != 0).long()[: len(mask)]], 1)
    return {
        "input_ids": torch.cat([first, asked[: len(first)]], 1),
        "attention_mask": mask,
    }


@torch.no_grad()
def recomputed(model, prompt, visual, later, method, new=NEW):
    """Greedy tokens and their logits of a prompt (S, D) as it entered the decoder with `later` ids behind it: all of it
    again for every token.
    """
    embed, config = model.model.language_model.embed_tokens, model.config
    x = torch.cat([prompt, embed(torch.tensor(later, dtype=torch.long))])
    kinds = ["visual" if v else "text" for v in visual] + ["answer"] * len(
        later
    )  # which choose nothing
    tokens, logits = [], []
    for _ in range(new):
        logits.append(oracle.logits_of(model, x, kinds, method))
        allowed = logits[-1].index_fill(
            0, torch.tensor([config.image_token_id, VIDEO]), float("-inf")
        )
        tokens.append(int(allowed.argmax()))
        x, kinds = torch.cat([x, embed(torch.tensor(tokens[-1:]))]), [*kinds, "answer"]
    return tokens, torch.stack(logits)


class Spy:
    """What entered the decoder when prompts were read: of every row (S, D), and which of it is visual."""

    def __init__(self, model):
        self.model, self.rows = model, None
        layers = model.model.language_model
        self.hooks = [
            model.model.register_forward_pre_hook(self.ids, with_kwargs=True),
            layers.layers[0].register_forward_pre_hook(self.hidden),
        ]

    def ids(self, module, args, kwargs):
        if self.rows is None:
            self.given = args[0] if args else kwargs["input_ids"]
            mask = kwargs.get("attention_mask")
            self.valid = (
                torch.ones_like(self.given).bool() if mask is None else mask.bool()
            )

    def hidden(self, module, args):
        if self.rows is None:
            self.rows = [
                (x[valid], [i in (IMAGE, VIDEO) for i in ids[valid].tolist()])
                for x, ids, valid in zip(args[0], self.given, self.valid, strict=True)
            ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def test_later_turns_equal_the_oracle(model, name):
    """The second turn and the third, with answers of other lengths than their batch has room for."""
    method, slow = METHODS[name]
    inputs = ask(model)
    with method.applied(model), Spy(model) as read:
        first, _, past = generate(model, inputs)
        following = second(first, inputs["attention_mask"])
        both, logits, past = generate(
            model, {**inputs, **following}, past_key_values=past
        )
        assert torch.equal(both[:, : first.shape[1]], first)
        last = second(
            both, following["attention_mask"], torch.ones_like(SAID), NEXT.flip(0)
        )
        final, last_logits, _ = generate(model, last, past_key_values=past)
    width = inputs["input_ids"].shape[1]
    for row, (prompt, visual) in enumerate(read.rows):
        for ids, answers, its, found in (
            (following["input_ids"], both, following["attention_mask"], logits),
            (last["input_ids"], final, last["attention_mask"], last_logits),
        ):
            later = ids[row, width:][its[row, width:].bool()].tolist()
            tokens, expected = recomputed(model, prompt, visual, later, slow())
            assert answers[row, -NEW:].tolist() == tokens
            torch.testing.assert_close(
                found[row], expected, atol=1e-5, rtol=0, check_dtype=False
            )


@torch.no_grad()
def asked_instead(model, prompt, visual, question, later, method, new=NEW):
    """As `recomputed`, for ids in place of the last `question` tokens of a prompt, which chose what is left of it."""
    decoder, embed = model.model.language_model, model.model.language_model.embed_tokens
    config, tokens = decoder.config, []
    for _ in range(new):
        x, y, probabilities = prompt, embed(torch.tensor([*later, *tokens])), None
        slots = [
            {"kind": "visual" if v else "text", "position": i, "born": i}
            for i, v in enumerate(visual)
        ]
        for number, layer in enumerate(decoder.layers):
            x, slots = method(number, x, slots, probabilities, prompt)
            left = len(x) - question
            positions = [slot["position"] for slot in slots]
            behind = [positions[left] + i for i in range(len(y))]
            y = oracle.block(
                layer, config, torch.cat([x[:left], y]), [*positions[:left], *behind]
            )[0][left:]
            x, probabilities = oracle.block(layer, config, x, positions)
        logits = model.lm_head(oracle.normed(y[-1], decoder.norm.weight, config))
        tokens.append(
            int(
                logits.index_fill(
                    0, torch.tensor([IMAGE, VIDEO]), float("-inf")
                ).argmax()
            )
        )
    return tokens, logits


def test_the_first_question_can_be_masked_out(model, name):
    """Another question, about what was left for the first one, as if that had never been asked."""
    method, slow = METHODS[name]
    inputs = ask(model)
    following = unasked(inputs)
    with method.applied(model), Spy(model) as read:
        first, _, past = generate(model, inputs)
        tokens, logits, _ = generate(model, following(first), past_key_values=past)
    for row, (prompt, visual) in enumerate(read.rows):
        later = NEXT[row][NEXT[row] != 0].tolist()
        expected = asked_instead(
            model, prompt, visual, len(QUESTIONS[row]), later, slow()
        )
        assert tokens[row, -NEW:].tolist() == expected[0]
        torch.testing.assert_close(
            logits[row, -1], expected[1], atol=1e-5, rtol=0, check_dtype=False
        )


def unasked(inputs):
    """The next question without the first one and its answer."""
    slots = torch.arange(inputs["input_ids"].shape[1], 0, -1)
    mask = inputs["attention_mask"].masked_fill(
        slots <= torch.tensor([[len(q)] for q in QUESTIONS]), 0
    )
    return lambda first: second(first, mask, torch.zeros_like(SAID))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "everything",
    [KeepAll(), FastV(ratio=0.0), Chain(KeepAll(), FastV(ratio=0.0))],
    ids=repr,
)
def test_keeping_everything_is_the_stock_model(family, everything):
    """Exactly, in float32, whatever of the conversation is masked out."""
    model = FAMILIES[family](side=4, layers=4)
    inputs = prompts(model, QUESTIONS, IMAGES)
    for following in (
        unasked(inputs),
        lambda first: second(first, inputs["attention_mask"]),
    ):
        first, _, past = generate(model, inputs)
        stock = generate(model, following(first), past_key_values=past)[:2]
        with everything.applied(model):
            past = generate(model, inputs)[2]
            tokens, logits, _ = generate(model, following(first), past_key_values=past)
        assert torch.equal(tokens, stock[0])
        assert torch.equal(logits, stock[1])


def test_the_cache_may_be_the_callers_own(model, name):
    inputs = ask(model)
    mine = DynamicCache(config=model.config)
    with METHODS[name][0].applied(model):
        first, _, past = generate(model, inputs)
        following = second(first, inputs["attention_mask"])
        expected = generate(model, following, past_key_values=past)
        again = model.generate(
            **inputs,
            past_key_values=mine,
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=[IMAGE, VIDEO],
        )
        assert torch.equal(again, first)
        found = generate(model, following, past_key_values=mine)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_pictures_of_the_first_turn_are_not_encoded_again(model, name, monkeypatch):
    inputs = ask(model)
    with METHODS[name][0].applied(model):
        first, _, past = generate(model, inputs)
        for tower in ("vision_tower", "image_tower", "video_tower"):
            if hasattr(model.model, tower):
                monkeypatch.setattr(getattr(model.model, tower), "forward", None)
        generate(
            model,
            {**inputs, **second(first, inputs["attention_mask"])},
            past_key_values=past,
        )


def test_calls_by_hand_equal_generate(model, name):
    """`forward` takes the new ids and the mask of the whole conversation, as that of the stock model does."""
    inputs = ask(model)
    inputs = {
        **inputs,
        **{n: inputs[n][1:2] for n in ("input_ids", "attention_mask")},
    }  # the longest: no padding
    pictures = {"pixel_values", "image_sizes"} & inputs.keys()
    if "pixel_values_videos" in inputs:  # of three prompts the second one has the image
        del inputs["pixel_values_videos"]
    else:
        inputs |= {n: inputs[n][1:2] for n in pictures}
    with METHODS[name][0].applied(model), torch.no_grad():
        first, _, past = generate(model, inputs, new=1)
        following = second(first, inputs["attention_mask"], SAID[:1, :1])
        expected = generate(model, following, past_key_values=past)[1][:, 0]
        read = model(**inputs, use_cache=True).past_key_values
        new = following["input_ids"][:, inputs["input_ids"].shape[1] :]
        found = model(
            input_ids=new,
            attention_mask=following["attention_mask"],
            past_key_values=read,
        ).logits[:, -1]
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["visionzip", "fastv", "chain"])
def test_calls_by_hand_know_nothing_of_new_padding(name):
    """Prompts of one length, of which the second one has more to lose: the caller has no mask, and needs none."""
    model = tiny("llava")
    given = prompts(model, [[5 + i for i in range(20)], [50, 51, 52]], [1, 2])
    inputs = {
        name: x.double() if name.startswith("pixel") else x for name, x in given.items()
    }
    assert inputs["attention_mask"].all()
    with METHODS[name][0].applied(model), torch.no_grad():
        tokens, expected, past = generate(model, inputs)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        following = second(tokens, inputs["attention_mask"], said=torch.ones_like(new))
        later = generate(model, following, past_key_values=past)[1]
        cache = model(**inputs, use_cache=True).past_key_values
        found = [
            model(input_ids=its[:, None], past_key_values=cache).logits[:, -1]
            for its in new.T
        ]
        again = generate(model, following, past_key_values=cache)[1]
    torch.testing.assert_close(
        torch.stack(found[:-1], 1).float(), expected[:, 1:].float(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(again.float(), later.float(), atol=1e-5, rtol=0)


def test_a_prompt_may_be_read_in_chunks():
    model = tiny("llava")
    inputs = ask(model)
    if Version(transformers.__version__) < Version(
        "5.23"
    ):  # it forgets the images, with any model
        with (
            VisionZip(tokens=6).applied(model),
            pytest.raises(ValueError, match="places of images"),
        ):
            generate(model, inputs, prefill_chunk_size=5)
        return
    with VisionZip(tokens=6).applied(model):
        whole, _, past = generate(model, inputs)
        parts, _, cache = generate(model, inputs, prefill_chunk_size=5)
        assert torch.equal(parts, whole)
        following = second(whole, inputs["attention_mask"])
        expected = generate(model, following, past_key_values=past)[1]
        torch.testing.assert_close(
            generate(model, following, past_key_values=cache)[1],
            expected,
            atol=1e-5,
            rtol=0,
        )


def test_no_trace_is_left(model, name):
    """Neither on the model, nor of a cache that the caller has let go."""
    inputs = ask(model)
    generate(model, inputs)  # transformers notes things on a model at its first call
    before = snapshot(model)
    with METHODS[name][0].applied(model):
        first, _, past = generate(model, inputs)
        past = generate(
            model, second(first, inputs["attention_mask"]), past_key_values=past
        )[2]
        held = weakref.ref(past)
        del past
        gc.collect()
        assert held() is None
    assert snapshot(model) == before


class TestRefusals:
    """Of what would be answered wrongly; llava stands for all families, the vision stage refuses before the decoder."""

    @pytest.fixture
    def begun(self):
        model = tiny("llava")
        inputs = ask(model)
        with VisionZip(tokens=6).applied(model):
            first, _, past = generate(model, inputs)
            yield model, inputs, second(first, inputs["attention_mask"]), past

    def refused(self, begun, match, **changes):
        model, _, following, past = begun
        with pytest.raises(ValueError, match=match):
            generate(model, {**following, "past_key_values": past, **changes})

    def test_another_prompt(self, begun):
        ids = begun[2]["input_ids"].clone()
        ids[0, -10] += 1
        self.refused(begun, "begin with the prompt", input_ids=ids)

    def test_the_new_ids_alone(self, begun):
        self.refused(begun, "begin with the prompt", input_ids=NEXT)

    def test_a_new_picture(self, begun):
        ids = begun[2]["input_ids"].clone()
        ids[0, -1] = IMAGE
        self.refused(begun, "a picture in a later turn", input_ids=ids)

    def test_no_mask_of_several_prompts(self, begun):
        self.refused(begun, "attention_mask=None with 3 prompts", attention_mask=None)

    def test_a_cache_cropped_into_the_prompt(self, begun):
        begun[3].crop(-8)
        self.refused(begun, "cropped into the prompt")

    def test_beams(self, begun):
        model, inputs, following, _ = begun
        past = generate(model, inputs, num_beams=2)[2]
        self.refused((model, inputs, following, past), "6 rows of 3 prompts")

    @pytest.mark.parametrize("method", ["visionzip", "fastv"])
    def test_several_answers_to_a_later_turn(self, method):
        model = tiny("llava")
        inputs = ask(model)
        with METHODS[method][0].applied(model):
            first, _, past = generate(model, inputs)
            following = second(first, inputs["attention_mask"])
            with pytest.raises(ValueError, match="num_beams=2: a later turn"):
                generate(model, following, past_key_values=past, num_beams=2)

    def test_padding_on_the_right(self):
        model = tiny("llava")
        inputs = ask(model)
        for row, count in enumerate((~inputs["attention_mask"].bool()).sum(1).tolist()):
            for its in ("input_ids", "attention_mask"):
                inputs[its][row] = inputs[its][row].roll(-count)
        with VisionZip(tokens=6).applied(model):
            first, _, past = generate(model, inputs)
            with pytest.raises(ValueError, match="padded on the left"):
                generate(
                    model, second(first, inputs["attention_mask"]), past_key_values=past
                )

    def test_a_cache_of_another_block(self):
        model = tiny("llava")
        inputs = ask(model)
        first, _, past = generate(model, inputs)
        with (
            VisionZip(tokens=6).applied(model),
            pytest.raises(ValueError, match="not begun with this prompt"),
        ):
            generate(
                model, second(first, inputs["attention_mask"]), past_key_values=past
            )

    def test_a_new_picture_for_a_method_in_the_decoder(self):
        model = tiny("llava")
        inputs = ask(model)
        with FastV(keep=7).applied(model):
            first, _, past = generate(model, inputs)
            following = second(
                first, inputs["attention_mask"], asked=torch.full_like(NEXT, IMAGE)
            )
            with pytest.raises(ValueError, match="another image"):
                generate(model, following, past_key_values=past)


def test_a_failed_prompt_is_nobodys_first_turn(monkeypatch):
    """What is read next, a text, is not taken for it."""
    model = tiny("llava")
    inputs, text = (
        ask(model),
        {
            "input_ids": torch.tensor([[1, 5, 6]]),
            "attention_mask": torch.ones(1, 3).long(),
        },
    )
    with VisionZip(tokens=6).applied(model), torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(
                model.model.language_model.layers[0],
                "forward",
                lambda *args, **kwargs: 1 / 0,
            )
            for call in (partial(model.generate, max_new_tokens=2), model):
                with pytest.raises(ZeroDivisionError):
                    call(**inputs)
        first, _, past = generate(model, text)
        more = {
            "input_ids": torch.cat([first, torch.tensor([[7, 8]])], 1),
            "past_key_values": past,
        }
        generate(model, more)
