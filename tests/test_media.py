"""Images and videos on their way into a model: real files, decoded, through lmms-eval into records."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from io import BytesIO

import av
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from tiny import save_llava15
from transformers import LlavaImageProcessor

from zipeval import media
from zipeval.checkpoints.prompts import TEMPLATES
from zipeval.cli import compose
from zipeval.engine.images import pictures
from zipeval.errors import MediaError, UsageError
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.runner import evaluate, run
from zipeval.inference.session import Session
from zipeval.methods.visionzip import VisionZip
from zipeval.results import records

GRAY = (127, 127, 127)


def write_video(path, levels, size=96, codec="mpeg4"):
    """One even gray frame for each level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for level in levels:
            frame = av.VideoFrame.from_ndarray(
                np.full((size, size, 3), level, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return path


def levels(frames):
    return frames.mean((1, 2, 3))


@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video"), ("a.gif", "gif")],
)
@pytest.mark.parametrize("length", [1, 5, 8, 20])
def test_frames_are_at_even_distances_from_the_first_to_the_last(
    tmp_path, name, codec, length
):
    path = write_video(tmp_path / name, [i * 10 for i in range(length)], codec=codec)
    frames = media.frames(path, 8)
    assert frames.shape == (8, 96, 96, 3)
    expected = [int(i * (length - 1) / 7) * 10 for i in range(8)]
    assert levels(frames) == pytest.approx(expected, abs=20 if codec == "gif" else 4)


def test_what_is_missing_at_the_end_is_not_part_of_a_video(tmp_path):
    path = write_video(
        tmp_path / "a.ts", [i * 10 for i in range(20)], codec="mpeg2video"
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = levels(media.frames(path, 8))
    assert found[0] == pytest.approx(0, abs=3)
    assert 50 < found[-1] < 150
    assert (np.diff(found) > 5).all()


def test_a_video_ends_where_it_can_be_decoded_no_more(tmp_path):
    """Its index is whole and promises 20 frames."""
    path = write_video(tmp_path / "a.avi", [i * 10 for i in range(20)], codec="mjpeg")
    content = bytearray(path.read_bytes())
    starts = [
        i
        for i in range(len(content))
        if content[i : i + 4] == b"00dc" and content[i + 8 : i + 10] == b"\xff\xd8"
    ]
    assert len(starts) == 20
    for start in starts[12:]:
        size = int.from_bytes(content[start + 4 : start + 8], "little")
        content[start + 8 : start + 8 + size] = bytes(size)
    path.write_bytes(content)
    found = levels(media.frames(path, 8))
    assert found == pytest.approx([int(i * 11 / 7) * 10 for i in range(8)], abs=4)


def test_a_video_of_an_unknown_codec_is_a_media_error(tmp_path):
    """In a process of its own: PyAV would end it."""
    path = write_video(tmp_path / "a.mkv", [0, 50])
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_XXXXX/XXX/XXX"))
    script = f"import zipeval.media as m\ntry:\n    m.frames({str(path)!r}, 8)\nexcept m.MediaError as e:\n    print(e)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "no decoder" in done.stdout


@pytest.mark.parametrize("content", [b"", b"not a video", None, "directory", "sound"])
def test_a_damaged_video_is_a_media_error_that_names_it(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content == "directory":
        path.mkdir()
    elif content == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 800), np.int16), format="s16", layout="mono"
            )
            silence.rate = 8000
            container.mux(stream.encode(silence))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"broken\.wav"):
        media.frames(path, 8)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_padding_is_that_of_llava(width, height):
    """transformers' own processor for LLaVA has it, though its checkpoints do not use it."""
    image = Image.fromarray(
        np.random.default_rng(width * height).integers(
            0, 255, (height, width, 3), np.uint8
        )
    )
    theirs = LlavaImageProcessor().pad_to_square(
        torch.tensor(np.array(image)).permute(2, 0, 1), background_color=GRAY
    )
    assert np.array_equal(
        np.array(media.rgb(image, "pad", GRAY)), theirs.permute(1, 2, 0).numpy()
    )
    assert media.rgb(image, "crop", GRAY).size == (width, height)


def test_a_damaged_image_is_a_media_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ImageFile, "LOAD_TRUNCATED_IMAGES", True
    )  # as importing lmms-eval does
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    for image in (Image.open(path), str(path)):
        with pytest.raises(MediaError, match="image"):
            media.rgb(image, "pad", GRAY)


def ask(question, *pictures):
    content = [
        *({"type": kind, "url": url} for kind, url in pictures),
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]


def test_an_image_that_is_not_square_is_padded_or_cropped():
    """Columns that only padding keeps: white ends of a wide image."""
    wide = Image.new("RGB", (288, 96), "black")
    wide.paste("white", (0, 0, 48, 96))
    seen = {}
    for aspect in ("pad", "crop"):
        session = Session(compose([f"model.image_aspect={aspect}"]))
        inputs = session.inputs([session.decoded(ask("What?", ("image", wide)))])
        seen[aspect] = inputs["pixel_values"][0]
        assert seen[aspect].shape == (3, 96, 96)
    assert seen["crop"].unique().numel() == 1
    white, gray, black = seen["pad"].max(), seen["pad"][:, 0].mean(), seen["pad"].min()
    assert white > gray > black
    assert gray == pytest.approx(0, abs=0.02)  # the mean colour


def gradient(width, height):
    """Red from left to right, green from top to bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], 2).astype(np.uint8))


def middle(image):
    """The middle square."""
    width, height = image.size
    cut = abs(width - height) // 2
    return image.crop(
        (cut, 0, width - cut, height)
        if width > height
        else (0, cut, width, height - cut)
    )


@pytest.mark.parametrize("size", [(288, 96), (60, 180), (96, 96)])
@pytest.mark.parametrize(
    "overrides, side, seen",
    [
        (["model.image_aspect=pad"], 96, lambda image: media.rgb(image, "pad", GRAY)),
        (["model.image_aspect=crop"], 96, middle),
        (["model=tiny_next"], 96, lambda image: image),  # the whole of it, squeezed
        (["model=tiny_gemini"], 192, lambda image: media.rgb(image, "pad", GRAY)),
    ],
)
def test_the_picture_that_is_kept_is_what_the_model_sees(overrides, side, seen, size):
    session, image = Session(compose(overrides)), gradient(*size)
    asked = [
        ask("What?", ("image", Image.new("RGB", (9, 9)))),
        ask("What?", ("image", image)),
    ]
    inputs = session.inputs([session.decoded(messages) for messages in asked])
    kept = Image.open(BytesIO(session.jpeg(inputs["pixel_values"][1])))
    assert (kept.format, kept.size) == ("JPEG", (side, side))
    expected = seen(image).resize((side, side), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(kept, float) - np.asarray(expected, float)).mean() < 3


def test_large_pictures_are_kept_small():
    assert Image.open(
        BytesIO(media.jpeg(np.zeros((3, 768, 768)), [0.5] * 3, [0.2] * 3))
    ).size == (336, 336)


@pytest.mark.parametrize("name, who", [("vicuna_v1", "user"), ("llava_v1", "human")])
def test_conversations_are_those_of_llava(name, who):
    """Written out from LLaVA's conversation formats; images are where the task puts them, one line each."""
    system = (
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    conversation = [
        *ask("What is it?\nTell me.", ("image", None), ("video", None)),
        answer,
        *ask("Sure?"),
    ]
    render = partial(
        Session(compose([])).load()[1].apply_chat_template,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=True,
    )
    expected = "USER: <image>\n<video>\nWhat is it?\nTell me. ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert render(conversation) == f"{system} {expected}"
    assert render(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
            *ask("Sure?"),
        ]
    ) == ("Be short. USER: Sure? ASSISTANT:")


def test_the_prompt_of_a_model_is_the_one_it_reads(tmp_path):
    session = Session(
        compose(
            ["model=llava15", f"model.path={save_llava15(tmp_path / 'llava', side=2)}"]
        )
    )
    inputs = session.inputs(
        [session.decoded(ask("What?", ("image", Image.new("RGB", (28, 28)))))]
    )
    text = session.load()[1].tokenizer.decode(inputs["input_ids"][0])
    assert "curious user" in text
    assert text.count("<image>") == 4


def test_a_placeholder_in_a_text_is_a_media_error():
    """The processor would look for its image and end the task."""
    for model, text, refused in (
        ("tiny_llava", "<image>", True),
        ("tiny_llava", "<video>", False),
        ("tiny_video", "<video>", True),
    ):
        session = Session(compose([f"model={model}"]))
        if refused:
            with pytest.raises(MediaError, match=text):
                session.decoded(ask(f"Is {text} here?"))
        else:
            session.decoded(ask(f"Is {text} here?"))


@pytest.mark.parametrize(
    "part",
    [{"url": {"path": "a.mp4", "video_start": 1}}, {"url": "a.mp4", "end_time": 3.0}],
)
def test_parts_of_videos_are_refused(part):
    messages = [{"role": "user", "content": [{"type": "video", **part}]}]
    with pytest.raises(UsageError, match="whole videos"):
        Session(compose(["model=tiny_video"])).decoded(messages)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["model=tiny_next", "model.image_aspect=pad"],
            "model.image_aspect=pad.*tiny_next.*anyres",
        ),
        (["model.image_aspect=anyres"], "model.image_aspect=anyres.*pad or crop"),
        (
            ["model.image_aspect=squeeze"],
            "model.image_aspect=squeeze: expected one of pad, crop",
        ),
        (["model.prompt=llama2"], "model.prompt=llama2: expected one of hf, vicuna_v1"),
    ],
)
def test_what_a_model_cannot_do_with_its_inputs_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        Session(compose(overrides))


def test_prompt_and_aspect_make_another_run_and_are_recorded(tmp_path):
    (first,) = run(compose([f"results={tmp_path}", "limit=2"]))
    (second,) = run(
        compose(
            [
                f"results={tmp_path}",
                "limit=2",
                "model.prompt=vicuna_v1",
                "model.image_aspect=crop",
            ]
        )
    )
    assert first != second
    recorded = records.read(second)["config"]["model"]
    assert (recorded["prompt"], recorded["image_aspect"]) == ("vicuna_v1", "crop")


@pytest.fixture
def photos(tmp_path):
    """An lmms-eval task about four images as data sets hold them, one of which is cut short and one is none."""
    images = []
    for seed in range(4):
        stream = BytesIO()
        Image.fromarray(
            np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
        ).save(stream, "png")
        images.append(stream.getvalue())
    images[1], images[2] = images[1][:500], b"not an image"
    rows = {
        "image": [{"bytes": image, "path": None} for image in images],
        "question": ["How many circles are there?"] * 4,
    }
    features = Features({"image": ImageFeature(), "question": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    return write_task(
        tmp_path, "photos", "parquet", "test.parquet", "doc['image'].convert('RGB')"
    )


def test_a_damaged_image_of_a_data_set_is_one_recorded_failure(photos):
    model = ZipEval(Session(compose([])))
    record, samples = evaluate(model, "photos", photos)
    assert model.images.keys() == {("photos", 0), ("photos", 3)}
    assert ["error" in sample for sample in samples] == [False, True, True, False]
    assert record["failed"] == 2
    assert record["visual_tokens"]["mean"] == 144


def write_task(folder, name, kind, file, visual):
    (folder / "utils.py").write_text(
        f"def visual(doc):\n    return [{visual}]\n\n\n"
        "def process_results(doc, results):\n    return {'empty': float(not results[0])}\n"
    )
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n"
        f"dataset_path: {kind}\ndataset_kwargs: {{data_files: {{test: {folder / file}}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: question\ndoc_to_target: question\n"
        "process_results: !function utils.process_results\n"
        "generation_kwargs: {max_new_tokens: 4}\n"
        "metric_list: [{metric: empty, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


@pytest.fixture
def clips(tmp_path):
    """An lmms-eval task about four videos, two of which cannot be decoded."""
    write_video(tmp_path / "0.mp4", [0, 255] * 8)
    (tmp_path / "1.mp4").write_bytes(b"")
    write_video(tmp_path / "2.gif", [90] * 3, codec="gif")
    (tmp_path / "3.mp4").write_bytes((tmp_path / "0.mp4").read_bytes()[:700])
    docs = [
        {"video": str(path), "question": "How many circles are there?"}
        for path in sorted(tmp_path.glob("*.*"))
    ]
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(doc) + "\n" for doc in docs)
    )
    return write_task(
        tmp_path,
        "clips",
        "json",
        "test.jsonl",
        "{'type': 'video', 'path': doc['video']}",
    )


@pytest.mark.parametrize(
    "overrides", [["method=vanilla"], ["method=visionzip", "tokens=80"]], ids=" ".join
)
def test_a_damaged_video_is_one_recorded_failure(clips, overrides):
    model = ZipEval(Session(compose(["model=tiny_video", *overrides])))
    record, samples = evaluate(model, "clips", clips)
    assert record["failed"] == 2
    assert ["error" in sample for sample in samples] == [False, True, False, True]
    # A failed sample is wrong, also where the task itself takes an empty answer for right.
    answered = [sample["score"] for sample in samples if "error" not in sample]
    assert record["metrics"]["empty"] == sum(answered) / 4
    assert "1.mp4 cannot be decoded" in samples[1]["error"]
    assert samples[1]["prediction"] == ""
    tokens = 1160 if overrides == ["method=vanilla"] else 80
    assert [sample.get("visual_tokens") for sample in samples] == [
        [tokens] * 6,
        None,
        [tokens] * 6,
        None,
    ]
    assert record["visual_tokens"]["mean"] == tokens
    assert samples[0]["crops"] == [8]
    first_frames = [
        np.asarray(Image.open(BytesIO(model.images["clips", doc_id]))).mean()
        for doc_id in (0, 2)
    ]
    assert first_frames == pytest.approx([0, 90], abs=8)
    assert len(model.images) == 2


def test_nothing_readable_is_no_result(clips):
    for path in (clips / "0.mp4", clips / "2.gif"):
        path.write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"none of its 4 samples could be read: .*0\.mp4"
    ):
        evaluate(ZipEval(Session(compose(["model=tiny_video"]))), "clips", clips)


def test_the_published_budget_of_a_video_is_a_share_of_every_frame():
    session = Session(compose(["model=tiny_video", "method=visionzip", "tokens=80"]))
    assert session.method == VisionZip(tokens=10)
    assert VisionZip(tokens=17).split() == (14, 3)


def test_the_pictures_of_a_video_model_are_those_of_its_processor(tmp_path):
    session = Session(compose(["model=tiny_video"]))
    clip, image = write_video(tmp_path / "a.mp4", [0, 99]), Image.new("RGB", (40, 70))
    asked = [
        ask("What?", ("image", image), ("video", clip)),
        ask("What?", ("image", image)),
        ask("What?"),
    ]
    inputs = session.inputs([session.decoded(messages) for messages in asked])
    config = session.load()[0].config
    for kind, placeholder, crops in (
        ("image", config.image_token_id, 1),
        ("video", config.video_token_id, 8),
    ):
        found = pictures(session.load()[0], inputs, kind)
        assert [picture.crops for picture in found] == [crops] * (
            2 if kind == "image" else 1
        )
        assert sum(picture.tokens for picture in found) == int(
            (inputs["input_ids"] == placeholder).sum()
        )


def test_images_in_a_video_model_answer_as_in_the_model_it_is_made_of(tmp_path):
    (video,) = run(
        compose(
            [
                "model=tiny_video",
                f"results={tmp_path}",
                "limit=16",
                "method=visionzip",
                "tokens=80",
            ]
        )
    )
    (image,) = run(
        compose(
            [
                f"results={tmp_path}",
                "limit=16",
                "method=visionzip",
                "tokens=10",
                "budget=mean",
            ]
        )
    )
    answers = [
        [
            sample["prediction"]
            for sample in records.read_samples(path.parent, records.read(path))
        ]
        for path in (video, image)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=fastv", "tokens=400", "budget=mean"],
        ["method=sparsevlm", "tokens=400", "budget=final"],
        ["method=random", "tokens=80"],
        ["method=uniform", "tokens=100", "budget=mean"],
        ["method=pool", "tokens=96"],
        ["method=none"],
        ["method=chain", "method.first.tokens=400", "tokens=200", "budget=mean"],
    ],
    ids=" ".join,
)
def test_the_embedded_stand_in_runs(clips, overrides):
    record, _ = evaluate(
        ZipEval(Session(compose(["model=tiny_video", *overrides]))), "clips", clips
    )
    assert record["failed"] == 2
