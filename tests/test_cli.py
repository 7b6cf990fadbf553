"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from zipeval import configs
from zipeval.cli import compose, main
from zipeval.errors import UsageError
from zipeval.evaluation import runner
from zipeval.models import EMBEDDED, find


def zipeval(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "zipeval", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


REFUSED = [
    (["tokens=abc", "method=visionzip"], "tokens=abc", "`zipeval run --help`"),
    (["tokens=0", "method=visionzip"], "tokens=0", "tokens=16"),
    (
        ["tokens=9999", "method=visionzip"],
        "tokens=9999: tiny_llava has 144 visual tokens",
        "tokens=16",
    ),
    (["method=visonzip", "tokens=16"], "method=visonzip", "Did you mean visionzip?"),
    (["tokns=64"], "tokns=64", "Did you mean tokens?"),
    (["method=visionzip"], "tokens is not set: method=visionzip", "tokens=16"),
    (["method=random"], "tokens is not set: method=random", "tokens=16"),
    (["method=visionzip", "method.tokens=9"], "method.tokens=9", "tokens=9"),
    (
        ["method=visionzip", "method.dominant=200", "method.contextual=30"],
        "dominant=200, contextual=30) removes nothing",
        "method=vanilla",
    ),
    (["method._target_=nope.X"], "nope", "`zipeval run --help`"),
    (
        ["method=visionzip", "tokens=16", "method.foo=1"],
        "method.foo=1",
        "`zipeval run --help`",
    ),
    (
        ["method=visionzip", "tokens=16", "method.dominant=17"],
        "method=visionzip",
        "dominant=17",
    ),
    (
        ["method=visionzip", "tokens=17"],
        "tokens=17: published are 48, 32, 16 of 144",
        "budget=mean",
    ),
    (
        ["method=sparsevlm", "tokens=20"],
        "tokens=20: published are 48, 32, 16 of 144",
        "budget=mean",
    ),
    (
        ["method=fastv", "tokens=16", "budget=mean", "method.K=2"],
        "48 to 144 are feasible",
        "6 layers x 144",
    ),
    (
        ["method=fastv", "tokens=16", "method.K=3"],
        "K=3: published is K=1",
        "budget=mean",
    ),
    (["method=fastv", "tokens=16", "method.keep=9"], "tokens=", "method.keep="),
    (["method=fastv", "method.keep=200"], "keep=200", "removes nothing"),
    (["method=fastv"], "tokens is not set: method=fastv", "tokens=16"),
    (
        ["method=chain", "method@method.second=fast", "tokens=16"],
        "method@method.second=fast",
        "Did you mean fastv?",
    ),
    (
        [
            "method=chain",
            "method.first.tokens=48",
            "method@method.second=random",
            "tokens=16",
        ],
        "second=Random",
        "--help",
    ),
    (
        ["method=sparsevlm", "tokens=16", "method.counts=[9,8,7]"],
        "tokens=",
        "method.counts=",
    ),
    (["method=sparsevlm", "tokens=16", "method.version=3"], "version=3", "1.5 or 2"),
    (["method=pool", "tokens=13"], "tokens=13", "height x width"),
    (
        ["method=sparsevlm", "method.counts=[40,20,10]"],
        "layers=[3, 7, 16]",
        "layers 1 to 5",
    ),
    (
        ["method=sparsevlm", "method.after=[1,2,9]", "tokens=40", "budget=final"],
        "layers=[2, 3, 10]",
        "layers 1 to 5",
    ),
    (
        ["method=sparsevlm", "method.after=[1,2]", "tokens=40", "budget=mean"],
        "after=[1, 2]",
        "3 layers",
    ),
    (
        ["method=sparsevlm", "method.version=2", "method.heads=0", "tokens=16"],
        "heads=0",
        "from 1 up",
    ),
    (
        ["method=sparsevlm", "method.counts=[-1,5,5]", "method.after=[0,1,3]"],
        "counts=[-1, 5, 5]",
        "from 0 up",
    ),
    (["method=sparsevlm", "method.seed=7", "tokens=16"], "method.seed=7", "seed=7"),
    (
        ["method=fastv", "method.K=two", "tokens=16", "budget=mean"],
        "K=two",
        "whole number",
    ),
    (["method=fastv", "method.K=0", "method.keep=9"], "K=0", "from 1 up"),
    (["method=fastv", "method.keep=0.5"], "keep=0.5", "whole number"),
    (["method=chain", "tokens=16"], "method.first.tokens", "`zipeval run --help`"),
    (
        ["method=chain", "tokens=16", "method.first.tokens=500"],
        "first.tokens=500",
        "from 16 to 144",
    ),
    (["method=chain", "method.first.tokens=48"], "give tokens=", "second one leaves"),
    (
        ["method=chain", "method.first.tokens=16", "tokens=48"],
        "tokens=48",
        "removes nothing",
    ),
    (
        [
            "method=chain",
            "method.first.tokens=48",
            "tokens=16",
            "method.second.tokens=32",
        ],
        "second.tokens=32",
        "tokens=",
    ),
    (
        ["method=chain", "method.first.tokens=32", "tokens=9"],
        "tokens=9: published",
        "budget=mean",
    ),
    (["budget=average", "tokens=16"], "budget=average", "paper, mean, final"),
    (["model=tiny_lava"], "model=tiny_lava", "Did you mean tiny_llava?"),
    (["model.dtpe=float16"], "model.dtpe=float16", "Did you mean dtype?"),
    (["model.dtype=float8"], "model.dtype=float8", "bfloat16"),
    (["model.quantization=3bit"], "model.quantization=3bit", "none, 8bit, 4bit"),
    (["model.device_map=all"], "model.device_map=all", "null, auto"),
    (
        ["model.device_map=auto", "model.device=cpu"],
        "model.device=cpu",
        "model.device_map=auto",
    ),
    (
        ["model=tiny_next", "model.quantization=4bit"],
        "model.quantization=4bit",
        "model=tiny_llava",
    ),
    (
        ["model=tiny_next", "model.device_map=auto"],
        "model.device_map=auto",
        "model=tiny_llava",
    ),
    (["model.family=foo"], "model.family=foo", "`zipeval list models`"),
    (
        ["model=llava15", "model.hub=null", "suite=shapes"],
        "model=llava15",
        "model.path=DIR",
    ),
    (["model=llava15", "model.hub=a/b/c", "suite=shapes"], "a/b/c", "model.path=DIR"),
    (["model.path=damaged"], "model.path=damaged: ", "model.safetensors is damaged"),
    (["model.path=nowhere"], "model.path=nowhere", "config.json"),
    (
        ["tasks=[zipeval_shape]"],
        "tasks=[zipeval_shape]",
        "Did you mean zipeval_shapes?",
    ),
    (["tasks=[pope_full]"], "tasks=[pope_full]", "members"),
    (["tasks=[]"], "tasks=[]", "zipeval_shapes"),
    (['tasks=[""]'], "tasks=[]", "zipeval list tasks"),
    (
        ["tasks=[llava_wilder_small]"],
        "tasks=[llava_wilder_small]",
        "mmbench_en_dev, mmvet, llava_in_the_wild",
    ),
    (["tasks=[mmvet]"], "tasks=[mmvet]", "judge.url="),
    (["suite=paper_video"], "tasks=[zipeval_tgif_qa]", "judge.url="),
    (["judge.key=sk-canary"], "judge.key: no such setting", "model, url"),
    (["data.vidoes=DIR"], "data.vidoes=DIR", "Did you mean videos?"),
    (["limit=-3"], "limit=-3", "limit=16"),
    (["tasks=[mme]", "limit=3"], "limit=3: tasks=[mme]", "limit=4"),
    (
        ["tasks=[gqa]"],
        "lmms-lab-encoder/GQA is missing",
        "hf download --repo-type dataset lmms-lab-encoder/GQA",
    ),
    (
        ["tasks=[gqa]", "data.root=."],
        "not below data.root=.",
        "--local-dir ./lmms-lab-encoder/GQA",
    ),
    (
        ["data.root=nowhere"],
        "data.root=nowhere: no such directory",
        "ORGANISATION/NAME",
    ),
    (
        ["data.rot=nowhere"],
        "data.rot=nowhere: no such setting of data",
        "Did you mean root?",
    ),
    (["seed=-1"], "seed=-1", "0 to"),
    (["results=file/below"], "results=file/below", "Choose another results=DIR"),
    (["-m", "tokens=16,abc", "method=visionzip"], "abc", "`zipeval run --help`"),
    (
        ["model=llava15", "method=visionzip", "tokens=64"],
        "model=llava15: llava-hf/llava-1.5-7b-hf",
        "model.path=DIR",
    ),
]


@pytest.mark.parametrize(
    "arguments, named, advice",
    REFUSED,
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused_input(arguments, named, advice, tmp_path, monkeypatch, capsys):
    """One or two sentences that name the argument and the next command; no traceback, nothing left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zipeval", "run", *arguments])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    shutil.copytree(EMBEDDED / "tiny_llava", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert said.err.startswith("zipeval: ")
    told = [
        line for line in said.err.splitlines() if "this command evaluates" not in line
    ]
    assert len(told) == 1 or "model=llava15" in arguments
    assert named in said.err
    assert advice in said.err
    assert not list(tmp_path.glob("results/**/*.json"))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization_without_its_library(quantization, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        sys.modules, "bitsandbytes", None
    )  # Python's own way to say: there is none
    monkeypatch.setattr(
        sys, "argv", ["zipeval", "run", f"model.quantization={quantization}"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"zipeval: model.quantization={quantization}: bitsandbytes is not installed. "
        "`pip install 'zipeval[quantization]'` installs it.\n"
    )


def test_a_refusal_from_a_shell(tmp_path):
    done = zipeval("run", "method=visonzip", "tokens=16", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "zipeval: method=visonzip: no such method. Did you mean visionzip? Available: "
        "chain, fastv, none, pool, random, sparsevlm, sparsevlm_on_visionzip, sparsevlm_without_top, uniform, vanilla, "
        "visionzip, visionzip_tuned, without_top.\n"
    )


def test_refusals_import_nothing_heavy(tmp_path):
    script = (
        "import sys, zipeval.cli\n"
        "heavy = ('torch', 'transformers', 'lmms_eval')\n"
        "sys.argv = ['zipeval', 'run', 'method=visionzip', 'tokens=16', *sys.argv[1:]]\n"
        "try:\n    zipeval.cli.main()\n"
        "except SystemExit as e:\n    print(e.code, [m for m in heavy if m in sys.modules])"
    )
    for bad in (
        "tokens=0",
        "tokens=abc",
        "tokens=9999",
        "tokns=1",
        "method=visonzip",
        "tasks=[nothing]",
        "data.root=nowhere",
        "tasks=[gqa]",
        "results=/dev/null/x",
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, bad],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stdout == "2 []\n", (bad, done)


def test_a_sweep_goes_on_after_a_refused_job(tmp_path):
    done = zipeval(
        "run",
        "-m",
        "method=visionzip",
        "tokens=9999,16",
        "limit=2",
        "batch_size=2",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("tokens=9999") == 1
    assert (
        len(list(tmp_path.glob("results/runs/*-visionzip-16-*/zipeval_shapes.json")))
        == 1
    )


def test_a_refused_job_of_a_sweep_gives_its_memory_back(monkeypatch, tmp_path):
    """An error's traceback would hold its model while the next job looks for free memory."""
    models, alive = [], []

    def refuse(config, checkpoint):
        gc.collect()
        alive.extend(model() is not None for model in models)
        model = torch.nn.Linear(1, 1)
        models.append(weakref.ref(model))
        raise UsageError(f"tokens={config.tokens}: no memory")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", refuse)
    monkeypatch.setattr(
        sys,
        "argv",
        ["zipeval", "run", "-m", "method=visionzip", "tokens=1,2,3", "bound=none"],
    )
    with pytest.raises(SystemExit):
        main()
    assert (len(models), alive) == (3, [False] * 3)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "zipeval run model=MODEL"),
        (["--help"], "zipeval doctor"),
        (["list", "models"], "tiny_llava"),
        (["list", "methods"], "visionzip"),
        (["list", "suites"], "shapes"),
        (["list", "tasks"], "zipeval_shapes"),
        (["list", "experiments"], "Use with +experiment=NAME."),
        (["run", "--help"], "batch_size=N|auto"),
        (["doctor"], "tiny_llava   "),
    ],
    ids=str,
)
def test_helpful_commands(arguments, expected, tmp_path):
    done = zipeval(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


@pytest.mark.parametrize(
    "name",
    sorted(path.stem for path in Path(configs.__path__[0], "model").glob("*.yaml")),
)
def test_what_is_listed_of_a_model_is_so(name, monkeypatch, capsys):
    """Where its weights come from, and how many visual tokens and layers they have; looked up where they are there."""
    monkeypatch.setattr(sys, "argv", ["zipeval", "list", "models"])
    main()
    (line,) = (
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(f"{name} ")
    )
    _, source, about = re.split(r" {2,}", line)
    visual_tokens, layers = (
        int(re.search(rf"(\d+) {what}", about)[1])
        for what in ("visual tokens", "layers")
    )
    model = compose([f"model={name}"]).model
    assert model.name == name
    assert "ViT" in about
    if model.embedded:
        found = find(model)
        assert (source, visual_tokens, layers) == (
            "embedded",
            found.visual_tokens,
            found.layers,
        )
        return
    if not model.hub:
        assert (source, model.family) == ("zipeval convert", "mini_gemini")
        return
    assert re.fullmatch(r"[\w-]+/[\w.-]+", model.hub)
    assert re.fullmatch("[0-9a-f]{40}", model.revision)
    assert source == f"{model.hub}@{model.revision[:8]}"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["lst"], "Did you mean list?"),
        (["list"], "models"),
        (["list", "model"], "Did you mean models?"),
        (["table", "result=x"], "Did you mean results?"),
        (["table"], "no records"),
    ],
    ids=str,
)
def test_other_refusals(arguments, named, tmp_path):
    done = zipeval(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_data_set_that_cannot_be_fetched(tmp_path):
    done = zipeval("run", "tasks=[pope_adv]", cwd=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(
        "zipeval: tasks=[pope_adv]: its data set does not load"
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_data_set_without_a_network(tmp_path):
    """Nothing listens at the port. Refused at once, and not after the hub's own retries, which take a minute."""
    offline = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    done = zipeval("run", "tasks=[gqa]", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "zipeval: tasks=[gqa]: lmms-lab-encoder/GQA is missing"
    )
    assert len(done.stderr.splitlines()) == 1


def test_doctor_without_a_network(tmp_path):
    """The hub cannot be reached at a port where nothing listens; the rest of the examination goes on."""
    done = zipeval(
        "doctor", cwd=tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "http://127.0.0.1:9 not reachable" in done.stdout
    assert "judge" in done.stdout
