from __future__ import annotations

import json

import pytest

from zipeval.errors import UsageError
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables, upper_bound_of
from zipeval.results import records


def put(
    root,
    method,
    score,
    tokens=None,
    task="shapes",
    model="m",
    limit=None,
    task_hash="h",
    seed=0,
    device="cpu",
    prompt="hf",
    family="llava",
    failed=0,
    quantization="none",
    device_map=None,
    judge=None,
    **options,
):
    config = {
        "model": {
            "name": model,
            "family": family,
            "path": None,
            "revision": None,
            "dtype": "auto",
            "device": "auto",
            "attn_implementation": "auto",
            "prompt": prompt,
            "image_aspect": "pad",
            "quantization": quantization,
            "device_map": device_map,
        },
        "method": {
            "name": method,
            "_target_": "x",
            **options,
            **({"tokens": tokens} if tokens else {}),
        },
        "tokens": tokens,
        "budget": "paper",
        "packing": "published",
        "data": {"root": None},
        "limit": limit,
        "seed": seed,
    }
    if judge:
        config["judge"] = {"url": f"http://{judge}:8000/v1", "model": "m"}
    record = {
        "task": task,
        "task_hash": task_hash,
        "failed": failed,
        "metric": "accuracy",
        "score": score,
        "metrics": {"accuracy": score / 100, "accuracy_exist": score / 200},
        "visual_tokens": {
            "requested": tokens,
            "mean": float(tokens or 144),
            "final": 9.0,
        },
        "prefill": {"flops_exact": 1000.0 * (tokens or 144)},
        "config": config,
        "resolved": {
            "fingerprint": "f",
            "dtype": "float32",
            "device": device,
            "attn_implementation": "sdpa",
            "quantization": quantization,
            "device_map": device_map,
        },
    }
    setting = (
        f"{family}-{limit}-{seed}-{device}-{prompt}-{quantization}-{device_map}-{judge}"
    )
    name = f"{model}-{method}-{tokens}-{setting}-{len(options)}"
    return records.write(root / name, record, [])


def cells(text):
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_percentages_of_the_upper_bound(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16)
    put(tmp_path, "visionzip", 70.0, 48)
    put(tmp_path, "vanilla", 50.0, task="other")
    put(tmp_path, "visionzip", 45.0, 48, task="other")
    assert cells(render(tables(str(tmp_path))))[2:] == [
        [
            "vanilla",
            "all",
            "144.0",
            "9.0",
            "100.0%",
            "50.0 (100.0%)",
            "80.0 (100.0%)",
            "100.0%",
        ],
        [
            "visionzip",
            "48",
            "48.0",
            "9.0",
            "33.3%",
            "45.0 (90.0%)",
            "70.0 (87.5%)",
            "88.8%",
        ],
        ["visionzip", "16", "16.0", "9.0", "11.1%", "-", "60.0 (75.0%)", "-"],
    ]


def test_all_metrics_of_one_task(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16)
    assert cells(render(tables(str(tmp_path), "shapes"))) == [
        ["method", "tokens", "mean", "final", "flops", "accuracy", "accuracy_exist"],
        [
            "-" * n if i == 0 else "-" * n + ":"
            for i, n in enumerate((11, 7, 6, 6, 7, 14, 15))
        ],
        ["vanilla", "all", "144.0", "9.0", "100.0%", "80.0 (100.0%)", "40.0 (100.0%)"],
        ["visionzip", "16", "16.0", "9.0", "11.1%", "60.0 (75.0%)", "30.0 (75.0%)"],
    ]


def test_a_main_metric_of_0_leaves_the_others_on_their_scale(tmp_path):
    """Of a conversation's, the first answer may be right where no later one is."""
    path = put(tmp_path, "vanilla", 0.0, task="zipeval_shapes_turns")
    record = json.loads(path.read_text())
    record |= {
        "metric": "accuracy_later",
        "metrics": {"accuracy_later": 0.0, "accuracy_first": 1.0},
    }
    path.write_text(json.dumps(record))
    (table,) = tables(str(tmp_path), "zipeval_shapes_turns")
    assert [cell.score for cell in table.rows[0].cells.values()] == [0, 100]


def test_settings_do_not_mix(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "vanilla", 40.0, limit=100)
    put(tmp_path, "visionzip", 40.0, 16)
    put(tmp_path, "visionzip", 20.0, 16, limit=100)
    found = cells(render(tables(str(tmp_path))))
    assert [row[5] for row in found if row[0] == "visionzip"] == [
        "20.0 (50.0%)",
        "40.0 (50.0%)",
    ]


def test_prompts_do_not_mix(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, prompt="vicuna_v1")
    with pytest.raises(UsageError, match=r"no upper bound.*model.prompt=vicuna_v1"):
        render(tables(str(tmp_path)))
    put(tmp_path, "vanilla", 75.0, prompt="vicuna_v1")
    assert [
        row[5] for row in cells(render(tables(str(tmp_path)))) if row[0] == "visionzip"
    ] == ["60.0 (80.0%)"]


def test_an_upper_bound_of_another_architecture_is_none(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, family="mini_gemini")
    with pytest.raises(UsageError, match="no upper bound"):
        render(tables(str(tmp_path)))


def test_failed_samples_are_told(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, failed=2)
    assert render(tables(str(tmp_path))).endswith(
        "visionzip 16: 2 of the 0 samples of shapes could not be read and count as unanswered."
    )


def test_an_upper_bound_from_another_device_is_none(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, device="cuda:1")
    with pytest.raises(UsageError, match="no upper bound"):
        render(tables(str(tmp_path)))
    put(tmp_path, "vanilla", 75.0, device="cuda:0")
    assert [
        row[5] for row in cells(render(tables(str(tmp_path)))) if row[0] == "visionzip"
    ] == ["60.0 (80.0%)"]


@pytest.mark.parametrize(
    "held", [{"quantization": "4bit"}, {"device_map": "auto"}], ids=str
)
def test_weights_that_are_held_otherwise_have_their_own_upper_bound(held, tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, **held)
    ((name, value),) = held.items()
    with pytest.raises(
        UsageError, match=rf"no upper bound.*method=vanilla.* model\.{name}={value} "
    ):
        render(tables(str(tmp_path)))
    put(tmp_path, "vanilla", 75.0, **held)
    rendered = render(tables(str(tmp_path)))
    assert [row[5] for row in cells(rendered) if row[0] == "visionzip"] == [
        "60.0 (80.0%)"
    ]
    titles = [line for line in rendered.splitlines() if line.startswith("m (f), ")]
    assert set(titles) == {
        "m (f), float32, cpu, sdpa, prompt=hf, image_aspect=pad",
        f"m (f), float32, cpu, sdpa, {name}={value}, prompt=hf, image_aspect=pad",
    }


def test_a_metric_that_is_not_known_is_named_and_keeps_its_digits(tmp_path):
    put(tmp_path, "vanilla", 0.8612)
    put(tmp_path, "visionzip", 0.8239, 16)
    header, _, _, row = cells(render(tables(str(tmp_path))))
    assert (header[5], row[5]) == ("shapes (accuracy)", "0.824 (95.7%)")


def test_a_record_without_its_parts_is_named(tmp_path):
    path = records.write(tmp_path / "run", {"task": "t"}, [])
    with pytest.raises(UsageError, match=f"{path}: lacks 'config'"):
        render(tables(str(tmp_path)))


def test_a_missing_upper_bound_names_the_command(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, limit=100)
    with pytest.raises(
        UsageError,
        match=r"`zipeval run model=m method=vanilla tasks=\[shapes\] limit=100 results=.*`",
    ):
        render(tables(str(tmp_path)))


def test_an_upper_bound_on_another_version_of_the_task_is_none(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16, task_hash="changed")
    with pytest.raises(UsageError, match="no upper bound"):
        render(tables(str(tmp_path)))


def test_an_upper_bound_is_scored_by_the_same_judge(tmp_path):
    put(tmp_path, "vanilla", 90.0, judge="strict")
    path = put(tmp_path, "visionzip", 80.0, 16, judge="mild")
    assert upper_bound_of(records.read(path), str(tmp_path)) is None
    put(tmp_path, "vanilla", 95.0, judge="mild")
    assert upper_bound_of(records.read(path), str(tmp_path))["score"] == 95.0


def test_options_and_seeds_make_rows(tmp_path):
    put(tmp_path, "vanilla", 80.0)
    put(tmp_path, "visionzip", 60.0, 16)
    put(tmp_path, "visionzip", 50.0, 16, dominant=16, contextual=None)
    put(tmp_path, "visionzip", 61.0, 16, seed=3)
    labels = [row[0] for row in cells(render(tables(str(tmp_path))))[2:]]
    assert labels == [
        "vanilla",
        "visionzip",
        "visionzip dominant=16",
        "visionzip seed=3",
    ]


def test_two_records_for_one_cell_are_both_named(tmp_path):
    first = put(tmp_path, "vanilla", 80.0)
    second = put(tmp_path, "vanilla", 81.0, dominant=None)
    with pytest.raises(UsageError, match="two records") as refused:
        render(tables(str(tmp_path)))
    assert str(first) in str(refused.value)
    assert str(second) in str(refused.value)


def test_no_records(tmp_path):
    with pytest.raises(UsageError, match="no records"):
        render(tables(str(tmp_path / "nowhere")))


def answered(root, method, right, tokens=None, task="gqa"):
    """A run that answers these of 200 questions right."""
    samples = [
        {
            "doc_id": i,
            "question_hash": str(i),
            "score": float(i in right),
            "target": "x",
            "prediction": "x",
        }
        for i in range(200)
    ]
    path = put(root, method, len(right) / 2, tokens, task=task)
    record = records.read(path)
    record.pop("path")
    for file in path.parent.glob(f"{task}.*"):
        file.unlink()
    return records.write(path.parent, record | {"score": len(right) / 2}, samples)


def test_statistics_compare_runs_question_by_question(tmp_path):
    answered(tmp_path, "vanilla", range(160))
    answered(tmp_path, "visionzip", range(1, 160), 16)  # all but one of them
    answered(tmp_path, "pool", range(2, 161), 16)  # as many: two lost, one gained
    answered(tmp_path, "random", range(80), 16)
    (table,) = tables(str(tmp_path), statistics=True)
    rows = {row.label: row.cells["GQA"] for row in table.rows}
    visionzip = rows["visionzip"].comparison
    assert (visionzip.lost, visionzip.gained, visionzip.p) == (1, 0, 1.0)
    assert (rows["pool"].comparison.lost, rows["pool"].comparison.gained) == (2, 1)
    assert visionzip.low < rows["visionzip"].percent == 99.375 < visionzip.high
    assert not visionzip.distinguishable
    assert rows["random"].comparison.distinguishable
    assert {label: cell.tied for label, cell in rows.items()} == {
        "vanilla": False, "visionzip": True, "pool": True, "random": False
    }  # fmt: skip
    shown = cells(render([table]))
    (line,) = [line for line in shown if line[0] == "random"]
    assert line[5].startswith("40.0 (50.0%, 4")
    assert not line[5].endswith(("≈", "†"))
    assert [line[5][-2:] for line in shown if line[0] in ("pool", "visionzip")] == [
        "≈†",
        "≈†",
    ]
    assert [line[5] for line in shown if line[0] == "vanilla"] == ["80.0 (100.0%)"]


def test_of_all_metrics_of_a_task_only_the_main_one_is_compared(tmp_path):
    answered(tmp_path, "vanilla", range(160))
    answered(tmp_path, "visionzip", range(120), 16)
    (table,) = tables(str(tmp_path), task="gqa", statistics=True)
    main, other = (table.rows[-1].cells[name] for name in table.columns)
    assert main.comparison.percent == main.percent == 75
    assert (other.comparison, other.tied) == (None, False)


def test_the_average_has_an_interval_of_its_own(tmp_path):
    for task in ("gqa", "scienceqa_img"):
        answered(tmp_path, "vanilla", range(160), task=task)
        answered(tmp_path, "visionzip", range(40, 160), 16, task=task)
    (table,) = tables(str(tmp_path), statistics=True)
    row = table.rows[-1]
    single, both = row.cells["GQA"].comparison, row.average_comparison
    assert both.percent == row.average == 75
    assert both.high - both.low == pytest.approx(
        (single.high - single.low) / 2**0.5, rel=0.1
    )
    assert f"75.0%, {both.low:.1f}-{both.high:.1f} |" in render([table])


def test_runs_of_other_questions_are_not_compared(tmp_path):
    answered(tmp_path, "vanilla", range(160))
    path = answered(tmp_path, "visionzip", range(80), 16)
    record = records.read(path)
    samples = records.read_samples(path.parent, record)
    samples[3]["question_hash"] = "another"
    record.pop("path")
    path.unlink()
    records.write(path.parent, record, samples)
    with pytest.raises(UsageError, match="do not pair"):
        tables(str(tmp_path), statistics=True)
