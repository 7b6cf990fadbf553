"""Mini-Gemini: checkpoints in the official layout, made up here, converted, and held against plain arithmetic."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import Watched, mini_gemini, prompts
from transformers import AutoTokenizer, LlamaTokenizer

from zipeval import cli, models
from zipeval.checkpoints.placement import Placement
from zipeval.checkpoints.prompts import TEMPLATES
from zipeval.cli import compose
from zipeval.config.schema import ModelConfig
from zipeval.engine.vision import reduced_inputs
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.methods.uniform import Uniform
from zipeval.models import EMBEDDED
from zipeval.models import _convert as convert

CPU = Placement("cpu", "float32", "sdpa")
WIDTH, PATCH, SIDE, DEPTH = 128, 8, 4, 3  # of CLIP: two heads of 64
DIMS, BLOCKS = [8, 12, 16, 24], [1, 2, 1, 1]  # of the ConvNeXt
HIDDEN, LAYERS, VOCABULARY = 48, 2, 440  # of the decoder
SIZE_AUX = 80  # 5 x 5 features of 4 pixels to each of 4 x 4 patches


# ------------------------------------------------------------------------------------- the official layout, made up


def clip_shapes():
    yield "embeddings.class_embedding", (WIDTH,)
    yield "embeddings.patch_embedding.weight", (WIDTH, 3, PATCH, PATCH)
    yield "embeddings.position_embedding.weight", (SIDE**2 + 1, WIDTH)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield from linear(norm, WIDTH)
    for layer in range(DEPTH):
        name = f"encoder.layers.{layer}"
        for part in "qkv":
            yield from linear(f"{name}.self_attn.{part}_proj", WIDTH, WIDTH)
        yield from linear(f"{name}.self_attn.out_proj", WIDTH, WIDTH)
        yield from linear(f"{name}.layer_norm1", WIDTH)
        yield from linear(f"{name}.layer_norm2", WIDTH)
        yield from linear(f"{name}.mlp.fc1", 2 * WIDTH, WIDTH)
        yield from linear(f"{name}.mlp.fc2", WIDTH, 2 * WIDTH)


def convnext_shapes(stem="stem", stages="stages"):
    yield from linear(f"{stem}.0", DIMS[0], 3, 4, 4)
    yield from linear(f"{stem}.1", DIMS[0])
    for stage, (dim, blocks) in enumerate(zip(DIMS, BLOCKS, strict=True)):
        if stage:
            yield from linear(f"{stages}.{stage}.downsample.0", DIMS[stage - 1])
            yield from linear(
                f"{stages}.{stage}.downsample.1", dim, DIMS[stage - 1], 2, 2
            )
        for block in range(blocks):
            name = f"{stages}.{stage}.blocks.{block}"
            yield f"{name}.gamma", (dim,)
            yield from linear(f"{name}.conv_dw", dim, 1, 7, 7)
            yield from linear(f"{name}.norm", dim)
            yield from linear(f"{name}.mlp.fc1", 4 * dim, dim)
            yield from linear(f"{name}.mlp.fc2", dim, 4 * dim)


def linear(name, *shape):
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def official_shapes(decoder):
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    if decoder == "llama":  # Gemma's is tied to its embeddings
        yield "lm_head.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part in "qkvo":
            yield f"{name}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{name}.self_attn.rotary_emb.inv_freq", (HIDDEN // 8,)
        for part, shape in (
            ("gate", (96, HIDDEN)),
            ("up", (96, HIDDEN)),
            ("down", (HIDDEN, 96)),
        ):
            yield f"{name}.mlp.{part}_proj.weight", shape
        for norm in ("input", "post_attention"):
            yield f"{name}.{norm}_layernorm.weight", (HIDDEN,)
    yield from linear("model.mm_projector.0", HIDDEN, WIDTH)
    yield from linear("model.mm_projector.2", HIDDEN, HIDDEN)
    for part, width in (("query", WIDTH), ("aux", sum(DIMS)), ("val", sum(DIMS))):
        yield from linear(f"model.vlm_uni_{part}_projector.0", width)
        yield from linear(f"model.vlm_uni_{part}_projector.1", WIDTH, width)


def drawn(shapes):
    """Random weights under which nothing explodes, vanishes, or is close to what training starts from."""
    for name, shape in shapes:
        scale = 0.3 if len(shape) == 1 else 1.5 * math.prod(shape[1:]) ** -0.5
        weight = scale * torch.randn(shape)
        yield name, weight + (len(shape) == 1 and name.endswith("weight"))


def official(path, decoder="llama", grid=1, apart=False):
    """(SRC, the towers' directories if they are to be apart, all weights by their official names)."""
    torch.manual_seed(grid)
    source = path / "official"
    shutil.copytree(
        EMBEDDED / "tiny_llava",
        source,
        ignore=shutil.ignore_patterns("*.safetensors", "proc*", "*.jinja"),
    )
    file = source / "tokenizer.json"  # as that of a language model
    file.write_text(file.read_text().replace("<image>", "<other>"))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer.pop("image_token")
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = {
        "model_type": {"llama": "mgm", "gemma": "mgm_gemma"}[decoder],
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": HIDDEN // 4,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float32",
        "mm_hidden_size": WIDTH,
        "mm_hidden_size_aux": sum(DIMS),
        "mm_vision_tower": "model_zoo/clip",
        "mm_vision_tower_aux": "model_zoo/convnext",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "image_size_aux": SIZE_AUX * grid,
        "image_grid": grid,
        "image_global": grid > 1,
    }
    (source / "config.json").write_text(json.dumps(config))
    clip, convnext = dict(drawn(clip_shapes())), dict(drawn(convnext_shapes()))
    weights = dict(drawn(official_shapes(decoder)))
    towers = {
        f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in clip.items()
    }
    towers |= {f"model.vision_tower_aux.vision_{k}": v for k, v in convnext.items()}
    options = {}
    if apart:
        contents = {
            "vision_tower": {
                **{f"vision_model.{k}": v for k, v in clip.items()},
                "vision_model.embeddings.position_ids": torch.arange(SIDE**2 + 1),
                "text_model.final_layer_norm.weight": torch.zeros(4),
                "logit_scale": torch.zeros(1),
            },
            "vision_tower_aux": {
                **{f"visual.trunk.{k}": v for k, v in convnext.items()},
                "visual.trunk.head.norm.weight": torch.zeros(4),
                "visual.head.mlp.fc1.weight": torch.zeros(4),
                "transformer.resblocks.0.ln_1.weight": torch.zeros(4),
                "token_embedding.weight": torch.zeros(4),
            },
        }
        for name, tensors in contents.items():
            options[name] = path / name
            options[name].mkdir()
            save_file(tensors, options[name] / "model.safetensors")
    else:
        weights |= towers
    names = sorted(weights)
    for shard, some in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in some}, source / f"model-{shard}.safetensors")
    return source, options, weights | towers


@pytest.fixture(
    params=[("llama", 1, False), ("llama", 2, True), ("gemma", 1, True)],
    ids="{0[0]}-{0[1]}".format,
)
def converted(request, tmp_path):
    """(DST, official weights, official config)."""
    decoder, grid, apart = request.param
    source, options, weights = official(tmp_path, decoder, grid, apart)
    convert.mini_gemini(source, tmp_path / "made", **options)
    return tmp_path / "made", weights, json.loads((source / "config.json").read_text())


# ---------------------------------------------------------------------- the architecture, spelled out, by those names


def bilinear(image, size):
    """(C, h, h) -> (C, size, size): between the centres of the pixels on either side, the border repeated."""
    old = image.shape[-1]
    weight = torch.zeros(size, old, dtype=image.dtype)
    for i in range(size):
        at = max((i + 0.5) * old / size - 0.5, 0)
        left = min(math.floor(at), old - 1)
        weight[i, left] += 1 - (at - left)
        weight[i, min(left + 1, old - 1)] += at - left
    return weight @ image @ weight.T


class Plain:
    """One image at a time, loops over patches."""

    def __init__(self, weights, config):
        self.weights, self.config = weights, config

    def __call__(self, image):
        """(3, S, S) -> (visual tokens, HIDDEN)."""
        grid, side = self.config["image_grid"], PATCH * SIDE
        high = self.convnext(image)
        if grid == 1:
            crops = [(bilinear(image, side), high)]
        else:
            large = bilinear(image, 2 * side)
            half = high.shape[-1] // 2
            crops = [(bilinear(large, side), bilinear(high, half))]
            for row in range(2):
                for column in range(2):
                    low = large[
                        :,
                        row * side : (row + 1) * side,
                        column * side : (column + 1) * side,
                    ]
                    part = high[
                        :,
                        row * half : (row + 1) * half,
                        column * half : (column + 1) * half,
                    ]
                    crops.append((low, part))
        mined = torch.cat([self.mined(self.clip(low), high) for low, high in crops])
        visual = self.linear(
            "model.mm_projector.2", F.gelu(self.linear("model.mm_projector.0", mined))
        )
        return (
            visual * HIDDEN**0.5 if self.config["model_type"] == "mgm_gemma" else visual
        )

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x, eps=1e-5):
        """Over the last dimension."""
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def mined(self, tokens, high):
        rows = []
        n = high.shape[-1] // SIDE
        for place, token in enumerate(tokens):
            row, column = divmod(place, SIDE)
            part = high[:, row * n : (row + 1) * n, column * n : (column + 1) * n]
            part = torch.stack([part[:, i, j] for i in range(n) for j in range(n)])
            query, key, value = (
                self.linear(
                    f"model.vlm_uni_{name}_projector.1",
                    self.norm(f"model.vlm_uni_{name}_projector.0", x),
                )
                for name, x in (("query", token), ("aux", part), ("val", part))
            )
            shares = (key @ query / WIDTH**0.5).softmax(0)
            rows.append(token + shares @ value)
        return torch.stack(rows)

    def clip(self, image):
        """(3, s, s) -> (patches, WIDTH): what enters the last layer, without CLS."""
        where = "model.vision_tower.vision_tower.vision_model"
        patches = F.conv2d(
            image[None],
            self.weights[f"{where}.embeddings.patch_embedding.weight"],
            stride=PATCH,
        )[0]
        x = torch.cat(
            [
                self.weights[f"{where}.embeddings.class_embedding"][None],
                patches.flatten(1).T,
            ]
        )
        x = self.norm(
            f"{where}.pre_layrnorm",
            x + self.weights[f"{where}.embeddings.position_embedding.weight"],
        )
        for layer in range(DEPTH - 1):
            name = f"{where}.encoder.layers.{layer}"
            h = self.norm(f"{name}.layer_norm1", x)
            q, k, v = (
                self.linear(f"{name}.self_attn.{part}_proj", h).split(64, -1)
                for part in "qkv"
            )
            heads = [
                (a @ b.T / 8).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)
            ]
            x = x + self.linear(f"{name}.self_attn.out_proj", torch.cat(heads, -1))
            h = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", h * (1.702 * h).sigmoid())
        return x[1:]

    def convnext(self, image):
        """(3, S, S) -> (sum(DIMS), S / 4, S / 4): after every stage, all of the first one's size."""
        where = "model.vision_tower_aux.vision"
        x, stages = (
            self.over_channels(
                f"{where}_stem.1", self.conv(f"{where}_stem.0", image, stride=4)
            ),
            [],
        )
        for stage, blocks in enumerate(BLOCKS):
            name = f"{where}_stages.{stage}"
            if stage:
                x = self.conv(
                    f"{name}.downsample.1",
                    self.over_channels(f"{name}.downsample.0", x),
                    stride=2,
                )
            for block in range(blocks):
                part = f"{name}.blocks.{block}"
                h = self.conv(f"{part}.conv_dw", x, padding=3, groups=len(x)).permute(
                    1, 2, 0
                )
                h = F.gelu(
                    self.linear(f"{part}.mlp.fc1", self.norm(f"{part}.norm", h, 1e-6))
                )
                h = self.linear(f"{part}.mlp.fc2", h) * self.weights[f"{part}.gamma"]
                x = x + h.permute(2, 0, 1)
            stages.append(x)
        return torch.cat([bilinear(stage, stages[0].shape[-1]) for stage in stages])

    def conv(self, name, x, **options):
        return F.conv2d(
            x[None],
            self.weights[f"{name}.weight"],
            self.weights[f"{name}.bias"],
            **options,
        )[0]

    def over_channels(self, name, x):
        return self.norm(name, x.permute(1, 2, 0), 1e-6).permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------- the tests


def load(path):
    found = models.find(
        ModelConfig(name="mini_gemini", family="mini_gemini", path=str(path))
    )
    return models.load("mini_gemini", found, CPU)


@torch.no_grad()
def test_visual_tokens_are_those_of_the_architecture(converted):
    path, weights, config = converted
    model = load(path)[0].double()
    plain = Plain({name: weight.double() for name, weight in weights.items()}, config)
    pixels = torch.randn(
        2, 3, config["image_size_aux"], config["image_size_aux"]
    ).double()
    features = model.get_image_features(pixels, return_dict=True).pooler_output
    for image, actual in zip(pixels, features, strict=True):
        torch.testing.assert_close(actual, plain(image), atol=1e-5, rtol=1e-5)


def test_the_decoder_is_taken_over(converted):
    """Names, shapes and settings; how it computes is transformers' own matter."""
    path, weights, config = converted
    model, _ = load(path)
    ours = dict(model.model.language_model.named_parameters())
    for name, weight in ours.items():
        assert torch.equal(weight[:VOCABULARY], weights[f"model.{name}"])
    assert len(ours) == 2 + 9 * LAYERS
    settings = model.config.text_config
    assert settings.rope_parameters["rope_theta"] == 5000.0
    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "head_dim",
    ):
        assert getattr(settings, name) == config[name]
    tied = config["model_type"] == "mgm_gemma"
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(model.lm_head.weight[:VOCABULARY], head)
    assert (
        model.lm_head.weight is model.model.language_model.embed_tokens.weight
    ) == tied


def test_the_image_token_is_new_and_never_the_answer(converted):
    path, weights, _ = converted
    model, processor = load(path)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_id == token == VOCABULARY
    rows = model.model.language_model.embed_tokens.weight
    assert len(rows) == VOCABULARY + 1
    torch.testing.assert_close(
        rows[token], weights["model.embed_tokens.weight"].mean(0)
    )
    logits = model.lm_head(torch.randn(1000, HIDDEN))
    assert (logits.argmax(-1) != token).all()


PROMPTS = {
    "mgm": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT:",
    "mgm_gemma": "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\n",
}


def test_every_token_of_the_tokenizer_has_a_row(tmp_path):
    """Also where it brings more of them than the language model was trained with."""
    source, options, _ = official(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny_llava")
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(source)
    convert.mini_gemini(source, tmp_path / "made", **options)
    model, processor = load(tmp_path / "made")
    assert processor.tokenizer.pad_token_id == VOCABULARY
    assert model.config.image_token_id == 4
    assert (
        len(model.lm_head.weight)
        == len(model.get_input_embeddings().weight)
        == VOCABULARY + 1
    )


def test_prompts_and_placeholders(converted):
    path, _, config = converted
    model, processor = load(path)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == PROMPTS[config["model_type"]]
    inputs = processor(
        text=[text] * 2, images=[Image.new("RGB", (30, 50))] * 2, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (
        2,
        3,
        config["image_size_aux"],
        config["image_size_aux"],
    )
    crops = 5 if config["image_grid"] == 2 else 1
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [
        SIDE**2 * crops
    ] * 2


@pytest.mark.parametrize(
    "decoder, grid, model",
    [("llama", 1, "gemini"), ("llama", 2, "gemini_hd"), ("gemma", 1, "gemini_2b")],
)
def test_the_model_that_is_named_asks_in_the_checkpoints_own_conversation(
    decoder, grid, model, tmp_path
):
    source, options, _ = official(tmp_path, decoder, grid)
    named = convert.mini_gemini(source, tmp_path / "made", **options)
    assert named == f"mini_{model}"
    session = Session(compose([f"model={named}", f"model.path={tmp_path / 'made'}"]))
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    template = TEMPLATES[session.config.model.prompt]
    text = session.load()[1].apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=template,
        add_generation_prompt=True,
    )
    assert text == PROMPTS["mgm_gemma" if decoder == "gemma" else "mgm"]


def test_a_space_is_put_before_the_text_behind_an_image(tmp_path):
    """Llama's tokenizers; official code encodes it apart."""
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"<0x{i:02X}>": i + 3 for i in range(256)},
        "▁": 259,
        "a": 260,
    }
    LlamaTokenizer(vocab=vocabulary, merges=[], legacy=False).save_pretrained(tmp_path)
    source, options, _ = official(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(tmp_path / file, source / file)
    convert.mini_gemini(source, tmp_path / "made", **options)
    tokenizer = load(tmp_path / "made")[1].tokenizer
    assert tokenizer.tokenize("a: <image>\na") == [
        "▁",
        "a",
        "<0x3A>",
        "▁",
        "<image>",
        "▁",
        "<0x0A>",
        "a",
    ]


@pytest.mark.parametrize("grid", [1, 2])
def test_the_converted_checkpoint_runs(grid, tmp_path):
    source, _, _ = official(tmp_path, grid=grid)
    arguments = [
        "zipeval",
        "convert",
        "mini_gemini",
        str(source),
        str(tmp_path / "made"),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", arguments)
        cli.main()
    (path,) = run(
        compose(
            [
                "model=mini_gemini",
                f"model.path={tmp_path / 'made'}",
                f"results={tmp_path}",
                "limit=2",
                "suite=shapes",
            ]
        )
    )
    record = json.loads(path.read_text())
    assert (
        record["visual_tokens"]["entering"]
        == [SIDE**2 * (5 if grid == 2 else 1)] * LAYERS
    )


def test_shards_are_written_one_by_one(tmp_path, monkeypatch):
    source, options, _ = official(tmp_path)
    convert.mini_gemini(source, tmp_path / "whole", **options)
    monkeypatch.setattr(convert, "SHARD", "300KB")
    convert.mini_gemini(source, tmp_path / "shards", **options)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = (
        load(tmp_path / name)[0].state_dict() for name in ("whole", "shards")
    )
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


# ----------------------------------------------------------------------------------------------------------- refusals


def edit(change):
    """Of the weights of the shard that GONE is in."""

    def damage(source):
        file = next(f for f in source.glob("*.safetensors") if GONE in load_file(f))
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return damage


def pickle(source):
    for file in source.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def truncate(source):
    file = source / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def set_config(**settings):
    def damage(source):
        file = source / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return damage


def lose_a_shard(source):
    (source / "model-1.safetensors").unlink()


GONE = "model.vision_tower_aux.vision_stages.1.blocks.1.norm.bias"


@pytest.mark.parametrize(
    "damage, named",
    [
        (edit(lambda w: w.pop(GONE)), rf"1 missing \({GONE}\)"),
        (
            edit(lambda w: w.update({"model.layers.9.x": torch.ones(1)})),
            r"1 unexpected \(model\.layers\.9\.x\)",
        ),
        (
            edit(lambda w: w.update({GONE: torch.ones(3)})),
            rf"1 of another shape \({GONE}\)",
        ),
        (lose_a_shard, r"missing"),
        (pickle, r"model-.\.bin is pickled.*weights_only=True"),
        (truncate, r"model-1\.safetensors is damaged"),
        (
            lambda source: (source / "config.json").write_text("[]"),
            r"config\.json cannot be read",
        ),
        (
            lambda source: (source / "config.json").unlink(),
            r"config\.json cannot be read",
        ),
        (
            lambda source: (source / "tokenizer.json").write_text("{}"),
            r"its tokenizer cannot be loaded",
        ),
        (set_config(model_type="llava"), r"'llava' checkpoint"),
        (set_config(mm_projector_type="linear"), r"mm_projector_type='linear'"),
        (set_config(image_grid=2), r"image_global=False"),
        (set_config(image_size_aux=84), r"image_size_aux=84"),
        (set_config(image_grid="2"), r"image_grid='2', which is no whole number"),
    ],
    ids=range(14),
)
def test_a_bad_source_is_refused(damage, named, tmp_path):
    source, options, _ = official(tmp_path)
    damage(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=named):
        convert.mini_gemini(source, tmp_path / "made", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, monkeypatch):
    source, options, _ = official(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(convert, "save_file", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.mini_gemini(source, tmp_path / "made", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_towers_are_asked_for_once(tmp_path):
    source, options, _ = official(tmp_path, apart=True)
    clip = options.pop("vision_tower")
    with pytest.raises(UsageError, match=r"without model_zoo/clip.*vision_tower=DIR"):
        convert.mini_gemini(source, tmp_path / "made", **options)
    with pytest.raises(UsageError, match=r"missing.*vision_model"):
        convert.mini_gemini(
            source,
            tmp_path / "made",
            vision_tower=options["vision_tower_aux"],
            vision_tower_aux=clip,
        )
    convert.mini_gemini(source, tmp_path / "made", vision_tower=clip, **options)
    with pytest.raises(UsageError, match=r"made exists"):
        convert.mini_gemini(source, tmp_path / "made", vision_tower=clip, **options)
    (tmp_path / "other").mkdir()
    source, _, _ = official(tmp_path / "other")
    with pytest.raises(UsageError, match=r"has its own.*Leave vision_tower= out"):
        convert.mini_gemini(source, tmp_path / "new", vision_tower=clip)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "say what, from and to where"),
        (["llava", "a", "b"], "say what, from and to where"),
        (["mini_gemini", "a"], "say what, from and to where"),
        (["mini_gemini", "/nowhere", "b"], "/nowhere: no such directory"),
        (
            ["mini_gemini", ".", "b", "vision_tower=/nowhere"],
            "/nowhere: no such directory",
        ),
        (
            ["mini_gemini", ".", "b", "vision_towr=."],
            "vision_towr: no such setting.*Did you mean vision_tower",
        ),
    ],
)
def test_a_bad_command_line_is_refused(arguments, named):
    with pytest.raises(UsageError, match=named):
        cli.convert(arguments)


def test_without_a_checkpoint_one_sentence_says_how_to_get_it():
    with pytest.raises(
        UsageError,
        match=r"model=mini_gemini: it names no weights.*zipeval convert mini_gemini SRC DST",
    ):
        models.find(compose(["model=mini_gemini"]).model)


# ----------------------------------------------------------------------------------------------------- the model class


@torch.no_grad()
def test_mining_nothing_is_plain_llava():
    """The stand-in, on the pixels that its CLIP sees."""
    session = Session(compose(["model=tiny_gemini"]))
    model, _ = session.load()
    content = [
        {"type": "image", "url": Image.effect_noise((96, 96), 90)},
        {"type": "text", "text": "What color?"},
    ]
    inputs = session.inputs([[{"role": "user", "content": content}]])
    mined = model(**inputs).logits
    seen = model.model.low_resolution(inputs.pop("pixel_values"))
    llava, _ = Session(compose(["model=tiny_llava"])).load()
    assert torch.equal(mined, llava(**inputs, pixel_values=seen).logits)


@torch.no_grad()
def test_crops_are_rows_of_encoder_and_projector():
    """Image by image, the whole before its tiles: what reduction relies on."""
    model = mini_gemini(grid=2)
    base, seen = model.model, []
    pixels = torch.randn(3, 3, 192, 192)
    base.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    alone = [
        base.get_image_features(image[None], return_dict=True).pooler_output[0]
        for image in pixels
    ]
    together = base.get_image_features(pixels, return_dict=True).pooler_output
    assert [tuple(x.shape) for x in seen] == [(5, 36, 32)] * 3 + [(15, 36, 32)]
    torch.testing.assert_close(seen[-1], torch.cat(seen[:-1]))
    torch.testing.assert_close(together, alone)
    low = base.low_resolution(pixels)
    assert low.shape == (15, 3, 84, 84)
    tiles = low.unflatten(0, (3, 5))[:, 1:]
    large = torch.cat(
        [
            torch.cat([tiles[:, 0], tiles[:, 1]], -1),
            torch.cat([tiles[:, 2], tiles[:, 3]], -1),
        ],
        -2,
    )
    torch.testing.assert_close(
        large, F.interpolate(pixels, size=(168, 168), mode="bilinear")
    )


@pytest.mark.parametrize("decoder", ["llama", "gemma"])
@pytest.mark.parametrize("grid", [1, 2])
@torch.no_grad()
def test_what_is_kept_is_as_it_was(grid, decoder):
    """Some patches of every crop: what the whole model makes of it, in its place."""
    model = mini_gemini(grid=grid, decoder=decoder)
    inputs = prompts(model, [[5, 6]], [2])
    every = model.get_image_features(
        inputs["pixel_values"], return_dict=True
    ).pooler_output
    crops = 5 if grid == 2 else 1
    method = Watched(Uniform(tokens=4))
    features = reduced_inputs(model, inputs, method)["mm_encoder_outputs"][
        "image"
    ].pooler_output
    kept = (method.reduced.kept - 1).unflatten(0, (2, crops))
    assert kept.shape == (2, crops, 4)
    for image, positions in enumerate(kept):
        rows = (positions + 36 * torch.arange(crops)[:, None]).flatten()
        torch.testing.assert_close(features[image], every[image][rows])


@pytest.mark.parametrize("grid, counts", [(1, 36), (2, 180)])
@torch.no_grad()
def test_greedy_answers_to_two_images(grid, counts):
    model = mini_gemini(grid=grid).double()
    pixels = torch.randn(2, 3, 96 * grid, 96 * grid).double()
    image = [98] * counts
    ids = torch.tensor([[1, *image, 5, 9, 11], [0, 1, *image, 7, 8]])
    mask = (ids > 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [98]}
    together = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, **options
    )
    for row, start in enumerate((0, 1)):
        so_far = ids[row : row + 1, start:]
        for _ in range(8):  # without a cache
            logits = model(input_ids=so_far, pixel_values=pixels[row : row + 1]).logits[
                :, -1
            ]
            logits[:, 98] = float("-inf")
            so_far = torch.cat([so_far, logits.argmax(-1, keepdim=True)], 1)
        assert together[row, start:].tolist() == so_far[0].tolist()
    other = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels.flip(0), **options
    )
    assert not torch.equal(other, together)


@pytest.mark.parametrize("grid", [1, 2])
@torch.no_grad()
def test_half_precision(grid):
    model = mini_gemini(grid=grid, gain=1.0)
    pixels = torch.randn(1, 3, 96 * grid, 96 * grid)
    exact = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    half = (
        model.bfloat16()
        .get_image_features(pixels.bfloat16(), return_dict=True)
        .pooler_output[0]
    )
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_cls_cannot_be_mined():
    with pytest.raises(ValueError, match="CLS cannot be mined"):
        mini_gemini().get_image_features(
            torch.randn(1, 3, 96, 96), vision_feature_select_strategy="full"
        )


def test_its_names_are_the_same_wherever_they_are_written():
    """What imports no torch cannot read them of the architecture, nor a schema those of the templates."""
    from zipeval.config import schema
    from zipeval.models import _mini_gemini, mini_gemini

    assert _mini_gemini.MiniGeminiConfig.model_type == mini_gemini.MODEL_TYPE
    assert tuple(TEMPLATES) == schema.PROMPTS
