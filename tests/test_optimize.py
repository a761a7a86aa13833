"""The face, end to end: an optimized model is the model it was, only faster, and undo() takes everything back."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.kernels.deferred_logits import DeferredLogits
from weft.rewrite.errors import UndoError

from .models import (
    Nested,
    NoBlocks,
    RootLoop,
    assert_identical,
    assert_same,
    batch,
    in_four_bits,
    llama,
    outcome,
    quickly,
    twin,
    with_lora,
)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama with adapters": lambda: with_lora(llama()),
    "llama in four bits with adapters": lambda: with_lora(
        in_four_bits(llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4))
    ),
    "loop in the root": RootLoop,
    "nested": Nested,
    "no blocks": NoBlocks,
}
WANTED = {
    "llama with adapters": {"rms_norm": 5, "lora_linear": 14, "rope": 6, "gated_mlp": 2, "linear_cross_entropy": 1},
    "llama in four bits with adapters": {"rms_norm": 5, "lora_linear": 14, "gated_mlp": 2, "linear_cross_entropy": 1},
    "loop in the root": {"rms_norm": 5, "lora_linear": 2, "gated_mlp": 2, "linear_cross_entropy": 1},
    "nested": {"rms_norm": 5, "lora_linear": 2, "gated_mlp": 2, "linear_cross_entropy": 1},
    "no blocks": {"rms_norm": 1, "gated_mlp": 1, "linear_cross_entropy": 1},
}


class Pair:
    """A model before and after optimize()."""

    def __init__(self, name: str) -> None:
        self.model = MODELS[name]().train()
        self.plain = twin(self.model)
        self.before = vars(self.model).copy()
        self.forwards = {path: m.__dict__.get("forward") for path, m in self.model.named_modules()}
        self.examples = None if name.startswith("llama") else batch()
        self.returned = weft.optimize(self.model, example_inputs=self.examples)

    @property
    def report(self) -> Any:
        return self.model.rewrite_report


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    """One optimized model, and its untouched twin, for all tests that leave it as it is."""
    return Pair(request.param)


def test_the_same_object_comes_back_with_a_report(pair: Pair, request: pytest.FixtureRequest) -> None:
    assert pair.returned is pair.model and type(pair.model) is type(pair.plain)
    rules = [r.rule for r in pair.report.rewrites]
    wanted = WANTED[request.node.callspec.params["pair"]]
    assert {rule: rules.count(rule) for rule in wanted} == wanted, str(pair.report)
    assert all(r.error is not None and r.error <= 1 for r in pair.report.rewrites)
    paths = {path for path, _ in pair.model.named_modules()}
    assert {r.module_path for r in pair.report.rewrites} <= paths
    assert not [n for n in pair.report.notes if "failed" in n]


@pytest.mark.parametrize(("rows", "length"), [(2, 9), (3, 14), (1, 5)])
def test_other_shapes_give_equal_values_and_gradients(pair: Pair, rows: int, length: int) -> None:
    inputs = batch(rows, length, seed=length)
    assert_same(outcome(pair.model, inputs), outcome(pair.plain, inputs))


def test_padding_and_calls_without_labels(pair: Pair) -> None:
    takes_masks = hasattr(pair.model, "config")
    for labels in (True, False):
        inputs = batch(3, 8, seed=3, padded=takes_masks, labels=labels)
        assert_same(outcome(pair.model, inputs), outcome(pair.plain, inputs))


def test_twice_is_once(pair: Pair) -> None:
    report, forwards = pair.report, [m.__dict__.get("forward") for m in pair.model.modules()]
    count = len(report.rewrites)
    assert weft.optimize(pair.model, example_inputs=pair.examples) is pair.model
    assert pair.model.rewrite_report is report and len(report.rewrites) == count
    assert all(a is b for a, b in zip(forwards, [m.__dict__.get("forward") for m in pair.model.modules()], strict=True))


def test_names_and_values_of_the_state_stay(pair: Pair) -> None:
    ours, plain = pair.model.state_dict(), pair.plain.state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert [n for n, p in pair.model.named_parameters() if p.requires_grad] == [
        n for n, p in pair.plain.named_parameters() if p.requires_grad
    ]


def test_copies_and_files_are_the_original(pair: Pair) -> None:
    inputs = batch(2, 6, seed=5)
    wanted = outcome(pair.plain, inputs)
    assert_identical(outcome(twin(pair.model), inputs), wanted)
    file = io.BytesIO()
    torch.save(pair.model, file)
    file.seek(0)
    assert_identical(outcome(torch.load(file, weights_only=False), inputs), wanted)
    assert_same(outcome(pair.model, inputs), wanted)


def test_hooks_on_inner_modules_still_run(pair: Pair) -> None:
    def recorder(calls: list[torch.Tensor]) -> Callable[..., None]:
        # not a default argument: Dynamo 2.11 loses what is appended to a list that is one
        return lambda module, inputs, output: calls.append(output.detach())

    inputs, seen = batch(2, 6, seed=6), dict[tuple[str, str], list[torch.Tensor]]()
    handles = []
    for which, model in (("ours", pair.model), ("plain", pair.plain)):
        for name, module in model.named_modules():
            if name.endswith(("norm", "layernorm", "before", "final")):
                calls = seen.setdefault((which, name), [])
                handles.append(module.register_forward_hook(recorder(calls)))
    try:
        pair.model(**inputs), pair.plain(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for which, name in seen if which == "plain"]
    assert names and all(len(seen["plain", name]) == 1 for name in names)
    for name in names:
        torch.testing.assert_close(seen["ours", name], seen["plain", name], rtol=1e-4, atol=1e-5)
    assert_same(outcome(pair.model, inputs), outcome(pair.plain, inputs))


def test_deferred_logits_are_tensors(pair: Pair) -> None:
    inputs = batch(2, 6, seed=7)
    logits, wanted = pair.model(**inputs).logits, pair.plain(**inputs).logits
    assert isinstance(logits, torch.Tensor) and isinstance(logits, DeferredLogits)
    assert logits.shape == wanted.shape and logits.dtype == wanted.dtype
    torch.testing.assert_close(logits.float(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    (logits * 2).sum().backward()
    (wanted * 2).sum().backward()
    for (name, ours), plain in zip(pair.model.named_parameters(), pair.plain.parameters(), strict=True):
        assert (ours.grad is None) == (plain.grad is None), name
        if plain.grad is not None:
            torch.testing.assert_close(
                ours.grad, plain.grad, rtol=1e-3, atol=1e-3 * float(plain.grad.abs().max()), msg=name
            )
    pair.model.zero_grad(set_to_none=True), pair.plain.zero_grad(set_to_none=True)


def test_z_switching_between_training_and_evaluation(pair: Pair) -> None:
    """Late among the tests that share the pair: on some CPUs bitsandbytes then repacks the weights, and rounds to bfloat16."""
    in_four_bits = any(hasattr(p, "quant_state") for p in pair.model.parameters())
    rounding = 2e-2 if in_four_bits else 2e-5
    inputs = batch(2, 7, seed=4)
    for mode in (False, True, False, True):
        pair.model.train(mode), pair.plain.train(mode)
        if mode:
            assert_same(outcome(pair.model, inputs), outcome(pair.plain, inputs), rounding)
        else:
            with torch.no_grad():
                found, wanted = ([m(**inputs)[k].float() for k in ("loss", "logits")] for m in (pair.model, pair.plain))
            assert_same(dict(enumerate(found)), dict(enumerate(wanted)), rounding)


def test_zz_undo_takes_everything_back(pair: Pair) -> None:
    """Last of the tests that share the pair."""
    inputs = batch(2, 6, seed=8)
    for model in (pair.model, pair.plain):
        model.state_dict()  # bitsandbytes packs its weights back to save
    assert weft.undo(pair.model) is pair.model
    assert {path: m.__dict__.get("forward") for path, m in pair.model.named_modules()} == pair.forwards
    assert vars(pair.model).keys() == pair.before.keys()
    assert_identical(outcome(pair.model, inputs), outcome(pair.plain, inputs))
    with pytest.raises(UndoError, match="not optimized"):
        weft.undo(pair.model)


@pytest.mark.parametrize("nested", [False, True])
def test_packed_weights_stored_as_bfloat16_are_replayed_as_bytes(nested: bool) -> None:
    """Bytes that happen to be NaN as bfloat16 are codes like any other, in every pass that replays a product with them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    plain = in_four_bits(llama(**sizes), nested=nested, storage=torch.bfloat16)
    adapted = with_lora(twin(plain), target_modules=["q_proj", "v_proj", "down_proj"])
    for model in (plain, adapted):
        weft.optimize(model.train())
        report = model.rewrite_report
        assert not [r for r in report.refusals if "linear" in r.rule], report
        assert {"quant_linear"} <= {r.rule for r in report.rewrites}
        assert all(r.error is not None for r in report.rewrites if "linear" in r.rule)
    assert {"lora_linear", "parallel_linears"} <= {r.rule for r in adapted.rewrite_report.rewrites}


class Residual(nn.Module):
    """Blocks of torch's own classes, in a loop of the root."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.norm = nn.RMSNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
    "transformer": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.SiLU()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_torch_itself(name: str) -> None:
    plain = Residual(BLOCKS[name])
    model = weft.optimize(twin(plain), example_inputs={"x": torch.randn(2, 5, 16)})
    weights = torch.randn(3, 5, 16)
    found = []
    for each in (model, plain):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (each(x) * weights).sum().backward()
        found.append({n: p.grad for n, p in each.named_parameters()} | {"x": x.grad})
    assert_same(*found)
    rules = [r.rule for r in model.rewrite_report.rewrites]
    assert rules.count("rms_norm") == 1 and rules.count("layer_norm") == {"sequential": 3, "transformer": 6}.get(
        name, 0
    )


def test_a_model_in_float64() -> None:
    """Replay knows nothing more exact, and allows what sums in another order may differ by."""
    model = with_lora(llama(hidden_size=64, intermediate_size=160, num_hidden_layers=2)).double()
    plain = twin(model)
    weft.optimize(model)
    assert not model.rewrite_report.refusals
    assert {"rms_norm", "lora_linear", "parallel_linears", "linear_cross_entropy"} <= {
        r.rule for r in model.rewrite_report.rewrites
    }
    assert_same(outcome(model, batch(2, 7)), outcome(plain, batch(2, 7)))  # its norms and loss are computed in float32


def test_a_model_that_goes_is_freed() -> None:
    """With all that was captured of it: nothing that stays refers to it."""
    model = with_lora(llama(num_hidden_layers=2))
    weft.optimize(model, verify=False)
    model(**batch(2, 7)).loss.backward()
    gone = [weakref.ref(m) for m in (model, model.base_model.model, model.base_model.model.model.layers[0])]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.parametrize("make", [RootLoop, Nested, NoBlocks])
def test_a_model_by_hand_that_goes_is_freed(make: Any, undone: bool) -> None:
    """Whether or not its blocks are calls in a graph around them."""
    model = quickly(make())
    model(**batch(2, 7)).loss.backward()
    if undone:
        weft.undo(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_block_that_outlives_its_model_works() -> None:
    model = quickly(RootLoop())
    block, plain, x = model.blocks[1], RootLoop().blocks[1], torch.linspace(-1, 1, 96).view(2, 3, 16)
    del model
    gc.collect()
    torch.testing.assert_close(block(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(block)(x), plain(x))
