"""Every method of zipeval's own, on the random models of the contract."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from tiny import llava, llava_next, mini_gemini, prompts, video_llava

import zipeval.methods
from zipeval.contract.candidates import candidate
from zipeval.contract.checks import Candidate, answer, snapshot
from zipeval.contract.subjects import IMAGES, LAYERS, QUESTIONS, SIDE, SUBJECTS

__all__ = [
    "FAMILIES",
    "IMAGES",
    "LAYERS",
    "METHODS",
    "SIDE",
    "answer",
    "ask",
    "make",
    "method",
    "modules",
    "snapshot",
    "tiny",
]


def modules(package):
    return sorted(path.stem for path in Path(package.__path__[0]).glob("[a-z]*.py"))


METHODS = modules(zipeval.methods)
FAMILIES = {
    "llava": llava,
    "llava_next": llava_next,
    "mini_gemini": mini_gemini,
    "mini_gemini_hd": partial(mini_gemini, grid=2),
    "video_llava": video_llava,
}


@cache
def method(name) -> Candidate:
    return candidate(name)


SUBJECT_BY_NAME = {subject.name: subject for subject in SUBJECTS}


def make(name, model):
    """Return a method that leaves a third of the model's visual tokens, or the least that it can leave."""
    family = model.config.model_type + (
        "_hd" if getattr(model.config, "image_grid", 1) > 1 else ""
    )
    return method(name).on(SUBJECT_BY_NAME[family])


def tiny(family):
    """Return the model of the contract, in float64, which tests share."""
    return SUBJECT_BY_NAME[family].model()


def ask(model, images):
    """Return three left-padded prompts for a model in float64."""
    batch = prompts(model, QUESTIONS, images)
    return {
        name: tensor.to(torch.double) if name.startswith("pixel") else tensor
        for name, tensor in batch.items()
    }
