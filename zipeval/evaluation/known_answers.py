"""Answer a known question of the embedded task with the embedded model, under methods of either stage.

    python -m zipeval.evaluation.known_answers

prints what it answers here, to take the place of `KNOWN` when the weights or the question change. In float32 on a CPU
the answers are those of any version: each of their tokens is ahead of the next by 0.3 or more. The methods drop what
the model would need, and so answer otherwise than vanilla: one that no longer drops anything shows in its words too.
"""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pprint import pprint

# Where is the yellow circle?
TASK, ROW = "zipeval_shapes", 3
MODEL = (
    "model=tiny_llava",
    "model.device=cpu",
    "model.dtype=float32",
    "batch_size=1",
    "runner.workers=0",
)
METHODS = {
    "vanilla": ("method=vanilla",),
    "visionzip": ("method=visionzip", "tokens=16"),
    "fastv": ("method=fastv", "tokens=32"),
}


@dataclass(frozen=True)
class Answer:
    """An answer to the question.

    Attributes:
        text: of the answer in a run, through lmms-eval.
        token_ids: of the answer from Python, by `method.applied(model)` and `generate`.
        visual_tokens: that entered each layer of the decoder.
        positions: of the patches that were left; None for a method that removes none.
    """

    text: str
    token_ids: list[int]
    visual_tokens: list[int]
    positions: list[int] | None


FASTV_POSITIONS = "43 54 55 66 67 87 88 99 100 104 105 111 112 113 115 116 117 123 124 125 127 128 129 136 137 139 140 141"
KNOWN = {
    "vanilla": Answer("bottom right", [387, 382, 1], [144] * 6, None),
    "visionzip": Answer(
        "bottom left",
        [387, 378, 1],
        [16] * 6,
        [16, 28, 54, 55, 66, 67, 99, 100, 111, 112, 116, 128],
    ),
    "fastv": Answer(
        "bottom left",
        [387, 378, 1],
        [144, *[28] * 5],
        list(map(int, FASTV_POSITIONS.split())),
    ),
}


def answer(method: str) -> Answer:
    """Answer the question under one of `METHODS`: in a run of nothing else, and from Python.

    Raises:
        Exception: whatever a package raises that does not fit.
    """
    from zipeval.benchmarks import task_folder
    from zipeval.benchmarks.lmms_names import RequestArgs
    from zipeval.config.compose import compose
    from zipeval.evaluation.chat_model import ZipEval
    from zipeval.evaluation.runner import evaluate
    from zipeval.inference.session import Session

    session = Session(compose([*MODEL, *METHODS[method], f"limit={ROW + 1}"]))
    model = ZipEval(session)
    requests = {}

    def note_requests(batch: list[tuple]) -> None:
        for request, _ in batch:
            requests[RequestArgs.of(request).doc_id] = request

    model.keep = note_requests
    # Without the progress, and what lmms-eval says of itself.
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        _, samples = evaluate(model, TASK, task_folder(TASK))
    # lmms-eval asks all questions up to this one.
    by_doc_id = {sample["doc_id"]: sample for sample in samples}
    sample, request = by_doc_id[ROW], requests[ROW]
    token_ids = _generate(session, model.messages(request))
    # Of the only picture.
    positions = sample["kept"][0] if "kept" in sample else None
    return Answer(sample["prediction"], token_ids, sample["visual_tokens"], positions)


def _generate(session, messages: list[dict]) -> list[int]:
    """Return the token ids of an answer to chat messages, as zipeval is used from Python."""
    import torch

    model, _ = session.load()
    inputs = session.inputs([session.decoded(messages)])
    with torch.inference_mode(), session.method.applied(model):
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return generated[0, inputs["input_ids"].shape[1] :].tolist()


def differences() -> list[str]:
    """Answer the question under every method, and say where an answer is not the known one.

    Raises:
        Exception: whatever a package raises that does not fit.
    """
    import torch

    # More of them take ten times as long for so small a model.
    torch.set_num_threads(1)
    messages = []
    for method, known in KNOWN.items():
        answered = asdict(answer(method))
        for name, expected in asdict(known).items():
            actual = answered[name]
            if actual != expected:
                messages.append(f"{method}: {name} {actual} in place of {expected}")
    return messages


if __name__ == "__main__":
    pprint({method: answer(method) for method in METHODS}, width=116, compact=True)
