"""What other libraries do differently within a block is as before behind it, whoever leaves first."""

from __future__ import annotations

import os
from contextlib import ExitStack

import datasets
import pytest
from PIL import ImageFile

from zipeval.utils import foreign_patches


def test_blocks_that_end_in_any_order_restore_what_was_there(monkeypatch):
    """As those of two threads do: the first to leave does not switch the other one's patch off."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    first, second = ExitStack(), ExitStack()
    first.enter_context(foreign_patches.refuse_truncated_images())
    second.enter_context(foreign_patches.refuse_truncated_images())
    first.close()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    second.close()
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_inner_of_two_functions_is_called():
    before = datasets.load_dataset
    with foreign_patches.load_datasets_with(lambda: "outer"):
        with foreign_patches.load_datasets_with(lambda: "inner"):
            assert datasets.load_dataset() == "inner"
        assert datasets.load_dataset() == "outer"
    assert datasets.load_dataset is before


def test_an_environment_comes_back_also_behind_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    before = dict(os.environ)
    with (
        pytest.raises(ValueError),
        foreign_patches.environment(removed=["RANK"], KEY="none"),
    ):
        assert "RANK" not in os.environ and os.environ["KEY"] == "none"
        os.environ["LEFT_BEHIND"] = "by a library"
        raise ValueError
    assert dict(os.environ) == before
