"""TRL's SFTTrainer, which replaces the model's forward, reads the head's weight, and chooses its own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from weft.callbacks import TrainingMonitor

from .runs import KINDS, adapted_pair, arguments, as_before, assert_same_losses, rows, trained

OPTIONS: dict[str, dict[str, Any]] = {
    "nll": {"loss_type": "nll"},
    "chunked_nll": {"loss_type": "chunked_nll"},
    "dft": {"loss_type": "dft"},
    "completions": {"completion_only_loss": True},
    "bf16": {"bf16": True},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every id."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2", unk_token="w0")


def data(completions: bool = False) -> Any:
    """Token ids of two lengths, the second half of each a completion where asked for."""
    found = []
    for r in rows():
        ids = r["input_ids"][: int(r["attention_mask"].sum())].tolist()
        mask = {"completion_mask": [int(i >= len(ids) // 2) for i in range(len(ids))]} if completions else {}
        found.append({"input_ids": ids, **mask})
    return datasets.Dataset.from_list(found)


@pytest.fixture(scope="module", params=KINDS)
def both(request: Any) -> tuple[str, Any, Any]:
    """What the weights are, an optimized model, and its twin."""
    return request.param, *adapted_pair(request.param)


@pytest.mark.parametrize("name", OPTIONS)
def test_losses(name: str, both: tuple[str, Any, Any], tmp_path: Path) -> None:
    kind, *pairs = both
    on_gpu = torch.cuda.is_available()  # TRL chooses its kernel by whether Triton is there, not by where the model is
    options = {
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "bf16": False,
        "packing": False,
        "max_length": None,
        **OPTIONS[name],
    }
    with as_before(*pairs):
        found, wanted = (
            trained(
                model, arguments(tmp_path, trl.SFTConfig, **options), data(name == "completions"), trl.SFTTrainer,
                processing_class=tokenizer(), callbacks=[TrainingMonitor()],
            )
            for model in pairs
        )  # fmt: skip
    close = "bfloat16" if name == "bf16" else kind
    assert_same_losses(found.losses, wanted.losses, close)
    assert len(found.logged("tokens_per_second")) == 3
    one_of_ten = 0.11 if close == "bfloat16" else 1e-3
    assert found.logged("mean_token_accuracy") == pytest.approx(wanted.logged("mean_token_accuracy"), abs=one_of_ten)
