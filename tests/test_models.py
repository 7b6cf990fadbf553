"""Checkpoints are checked before they are loaded."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from zipeval import models
from zipeval.checkpoints.placement import Placement, check_memory, machine, place
from zipeval.cli import compose
from zipeval.config.schema import ModelConfig
from zipeval.errors import UsageError
from zipeval.inference.session import Session
from zipeval.models import EMBEDDED

CPU = Placement("cpu", "float32", "sdpa")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return tiny.save_llava15(tmp_path_factory.mktemp("checkpoint") / "llava")


@pytest.fixture
def checkpoint(pristine, tmp_path):
    """A copy to damage, and the config that names it."""
    path = shutil.copytree(pristine, tmp_path / "copy")
    return path, ModelConfig(
        name="llava15", family="llava", hub="llava-hf/llava-1.5-7b-hf", path=str(path)
    )


def test_a_local_directory_is_found(checkpoint, pristine):
    path, config = checkpoint
    found = models.find(config)
    assert (found.path, found.visual_tokens) == (path, 576)
    assert (
        found.fingerprint
        == models.find(ModelConfig(family="llava", path=str(pristine))).fingerprint
    )


def test_prompts_are_padded_on_the_left_whatever_the_checkpoint_says(checkpoint):
    path, config = checkpoint
    for file in ("tokenizer_config.json", "processor_config.json"):
        settings = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(settings | {"padding_side": "right"}))
    _, processor = models.load("llava", models.find(config), place(config))
    assert processor.tokenizer.padding_side == "left"


def test_other_weights_have_another_fingerprint(checkpoint):
    path, config = checkpoint
    before = models.find(config).fingerprint
    weights = load_file(path / "model.safetensors")
    name = next(n for n in weights if n.endswith("mlp.down_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert models.find(config).fingerprint != before


@pytest.fixture(scope="module")
def large(pristine, tmp_path_factory):
    """A checkpoint of 12 matrices of 8 MiB in two shards, with an index, and all files that may be beside them."""
    path = shutil.copytree(pristine, tmp_path_factory.mktemp("large") / "checkpoint")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(2):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        weights = {
            f"model.layers.{shard * 6 + n}.q_proj.weight": torch.ones(1448, 1448)
            for n in range(6)
        }
        save_file(weights, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    for name in (
        "modeling.py",
        "merges.txt",
        "tokenizer.model",
        "additional_chat_templates/tool.jinja",
        "README.md",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("1")
    return path


def fingerprint(path):
    return models.find(ModelConfig(family="llava", path=str(path))).fingerprint


def merge_lora(path):
    """Change one of the matrices in each shard a little, as a merged adapter does."""
    for file in path.glob("*.safetensors"):
        weights = load_file(file)
        name = sorted(weights)[1]
        weights[name] += 1e-3 * torch.ones(1448, 1) @ torch.ones(1, 1448)
        save_file(weights, file, metadata={"format": "pt"})


def exchange_shards(path):
    """The same bytes under each other's names."""
    first, second = sorted(path.glob("*.safetensors"))
    first.rename(path / "first")
    second.rename(first)
    (path / "first").rename(second)


def write(name, content="2"):
    return lambda path: (path / name).write_text(content)


ANSWERS_CHANGE = {
    "merged LoRA": merge_lora,
    "shards": exchange_shards,
    "code": write("modeling.py"),
    "more code": write("processing.py"),
    "merges": write("merges.txt"),
    "tokenizer": write("tokenizer.model"),
    "template": write("additional_chat_templates/tool.jinja"),
    "first template": write("chat_template.jinja"),
    "generation": write("generation_config.json", "{}"),
    "adapter": write("adapter_config.json", "{}"),
}
ANSWERS_STAY = {
    "README": write("README.md"),
    "license": write("LICENSE.txt"),
    "hidden": write(".gitattributes"),
    "training": write("trainer_state.json", "{}"),
    "optimizer": write("optimizer.pt"),
    "other format": write("pytorch_model.bin"),
    "touched": lambda path: os.utime(path / "config.json"),
}


@pytest.mark.parametrize("change", ANSWERS_CHANGE.values(), ids=ANSWERS_CHANGE)
def test_what_can_change_an_answer_is_another_checkpoint(change, large, tmp_path):
    path = shutil.copytree(large, tmp_path / "copy")
    assert fingerprint(path) == fingerprint(large)  # wherever it lies
    change(path)
    assert fingerprint(path) != fingerprint(large)


@pytest.mark.parametrize("change", ANSWERS_STAY.values(), ids=ANSWERS_STAY)
def test_what_cannot_is_the_same_one(change, large, tmp_path):
    path = shutil.copytree(large, tmp_path / "copy")
    change(path)
    assert fingerprint(path) == fingerprint(large)


def test_any_single_tensor_is_another_checkpoint(large, tmp_path):
    path = shutil.copytree(large, tmp_path / "copy")
    seen = {fingerprint(path)}
    tensors = json.loads((path / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    for name, file in tensors.items():
        with (path / file).open("r+b") as stream:
            length = int.from_bytes(stream.read(8), "little")
            start, end = json.loads(stream.read(length))[name]["data_offsets"]
            stream.seek(8 + length + (start + end) // 2)
            stream.write(b"\x42")
        seen.add(fingerprint(path))
    assert len(seen) == 1 + len(tensors)


def test_a_snapshot_of_links_to_blobs_is_known_by_content(large, tmp_path):
    """As in the Hugging Face cache. A blob may be changed where it lies, whatever it is called."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    shutil.copytree(large, snapshot)
    blobs.mkdir()
    for number, file in enumerate(
        sorted(f for f in snapshot.rglob("*") if f.is_file())
    ):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert fingerprint(snapshot) == fingerprint(large)
    merge_lora(snapshot)
    assert fingerprint(snapshot) != fingerprint(large)


def test_nothing_is_hashed_for_what_is_refused(monkeypatch):
    monkeypatch.setattr(models, "fingerprint", lambda *_: pytest.fail("it was hashed"))
    with pytest.raises(UsageError, match="tokens=999"):
        Session(compose(["method=visionzip", "tokens=999"]))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scramble(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 1000)


def empty_config(path):
    (path / "config.json").write_text("{")


def list_config(path):
    (path / "config.json").write_text("[]")


def lose_a_shard(path):
    """An index of two files of which one was not fetched."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def remove(name):
    return lambda path: (path / name).unlink()


def other_family(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))


@pytest.mark.parametrize(
    "damage, named",
    [
        (truncate, "model.safetensors is damaged.*hf download"),
        (scramble, "model.safetensors is damaged"),
        (empty_config, "config.json cannot be read"),
        (remove("config.json"), "config.json is missing"),
        (remove("tokenizer_config.json"), "tokenizer_config.json is missing"),
        (remove("tokenizer.json"), "tokenizer.json is missing"),
        (remove("processor_config.json"), "processor_config.json is missing"),
        (remove("model.safetensors"), r"no \*\.safetensors"),
        (lose_a_shard, "model-2.safetensors is damaged.*hf download"),
        (list_config, "config.json cannot be read"),
        (other_family, "qwen2_vl.*zipeval list models"),
        (shutil.rmtree, "no such directory"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_damage_is_named(checkpoint, damage, named):
    path, config = checkpoint
    damage(path)
    with pytest.raises(UsageError, match=named) as refused:
        models.find(config)
    assert f"model.path={config.path}" in str(refused.value)


def test_missing_tensors_are_not_filled_with_noise(checkpoint):
    path, config = checkpoint
    weights = load_file(path / "model.safetensors")
    gone = next(n for n in weights if n.endswith("linear_1.weight"))
    save_file(
        {k: v for k, v in weights.items() if k != gone},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = models.find(config)
    with pytest.raises(UsageError, match=r"1 tensors are missing \(.*linear_1\.weight"):
        models.load("llava", found, CPU)


def test_what_transformers_refuses_is_told_in_a_sentence(checkpoint):
    path, config = checkpoint
    (path / "tokenizer.json").write_text("{}")
    found = models.find(config)
    with pytest.raises(UsageError, match=f"{path}: transformers cannot load it"):
        models.load("llava", found, CPU)


def enlarge(path, rows):
    """Replace the weights by a sparse file: one matrix of a decoder layer with `rows` x 2^20 numbers of 2 bytes."""
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensor = {"dtype": "F16", "shape": [rows, 1 << 20], "data_offsets": [0, rows << 21]}
    header = json.dumps({name: tensor}).encode()
    file = path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, file.stat().st_size + (rows << 21))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(checkpoint):
    path, config = checkpoint
    enlarge(path, rows=1 << 20)
    config = replace(config, device="cpu", dtype="float32")
    with pytest.raises(
        UsageError,
        match=r"^model\.device=cpu: .* 4096\.0 GiB in float32, \d+\.\d GiB are",
    ) as refused:
        models.load("llava", models.find(config), place(config))
    assert "`zipeval list models`" in str(refused.value)
    assert "model.quantization" not in str(refused.value)


@pytest.mark.parametrize(
    "free, advice",
    [
        ([9, 0], ["model.quantization=4bit"]),
        ([17, 5], ["model.quantization=8bit", "model.quantization=4bit"]),
        (
            [20, 20],
            [
                "model.device_map=auto",
                "model.quantization=8bit",
                "model.quantization=4bit",
            ],
        ),
        ([1, 33], ["model.device=cuda:1", "model.device_map=auto"]),
        ([1, 2], []),
        ([33, 0], None),
    ],
    ids=str,
)
def test_too_little_memory_on_a_gpu(free, advice, checkpoint, monkeypatch):
    """32 GiB of weights in bfloat16, and what would make them fit."""
    path, config = checkpoint
    enlarge(path, rows=1 << 14)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(
        torch.cuda,
        "mem_get_info",
        lambda device: (free[torch.device(device).index] << 30, 80 << 30),
    )
    check = partial(
        check_memory, models.find(config), Placement("cuda:0", "bfloat16", "sdpa")
    )
    if advice is None:
        return check()
    with pytest.raises(
        UsageError,
        match=rf"^model\.device=cuda:0: .* 32\.0 GiB in bfloat16, {free[0]}\.0 GiB",
    ) as refused:
        check()
    assert re.findall(r"model\.\w+=[\w:]+", str(refused.value))[1:] == advice


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="asks for a CUDA device that must not exist"
)
def test_a_missing_device_is_refused():
    with pytest.raises(UsageError, match=r"model\.device=cuda:3: 0 CUDA devices"):
        place(ModelConfig(device="cuda:3"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="may have it")
def test_flash_attention_that_is_not_there_is_refused():
    with pytest.raises(
        UsageError,
        match=r"model\.attn_implementation=flash_attention_2: it is not installed",
    ):
        place(ModelConfig(attn_implementation="flash_attention_2"))


def test_a_checkpoint_of_ones_own_is_no_stand_in(tmp_path):
    """Its grids are its own, and it may be quantised."""
    tiny.llava_next(side=4).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(EMBEDDED / "tiny_llava" / name, tmp_path)
    config = compose(
        ["model=tiny_next", f"model.path={tmp_path}", "model.device_map=auto"]
    ).model
    assert models.find(config).grids == ((3, 4), (3, 8), (4, 4), (4, 12), (5, 8))


def test_placement_on_the_cpu():
    assert place(ModelConfig(device="cpu")) == CPU
    assert place(
        ModelConfig(device="cpu", dtype="bfloat16", attn_implementation="eager")
    ) == Placement("cpu", "bfloat16", "eager")


def test_the_commit_of_weights_from_the_hub_is_known(pristine, tmp_path, monkeypatch):
    """Also where none was asked for: the newest is one. A copy of the same weights elsewhere has none."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--a--b"
    shutil.copytree(pristine, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(name="b", family="llava", hub="a/b")
    found = models.find(config)
    assert found.revision == commit
    copy = models.find(replace(config, path=str(pristine)))
    assert (copy.revision, copy.fingerprint) == (None, found.fingerprint)
    assert models.find(compose(["model=tiny_llava"]).model).revision is None


def test_the_machine_is_named(tmp_path, monkeypatch):
    held = machine(CPU)
    assert (held["cuda"], held["driver"]) == (None, None)
    assert held["platform"].startswith(platform.system())
    assert held["device"]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_name",
        lambda device: f"GPU {torch.device(device).index}",
    )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu = replace(CPU, device="cuda:1")
    on_gpu = {"device": "GPU 1", "cuda": "12.8", "driver": None}  # no nvidia-smi
    assert machine(gpu) == held | on_gpu
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 570.124.06\necho 570.124.06\n")
    script.chmod(0o755)
    assert machine(gpu) == held | on_gpu | {"driver": "570.124.06"}
    script.write_text("#!/bin/sh\necho Failed to initialize NVML\nexit 9\n")
    assert machine(gpu) == held | on_gpu
    spread = replace(gpu, device="cuda:0", device_map="auto")
    assert machine(spread)["device"] == "GPU 0, GPU 1"


@pytest.mark.parametrize(
    "quantization, kind, size",
    [("8bit", "Linear8bitLt", 1), ("4bit", "Linear4bit", 0.5)],
)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_only_the_language_model_is_quantised(
    family, quantization, kind, size, checkpoint
):
    """lm_head and all before the language model keep the dtype, so that methods read what the encoder attends to."""
    pytest.importorskip("bitsandbytes")
    path, config = checkpoint
    vocabulary = json.loads((path / "config.json").read_text())["text_config"][
        "vocab_size"
    ]
    getattr(tiny, family)(24, vocabulary=vocabulary).save_pretrained(path)
    placement = place(
        replace(config, device="cpu", dtype="bfloat16", quantization=quantization)
    )
    model, _ = models.load(
        family, models.find(replace(config, family=family)), placement
    )
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = {n: m for n, m in linear.items() if type(m).__name__ == kind}
    assert quantised.keys() == {
        n for n in linear if n.startswith("model.language_model.")
    }
    assert len(linear) - len(quantised) > 10
    assert {m.weight.dtype for n, m in linear.items() if n not in quantised} == {
        torch.bfloat16
    }
    assert all(
        m.weight.nbytes == size * m.in_features * m.out_features
        for m in quantised.values()
    )
    if quantization == "4bit":
        assert {(m.weight.quant_type, m.compute_dtype) for m in quantised.values()} == {
            ("nf4", torch.bfloat16)
        }
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")


def test_the_embedded_checkpoint_loads_with_plain_transformers():
    path = EMBEDDED / "tiny_llava"
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    config = model.config
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert config.text_config.num_hidden_layers >= 6
    assert config.vision_config.model_type == "clip_vision_model"
    assert (
        models.find(ModelConfig(family="llava", embedded="tiny_llava")).visual_tokens
        == 144
    )


def test_a_module_that_declares_no_family_is_none():
    with pytest.raises(UsageError, match=r"model\.family=_convert: no such family"):
        models.family(ModelConfig(family="_convert"))
