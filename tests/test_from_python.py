"""`zipeval.evaluate`, from a script and from a notebook."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from tiny_methods import snapshot

import zipeval
from zipeval.errors import UsageError
from zipeval.evaluation import from_python
from zipeval.models._in_memory import describe, fingerprint

LIMIT = 12


def evaluate(tmp_path, *arguments, **more):
    settings = {"limit": LIMIT, "results": tmp_path, "runner.workers": 0, **more}
    return zipeval.evaluate(*arguments, **settings)


@pytest.fixture(scope="module")
def loaded():
    return zipeval.load("tiny_llava")


def test_methods_and_budgets_beside_one_upper_bound(tmp_path, capsys):
    runs = evaluate(tmp_path, "tiny_llava", ["vanilla", "visionzip"], tokens=[48, 16])
    rows = [
        (method, None if tokens != tokens else int(tokens))
        for _, method, tokens in runs.table().index
    ]
    assert rows == [("vanilla", None), ("visionzip", 48), ("visionzip", 16)]
    assert len(runs.samples) == 3 * LIMIT
    capsys.readouterr()
    # What is there is read; of the directory's other runs, these results say nothing.
    again = evaluate(tmp_path, "tiny_llava", "visionzip", tokens=16)
    assert capsys.readouterr().out.count("finished before, kept") == 2
    assert len(again.records) == 2 and len(zipeval.read_results(tmp_path).records) == 3


def test_a_model_that_is_loaded_answers_as_the_named_one(tmp_path, loaded):
    model, processor = loaded
    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = "right"
    # transformers leaves hooks of its own on an encoder that is asked for attention weights the first time.
    side = model.config.vision_config.image_size
    model.model.vision_tower(torch.zeros(1, 3, side, side), output_attentions=True)
    before = snapshot(model)
    runs = evaluate(
        tmp_path,
        model,
        ["visionzip", "fastv"],
        tokens=16,
        tasks="zipeval_shapes",
        processor=processor,
        name="mine",
    )
    named = evaluate(tmp_path, "tiny_llava", ["visionzip", "fastv"], tokens=16)
    columns = [
        "method",
        "tokens",
        "doc_id",
        "prediction",
        "score",
        "lost",
        "visual_tokens",
        "prompt_tokens",
    ]
    assert runs.samples[columns].equals(named.samples[columns])
    assert {*runs.records.model} == {"mine"}
    assert snapshot(model) == before and processor.tokenizer.padding_side == "right"


def test_a_model_that_its_user_changes_is_no_runs(tmp_path):
    """A run by name reads the checkpoint's weights, whatever was done to those that `load` gave."""
    before = evaluate(tmp_path / "before", "tiny_llava", "visionzip", tokens=16)
    model, processor = zipeval.load("tiny_llava")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    processor.tokenizer.padding_side = "right"
    after = evaluate(tmp_path / "after", "tiny_llava", "visionzip", tokens=16)
    assert after.samples.prediction.tolist() == before.samples.prediction.tolist()
    assert zipeval.load("tiny_llava")[0].lm_head.weight.any()


def test_a_model_that_changed_is_another_model(tmp_path, loaded):
    """Whatever changes an answer: a weight in the middle, a buffer, the template, a special token, the pictures."""
    model, processor = copy.deepcopy(loaded[0]), copy.deepcopy(loaded[1])
    names = {fingerprint(model, processor), fingerprint(*loaded)}
    assert len(names) == 1

    def changed(count):
        names.add(fingerprint(model, processor))
        assert len(names) == count

    with torch.no_grad():
        model.model.language_model.layers[3].self_attn.q_proj.weight[5, 7] += 1e-3
    changed(2)
    model.model.language_model.rotary_emb.inv_freq[0] *= 2
    changed(3)
    model.generation_config.max_new_tokens = 3
    changed(4)
    processor.chat_template += " "
    changed(5)
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    changed(6)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    changed(7)
    assert describe(model, processor, "m")[1].fingerprint in names


def test_a_model_that_is_loaded_is_refused_where_answers_would_not_be_its_own(
    tmp_path, loaded
):
    model, processor = loaded

    def refused(match, *arguments, **more):
        with pytest.raises(UsageError, match=match):
            evaluate(tmp_path, *arguments, "visionzip", tokens=16, **more)

    refused("processor: a model that is loaded needs", model)
    refused(
        "model: it is in training mode",
        copy.deepcopy(model).train(),
        processor=processor,
    )
    refused("has no tokenizer", model, processor=processor.image_processor)
    refused("Linear is of no family", torch.nn.Linear(2, 2), processor=processor)
    refused(
        "the model is loaded already",
        model,
        processor=processor,
        **{"model.dtype": "float16"},
    )
    refused(
        "no such setting of model", model, processor=processor, **{"model.promt": "hf"}
    )
    refused("model=tiny_llava is a name", "tiny_llava", processor=processor)
    for name in ("llava-hf/mine", "../mine", "..", "a b"):
        refused("it names folders of records", model, processor=processor, name=name)
    refused(
        "mme.* is missing", model, processor=processor, name="mine"
    )  # the suite that fits it
    without = copy.deepcopy(processor)
    without.chat_template = None
    refused("the processor has no chat template", model, processor=without)
    assert not [*tmp_path.iterdir()]


def test_a_model_with_code_of_its_users_is_refused(loaded, monkeypatch):
    """Its answers would be recorded as those of the weights alone, or not be made at all: they are there already."""
    processor = loaded[1]

    def refused(match, change):
        model = copy.deepcopy(loaded[0])
        change(model)
        with pytest.raises(UsageError, match=match):
            describe(model, processor, "m")

    def negated(module, inputs, output):
        return -output

    class Head(torch.nn.Linear):
        pass

    describe(*loaded, "m")  # also with the hooks that transformers leaves
    refused(
        "lm_head has a hook of test_from_python",
        lambda model: model.lm_head.register_forward_hook(negated),
    )
    refused(
        "lm_head has a hook",
        lambda model: model.lm_head.register_forward_pre_hook(
            lambda module, inputs: None
        ),
    )
    refused(
        "lm_head has a forward of",
        lambda model: setattr(model.lm_head, "forward", negated),
    )
    refused(
        "lm_head has a class of", lambda model: setattr(model, "lm_head", Head(2, 2))
    )
    attention = type(loaded[0].model.language_model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", negated)
    refused(r"layers\.0\.self_attn has a forward of", lambda model: None)


def test_what_cannot_be_is_refused_before_anything_is_evaluated(tmp_path, monkeypatch):
    from zipeval.evaluation import runner

    def fail(*_):
        raise AssertionError("evaluated")

    monkeypatch.setattr(runner, "run", fail)
    for match, arguments, settings in (
        ("no such model", ("tiny_lava", "visionzip", 16), {}),
        ("no such method", ("tiny_llava", ["vanilla", "visonzip"], 16), {}),
        ("tokens=999: tiny_llava has 144", ("tiny_llava", "visionzip", [16, 999]), {}),
        ("tokens is not set", ("tiny_llava", "visionzip"), {}),
        (
            "tasks=.*no such task",
            ("tiny_llava", "visionzip", 16),
            {"tasks": ["shaeps"]},
        ),
        ("no such setting", ("tiny_llava", "visionzip", 16), {"batchsize": 8}),
        (
            "method=x: it is given as an argument",
            ("tiny_llava", "visionzip", 16),
            {"method": "x"},
        ),
        ("there is nothing in a list", ("tiny_llava", []), {}),
        ("limit=0", ("tiny_llava", "visionzip", 16), {"limit": 0}),
    ):
        with pytest.raises(UsageError, match=match):
            evaluate(tmp_path, *arguments, **settings)


def test_settings_reach_hydra_as_they_are():
    values = {
        None: "null",
        True: "true",
        16: "16",
        "fastv": "fastv",
        "a b=c,d": "'a b=c,d'",
        "it's": "'it\\'s'",
        "": "''",
    }
    for value, text in values.items():
        assert from_python._hydra_value(value) == text
    assert from_python._hydra_value(["a", 1]) == "[a,1]"


def test_a_method_of_a_directory(tmp_path):
    folder = tmp_path / "my configs" / "method"
    folder.mkdir(parents=True)
    text = "name: mine\n_target_: zipeval.methods.uniform.Uniform\ntokens: ${tokens}\n"
    (folder / "mine.yaml").write_text(text)
    runs = evaluate(
        tmp_path / "runs", "tiny_llava", "mine", tokens=16, config_dir=folder.parent
    )
    assert {*runs.records.method} == {"vanilla", "mine"}


NOTEBOOK = (
    'import zipeval\nruns = zipeval.evaluate("tiny_llava", ["vanilla", "visionzip"], tokens=[48, 16], limit=8)',
    "runs.table(statistics=True)",
    "runs.samples.head()",
    "runs.plot()",
    'zipeval.read_results("results/runs")',
)


def test_a_notebook(tmp_path):
    """Executed by a real kernel: a bar that moves, a table, a frame and a picture."""
    nbclient, nbformat = (
        pytest.importorskip("nbclient"),
        pytest.importorskip("nbformat"),
    )
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in NOTEBOOK]
    )
    # The kernel of this Python, whatever others are installed.
    kernel = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=kernel
    )
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    evaluated, table, samples, plot, read = [cell.outputs for cell in notebook.cells]
    bars = [output.data["text/html"] for output in evaluated if "data" in output]
    assert [bar.count('<progress value="8" max="8"') for bar in bars] == [1, 1, 1]
    assert (
        "<th scope" in table[0].data["text/html"]
        and "95% interval" in table[0].data["text/html"]
    )
    assert "prediction" in samples[0].data["text/html"]
    assert plot[0].data["image/png"].startswith("iVBOR")
    assert "visionzip" in read[0].data["text/html"]
