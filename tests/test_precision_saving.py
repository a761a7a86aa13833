"""Planned models as files: plain transformers loads them, undo takes it off again, and what cannot be saved says why."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from weft import PrecisionPlan, optimize, plan_precision, save_pretrained, undo
from weft.bnb_config import config_for
from weft.quant.formats import FORMATS, Format, quantize
from weft.quant.modules import give_back, put_stored
from weft.rewrite.errors import OptionError, PrecisionError
from weft.saving import describe

from .planned import batch, gpt2, linears, llama, logits, mixtral, plan_of, stored, tied

BNB: Any = bnb.nn


def reloaded(folder: Path) -> Any:
    """By transformers alone; nothing may be missing, or too much."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, device_map="cpu")
    assert not any(info.values()), info
    return model


MIXES = [("nf4", "16-bit"), ("nf4",), ("fp4", "nf4", "16-bit"), ("int8", "16-bit")]


@pytest.mark.parametrize("make", [llama, tied, gpt2])
@pytest.mark.parametrize("formats", MIXES, ids="-".join)
def test_plain_transformers_loads_what_was_saved(make: Any, formats: tuple[str, ...], tmp_path: Path) -> None:
    model = make()
    plan = plan_of(model, *formats)
    stored(model, *formats).save_pretrained(
        tmp_path
    )  # before it runs: on some CPUs bitsandbytes then rounds the scales for a kernel
    again = reloaded(tmp_path)
    assert torch.equal(logits(again), logits(model))
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    eight = "int8" in formats
    assert (said["load_in_8bit"], said["load_in_4bit"]) == (eight, not eight)
    kinds = {p: f for p, f in plan.choice.items() if f != "16-bit"}
    kept = {n for n, m in make().named_modules() if hasattr(m, "weight") and n in {*linears(make()), "lm_head"}}
    assert set(said["llm_int8_skip_modules"]) == kept - kinds.keys()
    if not eight:
        assert said["bnb_4bit_use_double_quant"] and said["bnb_4bit_quant_type"] in kinds.values()
        assert said["bnb_4bit_compute_dtype"] == str(model.dtype).removeprefix("torch.")
    kind = BNB.Linear8bitLt if eight else BNB.Linear4bit
    assert {n for n, m in again.named_modules() if isinstance(m, kind)} == kinds.keys()


def test_a_rewritten_model_saves_as_one_that_is_not(tmp_path: Path) -> None:
    model, plan = llama(), plan_of(llama(), "nf4", "16-bit")
    optimize(model, precision=plan)
    save_pretrained(model, tmp_path / "rewritten")
    save_pretrained(stored(llama(), "nf4", "16-bit"), tmp_path / "plain", plan)
    for name in ("config.json", "model.safetensors", "weft_plan.json"):
        assert (tmp_path / "rewritten" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert torch.allclose(logits(reloaded(tmp_path / "rewritten")), logits(model), atol=1e-3)


def test_searched_scales_load_as_ordinary_nf4(tmp_path: Path) -> None:
    model = llama()
    plan = plan_precision(model, [batch()], formats=("nf4-feedback", "16-bit"), measurements=1)
    optimize(model, precision=plan, calibration=[batch()], passes=())
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(model))
    assert PrecisionPlan.from_json(tmp_path / "weft_plan.json") == plan


@pytest.mark.parametrize("size", [32, 256])
def test_other_block_sizes_and_scales_that_are_not_quantized(size: int, tmp_path: Path) -> None:
    model = llama(hidden_size=256, intermediate_size=256)
    for i, (path, weight) in enumerate(linears(model).items()):
        put_stored(model, f"{path}.weight", quantize(weight, Format("x", "nf4", size, double_quantized=bool(i % 2))))
    describe(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(model))


def hooks(model: nn.Module) -> list[tuple[int, ...]]:
    """How many of each kind every module has."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._state_dict_hooks)) for m in model.modules()]


@pytest.mark.parametrize("make", [llama, tied, gpt2, mixtral])
def test_undo_takes_it_off_again(make: Any) -> None:
    model = make()
    before = logits(model), set(vars(model)), model.config.to_dict(), [n for n, _ in model.named_parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hung = hooks(model)
    optimize(model, precision=plan_of(model, "nf4", "16-bit"), passes=(), keep_weights=True)
    assert model.is_quantized and model.is_loaded_in_4bit and model.config.quantization_config.load_in_4bit
    with pytest.raises(ValueError, match="bitsandbytes"):
        model.to(torch.float16)
    undo(model)
    assert torch.equal(logits(model), before[0]) and hooks(model) == hung
    assert (set(vars(model)), model.config.to_dict(), [n for n, _ in model.named_parameters()]) == before[1:]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and not hasattr(
        model.config, "_is_quantized"
    )
    undo(
        optimize(model, precision=plan_of(model, "16-bit"), passes=())
    )  # nothing was stored, so nothing had to be kept
    assert set(vars(model)) == before[1]


def test_copies_say_the_same(tmp_path: Path) -> None:
    model = stored(llama(), "nf4")
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model.hf_quantizer))
    assert type(pickled).__module__.startswith("transformers.")
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(copied))


UNSAVABLE: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "int8 beside 4 bits": (llama, ("nf4", "int8"), r"k_proj.*one bitsandbytes config cannot say.*formats="),
    "stacked experts": (mixtral, ("nf4",), r"experts\.gate_up_proj.*no linears' weights"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_transformers_could_not_load_is_not_saved(name: str, tmp_path: Path) -> None:
    make, formats, words = UNSAVABLE[name]
    model = stored(make(), *formats)
    for save in (model.save_pretrained, lambda folder: save_pretrained(model, folder, plan_of(make(), *formats))):
        with pytest.raises(PrecisionError, match=words):
            save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_linears_of_a_class_of_their_own_and_those_kept_in_float32_are_not_saved(tmp_path: Path) -> None:
    class Own(nn.Linear):
        """transformers replaces nn.Linear alone."""

    model = llama()
    old = model.model.layers[0].mlp.up_proj
    own = model.model.layers[0].mlp.up_proj = Own(64, 128, bias=False)
    own.weight = old.weight
    with pytest.raises(PrecisionError, match=r"mlp\.up_proj.*class of their own"):
        stored(model, "nf4").save_pretrained(tmp_path)
    model = llama()
    model._keep_in_fp32_modules = ["down_proj"]
    with pytest.raises(PrecisionError, match=r"down_proj.*float32"):
        stored(model, "nf4").save_pretrained(tmp_path)


def test_names_that_are_endings_or_patterns_of_others() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    kinds = dict.fromkeys(("vision.layers.0.fc", "layers_0.fc2", "layers.1.fc"), "nf4")
    skipped = config_for(kinds, ["layers.0.fc", "layers.0.fc2"], torch.bfloat16).llm_int8_skip_modules
    assert all(should_convert_module(name, skipped) for name in kinds)
    assert not any(should_convert_module(name, skipped) for name in ("layers.0.fc", "layers.0.fc2"))


def test_tied_weights_are_stored_once_wherever_they_are_read() -> None:
    model = tied()
    expected, weight = logits(model), model.lm_head.weight
    done = [put_stored(model, "model.embed_tokens.weight", quantize(weight, FORMATS["nf4"]))]
    assert isinstance(model.lm_head, BNB.Linear4bit)
    original: Any = model.model.embed_tokens.parametrizations["weight"]
    assert original.original.data_ptr() == model.lm_head.weight.data_ptr()
    after = logits(model)
    assert torch.isfinite(after).all() and not torch.equal(after, expected)
    give_back(done)
    assert model.lm_head.weight is weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)


def test_adapters_on_a_planned_model_and_on_the_reloaded_one(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora.bnb import Linear4bit

    base = optimize(llama(), precision=plan_of(llama(), "nf4", "16-bit"), passes=())
    base.save_pretrained(tmp_path / "base")
    tuned: Any = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    assert any(isinstance(m, Linear4bit) for m in tuned.modules())
    save_pretrained(tuned, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weft_plan.json").is_file()
    again = PeftModel.from_pretrained(reloaded(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(tuned))


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no precision plan"):
        save_pretrained(llama(), tmp_path)
    with pytest.raises(OptionError, match="no save_pretrained"):
        save_pretrained(nn.Linear(2, 2), tmp_path, plan=plan_of(llama(), "nf4"))
