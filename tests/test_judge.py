"""Videos, a judge that is a real HTTP server, and what a run records of both."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
from judge_server import serving
from test_media import write_video

from zipeval import models
from zipeval.benchmarks import judge
from zipeval.benchmarks.judge import Judge, JudgeError
from zipeval.benchmarks.protocols import VideoQA
from zipeval.benchmarks.videoqa import questions
from zipeval.cli import compose, main
from zipeval.config.schema import JudgeConfig
from zipeval.errors import RunError, Stopped, UsageError
from zipeval.evaluation.runner import run
from zipeval.inference import answering
from zipeval.inference.session import Session
from zipeval.reporting.render import render
from zipeval.reporting.tables import settings, tables
from zipeval.results import records
from zipeval.results.identity import judge_identity, run_id
from zipeval.utils.urls import public_url

KEY = "sk-canary-5Yk2pQ7"
YES, NO = "{'pred': 'yes', 'score': 5}", "{'pred': 'no', 'score': 0}"
LAYOUT = {  # of Video-LLaVA's evaluation data
    "zipeval_tgif_qa": "TGIF_Zero_Shot_QA/mp4/{}.gif",
    "zipeval_msvd_qa": "MSVD_Zero_Shot_QA/videos/{}.mp4",
    "zipeval_msrvtt_qa": "MSRVTT_Zero_Shot_QA/videos/all/{}.avi",
    "zipeval_activitynet_qa": "Activitynet_Zero_Shot_QA/all_test/v_{}.mp4",
}
MSVD = "tasks=[zipeval_msvd_qa]"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "RETRIES", 0)


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Five questions of every set: about four videos, the fourth damaged, the fifth missing."""
    root = tmp_path_factory.mktemp("videos")
    for place in LAYOUT.values():
        folder, path = place.split("/", 1)
        (root / place).parent.mkdir(parents=True)
        codec = "gif" if path.endswith("gif") else "mpeg4"
        for number in range(3):
            write_video(
                root / folder / path.format(f"clip{number}"),
                [0, 80 * number] * 4,
                codec=codec,
            )
        (root / folder / path.format("clip3")).write_bytes(b"damaged")
        asked = [
            {
                "question_id": i,
                "video_name": f"clip{i}",
                "question": f"How many circles {i}?",
            }
            for i in range(5)
        ]
        (root / folder / "test_q.json").write_text(json.dumps(asked))
        answers = [{"question_id": i, "answer": f"answer {i}"} for i in range(5)]
        (root / folder / "test_a.json").write_text(json.dumps(answers))
    return root


@pytest.fixture
def asked(videos, tmp_path):
    """The overrides of a run, to which a judge has to be added."""
    common = [
        "model=tiny_video",
        "method=visionzip",
        "tokens=80",
        f"data.videos={videos}",
        f"results={tmp_path}/runs",
    ]
    return lambda server, *overrides: compose(
        [*common, f"judge.url={server.url}", "judge.model=m", *overrides]
    )


def number(prompt):
    """Which of our questions a judge was asked about; None for that before the run."""
    return next((i for i in range(5) if f"How many circles {i}?" in prompt), None)


def by_number(replies):
    return lambda prompt: YES if number(prompt) is None else replies[number(prompt)]


def read(path):
    record = records.read(path)
    return record, records.read_samples(path.parent, record)


def no_model(*_):
    raise AssertionError("the model was loaded")


def test_every_video_benchmark_gives_a_number(asked, capsys):
    """Two of the three readable ones are right, the two others count as wrong: 40%."""
    with serving(by_number([YES, NO, "{'pred': 'yes', 'score': 3}"])) as server:
        paths = run(asked(server, "suite=paper_video"))
    assert [path.stem for path in paths] == list(LAYOUT)
    for path in paths:
        record, samples = read(path)
        assert (record["status"], record["failed"], record["unscored"]) == (
            "success",
            2,
            0,
        )
        assert record["score"] == record["metrics"]["accuracy"] == 40.0
        assert record["metrics"]["score"] == pytest.approx(8 / 5)
        assert record["visual_tokens"]["mean"] == 80
        assert [sample["score"] for sample in samples] == [1, 0, 1, 0, 0]
        assert [sample["scores"]["grade"] for sample in samples] == [5, 0, 3, 0, 0]
        assert "clip3" in samples[3]["error"]
        assert "clip4.mp4 cannot be decoded" in samples[4]["error"]
        assert samples[0]["question"] == "How many circles 0?"
        assert samples[0]["prediction"]
    assert len(server.prompts) == 1 + 4 * 3
    assert (
        "How many circles 1?\nCorrect Answer: answer 1\nPredicted Answer: "
        in "\n".join(server.prompts)
    )
    assert set(server.paths) == {"/v1/chat/completions"}
    assert (
        capsys.readouterr().out.count("accuracy 40, 2 samples could not be read") == 4
    )


@pytest.mark.parametrize(
    "replies, accuracy, score",
    [
        ([YES] * 3, 100, 5),
        ([NO] * 3, 0, 0),
        # 1 of 3; (4 + 2 + 3) / 3
        (
            [
                "{'pred': 'yes', 'score': 4.8}",
                "{'pred': 'no', 'score': 2}",
                "```\n{'pred': 'No', 'score': 3}\n```",
            ],
            100 / 3,
            3,
        ),
    ],
    ids=["right", "wrong", "mixed"],
)
def test_accuracy_and_score(asked, replies, accuracy, score):
    with serving(by_number(replies)) as server:
        (path,) = run(asked(server, MSVD, "limit=3"))
    record, _ = read(path)
    assert record["score"] == pytest.approx(accuracy)
    assert record["metrics"] == pytest.approx({"accuracy": accuracy, "score": score})


def test_the_protocol_is_video_llavas(asked, monkeypatch):
    options, texts = [], []
    greedy, inputs = answering.generation_options, Session.inputs

    def prompts(self, conversations):
        texts.extend(
            part["text"]
            for c in conversations
            for part in c[0]["content"]
            if part["type"] == "text"
        )
        return inputs(self, conversations)

    monkeypatch.setattr(
        answering,
        "generation_options",
        lambda given: options.append(greedy(given)) or greedy(given),
    )
    monkeypatch.setattr(Session, "inputs", prompts)
    with serving(lambda prompt: YES) as server:
        run(asked(server, MSVD, "limit=2"))
    assert texts == ["How many circles 0?", "How many circles 1?"]
    assert [(o["max_new_tokens"], o["do_sample"], o["num_beams"]) for o in options] == [
        (1024, False, 1)
    ]


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "its reply is empty"),
        ("Yes, they agree.", "no verdict"),
        ("{'pred': 'maybe', 'score': 3}", "no verdict"),
        ("{'pred': 'yes'}", "no verdict"),
        ("{'pred': 'yes', 'score': 9}", "no verdict"),
        ("{'pred': 'yes', 'score': 1e999}", "no verdict"),
        ("{'pred': 'yes', 'score': __import__('os').getpid()}", "no verdict"),
        ((500, "out of order"), "out of order"),
        ((404, "no such model"), "no such model"),
        ((401, "wrong key"), "OPENAI_API_KEY is not set"),
        ([{"type": "text", "text": YES}], "its reply is empty"),
        ((200, '{"choices": [{"mess'), "its reply cannot be read"),
        ((200, "\udcff"), "its reply cannot be read"),
    ],
)
def test_what_is_no_verdict(reply, reason):
    with (
        serving(lambda prompt: reply) as server,
        pytest.raises(JudgeError, match=reason),
    ):
        Judge(JudgeConfig(server.url, "m")).verdict(VideoQA(), VideoQA.probe)


@pytest.mark.parametrize("trouble", [(500, "out of order"), "I cannot say.", "slow"])
def test_a_judge_that_fails_midway_is_asked_again_for_the_rest_only(
    asked, trouble, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(judge, "TIMEOUT", 0.5)

    def failing(prompt):
        if number(prompt) != 1:
            return by_number([YES, YES, NO])(prompt)
        if trouble != "slow":
            return trouble
        time.sleep(1)
        return YES

    with serving(failing) as server:
        (path,) = run(asked(server, MSVD, "limit=4"))
        record, before = read(path)
        assert (record["status"], record["unscored"], record["failed"]) == (
            "incomplete",
            1,
            1,
        )
        assert record["score"] == pytest.approx(
            100 / 3
        )  # of the two that were judged and the one without a video
        assert record["metrics"]["score"] == pytest.approx(5 / 3)
        assert before[1]["scores"] == {}
        assert before[1]["unscored"]
        assert before[1]["prediction"]
        assert (
            "1 of 4 answers have no verdict: run this again" in capsys.readouterr().out
        )
        shutil.copytree(tmp_path / "runs", tmp_path / "vanilla")
        for copy in (tmp_path / "vanilla").glob("*/*a.json"):
            copy.write_text(
                copy.read_text().replace('"name": "visionzip"', '"name": "vanilla"')
            )
        shown = render(tables(str(tmp_path / "vanilla")))
        assert (
            "INCOMPLETE, 1 of the 4 samples of zipeval_msvd_qa have no verdict" in shown
        )

        monkeypatch.setattr(models, "load", no_model)
        server.prompts.clear()
        server.reply = by_number([NO, YES, YES])
        monkeypatch.setattr(records, "now", lambda: "later")
        started = record["started"]
        assert run(asked(server, MSVD, "limit=4")) == [path]
        assert [number(prompt) for prompt in server.prompts] == [None, 1]
        record, after = read(path)
        assert (record["status"], record["unscored"]) == ("success", 0)
        assert (record["started"], record["ended"]) == (started, "later")
        assert record["score"] == 50
        assert after[1] == {k: v for k, v in before[1].items() if k != "unscored"} | {
            "score": 1.0,
            "scores": {"grade": 5.0},
        }
        assert [after[i] for i in (0, 2, 3)] == [before[i] for i in (0, 2, 3)]
        assert [f.name for f in sorted(path.parent.glob("*.json*"))] == [
            path.name,
            "zipeval_msvd_qa.samples.jsonl",
        ]

        server.prompts.clear()
        run(asked(server, MSVD, "limit=4"))
        assert "finished before, kept" in capsys.readouterr().out
        assert server.prompts == []


def test_no_verdict_no_number(asked, tmp_path):
    """Also where videos that cannot be read would make a zero."""
    with serving(lambda prompt: YES if number(prompt) is None else (500, "")) as server:
        (path,) = run(asked(server, MSVD, "method=vanilla"))
    record, _ = read(path)
    assert (
        record["status"],
        record["unscored"],
        record["score"],
        record["metrics"],
    ) == ("incomplete", 3, None, {})
    for task in (None, "zipeval_msvd_qa"):
        assert "INCOMPLETE, 3 of the 5" in render(tables(f"{tmp_path}/runs", task))


def test_a_run_without_all_verdicts_is_red(videos, tmp_path, monkeypatch, capsys):
    """Exit code 1 and the record's path; 0 once they are there."""
    common = [
        "model=tiny_video",
        f"data.videos={videos}",
        f"results={tmp_path}/runs",
        "judge.model=m",
        "limit=2",
        MSVD,
    ]
    monkeypatch.chdir(tmp_path)
    with serving(by_number([YES, (500, "")])) as server:
        monkeypatch.setattr(
            sys, "argv", ["zipeval", "run", *common, f"judge.url={server.url}"]
        )
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        assert (
            "zipeval_msvd_qa.json: answers have no verdict" in capsys.readouterr().err
        )
        server.reply = by_number([YES, NO])
        monkeypatch.setattr(
            sys, "argv", ["zipeval", "run", *common, f"judge.url={server.url}"]
        )
        main()


def test_a_run_that_is_stopped_while_it_judges_keeps_its_verdicts(asked, monkeypatch):
    score = judge.Judge.score

    def then_stop(*given):
        score(*given)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("zipeval.evaluation.judging.JUDGED_AT_ONCE", 1)
    monkeypatch.setattr(judge.Judge, "score", then_stop)
    with serving(by_number([YES, NO, NO])) as server:
        config = asked(server, MSVD, "limit=3")
        with pytest.raises(Stopped):
            run(config)
        assert [number(prompt) for prompt in server.prompts] == [None, 0]
        (record,) = records.read_all(config.results)
        assert (record["unscored"], record["score"]) == (2, 100)


def test_a_run_that_dies_while_it_judges_keeps_answers_and_verdicts(asked, monkeypatch):
    """The disk is full between a record's samples and the record itself."""
    monkeypatch.setattr("zipeval.evaluation.judging.JUDGED_AT_ONCE", 1)
    write, records_written = records.atomic_write, []

    def full(path, text):
        if path.suffix == ".json" and (
            records_written.append(path) or len(records_written) == 3
        ):
            raise OSError(28, "No space left on device")
        write(path, text)

    with serving(by_number([YES, NO, NO])) as server:
        with monkeypatch.context() as patched:
            patched.setattr(records, "atomic_write", full)
            with pytest.raises(RunError, match="space"):
                run(asked(server, MSVD, "limit=3"))
        assert [number(prompt) for prompt in server.prompts] == [None, 0, 1]
        record, _ = read(records_written[0])
        assert (record["unscored"], record["score"]) == (2, 100)
        monkeypatch.setattr(models, "load", no_model)
        server.prompts.clear()
        (path,) = run(asked(server, MSVD, "limit=3"))
        assert [number(prompt) for prompt in server.prompts] == [None, 1, 2]
    assert read(path)[0]["score"] == pytest.approx(100 / 3)


def test_a_run_that_is_interrupted_while_it_judges_keeps_verdicts(asked, monkeypatch):
    monkeypatch.setattr(judge, "THREADS", 1)
    verdict = Judge.verdict

    def interrupted(self, protocol, sample):
        if sample["question"] == "How many circles 1?":
            raise KeyboardInterrupt
        return verdict(self, protocol, sample)

    with serving(by_number([YES, NO, NO])) as server:
        with monkeypatch.context() as patched:
            patched.setattr(Judge, "verdict", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(asked(server, MSVD, "limit=3"))
        server.prompts.clear()
        (path,) = run(asked(server, MSVD, "limit=3"))
        assert 0 not in [number(prompt) for prompt in server.prompts]
    assert read(path)[0]["score"] == pytest.approx(100 / 3)


def test_a_record_that_waits_without_its_samples_is_refused(asked):
    with serving(by_number([YES, (500, "")])) as server:
        (path,) = run(asked(server, MSVD, "limit=2"))
        (samples,) = path.parent.glob("*.samples.jsonl")
        samples.unlink()
        with pytest.raises(
            UsageError, match=rf"{samples}: No such file or directory. Move {path} away"
        ):
            run(asked(server, MSVD, "limit=2"))


def test_a_judge_that_is_gone_is_not_asked_for_every_answer(monkeypatch):
    monkeypatch.setattr(judge, "THREADS", 1)
    samples = [
        {
            "question": str(i),
            "target": "a",
            "prediction": "b",
            "unscored": "not asked yet",
        }
        for i in range(40)
    ]
    with serving(
        lambda prompt: YES if "Question: 3\n" in prompt else (500, "gone")
    ) as server:
        Judge(JudgeConfig(server.url, "m")).score(VideoQA(), samples, lambda _: None)
        assert len(server.prompts) == 14
    assert sum("unscored" in sample for sample in samples) == 39
    assert samples[-1]["unscored"] == "not asked: the judge failed 10 times in a row"


def test_a_judge_that_replies_with_no_verdict_is_not_gone(monkeypatch):
    """Its next reply may be one: answers that it never judges would keep it from all behind them, run after run."""
    monkeypatch.setattr(judge, "THREADS", 1)
    samples = [
        {
            "question": str(i),
            "target": "a",
            "prediction": "b",
            "unscored": "not asked yet",
        }
        for i in range(40)
    ]
    replies = ["I cannot say.", (400, "The prompt was filtered")]

    def reply(prompt):
        asked = int(re.search(r"Question: (\d+)", prompt)[1])
        return YES if asked == 39 else replies[asked % 2]

    with serving(reply) as server:
        Judge(JudgeConfig(server.url, "m")).score(VideoQA(), samples, lambda _: None)
        assert len(server.prompts) == 40
    assert [sample.get("score") for sample in samples] == [None] * 39 + [1]


@pytest.mark.parametrize(
    "key", ["sk-canary\nsk-canary", "sk-canary\u200b", "sk canary"], ids=ascii
)
def test_what_cannot_be_a_key_is_not_sent(key, monkeypatch):
    """The client would fail with a message that shows it."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match=r"OPENAI_API_KEY: .* no key has") as refused:
        Judge(JudgeConfig("http://127.0.0.1:9/v1", "m"))
    assert "canary" not in str(refused.value)


def test_the_key_is_nowhere_but_in_the_request(asked, monkeypatch, tmp_path, capfd):
    """The judge repeats it in every error and even in a reply; the address brings a password too."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(by_number([(500, "x"), f"I was sent {KEY}.", (401, KEY)])) as server:
        paths = run(asked(server, MSVD, "limit=4"))
        assert set(server.keys) == {f"Bearer {KEY}"}
        server.url = server.url.replace("http://", "http://user:canary-password@")
        assert run(asked(server, MSVD, "limit=4")) == paths
        server.reply = lambda prompt: (403, KEY)
        with pytest.raises(UsageError) as refusal:
            run(asked(server, MSVD, "limit=3"))
        monkeypatch.setattr(sys, "argv", ["zipeval", "doctor"])
        main()
    said = capfd.readouterr()
    written = [
        file.read_text(errors="replace")
        for file in tmp_path.rglob("*")
        if file.is_file()
    ]
    assert len([text for text in written if text.startswith("{")]) == 2
    assert '"unscored": 3' in "".join(written)
    for text in (*written, said.out, said.err, str(refusal.value)):
        assert "canary" not in text


@pytest.mark.parametrize(
    "given", [[], ["judge.model=m"], ["judge.url=http://127.0.0.1:9/v1"]], ids=" ".join
)
@pytest.mark.parametrize(
    "suite, task",
    [("paper_video", "zipeval_tgif_qa"), ("paper_image", "mmbench_en_dev")],
)
def test_without_a_judge_its_tasks_are_refused_at_once(
    given, suite, task, videos, tmp_path, monkeypatch, capsys
):
    said, seconds = refusal(
        [*given, f"suite={suite}", f"data.videos={videos}"],
        tmp_path,
        monkeypatch,
        capsys,
    )
    assert said.startswith(
        f"zipeval: tasks=[{task}]: a judge model scores its answers. Set judge.url="
    )
    assert "judge.model=" in said
    assert "OPENAI_API_KEY" in said
    assert seconds < 5


@pytest.mark.parametrize(
    "reply, named",
    [
        (
            (401, "Incorrect API key"),
            "a key is needed, OPENAI_API_KEY is not set (HTTP 401)",
        ),
        ((404, "The model m does not exist"), "The model m does not exist"),
        ((500, "out of order"), "out of order"),
        ("", "its reply is empty"),
        (
            "Certainly!",
            "its reply is no verdict such as {'pred': 'yes', 'score': 4}: 'Certainly!'",
        ),
        ("slow", "no reply within 0.5 s"),
        ("down", "not reachable"),
    ],
)
def test_a_judge_that_does_not_judge_is_found_out_before_the_model_is_loaded(
    reply, named, videos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(judge, "TIMEOUT", 0.5)
    with serving(
        lambda prompt: time.sleep(1) or YES if reply == "slow" else reply
    ) as server:
        url = "http://127.0.0.1:9/v1" if reply == "down" else server.url
        given = [
            MSVD,
            f"data.videos={videos}",
            f"judge.url={url}",
            "judge.model=m",
            "model=tiny_video",
        ]
        said, _ = refusal(given, tmp_path, monkeypatch, capsys)
    assert said.startswith(f"zipeval: judge.model=m at judge.url={url}: ")
    assert named in said
    assert "Set judge.url= to an OpenAI-compatible server" in said


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://host/v1?key=canary",
        "me:canary@host/v1",
        "http://me:canary/#@host/v1",
        "http://[::1/v1",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_secrets(
    url, videos, tmp_path, monkeypatch, capsys
):
    given = [
        MSVD,
        f"data.videos={videos}",
        f"'judge.url=\"{url}\"'".strip("'"),
        "judge.model=m",
    ]
    said, _ = refusal(given, tmp_path, monkeypatch, capsys)
    assert said.startswith("zipeval: judge.url=")
    assert "expected an address, such as http://localhost:8000/v1" in said
    assert "canary" not in said


def refusal(arguments, tmp_path, monkeypatch, capsys):
    """(what a user is told, after how many seconds), exit code 2, before a model is loaded, with nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", no_model)
    monkeypatch.setattr(sys, "argv", ["zipeval", "run", *arguments])
    start = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main()
    seconds = time.monotonic() - start
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.glob("results/**/*.json*"))
    return said.err, seconds


def test_another_judge_is_another_record_where_a_judge_is_asked(videos, tmp_path):
    def ids(*overrides):
        common = [
            "model=tiny_video",
            f"data.videos={videos}",
            "tasks=[zipeval_msvd_qa,zipeval_shapes]",
        ]
        session = Session(
            compose([*common, "judge.url=http://a/v1", "judge.model=m", *overrides])
        )
        return session.record_id("zipeval_msvd_qa"), session.record_id("zipeval_shapes")

    judged, not_judged = ids()
    for other in ("judge.url=http://b/v1", "judge.model=n"):
        assert ids(other)[0] != judged
        assert ids(other)[1] == not_judged
    for same in (
        "judge.url=http://a/v1/chat/completions",
        "judge.url=http://u:p@a/v1/",
    ):
        assert ids(same) == (judged, not_judged)
    assert not_judged == Session(compose(["model=tiny_video"])).run_id
    moved = shutil.copytree(videos, tmp_path / "moved")
    assert ids(f"data.videos={moved}") == (judged, not_judged)
    assert public_url("http://u:p@h:8/v1") == "http://h:8/v1"


def test_a_port_is_not_part_of_a_judges_identity():
    """Wherever the port stands; user names and paths, and what merely looks like one, stay apart."""
    same = ["http://h:8000/v1", "http://h:9/v1", "http://h/v1"]
    assert {judge_identity({"url": url, "model": "m"})["url"] for url in same} == {
        "http://h/v1"
    }
    for url in ("http://[::1]/v1", "http://h/v1:8000/x", "https://h/v1"):
        assert judge_identity({"url": url, "model": "m"})["url"] == url
    assert (
        judge_identity({"url": "http://[::1]:80/v1", "model": "m"})["url"]
        == "http://[::1]/v1"
    )
    assert judge_identity(None) is None


def test_a_judge_at_another_port_is_the_same_run(asked, monkeypatch):
    """Its record is kept, with the port that it was made at; one that waits for verdicts is gone on with."""
    with serving(by_number([YES, (500, "")])) as server:
        (path,) = run(asked(server, MSVD, "limit=2", "method=vanilla"))
        first_url = server.url
    assert read(path)[0]["unscored"] == 1
    with serving(lambda prompt: YES) as other:
        assert other.url != first_url
        monkeypatch.setattr(models, "load", no_model)
        assert run(asked(other, MSVD, "limit=2", "method=vanilla")) == [path]
        assert read(path)[0]["unscored"] == 0
        other.prompts.clear()
        assert run(asked(other, MSVD, "limit=2", "method=vanilla")) == [path]
        assert not other.prompts
    assert read(path)[0]["config"]["judge"]["url"] == first_url


def test_a_record_of_before_keeps_its_name(asked, tmp_path, monkeypatch):
    """Its name has the port: the command that names this port finds it, and no other command does."""
    with serving(lambda prompt: YES) as server:
        config = asked(server, MSVD, "limit=1", "method=vanilla")
        (path,) = run(config)
        session = Session(config)
        former = run_id(session.config, session.resolved, judged=True, port=True)
        assert former != path.parent.name == session.record_id("zipeval_msvd_qa")
        path.parent.rename(path.parent.with_name(former))
        monkeypatch.setattr(models, "load", no_model)
        assert [made.parent.name for made in run(config)] == [former]
        url = server.url.rpartition(":")[0]
        elsewhere = Session(
            replace(
                session.config, judge=replace(session.config.judge, url=f"{url}:1/v1")
            )
        )
        assert elsewhere.record_id("zipeval_msvd_qa") == path.parent.name


def test_methods_scored_at_two_ports_stand_in_one_table(asked, tmp_path):
    """The heading then names the judge without a port. Another model, or another host, is another judge."""
    with serving(lambda prompt: YES) as one, serving(lambda prompt: YES) as other:
        run(asked(one, MSVD, "limit=1", "method=vanilla"))
        run(asked(other, MSVD, "limit=1"))
        shown = render(tables(f"{tmp_path}/runs"))
        assert "judge=m at http://127.0.0.1/v1" in shown
        assert shown.count("100.0 (100.0%)") == 2
    records_of_both = [*records.read_all(f"{tmp_path}/runs")]
    by_judge = settings.split_by_judge
    assert [len(group) for group in by_judge(records_of_both)] == [2]
    for change in ({"model": "n"}, {"url": "http://elsewhere:8000/v1"}):
        first, second = records_of_both
        judge = {**second["config"]["judge"], **change}
        changed = {**second, "config": {**second["config"], "judge": judge}}
        assert [len(group) for group in by_judge([first, changed])] == [1, 1]


def test_records_of_before_of_one_cell_at_two_ports_stand_in_two_tables(
    asked, tmp_path
):
    with serving(lambda prompt: YES) as server:
        run(asked(server, MSVD, "limit=1", "method=vanilla"))
    (record,) = records.read_all(f"{tmp_path}/runs")
    judge = {**record["config"]["judge"], "url": "http://127.0.0.1:1/v1"}
    again = {**record, "config": {**record["config"], "judge": judge}}
    assert [len(group) for group in settings.split_by_judge([record, again])] == [1, 1]


def test_tables_do_not_mix_judges_and_name_theirs(asked, tmp_path):
    with serving(lambda prompt: YES) as server:
        for model in ("m", "n"):
            run(
                asked(server, MSVD, "limit=1", "method=vanilla", f"judge.model={model}")
            )
        run(asked(server, MSVD, "limit=1", "judge.model=n"))
        shown = render(tables(f"{tmp_path}/runs"))
        assert shown.count(f"at {server.url}") == 2
        assert shown.count("100.0 (100.0%)") == 3
        assert " 5 (100.0%)" in render(tables(f"{tmp_path}/runs", "zipeval_msvd_qa"))
        run(asked(server, MSVD, "limit=1", "judge.model=o"))
    with pytest.raises(
        UsageError, match=rf"judge.url={server.url} judge.model=o data.videos=/"
    ):
        render(tables(f"{tmp_path}/runs"))


def test_questions_that_change_make_another_version_of_the_task(
    asked, videos, tmp_path
):
    with serving(lambda prompt: YES) as server:
        (path,) = run(asked(server, MSVD, "limit=1"))
        moved = shutil.copytree(videos, tmp_path / "moved")
        assert run(asked(server, MSVD, "limit=1", f"data.videos={moved}")) == [path]
        file = moved / "MSVD_Zero_Shot_QA/test_a.json"
        file.write_text(file.read_text().replace("answer 0", "another"))
        with pytest.raises(UsageError, match="another version"):
            run(asked(server, MSVD, "limit=1", f"data.videos={moved}"))


def test_a_record_of_videos_that_were_replaced_is_not_kept(asked, videos, tmp_path):
    moved = shutil.copytree(videos, tmp_path / "moved")
    with serving(lambda prompt: YES) as server:
        (path,) = run(asked(server, MSVD, "limit=2"))
        assert records.read(path)["data_hash"]
        for video in (moved / "MSVD_Zero_Shot_QA/videos").iterdir():
            video.write_bytes(b"garbage")
        with pytest.raises(
            UsageError,
            match=rf"data\.videos={moved}: {path} is of other data .*Move it away",
        ):
            run(asked(server, MSVD, "limit=2", f"data.videos={moved}"))


def shuffled(file):
    return json.dumps(json.loads(file.read_text())[::-1])


@pytest.mark.parametrize(
    "change, named",
    [
        (shutil.rmtree, r"MSVD_Zero_Shot_QA/test_q.json \(No such file or directory\)"),
        (
            lambda d: (d / "test_a.json").unlink(),
            r"test_a.json \(No such file or directory\)",
        ),
        (lambda d: (d / "test_q.json").write_text("{"), r"test_q.json \(not JSON\)"),
        (lambda d: (d / "test_q.json").write_text("{}"), "test_q.json holds no list"),
        (lambda d: (d / "test_q.json").write_text("[]"), "test_q.json holds no list"),
        (
            lambda d: (d / "test_q.json").write_text("[1, 2, 3, 4, 5]"),
            "do not fit together",
        ),
        (
            lambda d: (d / "test_a.json").write_text("[{}, {}, {}, {}, {}]"),
            r"do not fit together \(no 'answer'\)",
        ),
        (
            lambda d: (d / "test_q.json").write_text(shuffled(d / "test_q.json")),
            "question_id 4 meets 0",
        ),
        (
            lambda d: (d / "test_a.json").write_text('[{"answer": "a"}]'),
            "5 questions, 1 answers",
        ),
        (
            lambda d: shutil.rmtree(d / "videos"),
            "needs the videos in .*/videos. No such directory",
        ),
    ],
)
def test_a_directory_without_the_questions_is_refused(change, named, videos, tmp_path):
    root = shutil.copytree(videos, tmp_path / "videos")
    change(root / "MSVD_Zero_Shot_QA")
    with pytest.raises(UsageError, match=rf"data\.videos={root}: .*{named}"):
        questions("zipeval_msvd_qa", str(root))
    common = [
        "model=tiny_video",
        f"results={tmp_path}/runs",
        "judge.url=http://127.0.0.1:9/v1",
        "judge.model=m",
    ]
    with pytest.raises(UsageError, match=named):
        run(compose([*common, MSVD, f"data.videos={root}"]))


def test_without_a_directory_nothing_is_asked(tmp_path):
    with pytest.raises(
        UsageError, match=r"tasks=\[zipeval_msvd_qa\]: .*Set data.videos=DIR"
    ):
        run(
            compose(
                [
                    MSVD,
                    f"results={tmp_path}",
                    "judge.url=http://127.0.0.1:9/v1",
                    "judge.model=m",
                ]
            )
        )
