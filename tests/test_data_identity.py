"""Other data under the same name: videos that were replaced, and data sets that changed on the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import lmms_eval.api.task
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniatures import HUB, IMAGE, NUMBER, TEXT, TEXTS, picture

from zipeval.benchmarks import data_identity
from zipeval.cli import compose
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables
from zipeval.results import records
from zipeval.utils import content_hash
from zipeval.utils.arrow_hash import ColumnHash, hash_rows

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of datasets, as if everything in it came from the hub, which cannot be reached now."""
    folder = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    monkeypatch.setattr(data_identity, "_latest", {})
    resolve = (
        lmms_eval.api.task._resolve_hf_datasets_cache_dir
    )  # which it does once in a process
    resolve.cache_clear()
    yield folder
    resolve.cache_clear()


def give(hub_cache, miniatures, name, commit, change=None):
    """Put a version of a data set into the cache, prepared as it would be of that commit of the hub.

    Args:
        change: of the rows of every split.
    """
    source = miniatures / HUB / name
    for config in datasets.get_dataset_config_names(str(source)):
        target = (
            hub_cache
            / f"{HUB}___{datasets.naming.camelcase_to_snakecase(name)}"
            / config
            / "0.0.0"
            / commit
        )
        builder = datasets.load_dataset_builder(
            str(source), name=config, cache_dir=str(hub_cache.parent / "elsewhere")
        )
        builder.download_and_prepare()
        shutil.copytree(builder.cache_dir, target)
        if change:
            for file in target.glob("*.arrow"):
                rewrite(file, change)


def rewrite(file, change):
    """Change the rows of a file of datasets' cache, whose format keeps the columns' types."""
    rows = datasets.Dataset.from_file(str(file))
    table = pa.Table.from_pylist(
        change(rows.with_format("arrow")[:].to_pylist()), rows.data.table.schema
    )
    del rows
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def other_answers(rows):
    return [
        {**row, "answer": {"yes": "no", "no": "yes"}.get(row["answer"], row["answer"])}
        for row in rows
    ]


def other_image(rows):
    """One byte behind the pixels of the last image."""
    *first, last = rows
    return [
        *first,
        {**last, "image": {**last["image"], "bytes": last["image"]["bytes"] + b"\0"}},
    ]


def pope(results, *overrides):
    (path,) = run(
        compose(["tasks=[pope]", f"results={results}", "limit=3", *overrides])
    )
    return path


@pytest.mark.parametrize("change", [other_answers, other_image])
def test_a_record_of_another_version_of_the_hubs_data_is_not_kept(
    change, hub_cache, miniatures, tmp_path, capsys
):
    give(hub_cache, miniatures, "POPE", COMMITS[0])
    path = pope(tmp_path / "results")
    record = records.read(path)
    assert record["data_hash"]
    assert record["data_revision"] == COMMITS[0]
    assert pope(tmp_path / "results") == path
    assert "finished before, kept" in capsys.readouterr().out
    data_identity._latest.clear()  # as in another process
    shutil.rmtree(hub_cache)
    give(hub_cache, miniatures, "POPE", COMMITS[1], change)
    with pytest.raises(
        UsageError, match=rf"tasks=\[pope\]: {path} is of other data .*Move it away"
    ):
        pope(tmp_path / "results")
    other = records.read(pope(tmp_path / "others"))
    assert other["data_hash"] != record["data_hash"]
    assert other["data_revision"] == COMMITS[1]


def test_a_change_in_the_cache_itself_is_seen(hub_cache, miniatures, tmp_path):
    """The commit is the same, and so is what datasets calls its fingerprint."""
    give(hub_cache, miniatures, "POPE", COMMITS[0])
    path = pope(tmp_path / "results")
    data_identity._latest.clear()
    for file in hub_cache.rglob("*.arrow"):
        rewrite(file, other_answers)
    with pytest.raises(UsageError, match=f"{path} is of other data"):
        pope(tmp_path / "results")


def test_another_commit_of_the_same_data_is_the_same_data(
    hub_cache, miniatures, tmp_path
):
    """A README was mended, say."""
    give(hub_cache, miniatures, "POPE", COMMITS[0])
    path = pope(tmp_path / "results")
    data_identity._latest.clear()
    shutil.rmtree(hub_cache)
    give(hub_cache, miniatures, "POPE", COMMITS[1])
    assert pope(tmp_path / "results") == path


def test_rows_of_other_data_are_not_divided_by_a_bound(hub_cache, miniatures, tmp_path):
    results = tmp_path / "results"
    give(hub_cache, miniatures, "POPE", COMMITS[0])
    pope(results, "method=vanilla")
    shutil.rmtree(hub_cache)
    give(hub_cache, miniatures, "POPE", COMMITS[1], other_answers)
    pope(results, "method=visionzip", "tokens=16")
    with pytest.raises(UsageError, match="no upper bound of the same task and data"):
        render(tables(str(results)))


def test_the_images_of_a_second_data_set_count(hub_cache, miniatures, tmp_path):
    """GQA's questions and images are two."""
    give(hub_cache, miniatures, "GQA", COMMITS[0])
    settings = ["tasks=[gqa]", f"results={tmp_path}/results", "limit=2"]
    (path,) = run(compose(settings))
    data_identity._latest.clear()
    images = next(
        file
        for file in hub_cache.rglob("*.arrow")
        if "testdev_balanced_images" in str(file)
    )
    rewrite(images, other_image)
    with pytest.raises(UsageError, match=f"{path} is of other data"):
        run(compose(settings))


def test_a_finished_record_whose_data_is_gone_is_kept_and_that_is_said(
    hub_cache, miniatures, tmp_path, capsys
):
    give(hub_cache, miniatures, "POPE", COMMITS[0])
    path = pope(tmp_path / "results")
    data_identity._latest.clear()
    shutil.rmtree(hub_cache)
    assert pope(tmp_path / "results") == path
    assert "not on this machine" in capsys.readouterr().out


def test_answers_about_other_data_are_not_gone_on_with(
    hub_cache, miniatures, tmp_path, monkeypatch
):
    give(hub_cache, miniatures, "POPE", COMMITS[0])
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(records, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            pope(tmp_path / "results")
    shutil.rmtree(hub_cache)
    give(hub_cache, miniatures, "POPE", COMMITS[1], other_answers)
    with pytest.raises(UsageError, match=r"begun with data_hash .* \(now "):
        pope(tmp_path / "results")


def test_embedded_data_is_in_the_hash_of_its_task():
    session = Session(compose([]))
    folder = Path("tasks/shapes")
    assert session.data_identity("zipeval_shapes", folder).data_hash is None
    assert session.data_identity("zipeval_shapes_turns", folder).data_hash is None


# --- the hash of rows


def rows(**changes):
    columns = {
        "name": ["a", "bc", None, "", "é"],
        "number": [1, None, 3, 4, 5],
        "many": [["x"], [], None, ["y", ""], ["z"]],
        "image": [picture(number) for number in range(4)] + [None],
    }
    features = {"name": TEXT, "number": NUMBER, "many": TEXTS, "image": IMAGE}
    return datasets.Dataset.from_dict(
        columns | changes, features=datasets.Features(features)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ["ab", "c", None, "", "é"]},  # the same letters
        {"name": ["a", "bc", "", "", "é"]},  # the same length, and no null
        {"name": ["bc", "a", None, "", "é"]},
        {"number": [1, 0, 3, 4, 5]},
        {"number": [1, None, 3, 4, 6]},
        {"many": [["x"], [], [], ["y", ""], ["z"]]},
        {"many": [[], ["x"], None, ["y", ""], ["z"]]},
        {"many": [["x"], [], None, ["y"], ["", "z"]]},
        {"image": [picture(number) for number in (0, 1, 2, 4)] + [None]},
    ],
    ids=[
        "letters",
        "nulls",
        "order",
        "number",
        "null",
        "rows",
        "empty",
        "lists",
        "image",
    ],
)
def test_every_value_counts(changes):
    assert hash_rows(rows(**changes)) != hash_rows(rows())
    assert hash_rows(rows()) == hash_rows(rows())


def test_a_column_that_was_added_in_memory_counts(tmp_path, monkeypatch):
    """Its files are those of before."""
    monkeypatch.setattr(content_hash, "SETTLED", 0)
    rows().to_parquet(tmp_path / "rows.parquet")
    loaded = datasets.Dataset.from_parquet(
        str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "datasets")
    )
    assert (
        len({hash_rows(loaded.add_column("more", [number] * 5)) for number in range(3)})
        == 3
    )


def test_names_order_and_number_of_rows_count():
    whole = rows()
    hashes = {
        hash_rows(whole),
        hash_rows(whole.rename_column("name", "title")),
        hash_rows(whole.select([1, 0, 2, 3, 4])),
        hash_rows(whole.select(range(4))),
        hash_rows(whole.remove_columns("number")),
    }
    assert len(hashes) == 5
    assert hash_rows(
        whole.select([1, 0, 2, 3, 4]).select([1, 0, 2, 3, 4])
    ) == hash_rows(whole)


VALUES = {
    pa.string(): st.text(max_size=3),
    pa.large_binary(): st.binary(max_size=3),
    pa.int16(): st.integers(-300, 300),
    pa.bool_(): st.booleans(),
    pa.list_(pa.int8()): st.lists(st.integers(-2, 2), max_size=3),
    pa.list_(pa.float32(), 2): st.lists(
        st.integers(-2, 2).map(float), min_size=2, max_size=2
    ),
    pa.struct([("a", pa.string()), ("b", pa.bool_())]): st.fixed_dictionaries(
        {"a": st.none() | st.text(max_size=2), "b": st.booleans()}
    ),
    pa.decimal128(5, 2): st.decimals(-99, 99, places=2),
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_chunks_do_not_count_and_values_do(kind):
    values = st.lists(st.none() | VALUES[kind], max_size=6)

    def hashed(*chunks):
        column = ColumnHash()
        column.update(pa.chunked_array([*chunks], kind))
        return column.hexdigest()

    @given(values, values, st.integers(0, 6))
    def check(first, second, cut):
        whole = pa.array(first, kind)
        padded = pa.array([*second, *first, *second], kind)[
            len(second) : len(second) + len(first)
        ]
        assert hashed(whole) == hashed(whole[:cut], whole[cut:]) == hashed(padded)
        assert (hashed(whole) == hashed(pa.array(second, kind))) == (first == second)

    check()


def test_a_hash_of_rows_is_remembered_until_their_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(content_hash, "SETTLED", 0)
    monkeypatch.setenv("ZIPEVAL_CACHE", str(tmp_path / "cache"))
    rows().to_parquet(tmp_path / "rows.parquet")
    loaded = datasets.Dataset.from_parquet(
        str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "datasets")
    )
    digest = hash_rows(loaded)
    assert digest == hash_rows(rows())
    with monkeypatch.context() as patch:
        patch.setattr(ColumnHash, "update", lambda *_: pytest.fail("it was read again"))
        assert hash_rows(loaded) == digest
    (file,) = (Path(each["filename"]) for each in loaded.cache_files)
    del loaded
    rewrite(file, lambda values: values[::-1])
    assert hash_rows(datasets.Dataset.from_file(str(file))) != digest


def test_images_that_a_data_set_only_names_count_by_their_content(tmp_path):
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")

    def named():
        paths = [str(tmp_path / f"{number}.png") for number in range(2)]
        return datasets.Dataset.from_dict({"image": paths}).cast_column(
            "image", datasets.Image()
        )

    before = hash_rows(named())
    assert hash_rows(named()) == before
    stat = (tmp_path / "1.png").stat()
    picture(2).save(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hash_rows(named()) != before


# --- videos


@pytest.fixture
def videos(tmp_path):
    """Three questions about two videos and one that is missing; another video is about nothing."""
    folder = tmp_path / "videos/MSVD_Zero_Shot_QA"
    (folder / "videos").mkdir(parents=True)
    questions = [
        {"question_id": i, "video_name": f"clip{i}", "question": "What?"}
        for i in range(3)
    ]
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(
        json.dumps([{"question_id": i, "answer": "x"} for i in range(3)])
    )
    for name in ("clip0", "clip1", "clip9"):
        (folder / f"videos/{name}.mp4").write_bytes(name.encode())
    return tmp_path / "videos"


def video_hash(root, limit=None):
    from zipeval.benchmarks import videoqa
    from zipeval.config.schema import DataConfig

    task = "zipeval_msvd_qa"
    questions = videoqa.questions(task, str(root))
    return data_identity.identify(
        task, Path(), DataConfig(videos=str(root)), questions, limit
    ).data_hash


def test_videos_count_by_their_content(videos, tmp_path):
    folder = videos / "MSVD_Zero_Shot_QA"
    before, first = video_hash(videos), video_hash(videos, limit=1)
    assert video_hash(shutil.copytree(videos, tmp_path / "moved")) == before
    assert first != before
    (folder / "videos/clip9.mp4").write_bytes(b"asked about by nothing")
    assert video_hash(videos) == before
    (folder / "videos/clip1.mp4").write_bytes(b"CLIP1")
    changed = video_hash(videos)
    assert changed != before
    assert (
        video_hash(videos, limit=1) == first
    )  # about which only the first video is asked
    (folder / "videos/clip2.mp4").write_bytes(b"not missing any more")
    added = video_hash(videos)
    assert added not in (before, changed)
    (folder / "test_a.json").write_text(
        json.dumps([{"question_id": i, "answer": "y"} for i in range(3)])
    )
    assert video_hash(videos) != added
