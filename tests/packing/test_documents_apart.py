"""No token sees its neighbour document: in models with every kind of attention, before and after ``optimize``."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import weft
from weft.kernels import attention_documents
from weft.packing import PackedCollator, check_packing, collator
from weft.packing_check import LENGTHS
from weft.rewrite.errors import PackingError

from ..models import VOCABULARY, assert_same, in_four_bits, llama, with_lora

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox, eager": ("gpt_neox", {"attn_implementation": "eager"}),
    "gemma with sliding windows": ("gemma3_text", WINDOWS),
    "gemma with sliding windows, eager": ("gemma3_text", {**WINDOWS, "attn_implementation": "eager"}),
    "learned positions": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    "mixture of experts": ("mixtral", {"num_local_experts": 4}),
}
LENGTHS_OF_DOCUMENTS = (7, 3, 11, 2, 5, 9, 1, 6)


def made(name: str) -> PreTrainedModel:
    """A tiny random model."""
    kind, changes = MODELS[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=changes.get("attn_implementation", "sdpa")
    ).eval()


def documents(seed: int = 0) -> list[dict[str, list[int]]]:
    """Random documents."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS_OF_DOCUMENTS
    ]


def padded(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One document a row, filled up behind."""
    width = max(len(e["input_ids"]) for e in examples)
    rows = [e["input_ids"] + [0] * (width - len(e["input_ids"])) for e in examples]
    mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    ids, kept = torch.tensor(rows), torch.tensor(mask)
    return {"input_ids": ids, "attention_mask": kept, "labels": ids.masked_fill(kept == 0, -100)}


def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    found = {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def optimized(model: nn.Module, batch: dict[str, Any]) -> nn.Module:
    """With every attention replaced, if it is the library's function."""
    return weft.optimize(model, example_inputs=batch, verify=False, mode="train")


@functools.cache
def packed_and_optimized(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, optimized on packed documents, and those; no test trains it."""
    model = made(name)
    batch = collator(model, max_length=16)(documents())
    optimized(model, batch)
    return model, batch


@pytest.mark.parametrize("is_optimized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_its_neighbour_document(name: str, is_optimized: bool) -> None:
    if is_optimized:
        model, batch = packed_and_optimized(name)
        check_packing(model)
    else:
        model = made(name)
        batch = collator(model, max_length=16)(documents())
    assert batch["input_ids"].shape[0] < len(LENGTHS_OF_DOCUMENTS), "nothing was packed"
    with torch.no_grad():
        before = model(**batch).logits
        for row, start in (batch["position_ids"] == 0).nonzero().tolist():
            other = batch["input_ids"].clone()
            own = _same_document(batch["position_ids"], row, start)
            other[own] = (other[own] + 7) % VOCABULARY
            after = model(**{**batch, "input_ids": other}).logits
            assert float((after - before)[~own].abs().max()) <= 2e-6 * float(before.abs().max())
            assert not torch.equal(after[own], before[own])


def _same_document(positions: Tensor, row: int, start: int) -> Tensor:
    """Where the document stands that starts there."""
    number = (positions == 0).long().cumsum(-1)
    mine = torch.zeros_like(positions, dtype=torch.bool)
    mine[row] = number[row] == number[row, start]
    return mine


@pytest.mark.parametrize("is_optimized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_training_is_that_of_padded_documents(name: str, is_optimized: bool) -> None:
    model = made(name)
    wanted = step(model, padded(documents()))
    if is_optimized:
        model, _ = packed_and_optimized(name)
    assert_same(step(model, PackedCollator(16)(documents())), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma with sliding windows"])
def test_the_operator_reads_documents_and_each_mask_once(name: str) -> None:
    model: Any = packed_and_optimized(name)[0]
    batch = PackedCollator(16)(documents())
    assert "attention" in {r.rule for r in model.rewrite_report.rewrites}
    with patch.object(attention_documents, "_look", wraps=attention_documents._look) as look:
        step(model, batch)
        found = look.call_count
        with patch.object(attention_documents, "forward", wraps=attention_documents.forward) as ragged:
            step(model, batch)
    assert found == (1 if name == "llama" else 2) and ragged.call_count == 2


def test_adapters_and_the_trainer(tmp_path: Any) -> None:
    """Through ``transformers.Trainer`` with a cache left on: the collator turns it off, or documents would not be looked for."""
    losses = []
    for packed in (False, True):
        model = with_lora(made("llama"))
        model.config.use_cache = True
        collate = collator(model, max_length=16) if packed else padded
        arguments = TrainingArguments(
            str(tmp_path / str(packed)), per_device_train_batch_size=8, max_steps=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, logging_steps=1, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=documents(), data_collator=collate)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[1]) == 2


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "state space": ("mamba", {"state_size": 4}, r"layers\.0\.mixer.*conv1d of kernel \[4\]"),
    "short convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"layers\.0\.conv: conv1d of kernel"),
    "token shift": ("rwkv", {"attention_hidden_size": 32}, r"time_shift.*pad shifts the sequence"),
    "no positions": ("bloom", {}, "takes no position_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_documents_are_refused_by_operator_and_module(name: str) -> None:
    kind, changes, text = REFUSED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PackingError, match=text) as caught:
        collator(model, max_length=16)
    assert isinstance(caught.value, weft.WeftError)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


class Averaging(nn.Module):
    """A model whose second layer adds the running mean of the row in a way that shapes do not show."""

    def __init__(self, counts_from_row: bool) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(61, 16), nn.Embedding(128, 16)
        self.head, self.counts_from_row = nn.Linear(16, 61), counts_from_row
        self.inner = nn.Identity()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.counts_from_row:
            return self.head(x + self.place(torch.arange(input_ids.shape[1])))
        hidden = x.detach().numpy().cumsum(1)  # outside of any graph
        return self.head(self.inner(torch.from_numpy(hidden)) + self.place(position_ids))


def test_what_no_graph_shows_is_found_by_running_the_model() -> None:
    with pytest.raises(PackingError, match=r"see its neighbour.*'inner'"):
        check_packing(Averaging(False))


def test_positions_that_do_not_start_anew_are_refused() -> None:
    with pytest.raises(PackingError, match="counts positions from the start of the row"):
        check_packing(Averaging(True))


def test_other_kernels_for_another_row_are_no_other_positions() -> None:
    """bitsandbytes' products of 4-bit weights round to 16 bits inside, and otherwise for another number of rows."""
    model = in_four_bits(llama(num_hidden_layers=2, hidden_size=256, intermediate_size=512))
    check_packing(with_lora(model))


def test_lengths_to_try_are_primes() -> None:
    assert all(n % d for n in LENGTHS for d in range(2, n))
