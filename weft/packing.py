"""Batches of packed documents: rows without padding in which no token sees a document but its own.

collate = weft.packing.collator(model, max_length=2048)         # refuses a model that would mix documents
trainer = Trainer(model, args, train_dataset=tokenized, data_collator=collate)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.packing_check import accepts, check_packing, one_row_only
from weft.rewrite.errors import PackingError

__all__ = ["PackedCollator", "PackingError", "check_packing", "collator", "pack"]

Document = tuple[list[int], list[int]]
"""Token ids and labels."""


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most ``room`` tokens, each a list of indices into ``lengths``: first fit, longest first.

    The same lengths give the same rows, which are in the order of their first document. Takes O(n log n).

    Raises:
        PackingError: a document is longer than ``room``, or there is no room.
    """
    if room < 1:
        raise PackingError(f"rows of {room} tokens hold nothing")
    rows, left = list[list[int]](), _Room(max(len(lengths), 1), room)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > room:
            raise PackingError(
                f"document {index} has {lengths[index]} tokens, more than the {room} of a row: cut it, or pass truncate=True"
            )
        row = left.take(lengths[index])
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
    return sorted((sorted(r) for r in rows), key=lambda r: r[0])


class _Room:
    """What is left in each row, as a tree of maxima: the first row with room for a document is found without a search."""

    def __init__(self, rows: int, room: int) -> None:
        self.size = 1 << (rows - 1).bit_length()
        self.most = [room] * (2 * self.size)

    def take(self, length: int) -> int:
        """The first row with room for ``length``, from which it is taken."""
        at = 1
        while at < self.size:
            at = 2 * at if self.most[2 * at] >= length else 2 * at + 1
        self.most[at], row = self.most[at] - length, at - self.size
        while at > 1:
            at //= 2
            self.most[at] = max(self.most[2 * at], self.most[2 * at + 1])
        return row


@dataclass(frozen=True)
class PackedCollator:
    """Packs tokenized examples into rows; a ``data_collator`` for ``transformers.Trainer``, or to be called by hand.

    Examples hold ``input_ids``, and optionally ``labels`` and an ``attention_mask`` whose zeros are padding, which is left
    out. Use :func:`collator`, which asks the model what it can do.

    Args:
        max_length: tokens in a row.
        pad_id: what fills the ends of rows; no token sees it, and its labels are ignored.
        one_row: all documents in one row without any padding, for attention that finds documents in one row alone.
        fixed: rows always have ``max_length`` tokens, not as many as the fullest.
        truncate: cut longer documents, instead of refusing them.
        bounds: add the documents' ends, ``cu_seq_lens_q`` and its like, which flash attention reads.
        no_cache: add ``use_cache=False``: a model with a cache looks for no documents.
        ignore: the label that is not trained.
    """

    max_length: int
    pad_id: int = 0
    one_row: bool = False
    fixed: bool = False
    truncate: bool = False
    bounds: bool = False
    no_cache: bool = True
    ignore: int = -100

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: ``input_ids``, ``labels``, ``position_ids`` that start anew with each document; no attention mask.

        Raises:
            PackingError: there is no token, or an example has other labels than tokens, or is longer than a row.
        """
        documents = [d for i, f in enumerate(features) if (d := self._document(i, f))[0]]
        if not documents:
            raise PackingError(
                "a batch without a single token cannot be packed: leave empty examples out of the data set"
            )
        lengths = [len(ids) for ids, _ in documents]
        rows = pack(lengths, self.max_length)
        rows = [[i for row in rows for i in row]] if self.one_row else rows
        width = max(sum(lengths[i] for i in row) for row in rows)
        width = self.max_length if self.fixed and not self.one_row else width
        filled = [self._row([documents[i] for i in row], width) for row in rows]
        batch: dict[str, Any] = {
            name: torch.tensor([row[i] for row in filled], dtype=torch.long)
            for i, name in enumerate(("input_ids", "labels", "position_ids"))
        }
        if self.bounds:
            batch |= _bounds(batch["position_ids"])
        return batch | ({"use_cache": False} if self.no_cache else {})

    def _document(self, index: int, feature: Mapping[str, Any]) -> Document:
        ids = _listed(feature["input_ids"])
        labels = _listed(feature["labels"]) if feature.get("labels") is not None else list(ids)
        mask = _listed(feature["attention_mask"]) if feature.get("attention_mask") is not None else [1] * len(ids)
        if not len(ids) == len(labels) == len(mask):
            raise PackingError(
                f"example {index} has {len(ids)} input_ids, {len(labels)} labels and an attention_mask of {len(mask)}"
            )
        kept = [i for i, keep in enumerate(mask) if keep][: self.max_length if self.truncate else None]
        return [ids[i] for i in kept], [labels[i] for i in kept]

    def _row(self, documents: Sequence[Document], width: int) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and positions; each token of padding is a document of its own, which costs least."""
        ids, labels, positions = list[int](), list[int](), list[int]()
        for tokens, wanted in documents:
            ids += tokens
            labels += [self.ignore, *wanted[1:]]
            positions += range(len(tokens))
        rest = width - len(ids)
        return ids + [self.pad_id] * rest, labels + [self.ignore] * rest, positions + [0] * rest


def _listed(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _bounds(positions: Tensor) -> dict[str, Any]:
    """What flash attention reads of a batch: where documents start, and the longest."""
    starts = (positions.reshape(-1) == 0).nonzero()[:, 0]
    ends = torch.cat((starts, starts.new_tensor([positions.numel()]))).int()
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def collator(
    model: nn.Module,
    max_length: int,
    *,
    pad_id: int | None = None,
    fixed: bool = False,
    truncate: bool = False,
) -> PackedCollator:
    """The collator for ``model``, once it is certain that the model keeps documents apart.

    Args:
        model: any causal language model, optimized or not, with adapters or not.
        max_length: tokens in a row.
        pad_id: what fills the ends of rows. None: the config's padding or end token, or 0.
        fixed: rows always have ``max_length`` tokens.
        truncate: cut longer documents.

    Raises:
        PackingError: :func:`check_packing` refuses the model, by operator and module.
    """
    check_packing(model)
    config = getattr(model, "config", None)
    if pad_id is None:
        known = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
        pad_id = next(_first_numbers(known), 0)
    single = one_row_only(model)
    return PackedCollator(
        max_length, pad_id, one_row=single, fixed=fixed, truncate=truncate,
        bounds=single and accepts(model, "cu_seq_lens_q"), no_cache=accepts(model, "use_cache"),
    )  # fmt: skip


def _first_numbers(candidates: Iterator[Any]) -> Iterator[int]:
    for found in candidates:
        found = found[0] if isinstance(found, list | tuple) and found else found
        if isinstance(found, int) and found >= 0:
            yield found
