"""Weights quantized while they are read from a checkpoint in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from weft import load_planned
from weft.rewrite.errors import CheckpointError, PrecisionError, WeftError

from .planned import gpt2, llama, logits, mixtral, plan_of, stored, tied


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """In several shards."""
    llama(num_hidden_layers=2).save_pretrained(tmp_path / "16", max_shard_size="100KB")
    assert len(list((tmp_path / "16").glob("*.safetensors"))) > 2
    return tmp_path / "16"


@pytest.mark.parametrize("formats", [("nf4", "16-bit"), ("fp4",), ("int8", "16-bit"), ("16-bit",)], ids="-".join)
def test_quantized_while_loading(formats: tuple[str, ...], checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_of(llama(num_hidden_layers=2), *formats)
    plan.to_json(tmp_path / "plan.json")
    model = load_planned(checkpoint, tmp_path / "plan.json")
    expected = stored(llama(num_hidden_layers=2), *formats)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.name_or_path == str(checkpoint)
    if formats != ("16-bit",):
        assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()


@pytest.mark.parametrize("make", [tied, gpt2, mixtral])
def test_other_models_quantized_while_loading(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    formats = [f if "experts" not in path else "16-bit" for path, f in plan_of(make(), "nf4").choice.items()]
    plan = plan_of(make(), *formats)
    assert torch.equal(logits(load_planned(tmp_path, plan)), logits(stored(make(), *formats)))


def _without_a_shard(folder: Path) -> str:
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return "00002-of.*missing"


def _with_a_shard_cut_off(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return "00002-of.*cut off"


def _with_an_index_cut_off(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-50])
    return "index.*cut off"


def _with_an_index_of_nothing(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    return "lacks model.norm.weight"


def _with_names_that_are_nowhere(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["another"] = data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    return "lacks another"


def _without_weights(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    return "no safetensors checkpoint"


def _without_a_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "no config.json"


DAMAGE = [
    _without_a_shard, _with_a_shard_cut_off, _with_an_index_cut_off, _with_an_index_of_nothing, _with_names_that_are_nowhere,
    _without_weights, _without_a_config,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_named(damage: Any, checkpoint: Path) -> None:
    words = damage(checkpoint)
    with pytest.raises(CheckpointError, match=words):
        load_planned(checkpoint, plan_of(llama(num_hidden_layers=2), "nf4"))


def test_plans_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    fits = plan_of(llama(num_hidden_layers=2), "nf4")
    fits.to_json(tmp_path / "cut.json")
    (tmp_path / "cut.json").write_text((tmp_path / "cut.json").read_text()[:-200])
    bad: list[tuple[Any, str]] = [
        (tmp_path / "cut.json", "cut.json.*cut off"),
        (tmp_path / "none.json", "cannot be read"),
        (plan_of(llama(num_hidden_layers=2, intermediate_size=192), "nf4"), r"gate_proj is \(128, 64\) in this model"),
        (plan_of(llama(num_hidden_layers=3), "nf4"), "another model: it has model.layers.2"),
        (plan_of(mixtral(), "nf4"), "another model"),
        (plan_of(llama(num_hidden_layers=2), "nf4", "int8"), "as int8 and nf4"),
        (plan_of(llama(num_hidden_layers=2), "nf4-feedback"), "needs calibration data"),
    ]
    for plan, words in bad:
        with pytest.raises(PrecisionError, match=words):
            load_planned(checkpoint, plan)
    stored(llama(), "nf4").save_pretrained(tmp_path / "4")
    with pytest.raises(PrecisionError, match="quantized already"):
        load_planned(tmp_path / "4", plan_of(llama(), "nf4"))
    assert issubclass(CheckpointError, WeftError)
