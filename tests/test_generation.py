"""A task's generation_kwargs: each has its effect, or none for a reason that is recorded, or is refused."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from lmms_eval.api.instance import Instance
from own_tasks import write_task

from zipeval import benchmarks
from zipeval.benchmarks import lmms_names
from zipeval.benchmarks.lmms_names import RequestKey
from zipeval.cli import compose
from zipeval.errors import Stopped, UsageError
from zipeval.evaluation import chat_model, repeats
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.runner import evaluate, run
from zipeval.inference.generation import recorded, resolve
from zipeval.inference.session import Session
from zipeval.results import records
from zipeval.results.journal import Journal

GREEDY = {
    "num_beams": 1,
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
SAMPLED = {
    "num_beams": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": None,
    "top_k": None,
}
DRAWN = "{max_new_tokens: 6, do_sample: true, temperature: 5.0}"
EIGHT = "repeats: 8\nfilter_list: [{name: none, filter: [{function: take_first_k, k: 8}]}]\n"
DISTINCT = "return {'acc': float(len(set(results)))}"


@pytest.fixture
def ask(tmp_path):
    """(generation_kwargs, ...) -> (record, samples) of six questions."""

    def answer(generation, *overrides, **task):
        file = write_task(tmp_path, "own", generation, **task)
        return evaluate(
            ZipEval(Session(compose(["method=vanilla", *overrides]))),
            "own",
            file.parent,
        )

    return answer


def predictions(answered):
    return [sample["prediction"] for sample in answered[1]]


@pytest.mark.parametrize(
    "settings, arguments",
    [
        ({}, {"max_new_tokens": 1024, **GREEDY}),
        ({"max_gen_toks": 7}, {"max_new_tokens": 7, **GREEDY}),
        (
            {"max_new_tokens": 8, "max_gen_toks": 2, "max_tokens": 4},
            {"max_new_tokens": 2, **GREEDY},
        ),
        ({"max_new_tokens": "16"}, {"max_new_tokens": 16, **GREEDY}),
        (
            {"max_new_tokens": None, "do_sample": None},
            {"max_new_tokens": 1024, **GREEDY},
        ),
        (
            {"min_new_tokens": 3, "min_tokens": 5},
            {"max_new_tokens": 1024, "min_new_tokens": 5, **GREEDY},
        ),
        (
            {"repetition_penalty": 1.2},
            {"max_new_tokens": 1024, "repetition_penalty": 1.2, **GREEDY},
        ),
        (
            {"no_repeat_ngram_size": 3},
            {"max_new_tokens": 1024, "no_repeat_ngram_size": 3, **GREEDY},
        ),
        ({"do_sample": True}, {"max_new_tokens": 1024, **SAMPLED}),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 1024, **GREEDY}),
        ({"do_sample": False, "temperature": 0.2}, {"max_new_tokens": 1024, **GREEDY}),
        ({"temperature": 0.2}, {"max_new_tokens": 1024, **SAMPLED, "temperature": 0.2}),
        (
            {"do_sample": True, "top_p": 0.9, "top_k": 5},
            {"max_new_tokens": 1024, **SAMPLED, "top_p": 0.9, "top_k": 5},
        ),
        (
            {"temperature": 2, "min_p": 0.1},
            {"max_new_tokens": 1024, **SAMPLED, "temperature": 2.0, "min_p": 0.1},
        ),
        ({"top_p": 0.9}, {"max_new_tokens": 1024, **GREEDY}),
        (
            {"num_beams": 3, "length_penalty": 2, "early_stopping": True},
            {
                "max_new_tokens": 1024,
                **GREEDY,
                "num_beams": 3,
                "length_penalty": 2.0,
                "early_stopping": True,
            },
        ),
        ({"length_penalty": 2}, {"max_new_tokens": 1024, **GREEDY}),
    ],
    ids=str,
)
def test_settings_become_arguments_of_generate(settings, arguments):
    assert resolve(settings).arguments == arguments


@pytest.mark.parametrize(
    "settings, named, reason",
    [
        (
            {"eos_token_id": 2},
            "eos_token_id=2",
            "zipeval passes on no such setting. It knows max_new_tokens,",
        ),
        ({"max_length": 100}, "max_length=100", "zipeval passes on no such setting"),
        ({"history": False}, "history=False", "zipeval passes on no such setting"),
        (
            {"max_new_tokens": 0},
            "max_new_tokens=0",
            "it has to be an integer from 1 on",
        ),
        (
            {"max_new_tokens": 1.5},
            "max_new_tokens=1.5",
            "it has to be an integer from 1 on",
        ),
        (
            {"max_new_tokens": True},
            "max_new_tokens=True",
            "it has to be an integer from 1 on",
        ),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens=9",
            "an answer has at most 8 tokens",
        ),
        ({"temperature": -1}, "temperature=-1", "it has to be a number from 0 on"),
        (
            {"temperature": "hot"},
            "temperature='hot'",
            "it has to be a number from 0 on",
        ),
        (
            {"temperature": float("nan")},
            "temperature=nan",
            "it has to be a number from 0 on",
        ),
        ({"top_p": 1.5}, "top_p=1.5", "it has to be a number from 0 to 1"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty=0",
            "it has to be a number above 0",
        ),
        ({"do_sample": "no"}, "do_sample='no'", "it has to be true or false"),
        ({"until": 3}, "until=3", "it has to be a text or a list of texts"),
        (
            {"stop_sequences": ["a", 1]},
            "stop_sequences=['a', 1]",
            "it has to be a text or a list of texts",
        ),
    ],
    ids=str,
)
def test_others_are_refused_by_task_name_and_value(settings, named, reason):
    with pytest.raises(UsageError) as raised:
        resolve(settings, "own")
    message = str(raised.value)
    assert message.startswith(f"tasks=[own]: generation_kwargs has {named}: {reason}")
    assert message.endswith(
        "Nothing was answered. Change it in the task's YAML file and run this again."
    )


@pytest.mark.parametrize(
    "settings, stops",
    [
        ({"until": "</s>"}, ["</s>"]),
        ({"until": ["</s>", ""]}, ["</s>"]),
        ({"until": None}, []),
        (
            {"until": ["\n\n"], "stop_sequences": ["\n"], "stop": "Q:"},
            ["\n\n", "\n", "Q:"],
        ),
    ],
)
def test_a_text_is_one_stop_and_all_names_hold(settings, stops):
    assert resolve(settings).stops == stops


def test_what_has_no_effect_is_recorded_with_the_reason():
    generation = resolve(
        {
            "top_p": 1.0,
            "temperature": 0.7,
            "do_sample": False,
            "image_aspect_ratio": "pad",
        }
    )
    reasons = {
        name: entry["reason"] for name, entry in generation.without_effect.items()
    }
    assert reasons == {
        "top_p": "answers are not sampled",
        "temperature": "answers are not sampled",
        "image_aspect_ratio": "model.image_aspect= of the run says how images are prepared",
    }
    assert sorted(generation.notes()) == [
        f"image_aspect_ratio=pad has no effect, as {reasons['image_aspect_ratio']}",
        "temperature=0.7 has no effect, as answers are not sampled",
    ]
    assert generation.record()["without_effect"]["top_p"]["value"] == 1.0
    assert (
        recorded({"history": False, "until": []}, 4).items()
        >= {"history": False, "repeats": 4}.items()
    )


def test_every_setting_of_every_task_of_lmms_eval_is_known_or_refused():
    """What occurs in lmms-eval 0.7.3 and here; one that is new there has to be decided on."""
    names, refused, sampled = Counter(), Counter(), []
    for task, (kind, file) in benchmarks.task_files().items():
        if kind == "group" or task in benchmarks.BENCHMARKS:
            continue
        settings, conversation = lmms_names.generation_settings(file, {})
        names.update(settings.keys())
        try:
            generation = resolve(settings, task, conversation)
        except UsageError as error:
            refused[str(error).partition("has ")[2].partition("=")[0]] += 1
        else:
            sampled += (
                [task]
                if generation.is_sampled and not settings.get("do_sample")
                else []
            )
    assert {*names} == {
        *(
            "max_new_tokens",
            "until",
            "stop_sequences",
            "num_beams",
            "do_sample",
            "temperature",
            "top_p",
            "top_k",
        ),
        *(
            "repetition_penalty",
            "seed",
            "image_aspect_ratio",
            "visual_cot",
            "max_agentic_steps",
            "skip_special_tokens",
        ),
    }
    assert names["stop_sequences"] == 30
    # Each belongs to models that draw, call tools, or show their special tokens.
    assert refused == {
        "visual_cot": 31,
        "max_agentic_steps": 2,
        "skip_special_tokens": 1,
    }
    # Their temperature alone samples, as with lmms-eval's own models.
    assert sampled == [
        *(f"air_bench_chat_{kind}" for kind in ("mixed", "music", "sound", "speech")),
        *("alpaca_audio", "emma", "emma-mini", "lsdbench", "openhermes"),
    ]


LENGTHS = {
    **{
        "zipeval_shapes": 8,
        "gqa": 16,
        "mmbench_en_dev": 1024,
        "mme": 16,
        "pope": 128,
        "scienceqa_img": 16,
    },
    **{
        "vqav2_val": 16,
        "textvqa_val": 128,
        "mmmu_val": 128,
        "seedbench": 128,
        "mmvet": 1024,
        "vizwiz_vqa_val": 128,
    },
    **{
        "llava_in_the_wild": 1024,
        "zipeval_tgif_qa": 1024,
        "zipeval_msvd_qa": 1024,
        "zipeval_msrvtt_qa": 1024,
    },
    **{
        "zipeval_activitynet_qa": 1024,
        "zipeval_shapes_turns": 8,
        "zipeval_shapes_turns_no_history": 8,
    },
    **{
        f"zipeval_{name}_turns{end}": 16
        for name in ("gqa", "pope")
        for end in ("", "_no_history")
    },
}
CUT = (
    "mmbench_en_dev",
    "textvqa_val",
    "seedbench",
    "llava_in_the_wild",
    "vizwiz_vqa_val",
)


def test_the_papers_benchmarks_are_answered_as_before():
    resolved = {}
    for task, known in benchmarks.BENCHMARKS.items():
        settings, conversation = lmms_names.generation_settings(
            benchmarks.task_files()[task][1], known.settings
        )
        resolved[task] = resolve(settings, task, conversation)
    assert {
        task: generation.arguments["max_new_tokens"]
        for task, generation in resolved.items()
    } == LENGTHS
    for task, generation in resolved.items():
        assert generation.arguments == {**GREEDY, "max_new_tokens": LENGTHS[task]}
        assert generation.stops == (["ASSISTANT:"] if task in CUT else [])
        assert generation.notes() == (
            ["temperature=0.2 has no effect, as answers are not sampled"]
            if task == "mmvet"
            else []
        )


def test_a_yaml_is_read_as_lmms_eval_reads_it(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "output_type: generate_until\ngeneration_kwargs: {top_k: 3}\n"
    )
    (tmp_path / "a.yaml").write_text(
        "include: base.yaml\ndoc_to_text: !function utils.text\n"
        "model_specific_generation_kwargs: {default: {max_new_tokens: 2}, llava: {top_p: 0.1}}\n"
    )
    assert lmms_names.generation_settings(tmp_path / "a.yaml", {}) == (
        {"top_k": 3, "max_new_tokens": 2},
        False,
    )
    replaced = {
        "generation_kwargs": {"max_new_tokens": 5, "until": []},
        "output_type": lmms_names.MULTI_ROUND,
    }
    assert lmms_names.generation_settings(tmp_path / "a.yaml", replaced) == (
        {"max_new_tokens": 2, "until": []},
        True,
    )
    (tmp_path / "a.yaml").write_text("task: [")
    with pytest.raises(UsageError, match=r"a\.yaml cannot be read"):
        lmms_names.generation_settings(tmp_path / "a.yaml", {})


def test_one_stop_as_a_text_cuts_as_a_list_of_it(ask):
    as_list = ask('{max_new_tokens: 8, until: ["</s>"]}')
    as_text = ask('{max_new_tokens: 8, until: "</s>"}')
    assert predictions(as_text) == predictions(as_list)
    assert as_text[0]["generation"]["until"] == ["</s>"]


def test_settings_change_answers_and_are_recorded(ask):
    plain = ask("{max_new_tokens: 8}")
    assert plain[0]["generation"] == {
        "max_new_tokens": 8,
        **GREEDY,
        "seed": 0,
        "until": ["\n\n"],  # lmms-eval's own, for a task that names no stop
        "without_effect": {},
        "repeats": 1,
    }
    longer = ask("{max_new_tokens: 8, min_new_tokens: 8}")
    assert {sample["output_tokens"] for sample in longer[1]} == {8}
    penalised = ask("{max_new_tokens: 8, min_new_tokens: 8, repetition_penalty: 50.0}")
    assert predictions(penalised) != predictions(longer)
    cut = ask('{max_new_tokens: 8, stop_sequences: ["o"]}')
    assert (
        predictions(cut)
        == [text.split("o")[0].strip() for text in predictions(plain)]
        != predictions(plain)
    )
    assert {sample["output_tokens"] for sample in ask("{max_gen_toks: 1}")[1]} == {1}
    drawn = ask("{max_new_tokens: 8, do_sample: true, top_k: 0}")
    assert drawn[0]["generation"]["do_sample"] is True
    assert drawn[0]["generation"]["temperature"] == 1


@pytest.mark.parametrize("reuse", ["none", "prefix"])
def test_a_penalty_on_repetition_takes_no_notice_of_a_batch(ask, reuse):
    """It looks at whole rows, and so at the padding in front of them."""
    generation = "{max_new_tokens: 8, min_new_tokens: 8, repetition_penalty: 1.5, no_repeat_ngram_size: 2}"
    alone = ask(generation, "batch_size=1", "runner.reuse=none")
    assert predictions(
        ask(generation, "batch_size=6", f"runner.reuse={reuse}")
    ) == predictions(alone)


def test_an_unknown_setting_is_refused_before_the_model_is_loaded(
    ask, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        Session, "load", lambda self: pytest.fail("the weights are read")
    )
    with pytest.raises(
        UsageError,
        match=r"tasks=\[own\]: generation_kwargs has guidance_scale=3: zipeval passes on no",
    ):
        ask("{max_new_tokens: 8, guidance_scale: 3}")
    monkeypatch.setattr(
        benchmarks, "task_files", lambda: {"own": ("task", tmp_path / "own.yaml")}
    )
    monkeypatch.setattr(
        "zipeval.inference.session.Session",
        lambda config, checkpoint: pytest.fail("torch is imported"),
    )
    with pytest.raises(
        UsageError, match=r"tasks=\[own\]: generation_kwargs has guidance_scale=3"
    ):
        run(compose(["tasks=[own]", f"results={tmp_path}/runs"]))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """(directory, ...) -> (record, samples) of a run of the task that draws eight answers to each question."""
    file = write_task(
        tmp_path / "task", "own", DRAWN, samples=3, process=DISTINCT, more=EIGHT
    )
    monkeypatch.setattr(benchmarks, "task_files", lambda: {"own": ("task", file)})

    def answered(directory, *overrides):
        (path,) = run(
            compose(
                [
                    "tasks=[own]",
                    "method=vanilla",
                    f"results={tmp_path}/{directory}",
                    *overrides,
                ]
            )
        )
        record = records.read(path)
        return record, records.read_samples(path.parent, record)

    return answered


def test_repeats_are_different_draws_that_the_seed_reproduces(runs):
    record, samples = runs("first")
    texts = predictions((record, samples))
    assert record["score"] > 6  # different ones of eight
    assert record["generation"]["repeats"] == 8
    assert [len(sample["answers"]) for sample in samples] == [8, 8, 8]
    for sample in samples:
        assert [answer["text"] for answer in sample["answers"]] == sample["prediction"]
        assert (
            sum(answer["output_tokens"] for answer in sample["answers"])
            == sample["output_tokens"]
        )
        assert {*sample["answers"][0]} <= {"text", *repeats.ALWAYS}
    others = (["batch_size=5"], ["runner.reuse=prefix", "runner.workers=1"])
    for number, overrides in enumerate(others):
        assert predictions(runs(f"other{number}", *overrides)) == texts
    assert predictions(runs("seeded", "seed=1")) != texts


def test_repeats_go_on_where_a_run_was_stopped(runs, monkeypatch):
    whole, appended = runs("whole"), []
    append = Journal.append

    def then_stop(self, answers):
        append(self, answers)
        appended.extend((answer["doc_id"], answer["number"]) for answer in answers)
        if len(appended) == 11:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "append", then_stop)
    with pytest.raises(Stopped):
        runs("stopped")
    assert len({*appended}) == 11
    resumed = runs("stopped")
    assert len(appended) == len({*appended}) == 24  # none was answered twice
    assert predictions(resumed) == predictions(whole)
    for sample, other in zip(resumed[1], whole[1], strict=True):
        assert [answer["output_tokens"] for answer in sample["answers"]] == [
            answer["output_tokens"] for answer in other["answers"]
        ]


def test_greedy_repeats_are_equal_and_counted(ask):
    record, samples = ask(
        "{max_new_tokens: 8}", samples=2, process=DISTINCT, more=EIGHT
    )
    assert record["score"] == 1
    assert [len(sample["answers"]) for sample in samples] == [8, 8]


def test_the_first_draw_is_that_of_a_question_without_repeats(ask):
    once = ask(DRAWN, samples=3)
    often = ask(DRAWN, samples=3, process=DISTINCT, more=EIGHT)
    assert [texts[0] for texts in predictions(often)] == predictions(once)
    assert "answers" not in once[1][0]


def request(doc_id, context):
    metadata = {"task": "own", "doc_id": doc_id, "repeats": 1}
    return Instance(
        "generate_until",
        (context, lambda doc: [], {}, doc_id, "own", "test"),
        0,
        metadata,
    )


def test_requests_about_one_document_are_told_apart():
    """Repeats are one object to lmms-eval; a task may also ask several questions about a document."""
    first, second, other = (
        request(3, "Is it red?"),
        request(3, "Is it round?"),
        request(4, "Is it red?"),
    )
    numbered = lmms_names.numbered([first, first, other, second])
    assert [RequestKey.of(clone)[1:] for clone in numbered] == [
        (3, 0),
        (3, 1),
        (4, 0),
        (3, 2),
    ]
    assert [clone.args[0] for clone in numbered] == [
        "Is it red?",
        "Is it red?",
        "Is it red?",
        "Is it round?",
    ]
    assert lmms_names.numbered(numbered[1:]) == numbered[1:]
    assert lmms_names.NUMBER not in first.metadata
    seeds = {chat_model._seed(RequestKey.of(clone), 0) for clone in numbered}
    assert len(seeds) == 4


def test_a_sample_of_which_one_prompt_could_not_be_read_has_failed():
    cost = {"output_tokens": 2, "latency": 1.0, "batch": 2, "prompt_tokens": 9}
    measured = {
        RequestKey("own", 0, 1): {
            **cost,
            "prompt_tokens": 8,
            "output_tokens": 3,
            "batch": 1,
        },
        RequestKey("own", 0, 0): dict(cost),
        RequestKey("own", 1, 0): dict(cost),
        RequestKey("own", 1, 1): {"error": "cut off", "batch": 1},
        RequestKey("another", 1, 0): dict(cost),
    }
    costs = repeats.by_document(measured, "own")
    assert [*measured] == [("another", 1, 0)]
    assert repeats.merged(costs[0], ["a", "b"]) == {
        **cost,
        "output_tokens": 5,
        "latency": 3.0,  # 1.5 s of its own, in a batch of two
        "answers": [
            {"text": "a", "output_tokens": 2, "latency": 1.0, "batch": 2},
            {
                "text": "b",
                "output_tokens": 3,
                "latency": 1.0,
                "batch": 1,
                "prompt_tokens": 8,
            },
        ],
    }
    assert repeats.merged(costs[1], ["a", ""]) == {
        "error": "cut off",
        "batch": 1,
        "answers": [
            {"text": "a", **cost},
            {"text": "", "batch": 1},
        ],  # the one that could be read is not lost
    }
