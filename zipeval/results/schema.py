"""The schema of records and of their samples: every field, with its meaning and its unit.

Both are plain dicts while a run goes on and JSON on the disk. These classes say what is in them; nothing is converted.
`tests/test_schema.py` holds what a run writes to them. Records of schemas 4 and 5, which are read too, lack some of it.
"""

from __future__ import annotations

from typing import Any, TypedDict


class VisualTokens(TypedDict):
    """Visual tokens of a record, means over its samples."""

    # What was asked for by `tokens=`; None is all of them.
    requested: int | None
    # Where they are counted, as `budget=` says.
    budget: str
    # Patches that the vision encoder cuts a crop into.
    patches: int
    # Entering a decoder layer, the mean over layers; and entering the last layer.
    mean: float
    final: float
    # [layers]: entering each decoder layer.
    entering: list[float]


class Prefill(TypedDict):
    """Cost of reading a prompt, means over the samples of a record."""

    # Text and visual tokens that enter the first decoder layer.
    prompt_tokens: float
    # Entries of the key-value cache, summed over layers.
    kv_entries: float
    # Operations of the decoder: by VisionZip's formula (section 2.1), and counted matrix by
    # matrix; see zipeval/engine/flops.py.
    flops_formula: float
    flops_exact: float


class SamplesFile(TypedDict):
    """The file beside a record that holds its samples, one JSON object a line."""

    file: str
    count: int
    # Of the file's bytes, so that a change is noticed.
    sha256: str


class _FieldsOfSome(TypedDict, total=False):
    """Fields that only some records have."""

    # Where the record was read from; it is not in the file.
    path: str
    # Answers that wait for a judge's verdict.
    unscored: int
    # Whether a larger value is better, of the score and of each metric. A judged record has
    # neither: its scores are always better when larger.
    higher_is_better: bool
    directions: dict[str, bool]
    # Whether the score follows from the samples' scores, so that it can be checked and
    # intervals be drawn.
    from_samples: bool
    # Who works on it, one entry for each process that answered some of the questions.
    sessions: list[dict[str, Any]]


class Record(_FieldsOfSome):
    """A run of one method on one task, as `results/runs/RUN_ID/TASK.json` holds it."""

    # Version of this schema; `zipeval.results.records.READABLE` lists those that are read.
    schema: int
    # Name of the run's folder: model, method, tokens and a hash of all that answers
    # depend on by configuration.
    run_id: str
    task: str

    # What answers depend on beside the configuration. A run that goes on after one of
    # them changed would mix two experiments, so that it is refused.
    task_hash: str
    # None where the data lie beside their task, whose hash is of them too.
    data_hash: str | None
    code: str
    versions: dict[str, str | None]
    # Commits on the hub; None for what did not come from there.
    data_revision: str | None
    model_revision: str | None
    # Of zipeval's own sources; None for an installed wheel.
    git: dict[str, Any] | None

    # The settings as they were given, and what became of them: device, dtype, attention,
    # fingerprint of the weights.
    config: dict[str, Any]
    resolved: dict[str, Any]
    # How answers are generated, and the settings that had no effect.
    generation: dict[str, Any]

    # Where it ran, on how many devices, and what its prompts shared. Two equal runs may
    # differ in these.
    machine: dict[str, Any]
    processes: int
    reuse: str
    # UTC; seconds are those of all sessions.
    started: str
    ended: str
    seconds: float

    # "incomplete" while answers wait for a judge, "success" otherwise.
    status: str
    # Samples that could not be read: their answers are empty.
    failed: int
    # Samples whose prompt is longer than the decoder has positions.
    overflowed: int
    # Name of the metric that `score` is the value of, and every metric of the task. None
    # where nothing was judged yet.
    metric: str
    score: float | None
    metrics: dict[str, float]

    visual_tokens: VisualTokens
    prefill: Prefill
    samples: SamplesFile


class _MeasuredOfSample(TypedDict, total=False):
    """Measurements of answering a sample. One that failed has none of them but `answers`."""

    # Hashes of the prompt's pictures as the model saw them, and the crops of each.
    pictures: list[str]
    crops: list[int]
    # [layers]: entering each decoder layer.
    visual_tokens: list[int]
    prompt_tokens: int
    kv_entries: int
    flops_formula: int
    flops_exact: int
    output_tokens: int
    # Tokens by which the prompt exceeds the decoder's positions.
    overflow: int
    # [pictures][tokens]: positions of the visual tokens that a method left as they were,
    # and of those into which it merged others. A method that removes nothing has neither.
    kept: list[list[int]]
    merged: list[list[int]]
    # The first token's largest logit and the log-sum-exp, by which the regression gate
    # notices what changes no answer.
    digest: dict[str, float]
    # Seconds of the sample's whole batch, and the samples in it: a sample's share is one
    # over the other.
    latency: float
    batch: int
    # Of several answers to one question, each with its text and what is its own.
    answers: list[dict[str, Any]]


class _FieldsOfSomeSamples(TypedDict, total=False):
    """Fields that only some samples have."""

    # Why the sample could not be read or answered.
    error: str
    # Why the answer has no verdict of a judge yet.
    unscored: str
    # Answers that the question names, by letter or in order.
    choices: list[str]
    # The kind of question, and the questions that are scored together.
    kind: Any
    group: Any
    # Of conversations: the answers on a fresh selection, and the number of later rounds.
    fresh: str
    later: int
    # What a judge is shown beside question and answer, by benchmark: MMBench's options,
    # LLaVA-Bench's description of the picture, MM-Vet's capabilities.
    options: dict[str, str]
    context: str
    capabilities: list[str]


class Sample(_MeasuredOfSample, _FieldsOfSomeSamples):
    """A question and its answer: a line of `TASK.samples.jsonl`."""

    # Number of the question in its data set.
    doc_id: int
    # Of question and target: two runs are compared only where these agree.
    question_hash: str
    question: str
    target: Any
    prediction: str
    # Value of the record's main metric; None where there is none for a single sample.
    score: float | None
    # By metric, as lmms-eval logged them.
    scores: dict[str, Any]
