"""Projector tuning: what is trained and what is not, labels, resuming, and what a tuned projector serves."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import shapes
import torch
from safetensors.torch import load_file, save_file
from tiny import llava, prompts

from zipeval import models
from zipeval.checkpoints import projector
from zipeval.checkpoints import prompts as prompts_module
from zipeval.cli import compose, expand, main
from zipeval.engine.vision import IGNORED, reduced_inputs
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.methods.random import Random
from zipeval.methods.visionzip import VisionZip
from zipeval.methods.visionzip_tuned import VisionZipTuned
from zipeval.results import records
from zipeval.tuning import training
from zipeval.tuning.training import Conversations, Projecting
from zipeval.tuning.tune import TUNING, Settings, read, tune

SETTING = ["method=visionzip", "tokens=16", "runner.workers=0"]
TURNS = ["What color is the star?", "cyan", "How many objects are there?", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """instruct.json, of questions about four scenes and a text, and images."""
    directory = tmp_path_factory.mktemp("instructions")
    shapes.write_instructions(directory, 12)
    entries = json.loads((directory / "instruct.json").read_text())
    spoken = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]
    (directory / "instruct.json").write_text(
        json.dumps([*entries, {"id": "text", "conversations": spoken}])
    )
    return directory


def settings(data, out, **options):
    options = {"fraction": 1.0, "batch_size": 2, "accumulate": 1, "lr": 3e-4} | options
    return Settings(
        str(data / "instruct.json"), str(data / "images"), str(out), **options
    )


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """(the file of a tuning that nothing interrupted, the model's tensors before it, whether it left them alone)."""
    model, _ = Session(compose(SETTING)).load()
    before = {
        name: (tensor.data_ptr(), tensor.clone())
        for name, tensor in model.state_dict().items()
    }
    path = tune(compose(SETTING), settings(data, tmp_path_factory.mktemp("tuned")))
    after = model.state_dict()
    same = [
        after[name].data_ptr() == at and torch.equal(after[name], tensor)
        for name, (at, tensor) in before.items()
    ]
    assert before.keys() == after.keys()
    return path, before, all(same) and all(p.requires_grad for p in model.parameters())


def conversation(data, *overrides):
    """TURNS about a scene, as they are trained on; and the session that prepares them."""
    session = Session(compose([*SETTING, *overrides]))
    messages = [
        {
            "role": ("user", "assistant")[turn % 2],
            "content": [{"type": "text", "text": text}],
        }
        for turn, text in enumerate(TURNS)
    ]
    messages[0]["content"].insert(
        0, {"type": "image", "url": str(data / "images" / "0.png")}
    )
    return session, Conversations(session, [messages])


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


@pytest.mark.parametrize(
    "prompt, before, between", [("hf", "", ""), ("vicuna_v1", SYSTEM, "")]
)
def test_labels_are_the_answers_with_their_ends(data, prompt, before, between):
    """Of two turns, against ids that are put together here; before the reduction and behind it."""
    session, examples = conversation(data, f"model.prompt={prompt}")
    model, processor = session.load()
    first, color, second, count = TURNS
    pieces = [
        (f"{before}USER: ", False),
        ([model.config.image_token_id] * 144, False),
        (f"\n{first} ASSISTANT:", False),
        (f" {color}</s>", True),
        (f"{between}USER: {second} ASSISTANT:", False),
        (f" {count}</s>", True),
    ]
    ids, labels = [processor.tokenizer.bos_token_id], [IGNORED]
    for piece, answer in pieces:
        new = (
            processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
            if isinstance(piece, str)
            else piece
        )
        ids += new
        labels += new if answer else [IGNORED] * len(new)
    batch = examples.together([examples[0]])
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    end = processor.tokenizer.eos_token_id
    assert [label for label in labels if label == end] == [end, end]
    shorter = reduced_inputs(model, dict(batch), session.method)
    gone = 144 - 16
    at = ids.index(model.config.image_token_id)
    assert shorter["input_ids"].tolist() == [ids[:at] + ids[at + gone :]]
    assert shorter["labels"].tolist() == [labels[:at] + labels[at + gone :]]


def test_padding_has_no_labels():
    """In a batch, on the left; also where the images of a row leave more behind than those of another."""
    model = llava()
    inputs = prompts(model, [[5, 6], [7]], [1, 2])
    made = reduced_inputs(
        model, {**inputs, "labels": inputs["input_ids"]}, Random(tokens=3)
    )
    padding = made["attention_mask"] == 0
    assert padding.any()
    assert torch.equal(made["labels"], made["input_ids"].masked_fill(padding, IGNORED))


def test_long_conversations_lose_their_end_and_no_placeholder(data):
    session, examples = conversation(data)
    long = copy.deepcopy(examples.conversations[0])
    long[1]["content"][0]["text"] = "red " * 3000
    row = Conversations(session, [long])[0]
    visual = row["input_ids"] == session.load()[0].config.image_token_id
    assert (int(visual.sum()), len(row["input_ids"])) == (144, 2048 - 16 + 144)


@pytest.fixture(scope="module")
def exact():
    """(model, inputs with labels) in float64: two prompts with one and two images."""
    model = llava(gain=1.0).double()
    for module in model.modules():
        if (
            type(module).__name__ == "LlamaRMSNorm"
        ):  # computes in float32 whatever it is given
            shape, eps = module.weight.shape, module.variance_epsilon
            norm = torch.nn.functional.rms_norm
            module.forward = partial(
                norm, normalized_shape=shape, weight=module.weight, eps=eps
            )
    inputs = prompts(model, [[5, 9, 11, 8], [7, 8]], [1, 2])
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[0, -3:], labels[1, -2:] = (
        inputs["input_ids"][0, -3:],
        inputs["input_ids"][1, -2:],
    )
    return model, {
        **inputs,
        "pixel_values": inputs["pixel_values"].double(),
        "labels": labels,
    }


def test_the_gradient_is_that_of_finite_differences(exact):
    """Of the answers' cross-entropy, in float64; transformers has losses in float32."""
    model, inputs = exact
    projecting, method = Projecting(model), VisionZip(tokens=12)

    def loss():
        made = reduced_inputs(model, inputs, method)
        labels = made.pop("labels")[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(
            model(**made).logits[:, :-1].flatten(0, 1), labels
        )

    with projecting.in_place():
        loss().backward()
        gradients = [parameter.grad.clone() for parameter in projecting.parameters()]
        generator, step = torch.Generator().manual_seed(0), 1e-5
        for parameter, gradient in zip(projecting.parameters(), gradients, strict=True):
            for place in torch.randint(
                parameter.numel(), (4,), generator=generator
            ).tolist():
                flat, losses = parameter.data.view(-1), []
                value = flat[place].item()
                for nudged in (value + step, value - step):
                    flat[place] = nudged
                    with torch.no_grad():
                        losses.append(float(loss()))
                flat[place] = value
                slope = (losses[0] - losses[1]) / (2 * step)
                assert gradient.view(-1)[place].item() == pytest.approx(
                    slope, rel=1e-5, abs=1e-9
                )
        assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
        projecting.zero_grad()
        with method.applied(model):
            projecting(**inputs)["loss"].backward()
    for parameter, gradient in zip(projecting.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_of_a_batch_is_that_of_its_prompts(exact):
    """Every token of an answer counts the same."""
    model, inputs = exact
    rows = [
        {k: v[i : i + 1] for k, v in inputs.items() if k != "pixel_values"}
        for i in range(2)
    ]
    rows[0]["pixel_values"], rows[1]["pixel_values"] = inputs["pixel_values"].split(
        [1, 2]
    )
    with torch.no_grad(), VisionZip(tokens=12).applied(model):
        together = float(model(**inputs).loss)
        alone = [float(model(**row).loss) for row in rows]
    assert alone[0] != pytest.approx(alone[1], abs=0.01)
    assert together == pytest.approx((3 * alone[0] + 2 * alone[1]) / 5, abs=1e-6)


def test_only_the_projector_is_tuned(tuned, data):
    path, before, untouched = tuned
    assert untouched
    stock = {
        name.partition("multi_modal_projector.")[2]: t
        for name, (_, t) in before.items()
        if "projector" in name
    }
    found = load_file(path)
    assert {name: t.shape for name, t in found.items()} == {
        name: t.shape for name, t in stock.items()
    }
    assert not any(torch.equal(found[name], stock[name]) for name in stock)
    assert sorted(p.name for p in path.parent.iterdir()) == ["projector.safetensors"]


def test_it_learns(tuned, data):
    """The loss on what it was trained on falls."""
    session = Session(compose(SETTING))
    model, _ = session.load()
    made = read(data / "instruct.json", data / "images", 1.0, 0)
    examples = Conversations(session, made.conversations)
    batch = examples.together([examples[i] for i in range(0, len(examples), 2)])
    losses = []
    for method in (session.method, VisionZipTuned(tokens=16, projector=str(tuned[0]))):
        with torch.no_grad(), method.applied(model):
            losses.append(float(model(**batch).loss))
    assert losses[1] < 0.95 * losses[0]


def test_the_manifest_says_what_it_was_made_of(tuned, data):
    said = projector.manifest(tuned[0])
    count = len(json.loads((data / "instruct.json").read_text()))
    fingerprint = Session(compose(SETTING)).checkpoint.fingerprint
    purpose = {
        "model": "tiny_llava",
        "fingerprint": fingerprint,
        "method": "visionzip",
        "tokens": 16,
    }
    assert said["purpose"] == purpose | {"budget": "paper", "packing": "published"}
    assert {k: said["data"][k] for k in ("entries", "text_only", "samples")} == {
        "entries": count,
        "text_only": 1,
        "samples": count - 1,
    }
    assert said["training"]["lr"] == 3e-4
    assert said["code"] == records.code(TUNING) != records.code()
    assert said["versions"] == records.versions()


def test_a_share_is_drawn_by_the_seed(data):
    def drawn(fraction, seed):
        return read(
            data / "instruct.json", data / "images", fraction, seed
        ).conversations

    every = drawn(1.0, 0)
    assert drawn(0.5, 0) == drawn(0.5, 0) != drawn(0.5, 1)
    assert len(drawn(0.5, 0)) == round(len(every) / 2)
    assert all(its in every for its in drawn(0.5, 1))


def command(data, out):
    given = {
        "tokens": 16,
        "data": data / "instruct.json",
        "images": data / "images",
        "out": out,
        "fraction": 1.0,
    }
    given |= {"batch_size": 2, "accumulate": 1, "lr": 3e-4, "runner.workers": 0}
    return [
        sys.executable,
        "-m",
        "zipeval",
        "tune",
        *(f"{name}={value}" for name, value in given.items()),
    ]


def test_a_killed_training_goes_on_to_the_same_projector(
    tuned, data, tmp_path, monkeypatch
):
    """Bit by bit. A checkpoint that was being written when the process died is passed over."""
    process = subprocess.Popen(
        command(data, tmp_path), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while (
        not [*tmp_path.glob("checkpoints/checkpoint-*/trainer_state.json")]
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (begun,) = tmp_path.glob("checkpoints/checkpoint-*/trainer_state.json")
    assert not (tmp_path / "projector.safetensors").exists()
    step = json.loads(begun.read_text())["global_step"]
    torn = tmp_path / "checkpoints" / "checkpoint-99"
    torn.mkdir()
    shutil.copy(begun.parent / "model.safetensors", torn)
    read_row, rows = Conversations.__getitem__, []
    monkeypatch.setattr(
        Conversations,
        "__getitem__",
        lambda self, row: rows.append(row) or read_row(self, row),
    )
    path = tune(compose(SETTING), settings(data, tmp_path))
    assert path.read_bytes() == tuned[0].read_bytes()
    count = projector.manifest(path)["data"]["samples"]
    assert 0 < step < count // 2
    assert len(rows) == count - 2 * step


def test_another_training_is_not_gone_on_with(
    tuned, data, tmp_path, monkeypatch, capsys
):
    """Neither one that was begun, nor one that is finished; the same one that is finished is kept."""
    manifest = projector.manifest(tuned[0])
    manifest["training"]["lr"] = 1e-3
    (tmp_path / "tuning.json").write_text(json.dumps(manifest))
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    said = refused(monkeypatch, capsys, *command(data, tmp_path)[3:])
    assert "training.lr 0.001 (now 0.0003)" in said
    assert "out=DIR" in said
    said = refused(monkeypatch, capsys, *command(data, tuned[0].parent)[3:], "epochs=2")
    assert "training.epochs 1 (now 2)" in said
    written = tuned[0].stat().st_mtime_ns
    assert tune(compose(SETTING), settings(data, tuned[0].parent)) == tuned[0]
    assert tuned[0].stat().st_mtime_ns == written
    assert "finished before, kept" in capsys.readouterr().out


def drawn(path, tmp_path, **purpose):
    """A projector of another kind: its tensors moved about, for another purpose."""
    manifest = projector.manifest(path)
    manifest["purpose"] |= purpose
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: t + 3 * torch.randn(t.shape, generator=generator) * t.std()
        for name, t in load_file(path).items()
    }
    made = tmp_path / "drawn.safetensors"
    save_file(tensors, made, {projector.KEY: json.dumps(manifest)})
    return made


@pytest.fixture
def another(tuned, tmp_path):
    return drawn(tuned[0], tmp_path)


def test_it_is_visionzip_with_other_weights(another, data):
    session, examples = conversation(data)
    model, _ = session.load()
    batch = examples.together([examples[0]])
    swapped = copy.deepcopy(model)
    swapped.model.multi_modal_projector.load_state_dict(load_file(another))
    with torch.no_grad():
        with session.method.applied(swapped):
            expected = swapped(**batch).logits
        with VisionZipTuned(tokens=16, projector=str(another)).applied(model):
            assert torch.equal(model(**batch).logits, expected)
        with session.method.applied(model):
            assert (model(**batch).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "setting",
    ["budget=paper", "budget=mean", "packing=newline", "budget=mean packing=newline"],
)
def test_all_crops_of_an_image_are_projected_by_it(setting, another):
    """However the method divides its tokens over them."""
    model, _ = Session(compose(SETTING)).load()
    features = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    given = [
        "model=tiny_next",
        "method=visionzip_tuned",
        "tokens=160",
        f"projector={another}",
        *setting.split(),
    ]
    method = Session(compose(given)).method
    swapped = copy.deepcopy(model.model.multi_modal_projector)
    swapped.load_state_dict(load_file(another))
    with torch.no_grad():
        assert torch.equal(method.project(model, features), swapped(features))
        assert not torch.equal(
            method.project(model, features), model.model.multi_modal_projector(features)
        )


def test_what_runs_share_is_not_what_was_projected(another, tmp_path):
    """Encoder output is kept from one run for the next, under another projector: answers are as without that."""
    answers = {}
    for reuse in ("none", "prefix"):
        for method in ("visionzip", "visionzip_tuned"):
            common = [
                "tokens=16",
                "limit=10",
                f"runner.reuse={reuse}",
                f"results={tmp_path / reuse}",
            ]
            (path,) = run(
                compose([f"method={method}", *common, f"projector={another}"])
            )
            record = records.read(path)
            answers[reuse, method] = [
                s["prediction"] for s in records.read_samples(path.parent, record)
            ]
    for method in ("visionzip", "visionzip_tuned"):
        assert answers["none", method] == answers["prefix", method]
    assert answers["none", "visionzip"] != answers["none", "visionzip_tuned"]


def identity(path, *overrides):
    return Session(
        compose(
            ["method=visionzip_tuned", "tokens=16", f"projector={path}", *overrides]
        )
    ).run_id


def test_a_run_is_known_by_what_is_in_its_projector(tuned, another, tmp_path):
    copied = shutil.copy(tuned[0], tmp_path / "elsewhere.safetensors")
    assert identity(tuned[0]) == identity(copied) != identity(another)


def test_a_chain_may_begin_with_it(tuned, tmp_path):
    first = [
        "method=chain",
        "method@method.first=visionzip_tuned",
        "method.first.tokens=16",
        "tokens=8",
    ]
    session = Session(compose([*first, "budget=final", f"projector={tuned[0]}"]))
    assert (
        session.projector
        == Session(
            compose([*SETTING[1:], "method=visionzip_tuned", f"projector={tuned[0]}"])
        ).projector
    )
    with pytest.raises(Exception, match="tokens=16, and this run has tokens=32"):
        _ = Session(
            compose(
                [
                    *first,
                    "method.first.tokens=32",
                    "budget=final",
                    f"projector={tuned[0]}",
                ]
            )
        ).projector


def test_a_chain_does_not_scale_what_was_tuned(tuned):
    first = [
        "method=chain",
        "method@method.first=visionzip_tuned",
        "method.first.tokens=16",
        "method.of=576",
    ]
    with pytest.raises(
        UsageError, match="of=576: a projector is tuned for as many tokens"
    ):
        Session(compose([*first, "tokens=3", "budget=final", f"projector={tuned[0]}"]))


def test_a_run_keeps_the_projector_that_it_is_known_by(tuned, another, tmp_path):
    """Whoever writes another one meanwhile; the next run has that."""
    path = Path(shutil.copy(tuned[0], tmp_path / "projector.safetensors"))
    session, names = (
        Session(compose(["method=visionzip_tuned", "tokens=16", f"projector={path}"])),
        [],
    )
    model, _ = session.load()
    features = torch.randn(1, 2, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = session.method.project(model, features)
        names.append(session.projector)
        shutil.copy(another, path)
        assert torch.equal(session.method.project(model, features), before)
        session = Session(session.config)
        names.append(session.projector)
        assert not torch.equal(session.method.project(model, features), before)
    assert names[0] != names[1]


def refused(monkeypatch, capsys, *arguments):
    """What is said of a command that is refused, which loads no model."""
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["zipeval", *arguments])
        patch.setattr(
            models, "load", lambda *given: pytest.fail("the model was loaded")
        )
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("zipeval: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    "purpose, overrides, named",
    [
        (
            {"fingerprint": "f00d", "model": "llava15"},
            [],
            "fingerprint=f00d of model=llava15, and this run has",
        ),
        ({"method": "random"}, [], "method=random, and this run has method=visionzip"),
        ({}, ["tokens=32"], "tokens=16, and this run has tokens=32"),
        ({"dominant": 12}, [], "dominant=12, and this run has dominant=None"),
        ({}, ["method.contextual=4"], "contextual=None, and this run has contextual=4"),
        ({"budget": "mean"}, [], "budget=mean, and this run has budget=paper"),
    ],
    ids=str,
)
def test_one_that_was_tuned_for_anything_else_is_refused(
    purpose, overrides, named, tuned, tmp_path, monkeypatch, capsys
):
    path = drawn(tuned[0], tmp_path, **purpose)
    tokens = [] if any(o.startswith("tokens") for o in overrides) else ["tokens=16"]
    given = [
        "method=visionzip_tuned",
        *tokens,
        *overrides,
        f"projector={path}",
        f"results={tmp_path}",
    ]
    said = refused(monkeypatch, capsys, "run", *given)
    assert f"projector={path}: it was tuned for {named}" in said
    assert "`zipeval tune model=tiny_llava method=visionzip" in said
    assert not list(tmp_path.glob("*visionzip*/*.json"))


def test_crops_are_divided_as_they_were_when_it_was_tuned(
    tuned, tmp_path, monkeypatch, capsys
):
    """Of several crops, a budget leaves something else; of one it does not."""
    next_ = Session(compose(["model=tiny_next", "method=visionzip", "tokens=160"]))
    path = drawn(
        tuned[0],
        tmp_path,
        fingerprint=next_.checkpoint.fingerprint,
        tokens=160,
        model="tiny_next",
    )
    given = [
        "model=tiny_next",
        "method=visionzip_tuned",
        "tokens=160",
        f"projector={path}",
    ]
    assert Session(compose(given)).projector
    said = refused(
        monkeypatch, capsys, "run", *given, "budget=mean", f"results={tmp_path}"
    )
    assert "budget=paper, and this run has budget=mean" in said
    assert "budget=mean" in said.partition("`zipeval tune")[2]
    assert Session(
        compose(
            [
                "method=visionzip_tuned",
                "tokens=16",
                "budget=mean",
                f"projector={tuned[0]}",
            ]
        )
    ).projector


@pytest.mark.parametrize("content", [None, b"", b"{}", "weights"])
def test_what_is_no_tuned_projector_is_refused(
    content, tuned, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "some.safetensors"
    if content == "weights":
        save_file(load_file(tuned[0]), path)
    elif content is not None:
        path.write_bytes(content)
    said = refused(
        monkeypatch,
        capsys,
        "run",
        "method=visionzip_tuned",
        "tokens=16",
        f"projector={path}",
        f"results={tmp_path}",
    )
    assert f"projector={path}: " in said
    assert (
        "no such file" if content is None else "not a file of `zipeval tune`"
    ) in said


def test_without_a_name_it_is_where_tune_leaves_it(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    said = refused(monkeypatch, capsys, "run", "method=visionzip_tuned", "tokens=16")
    place = Path("results/projectors/tiny_llava-visionzip-16/projector.safetensors")
    assert f"projector={place}: no such file" in said
    assert (
        "`zipeval tune model=tiny_llava method=visionzip tokens=16 data=FILE.json images=DIR`"
        in said
    )
    made = tune(compose(SETTING), replace(settings(data, None, fraction=0.1), out=None))
    assert made == place
    assert place.exists()
    assert Session(compose(["method=visionzip_tuned", "tokens=16"])).projector


def test_the_advice_for_another_projector_can_be_followed(
    tuned, tmp_path, monkeypatch, capsys
):
    """Where there is one already none can be made; a file of another name is none that is made."""
    monkeypatch.chdir(tmp_path)
    run_ = ["run", "method=visionzip_tuned", "tokens=32"]
    made = "`zipeval tune model=tiny_llava method=visionzip tokens=32 {}data=FILE.json images=DIR`"
    for place in (tuned[0], "x.safetensors"):
        assert made.format("") in refused(
            monkeypatch, capsys, *run_, f"projector={place}"
        )
    assert made.format("out=x ") in refused(
        monkeypatch, capsys, *run_, "projector=x/projector.safetensors"
    )
    usual = projector.place("tiny_llava", 32)
    usual.parent.mkdir(parents=True)
    shutil.copy(tuned[0], usual)
    assert made.format("out=NEW_DIR ") in refused(monkeypatch, capsys, *run_)


def test_a_projector_that_a_run_would_not_use_is_refused(
    tuned, tmp_path, monkeypatch, capsys
):
    """In a sweep, others stand beside the method that has it."""
    given = [f"projector={tuned[0]}", f"results={tmp_path}", "limit=1"]
    said = refused(monkeypatch, capsys, "run", "method=vanilla", *given)
    assert f"projector={tuned[0]}: method=vanilla has none" in said
    made, _ = expand(["-m", "method=vanilla,visionzip_tuned", "tokens=16", *given])
    assert [cell.config.projector for cell in made.cells] == [None, str(tuned[0])]


def entry(**changed):
    spoken = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A star."},
    ]
    return {"id": "0", "image": "0.png", "conversations": spoken} | changed


BAD = {
    "turns": entry(conversations=entry()["conversations"][:1]),
    "roles": entry(conversations=[*entry()["conversations"][::-1]]),
    "nothing": entry(conversations=None),
    "placeholder": entry(
        conversations=[
            {"from": "human", "value": "What?"},
            {"from": "gpt", "value": "A star."},
        ]
    ),
    "value": entry(conversations=[{"from": "human"}, {"from": "gpt"}]),
}
REFUSED = [
    (["method=fastv"], "method=fastv", "method=visionzip"),
    (["method=vanilla"], "method=vanilla", "method=visionzip_tuned"),
    (["tokens=144"], "tokens=144", "nothing to tune"),
    (["tokens=9999"], "tokens=9999", "tokens=16"),
    (["model.device=cuda:1"], "model.device=cuda:1", "CUDA_VISIBLE_DEVICES=1"),
    (["model.dtype=float16"], "model.dtype=float16", "bfloat16"),
    (["data=nowhere.json"], "data=nowhere.json", "LLaVA's layout"),
    (["images=nowhere"], "images=nowhere: 1 of 1 images are missing", "nowhere/0.png"),
    (["fraction=0"], "fraction=0.0", "fraction=0.1"),
    (["fraction=0.1"], "fraction=0.1", "larger"),
    (["lr=-1"], "lr=-1.0", "lr=1e-3"),
    (["lr=fast"], "lr=fast", "`zipeval tune --help`"),
    (["epochs=0.5"], "epochs=0.5", "whole number"),
    (["batch_size=0"], "batch_size=0", "from 1 up"),
    (["limit=3"], "limit=3", "Leave it out"),
    (["data.root=x"], "data.root=x", "Leave it out"),
    (["data.videos=x"], "data.videos=x", "Leave it out"),
    (["--lr"], "--lr", "`zipeval tune --help`"),
    (["tokns=3"], "tokns: no such setting of `zipeval tune`", "Did you mean tokens?"),
    (["out=file/below"], "file/below", "Choose another"),
    *(
        (["data=bad.json", why], "data=bad.json: entry 1", "LLaVA's layout")
        for why in BAD
    ),
]


@pytest.mark.parametrize(
    "arguments, named, advice",
    REFUSED,
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_tuned_is_refused(
    arguments, named, advice, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "one.json").write_text(json.dumps([entry()]))
    if arguments[0] == "data=bad.json":
        (tmp_path / "bad.json").write_text(json.dumps([entry(), BAD[arguments.pop()]]))
    given = {
        "tokens": 16,
        "data": "one.json",
        "images": data / "images",
        "fraction": 1.0,
    }
    given |= dict(a.split("=", 1) for a in arguments if "=" in a)
    more = [a for a in arguments if "=" not in a]
    said = refused(
        monkeypatch,
        capsys,
        "tune",
        *(f"{name}={value}" for name, value in given.items()),
        *more,
    )
    assert named in said
    assert advice in said
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_damaged_image_ends_it_with_a_sentence(data, tmp_path, monkeypatch, capsys):
    """Also where a worker comes upon it."""
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "one.json").write_text(json.dumps([entry()] * 3))
    for workers in (0, 1):
        given = f"tune tokens=16 data={tmp_path}/one.json images={tmp_path} fraction=1 out={tmp_path}/{workers}"
        monkeypatch.setattr(
            sys, "argv", ["zipeval", *given.split(), f"runner.workers={workers}"]
        )
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 1
        assert f"zipeval: {tmp_path}/0.png: " in said
        assert "Take it out of the data" in said
        assert "Traceback" not in said


def test_a_template_that_does_not_end_answers_is_refused(data):
    session, examples = conversation(data)
    examples.template = session.load()[1].chat_template.replace("</s>", " ")
    with pytest.raises(Exception, match=r"model\.prompt=hf: .*vicuna_v1"):
        examples[0]


def failed(data, out, monkeypatch, capsys, *options):
    """(exit code, what is said) of a tuning that does not end well."""
    given = [
        o
        for o in command(data, out)[3:]
        if o.partition("=")[0] not in {o.partition("=")[0] for o in options}
    ]
    monkeypatch.setattr(sys, "argv", ["zipeval", *given, *options])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return end.value.code, next(
        line for line in said.splitlines() if line.startswith("zipeval: ")
    )


def test_a_training_that_diverges_is_no_projector(
    tuned, data, tmp_path, monkeypatch, capsys
):
    """Nor is it gone on with: the same place takes another learning rate."""
    code, said = failed(data, tmp_path, monkeypatch, capsys, "lr=1e30")
    assert (code, "lr=1e+30: " in said, "Set lr=0.001" in said) == (1, True, True)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert (
        tune(compose(SETTING), settings(data, tmp_path)).read_bytes()
        == tuned[0].read_bytes()
    )


def test_a_template_is_refused_before_workers_see_it(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(
        prompts_module.TEMPLATES,
        "vicuna_v1",
        prompts_module.VICUNA_V1.replace("</s>", " "),
    )
    monkeypatch.setattr(
        training, "Trainer", lambda *given: pytest.fail("the training was begun")
    )
    given = ("model.prompt=vicuna_v1", "runner.workers=1")
    code, said = failed(data, tmp_path, monkeypatch, capsys, *given)
    assert (
        code,
        "model.prompt=vicuna_v1: its answers do not end with </s>" in said,
    ) == (2, True)
    monkeypatch.undo()
    monkeypatch.setattr(Conversations, "rendered", late(Conversations.rendered))
    code, said = failed(data, tmp_path, monkeypatch, capsys, "runner.workers=1")
    assert (code, said) == (2, "zipeval: seen by a worker")


def late(rendered):
    """That refuses in worker processes only."""
    owner = os.getpid()

    def wrapped(self, messages):
        if os.getpid() != owner:
            raise UsageError("seen by a worker")
        return rendered(self, messages)

    return wrapped


def test_memory_that_runs_out_is_told(tuned, data, tmp_path, monkeypatch, capsys):
    """With a smaller batch, which the same place then takes."""

    def full(self, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(Projecting, "forward", full)
        code, said = failed(data, tmp_path, patch, capsys)
        assert (code, said) == (
            1,
            "zipeval: batch_size=2: memory ran out. Set batch_size=1 accumulate=2.",
        )
        code, said = failed(data, tmp_path, patch, capsys, "batch_size=1")
        assert (code, "batch_size=1: memory ran out. Nothing" in said) == (1, True)
    assert tune(
        compose(SETTING), settings(data, tmp_path, batch_size=1, accumulate=2)
    ).exists()


def test_a_killed_worker_is_told(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Conversations,
        "__getitem__",
        lambda self, row: os.kill(os.getpid(), signal.SIGKILL),
    )
    code, said = failed(data, tmp_path, monkeypatch, capsys, "runner.workers=1")
    assert (code, "runner.workers=1: one of them was ended" in said) == (1, True)


def test_batches_come_from_workers_as_bytes(data):
    """And not in shared memory, of which they would tell no more than where."""
    _, examples = conversation(data)
    batch = examples.together([examples[0]])
    sent = bytes(ForkingPickler.dumps(batch))
    assert len(sent) > batch["pixel_values"].nbytes
    assert torch.equal(pickle.loads(sent)["pixel_values"], batch["pixel_values"])


def test_other_images_of_the_same_names_are_other_data(data, tmp_path):
    directory = shutil.copytree(data / "images", tmp_path / "images")
    before = read(data / "instruct.json", data / "images", 1.0, 0).about
    assert read(data / "instruct.json", directory, 1.0, 0).about == before
    content = (directory / "0.png").read_bytes()
    (directory / "0.png").write_bytes(
        content[:-1] + bytes([content[-1] ^ 1])
    )  # of the same size
    assert read(data / "instruct.json", directory, 1.0, 0).about != before
