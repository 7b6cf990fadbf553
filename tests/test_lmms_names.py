"""What lmms-eval gives a model, and a word where that is not what it was."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from lmms_eval.api.instance import Instance

from zipeval.benchmarks import lmms_names
from zipeval.benchmarks.lmms_names import RequestArgs
from zipeval.cli import compose
from zipeval.errors import IncompatibleError
from zipeval.evaluation.chat_model import ZipEval
from zipeval.inference.session import Session

ARGS = (
    "Is it red?",
    lambda doc: [],
    {"max_new_tokens": 8},
    3,
    "zipeval_shapes",
    "test",
)
OTHERS = {
    "one more": (
        (*ARGS, None),
        "a request has 7 arguments (str, function, dict, int, str, str, NoneType)",
    ),
    "one less": (ARGS[:-1], "a request has 5 arguments"),
    "another order": (
        (ARGS[0], ARGS[2], ARGS[1], *ARGS[3:]),
        "a request's doc_to_messages is a dict",
    ),
    "another type": ((*ARGS[:3], "3", *ARGS[4:]), "a request's doc_id is a str"),
}


def request(arguments):
    metadata = {"task": "zipeval_shapes", "doc_id": 3, "repeats": 1}
    return Instance(
        request_type="generate_until", arguments=arguments, idx=0, metadata=metadata
    )


def test_the_arguments_of_a_request_have_names():
    args = RequestArgs.of(request(ARGS))
    assert args == ARGS
    assert (args.context, args.gen_kwargs["max_new_tokens"], args.split) == (
        "Is it red?",
        8,
        "test",
    )
    assert args.place == ("zipeval_shapes", 3)
    assert not lmms_names.is_conversation(request(ARGS))


@pytest.mark.parametrize("arguments, problem", OTHERS.values(), ids=OTHERS)
def test_others_end_in_one_sentence(arguments, problem):
    with pytest.raises(IncompatibleError) as raised:
        RequestArgs.of(request(arguments))
    told = str(raised.value)
    assert told.startswith(f"lmms-eval {version('lmms-eval')}: {problem}")
    assert (
        "where lmms-eval 0.7.3, which zipeval is tested with, gives context, doc_to_messages, gen_kwargs"
        in told
    )
    assert "`pip install lmms-eval==0.7.3`" in told


def test_a_model_stops_at_them():
    model = ZipEval(Session(compose(["limit=1"])))
    with pytest.raises(IncompatibleError, match="a request has 7 arguments"):
        model.generate_until([request((*ARGS, None))])


def test_without_lmms_eval_there_are_no_tasks(monkeypatch):
    monkeypatch.setattr(lmms_names, "find_spec", lambda name: None)
    with pytest.raises(IncompatibleError, match="lmms-eval is not installed"):
        lmms_names.tasks_folder()
