"""What `zipeval bench` measures, counts and keeps. No test waits for a clock to say anything in particular."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import tiny
import torch
from test_families import choices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import convnext_large

from zipeval import models
from zipeval.cli import bench as command
from zipeval.cli import compose
from zipeval.efficiency import bench, timing
from zipeval.engine import flops
from zipeval.errors import BudgetError, UsageError
from zipeval.inference.session import Session
from zipeval.methods.chain import Chain
from zipeval.methods.fastv import FastV
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.vanilla import Vanilla
from zipeval.methods.visionzip import VisionZip
from zipeval.reporting import paper
from zipeval.reporting.render import render
from zipeval.results import speed_records

NEW, TEXT = 3, 11
OTHERS = (
    "chain",
    "sparsevlm_on_visionzip",
    "visionzip_tuned",
)  # need another budget, or a file
METHODS = [m for m in choices("method") if m not in OTHERS]
KINDS = {
    "vanilla": Vanilla(),
    "visionzip": VisionZip(tokens=12),
    "fastv": FastV(keep=9, K=1),
    "sparsevlm": SparseVLM(counts=(12, 5), after=(0, 1)),
    "chain": Chain(VisionZip(tokens=20), FastV(keep=9, K=2)),
}


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 0)


def measured(folder, *arguments):
    """The record of a `zipeval bench` that keeps to little."""
    command(
        [
            f"results={folder}",
            "repeats=2",
            f"new_tokens={NEW}",
            f"prompt_tokens={TEXT}",
            *arguments,
        ]
    )
    newest = max(Path(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return speed_records.read(newest)


def by_method(record):
    return {
        (row["config"]["method"]["name"], row["batch"]): row for row in record["rows"]
    }


def inputs_of(model, batch=1):
    family = models.family(compose(["model=tiny_llava"]).model)
    return timing.prompts(model, family.noise, batch, TEXT, 0)


# ------------------------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("init", bench.INITS)
@pytest.mark.parametrize("model", choices("model", "tiny_*"))
def test_every_method_on_every_family(model, init, tmp_path, capsys):
    record = measured(
        tmp_path,
        f"model={model}",
        f"method={','.join(METHODS)}",
        "tokens=120",
        f"init={init}",
    )
    rows = by_method(record)
    assert rows.keys() == {(method, 1) for method in METHODS}
    config = compose([f"model={model}"])
    checkpoint = models.find(config.model)
    for (method, _), row in rows.items():
        session = Session(
            compose(
                [f"model={model}", f"method={method}", "tokens=120", "budget=final"]
            ),
            checkpoint,
        )
        layers = row["visual_tokens"]["layers"]
        assert len(layers) == 6
        if model != "tiny_next":  # whose largest image has row ends too
            assert layers == session.entering([session.shape.picture])
        assert (
            row["visual_tokens"]["final"] == layers[-1]
            and row["visual_tokens"]["mean"] == sum(layers) / 6
        )
        text = session.checkpoint.layers * TEXT
        assert (
            row["kv_bytes"] == (sum(layers) + text) * 5 * 32 * 2 * 4
        )  # heads, their width, keys and values, float32
        assert row["method"] == repr(session.method)
        assert len(row["rounds"]) == 2
        for times in row["rounds"]:
            stages = [times[stage] for stage in timing.STAGES]
            assert (
                min(stages) >= 0
                and times["encoder"] > 0
                and times["prefill"] > 0
                and times["decode"] > 0
            )
            assert sum(stages) == pytest.approx(times["ttft"])
            assert times["peak_bytes"] is None
    full = {
        "tiny_llava": 144,
        "tiny_gemini": 144,
        "tiny_next": 720 + 24,
        "tiny_video": 1160,
    }[model]
    assert rows["vanilla", 1]["visual_tokens"]["layers"] == [full] * 6
    assert rows["none", 1]["visual_tokens"]["layers"] == [0] * 6
    shown = capsys.readouterr().out
    assert all(f"\n| {method} " in shown for method in METHODS)
    assert ("random weights" in shown) == (init == "random")


def test_chain_has_options_that_vanilla_has_not(tmp_path):
    rows = by_method(
        measured(tmp_path, "method=chain", "tokens=16", "method.first.tokens=48")
    )
    assert rows["chain", 1]["visual_tokens"]["layers"][0] == 48
    assert rows["chain", 1]["visual_tokens"]["final"] == 16
    assert rows["vanilla", 1]["visual_tokens"]["final"] == 144


def test_a_batch_is_measured_whole(tmp_path):
    record = measured(tmp_path, "method=visionzip", "tokens=16", "batch=1,3")
    rows = by_method(record)
    for method in ("vanilla", "visionzip"):
        one, three = rows[method, 1], rows[method, 3]
        assert three["kv_bytes"] == 3 * one["kv_bytes"]
        assert three["flops"] == {
            part: 3 * number for part, number in one["flops"].items()
        }
        assert three["visual_tokens"] == one["visual_tokens"]
    assert speed_records.vanilla_of(record, rows["visionzip", 3]) is rows["vanilla", 3]


def test_the_record_says_what_was_measured(tmp_path):
    record = measured(
        tmp_path, "method=visionzip,vanilla", "tokens=32,16", "seed=3", "budget=paper"
    )
    assert (
        record["status"] == "success"
        and record["reuse"] == "none"
        and record["schema"] == speed_records.SCHEMA
    )
    assert record["settings"] == {
        "init": "checkpoint",
        "batch": [1],
        "new_tokens": NEW,
        "prompt_tokens": TEXT,
        "repeats": 2,
    }
    assert (
        record["machine"]["device"]
        and record["versions"]["torch"] == torch.__version__.partition("+")[0]
    )
    assert (
        record["resolved"]["dtype"] == "float32"
        and record["resolved"]["attn_implementation"] == "sdpa"
    )
    assert (
        record["resolved"]["fingerprint"] == models.find(compose([]).model).fingerprint
    )
    assert (
        record["started"] <= record["ended"] and record["model"]["name"] == "tiny_llava"
    )
    assert len(record["matrix_flops"]) == 2 and min(record["matrix_flops"]) > 0
    first, *others = record["rows"]
    assert first["config"]["method"]["name"] == "vanilla"
    assert [row["visual_tokens"]["requested"] for row in record["rows"]] == [
        None,
        32,
        16,
    ]
    assert all(
        row["config"] | {"seed": 3, "budget": "paper"} == row["config"]
        for row in others
    )


def test_a_record_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.records, "now", lambda: "2026-01-01T00:00:00+00:00")
    for _ in range(2):
        measured(tmp_path)
    assert len(list(tmp_path.glob("tiny_llava-2026-01-01T000000-*.json"))) == 2


def test_it_needs_neither_lmms_eval_nor_data_nor_weights(tmp_path):
    shutil.copy(models.EMBEDDED / "tiny_llava" / "config.json", tmp_path)
    code = (
        "import sys; from zipeval.cli import bench; "
        "bench(['model.path=.', 'init=random', 'repeats=1', 'new_tokens=1', 'model.dtype=bfloat16']); "
        "assert not {'lmms_eval', 'datasets'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout
    (path,) = (tmp_path / speed_records.RESULTS).glob("*.json")
    assert str(path.relative_to(tmp_path)) in done.stdout


# ------------------------------------------------------------------------------------------------------ what is timed


class Hands(timing.Clock):
    """A clock that counts its marks in place of time."""

    def _now(self):
        return len(self.marks)


@pytest.mark.parametrize("name", KINDS)
def test_stages_are_bounded_where_the_work_is(name):
    model, method = tiny.llava(), KINDS[name]
    clock, during = Hands(model.device), []
    base = model.base_model
    watched = {
        "encoder": [base.vision_tower.embeddings, base.vision_tower.encoder.layers[-1]],
        "projector": [
            base.multi_modal_projector.linear_1,
            base.multi_modal_projector.linear_2,
        ],
        "prefill": [layer.mlp for layer in base.language_model.layers]
        + [model.lm_head],
    }
    with (
        torch.inference_mode(),
        timing.staged(model, method, clock),
        pytest.MonkeyPatch.context() as patch,
    ):
        hooks = [
            module.register_forward_hook(
                lambda _, its, out, stage=stage: during.extend(
                    [(stage, clock.marks[-1][0])] * (out.numel() > 0)
                )
            )
            for stage, modules in watched.items()
            for module in modules
        ]
        for part in {
            type(method),
            *(type(getattr(method, n)) for n in ("first", "second") if name == "chain"),
        }:
            if hasattr(part, "reduce"):
                stock = part.reduce

                def reduce(self, *given, stock=stock):
                    during.append(("reducer", clock.marks[-1][0]))
                    return stock(self, *given)

                patch.setattr(part, "reduce", reduce)
        timing.answer(model, inputs_of(model), 1, clock)
        for hook in hooks:
            hook.remove()
    assert all(stage == running for stage, running in during), during
    count = {"vanilla": 0, "sparsevlm": 2, "chain": 2}.get(name, 1)
    assert [stage for stage, _ in during].count("reducer") == count
    assert {stage for stage, _ in during} >= watched.keys()
    marks = [stage for stage, _ in groupby(clock.marks, key=lambda mark: mark[0])]
    assert marks[:6] == ["other", "encoder", "reducer", "projector", "other", "prefill"]
    assert [stage for stage, _ in clock.marks[-2:]] == ["decode", "end"]
    assert sum(span for _, span in clock.spans()) == 1000 * (len(clock.marks) - 1)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("make", [tiny.llava, tiny.llava_next, tiny.mini_gemini])
def test_answers_are_those_of_generate_and_nothing_stays_on_the_model(make, name):
    model, method = make(), KINDS[name]
    family = models.family(
        compose(
            [f"model={'tiny_next' if make is tiny.llava_next else 'tiny_gemini'}"]
        ).model
    )
    inputs = timing.prompts(model, family.noise, 2, TEXT, 0)
    model(
        **inputs
    )  # transformers itself notes something on a model when it is first called
    before = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), {*vars(m)})
        for m in model.modules()
    ]
    clock = timing.Clock(model.device)
    with torch.inference_mode():
        with timing.staged(model, method, clock):
            ours = torch.cat(timing.answer(model, inputs, 5, clock), 1)
            marks = len(clock.marks)
            assert [stage for stage, _ in clock.marks[-2:]] == [
                "decode",
                "end",
            ]  # of all four steps
        with method.applied(model):
            stock = model.generate(**inputs, max_new_tokens=5, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
    assert torch.equal(ours, stock)
    assert len(clock.marks) == marks  # nobody told it of generate's
    timing.count(model, timing.Case(method, 2, {"visual_tokens": {}}), inputs)
    timing.times(model, timing.Case(method, 2, {}), inputs, 2)
    assert [
        (len(m._forward_hooks), len(m._forward_pre_hooks), {*vars(m)})
        for m in model.modules()
    ] == before


def test_every_round_measures_every_case_once_in_its_own_order(monkeypatch):
    model, asked = tiny.llava(), []
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(
        timing,
        "times",
        lambda model, case, inputs, new: asked.append(case.method) or {"ttft": 1.0},
    )
    methods = [Vanilla(), *(VisionZip(tokens=n) for n in (4, 8, 12))]
    cases = [
        timing.Case(method, 1, {"visual_tokens": {}, "rounds": []})
        for method in methods
    ]
    rates = list(timing.measure(model, cases, {1: inputs_of(model)}, 1, 5, 0))
    assert len(rates) == 5 and len(asked) == 4 * 6
    orders = [
        tuple(methods.index(m) for m in asked[start : start + 4])
        for start in range(0, len(asked), 4)
    ]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len({*orders}) > 2
    for number, case in enumerate(cases):
        assert [times["round"] for times in case.row["rounds"]] == [*range(5)]
        assert [times["place"] for times in case.row["rounds"]] == [
            order.index(number) for order in orders[1:]
        ]


def test_speed_ups_are_paired_by_rounds():
    def row(method, *times):
        config = {
            "method": {"name": method},
            "seed": 0,
            "budget": "paper",
            "packing": "published",
        }
        rounds = [{"round": number, "ttft": ttft} for number, ttft in times]
        return {
            "batch": 1,
            "config": config,
            "visual_tokens": {"requested": None},
            "rounds": rounds,
        }

    vanilla, other = (
        row("vanilla", (0, 10.0), (1, 40.0), (2, 90.0)),
        row("fastv", (0, 5.0), (1, 10.0), (2, 30.0)),
    )
    record = {"rows": [vanilla, other]}
    assert (
        speed_records.speed_up(record, other, speed_records.first) == 3
    )  # of 2, 4 and 3; of the medians it would be 4
    assert speed_records.speed_up(record, vanilla, speed_records.first) == 1
    del vanilla["rounds"][2]
    assert speed_records.speed_up(record, other, speed_records.first) == 3  # of 2 and 4
    vanilla["rounds"].clear()
    assert speed_records.speed_up(record, other, speed_records.first) is None


# ------------------------------------------------------------------------------------------------------------- counts


def test_operations_of_vanilla_by_hand(tmp_path):
    row = by_method(measured(tmp_path))["vanilla", 1]
    d, m, layers, n = 160, 448, 6, 144 + TEXT
    assert row["flops"]["decoder"] == layers * (
        2 * n * (4 * d * d + 3 * d * m) + 4 * n * n * d
    )
    assert row["flops"]["projector"] == 2 * 144 * (128 * d + d * d)
    s, w, f = 145, 128, 512
    patches = 2 * 144 * w * 3 * 8 * 8
    assert row["flops"]["encoder"] == patches + 6 * (
        2 * s * (4 * w * w + 2 * w * f) + 4 * s * s * w
    )


@pytest.mark.parametrize(
    "make", [tiny.llava, tiny.llava_next, tiny.video_llava, tiny.mini_gemini]
)
def test_operations_before_the_decoder_as_torch_counts_them(make):
    model = make()
    model.set_attn_implementation(
        "eager"
    )  # whose products torch counts on every device
    inputs = tiny.prompts(model, [[5, 9]], [1])
    kind = "video" if "pixel_values_videos" in inputs else "image"
    pixels = {
        name: inputs[name] for name in inputs.keys() - {"input_ids", "attention_mask"}
    }
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), flops.before_decoder(model) as before, counter:
        getattr(model.base_model, f"get_{kind}_features")(
            *pixels.values() if kind == "video" else (),
            **(pixels if kind == "image" else {}),
        )
    mined = (
        4 * 36 * 16 * 32 if make is tiny.mini_gemini else 0
    )  # a token's 16 features of 32 numbers, read twice
    assert sum(before.values()) + mined == counter.get_total_flops()
    assert before["projector"] > 0


def test_a_method_that_lies_is_told(tmp_path):
    class Liar(VisionZip):
        def tokens_per_layer(self, images, depth):
            return [1] * depth

    model = tiny.llava()
    case = timing.Case(Liar(tokens=4), 1, {"visual_tokens": {}})
    with pytest.raises(BudgetError, match=r"4, 4, 4.* entered .*1, 1, 1"):
        timing.count(model, case, inputs_of(model))


def test_prompts_have_text_on_both_sides_and_no_other_placeholder():
    def noise(config, count):
        return {"pixel_values": torch.randn(count, 3, 84, 84)}

    model = tiny.llava()
    inputs = timing.prompts(model, noise, 300, 9, 0)
    visual = inputs["input_ids"] == tiny.IMAGE
    assert inputs["input_ids"].shape == (300, 36 + 9)
    assert torch.equal(
        visual, torch.tensor([False] * 4 + [True] * 36 + [False] * 5).expand(300, -1)
    )
    assert inputs["attention_mask"].all()
    again = timing.prompts(model, noise, 300, 9, 0)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert timing.prompts(model, noise, 1, 1, 0)["input_ids"][0, -1] != tiny.IMAGE


# ------------------------------------------------------------------------------------------------ what does not work


@pytest.mark.parametrize(
    "batch, message",
    [
        (2, "vanilla, batch 2: out of memory."),
        (1, "visionzip budget=final, batch 1: out of memory."),
    ],
)
def test_what_does_not_fit_is_a_row_that_says_so(
    batch, message, tmp_path, monkeypatch, capsys
):
    stock, tried = timing.times, []

    def times(model, case, inputs, new_tokens):
        if (type(case.method), case.batch) == (
            {2: Vanilla, 1: VisionZip}[batch],
            batch,
        ):
            tried.append(case)
            if len(tried) == 2:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 20.00 GiB"
                )
        return stock(model, case, inputs, new_tokens)

    monkeypatch.setattr(timing, "times", times)
    record = measured(
        tmp_path, "method=visionzip", "tokens=16", "batch=1,2", "repeats=4"
    )
    failed = [row for row in record["rows"] if "failed" in row]
    assert [(row["batch"], len(row["rounds"])) for row in failed] == [(batch, 1)]
    assert len(tried) == 2
    assert all(len(row["rounds"]) == 4 for row in record["rows"] if row not in failed)
    assert message in capsys.readouterr().out


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "times", lambda *given: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch"):
        measured(tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_an_interrupted_command_keeps_its_rounds(tmp_path, monkeypatch):
    stock, calls = timing.times, iter(range(100))

    def times(*given):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return stock(*given)

    monkeypatch.setattr(timing, "times", times)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "method=visionzip", "tokens=16", "repeats=5")
    (path,) = tmp_path.glob("*.json")
    record = speed_records.read(path)
    assert record["status"] == "interrupted"
    assert sorted(len(row["rounds"]) for row in record["rows"]) == [2, 3]
    assert "medians of 2 rounds" in bench.render(record)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("batch=0", "batch=0: expected a whole number"),
        ("batch=1,x", "batch=1,x: expected a whole number"),
        ("repeats=0", "repeats=0"),
        ("new_tokens=0", "new_tokens=0"),
        ("prompt_tokens=0", "prompt_tokens=0"),
        ("prompt_tokens=1,2", "prompt_tokens=1,2"),
        ("init=noise", "init=noise: expected one of checkpoint, random"),
        ("tokns=3", "tokns: no such setting of `zipeval bench`. Did you mean tokens"),
        ("tokens=3,x method=visionzip", "tokens=x"),
        ("method=visonzip tokens=3", "Did you mean visionzip"),
        ("method=visionzip", "needs a budget"),
        ("method=visionzip tokens=999", "tokens=999: tiny_llava has 144"),
        (
            "method=visionzip,fastv tokens=20 budget=paper",
            "published are 48, 32, 16 of 144",
        ),
        (
            "model=llava_next init=random method=fastv tokens=160 budget=paper",
            "nothing was published for 5 crops",
        ),
        (
            "model=llava_next init=random method=fastv tokens=160 budget=mean",
            "are feasible on 32 layers x 2880",
        ),
        ("suite=shapes", "suite=shapes: .* has no use for it"),
        ("data.root=x", "data.root=x: .* has no use for it"),
        ("batch_size=4", "batch_size=4: .* has no use for it"),
        ("runner.reuse=prefix", "runner.reuse=prefix: .* has no use for it"),
        ("-m", "-m: expected NAME=VALUE"),
        (
            "model=llava15 model.name=mine init=random",
            "model=mine: its size is not known. Set model.path",
        ),
        ("init=random model.path=/nowhere", "model.path=/nowhere: no such directory"),
        (
            "model=llava15 init=random model.path={tiny_llava} model.family=video_llava",
            "'llava' checkpoint",
        ),
        (
            "init=random model.quantization=8bit",
            "model.quantization=8bit: weights have to be real",
        ),
        (
            "init=random method=visionzip_tuned tokens=16",
            "method=visionzip_tuned: .* the same as method=visionzip",
        ),
        ("model.device_map=auto", "model.device_map=auto: only a model on one device"),
        ("results=/dev/null/x", "results=/dev/null/x: cannot write"),
    ],
)
def test_refused_before_weights_are_made(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, name in ((models, "draw"), (models, "load")):
        monkeypatch.setattr(
            module, name, lambda *given: pytest.fail("weights were made")
        )
    with pytest.raises(UsageError, match=message):
        command(arguments.format(tiny_llava=models.EMBEDDED / "tiny_llava").split())


def test_weights_that_do_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(
        "zipeval.checkpoints.placement._free_bytes", lambda placement: 8 << 30
    )
    config = compose(["model=llava_next", "model.device=cpu", "model.dtype=bfloat16"])
    placement = Session(config, models.sketch(config.model)).placement
    with pytest.raises(
        UsageError, match=r"llava_next take 13.2 GiB in bfloat16, 8.0 GiB are free"
    ):
        models.draw(config.model, placement, 0)


# --------------------------------------------------------------------------------------------------------- real sizes


def on_meta(name):
    config = compose([f"model={name}"]).model
    model_class = models.family(config).model_class()
    with torch.device("meta"):
        return model_class._from_config(
            model_class.config_class.from_dict(models.size(config)),
            dtype=torch.bfloat16,
        )


CLIP_336, CLIP_224 = (
    303_507_456,
    303_179_776,
)  # openai/clip-vit-large-patch14-336 and -patch14, vision towers
VICUNA_7B, VICUNA_13B, GEMMA_2B = 6_738_415_616, 13_015_864_320, 2_506_172_416
MISTRAL_7B = 7_241_732_096


def projector(wide):
    return 1024 * wide + wide + wide * wide + wide


@pytest.mark.parametrize(
    "name, decoder, wide, towers, tokens",
    [
        ("llava15", VICUNA_7B + 64 * 2 * 4096, 4096, CLIP_336, 576),
        ("llava15_13b", VICUNA_13B + 64 * 2 * 5120, 5120, CLIP_336, 576),
        ("llava_next", VICUNA_7B + 64 * 2 * 4096 + 4096, 4096, CLIP_336, 2880),
        ("llava_next_13b", VICUNA_13B + 64 * 2 * 5120 + 5120, 5120, CLIP_336, 2880),
        ("llava_next_mistral", MISTRAL_7B + 64 * 2 * 4096 + 4096, 4096, CLIP_336, 2880),
        ("video_llava", VICUNA_7B + 64 * 2 * 4096, 4096, 2 * CLIP_224, 2056),
        ("mini_gemini", VICUNA_7B + 2 * 4096, 4096, CLIP_336, 576),
        ("mini_gemini_13b", VICUNA_13B + 2 * 5120, 5120, CLIP_336, 576),
        ("mini_gemini_hd", VICUNA_7B + 2 * 4096, 4096, CLIP_336, 2880),
        ("mini_gemini_2b", GEMMA_2B + 2048, 2048, CLIP_336, 576),
    ],
)
def test_models_have_their_real_sizes(name, decoder, wide, towers, tokens):
    before = json.dumps(models.size(compose([f"model={name}"]).model))
    model = on_meta(name)
    if name.startswith("mini_gemini"):
        with torch.device("meta"):
            stock = convnext_large()
        head = sum(
            p.numel() for p in stock.classifier.parameters()
        )  # with the norm before it
        mining = 2 * 1024 + 1024 * 1024 + 1024 + 2 * (2 * 2880 + 2880 * 1024 + 1024)
        towers += sum(p.numel() for p in stock.parameters()) - head + mining
    assert (
        sum(p.numel() for p in model.parameters()) == decoder + projector(wide) + towers
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    config = compose([f"model={name}"]).model
    assert models.sketch(config).visual_tokens == tokens
    assert models.sketch(config).layers == len(model.base_model.language_model.layers)
    assert json.dumps(models.size(config)) == before
    pixels = models.family(config).noise(model.config, 2)
    side = {"video_llava": 224, "mini_gemini_hd": 1536}.get(
        name, 768 if "gemini" in name else 336
    )
    crops = {"llava_next": (5,), "video_llava": (8,)}.get(config.family, ())
    assert next(iter(pixels.values())).shape == (2, *crops, 3, side, side)


def test_no_model_is_without_its_size_nor_has_that_of_another():
    found = {
        models.sketch(compose([f"model={name}"]).model).fingerprint
        for name in choices("model")
    }
    assert len(found) == len(choices("model"))


def test_llava_has_as_many_parameters_as_its_checkpoints_have():
    assert sum(p.numel() for p in on_meta("llava15").parameters()) == 7_063_427_072
    assert (
        sum(p.numel() for p in on_meta("llava_next_mistral").parameters())
        == 7_566_747_648
    )


class Made(TorchDispatchMode):
    """The largest tensor of a dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.largest = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (
            torch.is_tensor(out)
            and out.dtype == self.dtype
            and out.device.type != "meta"
        ):
            self.largest = max(self.largest, out.numel())
        return out


def test_random_weights_are_made_in_their_dtype_and_seeded():
    config = compose(["model=tiny_gemini", "model.dtype=bfloat16", "model.device=cpu"])
    placement = Session(config, models.sketch(config.model)).placement
    with Made(torch.float32) as made:
        model = models.draw(config.model, placement, 0)
    assert made.largest < 1000 < sum(p.numel() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {
        torch.bfloat16
    } and not model.training
    assert model.config._attn_implementation == "sdpa"
    again, other = (
        models.draw(config.model, placement, seed).state_dict() for seed in (0, 1)
    )
    assert all(
        torch.equal(weight, again[name]) for name, weight in model.state_dict().items()
    )
    assert any(
        not torch.equal(weight, other[name])
        for name, weight in model.state_dict().items()
    )


# ------------------------------------------------------------------------------------------- beside the paper's table


def test_measured_rows_stand_beside_published_ones(tmp_path, monkeypatch, capsys):
    stand_in = (
        "model=tiny_next",
        "model.name=llava_next",
        "init=random",
        "method=visionzip,fastv",
        "tokens=80",
    )
    record = measured(tmp_path, *stand_in, "batch=1,2")
    measured(tmp_path, "model=tiny_next")
    found = paper.measured("table4", str(tmp_path))
    assert [table.about for table in found] == [
        f"{speed_records.about(record)}, batch {batch}" for batch in (1, 2)
    ]
    assert record["machine"]["device"] in found[0].about
    for table, batch in zip(found, (1, 2), strict=True):
        ours, theirs = (
            [r for r in table.rows if (r.kind == kind)]
            for kind in ("measured", "published")
        )
        assert [(r.label, r.tokens) for r in ours] == [
            ("vanilla", None),
            ("visionzip budget=final", 80),
            ("fastv budget=final", 80),
        ]
        assert [r.label for r in theirs] == [
            f"{m} (published)" for m in ("vanilla", "fastv", "sparsevlm", "visionzip")
        ]
        for row in table.rows:
            assert {cell.record is not None for cell in row.cells.values()} == {
                row.kind == "measured"
            }
            assert ("total_time_s" in row.cells) == (row.kind == "published")
        row = by_method(record)["visionzip", batch]
        ttft = sorted(times["ttft"] for times in row["rounds"])
        assert ours[1].cells["prefill_ms"].score == pytest.approx(sum(ttft) / 2)
        assert ours[1].cells["answer_speedup"].score == speed_records.speed_up(
            record, row, speed_records.total
        )
        assert (ours[0].mean, ours[1].mean) == (744, 80) and ours[0].flops == 1 > ours[
            1
        ].flops > 0
        assert theirs[-1].cells["prefill_speedup"].score == pytest.approx(218 / 27.8)
    shown = render(found)
    assert "A800" in shown and "answer_ms: of 3 tokens" in shown
    assert "run_id" in render(found, "json")


def test_without_measurements_the_command_is_named(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"`zipeval bench model=llava_next init=random method=.*tokens=160`",
    ):
        paper.measured("table4", str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 0}', '{"schema": 1}'])
def test_what_is_no_record_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=r"x.json: not a record of `zipeval bench`"):
        paper.measured("table4", str(tmp_path))
