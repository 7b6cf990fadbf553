from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zipeval.engine.ragged import compact_index, take

rows = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


@given(rows)
def test_kept_entries_end_up_right_aligned_and_in_order(keep):
    keep = torch.tensor(keep)
    index, valid = compact_index(keep)
    assert index.shape[1] == keep.sum(1).max()
    for row, at, good in zip(keep, index, valid, strict=True):
        wanted = row.nonzero()[:, 0].tolist()
        assert at[good].tolist() == wanted
        assert good.tolist() == [False] * (len(good) - len(wanted)) + [True] * len(
            wanted
        )


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 6))
def test_take_gathers_along_the_sequence(batch, length, picked):
    x = torch.randn(batch, length, 2, 3)
    index = torch.randint(length, (batch, picked))
    expected = torch.stack([x[b, index[b]] for b in range(batch)])
    assert torch.equal(take(x, index), expected)
