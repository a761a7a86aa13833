"""Rows of packed documents: nothing lost, nothing doubled, no label across a boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.packing import PackedCollator, pack
from weft.rewrite.errors import PackingError

from ..graphs import cases


def naive(lengths: list[int], room: int) -> list[list[int]]:
    """First fit, longest first, by trying every row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = (r for r in rows if sum(lengths[i] for i in r) + lengths[index] <= room)
        row = next(fitting, None)
        if row is None:
            rows.append([index])
        else:
            row.append(index)
    return sorted((sorted(r) for r in rows), key=lambda r: r[0])


@cases
@given(lengths=st.lists(st.integers(0, 12), max_size=40), more=st.integers(0, 20))
def test_rows_are_those_of_first_fit(lengths: list[int], more: int) -> None:
    room = max([*lengths, 1]) + more
    rows = pack(lengths, room)
    assert rows == naive(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= room for row in rows)


@st.composite
def examples(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Tokenized documents, as lists or tensors, some with labels or with padding of their own."""
    made = []
    for _ in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.integers(3, 60), min_size=1, max_size=9))
        example: dict[str, Any] = {"input_ids": ids}
        if draw(st.booleans()):
            example["labels"] = [draw(st.sampled_from((-100, i))) for i in ids]
        if draw(st.booleans()):
            example["input_ids"], example["attention_mask"] = [*ids, 0], [1] * len(ids) + [0]
            if "labels" in example:
                example["labels"] = [*example["labels"], -100]
        made.append({k: torch.tensor(v) for k, v in example.items()} if draw(st.booleans()) else example)
    return made


def split(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every document of a batch, read off its positions; padding is documents of one token."""
    found: list[tuple[list[int], list[int]]] = []
    rows = zip(*(batch[k].tolist() for k in ("input_ids", "labels", "position_ids")), strict=True)
    for ids, labels, positions in rows:
        for token, label, position in zip(ids, labels, positions, strict=True):
            if position == 0:
                found.append(([], []))
            assert position == len(found[-1][0])
            found[-1][0].append(token)
            found[-1][1].append(label)
    return found


@cases
@given(given_examples=examples(), one_row=st.booleans(), fixed=st.booleans())
def test_documents_come_back(given_examples: list[dict[str, Any]], one_row: bool, fixed: bool) -> None:
    batch = PackedCollator(12, pad_id=1, one_row=one_row, fixed=fixed)(given_examples)
    wanted = []
    for example in given_examples:
        plain = {k: torch.as_tensor(v).tolist() for k, v in example.items()}
        count = sum(plain.get("attention_mask", [1] * len(plain["input_ids"])))
        labels = plain.get("labels", plain["input_ids"])[:count]
        wanted.append((plain["input_ids"][:count], [-100, *labels[1:]]))
    found = split(batch)
    assert sorted(f for f in found if f != ([1], [-100])) == sorted(wanted)
    assert not one_row or batch["input_ids"].shape[0] == 1
    assert one_row or not fixed or batch["input_ids"].shape[1] == 12
    assert batch["use_cache"] is False and "attention_mask" not in batch


def test_bounds_are_those_of_flash_attention() -> None:
    batch = PackedCollator(8, one_row=True, bounds=True)([{"input_ids": [5] * n} for n in (3, 8, 2)])
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 13]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == batch["max_length_k"] == 8


def test_the_same_examples_give_the_same_batch() -> None:
    made = [{"input_ids": list(range(3, 3 + n))} for n in (5, 2, 7, 2, 5)]
    one, other = PackedCollator(9)(made), PackedCollator(9)(made)
    assert all(torch.equal(one[k], other[k]) for k in ("input_ids", "labels", "position_ids"))


BAD = {
    "a document longer than a row": ([{"input_ids": [5] * 9}], "document 0 has 9 tokens"),
    "nothing": ([], "without a single token"),
    "empty documents": ([{"input_ids": []}], "without a single token"),
    "labels of another length": ([{"input_ids": [5, 6], "labels": [5]}], "2 input_ids, 1 labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_packed_is_said(name: str) -> None:
    given_examples, text = BAD[name]
    with pytest.raises(PackingError, match=text):
        PackedCollator(8)(given_examples)


def test_longer_documents_are_cut_where_asked_for() -> None:
    batch = PackedCollator(8, truncate=True)([{"input_ids": list(range(3, 20))}])
    assert batch["input_ids"].tolist() == [list(range(3, 11))]


def test_no_room() -> None:
    with pytest.raises(PackingError, match="hold nothing"):
        pack([1], 0)
