"""Runs end to end: real task code of lmms-eval, the embedded checkpoint and data, records on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_llava15
from transformers import LlavaForConditionalGeneration

import zipeval.tasks
from zipeval import models
from zipeval.checkpoints.placement import Placement, machine
from zipeval.cli import compose, main
from zipeval.errors import MediaError, UsageError
from zipeval.evaluation import chat_model
from zipeval.evaluation.runner import run
from zipeval.inference import answering
from zipeval.inference.session import Session
from zipeval.results import records

LIMIT = 48


def evaluate(root, *overrides):
    """(record, samples) of a run on the first few questions; of the samples what equal runs agree on."""
    (path,) = run(compose([f"results={root}", f"limit={LIMIT}", *overrides]))
    record = records.read(path)
    return record, [
        records.reproducible_fields(sample)
        for sample in records.read_samples(path.parent, record)
    ]


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    models._loaded.clear()  # what other test files did to the model is not to be on both sides of a comparison
    return evaluate(tmp_path_factory.mktemp("vanilla"), "method=vanilla")


@pytest.fixture(scope="module")
def visionzip(tmp_path_factory, vanilla):
    return evaluate(
        tmp_path_factory.mktemp("visionzip"), "method=visionzip", "tokens=16"
    )


def test_what_a_record_holds(vanilla, visionzip):
    record, samples = visionzip
    counted = {"mean": 16.0, "final": 16.0, "entering": [16.0] * 6}
    assert record["visual_tokens"] == {
        "requested": 16,
        "budget": "paper",
        "patches": 144,
        **counted,
    }
    counted = {"mean": 144.0, "final": 144.0, "entering": [144.0] * 6}
    assert vanilla[0]["visual_tokens"] == {
        "requested": None,
        "budget": "paper",
        "patches": 144,
        **counted,
    }
    assert record["status"] == "success"
    assert record["config"]["method"]["tokens"] == 16
    held = {"device", "dtype", "attn_implementation", "quantization", "device_map"}
    assert record["resolved"].keys() == {*held, "fingerprint", "method"}
    assert (
        record["resolved"]["method"]
        == "VisionZip(tokens=16, dominant=None, contextual=None)"
    )
    assert record["versions"]["lmms-eval"].startswith("0.7")
    assert record["machine"] == machine(Placement("cpu", "float32", "sdpa"))
    assert record["model_revision"] is None
    assert record["run_id"] == Path(record["path"]).parent.name
    started, ended = (
        datetime.fromisoformat(record[name]) for name in ("started", "ended")
    )
    assert started.utcoffset() == timedelta(0)
    assert abs((ended - started).total_seconds() - record["seconds"]) < 1.1
    assert record["seconds"] > 0
    assert [s["doc_id"] for s in samples] == list(range(LIMIT))
    right = [s["scores"]["accuracy"] for s in samples]
    assert record["score"] == pytest.approx(100 * sum(right) / LIMIT)
    for sample in samples:
        assert sample["scores"]["accuracy"] == float(
            sample["prediction"].lower() == sample["target"].lower()
        )
        assert sample["visual_tokens"] == [16] * 6
        assert sample["kv_entries"] == 6 * sample["prompt_tokens"]
        (kept,), (merged,) = sample["kept"], sample["merged"]
        assert (len(kept), len(merged)) == (12, 3)  # CLS is the 16th
        assert {*kept, *merged} <= {*range(144)}
        assert 16 < sample["prompt_tokens"] < 60
        assert 1 <= sample["output_tokens"] <= 8


def test_what_nothing_is_removed_from_has_no_tokens_that_are_left(vanilla, tmp_path):
    _, everything = evaluate(tmp_path, "method=visionzip", "tokens=144", "limit=2")
    for sample in (*vanilla[1], *everything):
        assert not {"kept", "merged"} & sample.keys()


def test_the_first_pictures_are_beside_the_record(vanilla, visionzip):
    table = datasets.Dataset.from_parquet(
        f"{zipeval.tasks.__path__[0]}/shapes/test.parquet"
    )
    for record, _ in (vanilla, visionzip):
        paths = sorted(Path(record["path"]).parent.glob("zipeval_shapes.images/*"))
        assert [path.name for path in paths] == [f"{doc_id}.jpg" for doc_id in range(8)]
        for doc_id, path in enumerate(paths):
            picture = np.asarray(Image.open(path), float)
            assert picture.shape == (96, 96, 3)
            assert (
                np.abs(
                    picture - np.asarray(table[doc_id]["image"].convert("RGB"), float)
                ).mean()
                < 5
            )


def test_reduction_changes_answers_and_not_the_prompt(vanilla, visionzip):
    full, reduced = vanilla[1], visionzip[1]
    assert [s["prediction"] for s in full] != [s["prediction"] for s in reduced]
    assert {
        f["prompt_tokens"] - r["prompt_tokens"]
        for f, r in zip(full, reduced, strict=True)
    } == {144 - 16}


def test_two_equal_runs_give_equal_records(visionzip, tmp_path):
    again, samples = evaluate(tmp_path, "method=visionzip", "tokens=16")
    assert samples == visionzip[1]
    assert records.reproducible_fields(again) == records.reproducible_fields(
        visionzip[0]
    )


def test_vanilla_after_visionzip_equals_vanilla_alone(vanilla, visionzip, tmp_path):
    """The model is shared within a process; `vanilla` ran before anything else was applied to it."""
    again, samples = evaluate(tmp_path, "method=vanilla")
    assert samples == vanilla[1]
    assert again["metrics"] == vanilla[0]["metrics"]


def test_a_sample_tells_how_long_its_batch_took(tmp_path):
    (path,) = run(compose([f"results={tmp_path}", "limit=5", "batch_size=3"]))
    record = records.read(path)
    samples = records.read_samples(path.parent, record)
    of = {
        size: {s["latency"] for s in samples if s["batch"] == size} for size in (3, 2)
    }
    assert sorted(sample["batch"] for sample in samples) == [2, 2, 3, 3, 3]
    assert [len(seconds) for seconds in of.values()] == [1, 1]
    assert 0 < sum(min(seconds) for seconds in of.values()) < record["seconds"]


def test_questions_are_told_apart_by_their_hash(vanilla, visionzip):
    hashes = [sample["question_hash"] for sample in vanilla[1]]
    assert hashes == [sample["question_hash"] for sample in visionzip[1]]
    table = datasets.Dataset.from_parquet(
        f"{zipeval.tasks.__path__[0]}/shapes/test.parquet"
    ).select(range(LIMIT))
    asked = list(zip(table["question"], table["answer"], strict=True))
    assert (
        len(set(asked))
        == len(set(hashes))
        == len(set(zip(asked, hashes, strict=True)))
        > 1
    )


def test_answers_do_not_depend_on_the_batch(visionzip, tmp_path):
    _, samples = evaluate(tmp_path, "method=visionzip", "tokens=16", "batch_size=5")
    assert samples == visionzip[1]


def test_finished_tasks_are_kept(tmp_path, capsys):
    overrides = [f"results={tmp_path}", "limit=2", "method=visionzip", "tokens=32"]
    first = run(compose(overrides))
    before = [p.read_bytes() for p in first]
    assert run(compose(overrides)) == first
    assert "kept" in capsys.readouterr().out
    assert [p.read_bytes() for p in first] == before


def test_a_record_of_another_version_of_the_task_is_not_kept(tmp_path):
    overrides = [f"results={tmp_path}", "limit=2", "method=visionzip", "tokens=32"]
    (path,) = run(compose(overrides))
    path.write_text(path.read_text().replace('"task_hash": "', '"task_hash": "0'))
    with pytest.raises(UsageError, match=f"{path} is of another version"):
        run(compose(overrides))


def test_counts_are_of_the_right_prompt_under_beam_search(
    vanilla, tmp_path, monkeypatch
):
    greedy = answering.generation_options
    monkeypatch.setattr(
        answering, "generation_options", lambda given: {**greedy(given), "num_beams": 2}
    )
    _, samples = evaluate(tmp_path, "method=vanilla", "limit=8")
    for name in ("visual_tokens", "prompt_tokens"):
        assert [s[name] for s in samples] == [s[name] for s in vanilla[1][:8]]
    assert len({s["prompt_tokens"] for s in samples}) > 1


def test_tokens_are_of_the_right_prompt_under_beam_search(tmp_path, monkeypatch):
    settings = ["method=fastv", "tokens=48", "limit=8"]
    _, greedy = evaluate(tmp_path / "greedy", *settings)
    options = answering.generation_options
    monkeypatch.setattr(
        answering,
        "generation_options",
        lambda given: {**options(given), "num_beams": 2},
    )
    _, beams = evaluate(tmp_path / "beams", *settings)
    kept = [sample["kept"] for sample in beams]
    assert kept == [sample["kept"] for sample in greedy]
    assert len({str(its) for its in kept}) > 1
    assert {len(its[0]) for its in kept} == {beams[0]["visual_tokens"][-1]}


def test_answers_end_where_the_task_says(visionzip, tmp_path, monkeypatch):
    decode = Session.decode
    monkeypatch.setattr(
        Session,
        "decode",
        lambda self, ids: [f" {text} \nUSER: {text}" for text in decode(self, ids)],
    )
    generate = chat_model.ZipEval.generate_until

    def with_stops(self, requests):
        for request in requests:
            request.arguments[2]["until"] = ["USER", "\n", ""]
        return generate(self, requests)

    monkeypatch.setattr(chat_model.ZipEval, "generate_until", with_stops)
    _, samples = evaluate(tmp_path, "method=visionzip", "tokens=16")
    assert [s["prediction"] for s in samples] == [s["prediction"] for s in visionzip[1]]


def test_media_that_the_model_does_not_take_are_refused():
    video = [
        {
            "role": "user",
            "content": [
                {"type": "video", "url": "a.mp4"},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ]
    with pytest.raises(UsageError, match="video"):
        Session(compose([])).decoded(video)


@pytest.mark.parametrize(
    "held", ["quantization=8bit", "quantization=4bit", "device_map=auto"]
)
def test_reduction_of_weights_that_are_held_otherwise(held, visionzip, tmp_path):
    """The quantised layers answer nearly as those that they are made of, and leave as many tokens."""
    if "bit" in held:
        pytest.importorskip("bitsandbytes")
    record, samples = evaluate(
        tmp_path, "method=visionzip", "tokens=16", f"model.{held}"
    )
    name, value = held.split("=")
    assert record["resolved"][name] == record["config"]["model"][name] == value
    assert [s["visual_tokens"] for s in samples] == [[16] * 6] * LIMIT
    same = [
        s["prediction"] == v["prediction"]
        for s, v in zip(samples, visionzip[1], strict=True)
    ]
    assert sum(same) >= 0.8 * LIMIT


def out_of_memory(monkeypatch, fits):
    """The sizes of the batches that are tried, of which those above `fits(number of the call)` raise as CUDA does."""
    generate, sizes = LlavaForConditionalGeneration.generate, []

    def exhausted(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > fits(len(sizes)):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB."
            )
        return generate(self, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", exhausted)
    return sizes


@pytest.mark.parametrize("reuse", ["none", "features", "prefix"])
def test_a_batch_that_does_not_fit_is_halved_and_not_lost(
    reuse, visionzip, tmp_path, monkeypatch, capsys
):
    sizes = out_of_memory(monkeypatch, lambda call: 20 if call < 3 else 10)
    _, samples = evaluate(
        tmp_path, "method=visionzip", "tokens=16", f"runner.reuse={reuse}"
    )
    assert samples == visionzip[1]
    assert sizes == [32, 16, 16, 8, 8, 8, 8]
    assert "cpu ran out of memory: batch_size=8 from here on" in capsys.readouterr().err


def test_failures_do_not_end_a_run_early(vanilla, tmp_path, monkeypatch):
    """The longest questions are asked first: more of them than wait together."""
    messages, lengths = (
        chat_model.ZipEval.messages,
        [s["prompt_tokens"] for s in vanilla[1][:12]],
    )
    good = lengths.index(min(lengths))

    def broken(self, request):
        if request.args[3] != good:
            raise MediaError("an image cannot be decoded (it is cut off)")
        return messages(self, request)

    monkeypatch.setattr(chat_model.ZipEval, "messages", broken)
    record, samples = evaluate(tmp_path, "limit=12", "batch_size=1")
    assert record["failed"] == 11
    assert samples[good] == vanilla[1][good]


def test_what_is_drawn_for_a_prompt_does_not_depend_on_others(tmp_path, monkeypatch):
    generate = chat_model.ZipEval.generate_until

    def drawing(self, requests):
        for request in requests:
            request.arguments[2].update(do_sample=True, temperature=5.0)
        return generate(self, requests)

    monkeypatch.setattr(chat_model.ZipEval, "generate_until", drawing)
    answers = [
        [
            s["prediction"]
            for s in evaluate(tmp_path / str(number), "limit=10", *settings)[1]
        ]
        for number, settings in enumerate(
            (["batch_size=32"], ["batch_size=5"], ["runner.reuse=prefix"], ["seed=1"])
        )
    ]
    assert answers[0] == answers[1] == answers[2] != answers[3]
    assert len({*answers[0]}) > 5


def test_out_of_memory_with_one_prompt_says_what_to_run_next(
    tmp_path, monkeypatch, capsys
):
    sizes = out_of_memory(monkeypatch, lambda call: 6 if call == 1 else 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["zipeval", "run", "batch_size=6", "limit=12", "method=vanilla"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert (end.value.code, sizes) == (2, [6, 6, 3, 1])
    assert "zipeval: batch_size=1: cpu ran out of memory with a single prompt" in said
    assert "model.quantization=4bit" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("results/**/*.json"))


def test_run_ids_tell_apart_what_changes_answers(tmp_path):
    def identity(*overrides):
        return Session(compose(["method=visionzip", "tokens=16", *overrides])).run_id

    base = identity()
    assert base == identity(
        f"results={tmp_path}",
        "logger=wandb",
        "batch_size=1",
        "tasks=[pope]",
        "model.device=cpu",
    )
    assert base == identity(
        "model.revision=abc", "model.hub=a/b"
    )  # the fingerprint says which weights they are
    changes = [
        "tokens=32",
        "budget=mean",
        "limit=3",
        "seed=1",
        "model.dtype=bfloat16",
        "model.quantization=8bit",
        "model.quantization=4bit",
        "model.device_map=auto",
        "method.dominant=10",
        "method=random",
    ]
    assert len({base, *map(identity, changes)}) == 1 + len(changes)
    assert (
        Session(compose(["tokens=16"])).run_id == Session(compose([])).run_id
    )  # vanilla has no budget


def test_lmms_eval_itself_gives_the_same_numbers(visionzip, tmp_path):
    """Through the entry point, in lmms-eval's own process and command line."""
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "zipeval",
        "--batch_size",
        "16",
    ]
    command += [
        "--model_args",
        "model=tiny_llava,method=visionzip,tokens=16",
        "--tasks",
        "zipeval_shapes",
    ]
    command += [
        "--include_path",
        zipeval.tasks.__path__[0],
        "--limit",
        str(LIMIT),
        "--output_path",
        "out",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (path,) = Path(tmp_path, "out").glob("**/*_results.json")
    theirs = json.loads(path.read_text())["results"]["zipeval_shapes"]
    ours = visionzip[0]["metrics"]
    assert {name: theirs[f"{name},none"] for name in ours} == pytest.approx(
        ours, abs=1e-12
    )


def test_a_local_llava15(tmp_path):
    """A random checkpoint with LLaVA-1.5's 576 visual tokens stands in for the 7B weights: the same loading code."""
    checkpoint = save_llava15(tmp_path / "llava")
    command = [
        sys.executable,
        "-m",
        "zipeval",
        "run",
        "model=llava15",
        f"model.path={checkpoint}",
    ]
    command += [
        "suite=shapes",
        "method=visionzip",
        "tokens=64",
        "limit=3",
        "bound=none",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (record,) = records.read_all(str(tmp_path / "results/runs"))
    assert record["visual_tokens"]["entering"] == [64.0] * 3
    assert record["config"]["model"]["path"] == str(checkpoint)


def test_a_killed_sweep_leaves_whole_records_only_and_can_be_repeated(tmp_path):
    """SIGKILL as soon as the first run's record is there, while the second run is under way."""
    command = [
        sys.executable,
        "-m",
        "zipeval",
        "run",
        "-m",
        "method=visionzip",
        "tokens=16,32",
        "limit=64",
    ]
    command += ["bound=none"]
    results = tmp_path / "results/runs"
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list(results.glob("*/*s.json")):
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    (record,) = records.read_all(str(results))
    first = Path(record["path"])
    assert len(records.read_samples(first.parent, record)) == 64
    before = first.read_bytes()
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "kept" in done.stdout
    assert first.read_bytes() == before
    for record in (found := records.read_all(str(results))):
        assert len(records.read_samples(Path(record["path"]).parent, record)) == 64
    assert len(found) == 2


def test_registered_with_lmms_eval():
    script = "import lmms_eval.models as m; print(m.get_model('zipeval').__module__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().splitlines()[-1] == "zipeval.evaluation.chat_model"
    assert "Failed" not in done.stdout + done.stderr
