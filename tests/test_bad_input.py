"""Models and inputs that are not as they should be: handled, or refused by an error that names the module and the remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import weft
from weft.kernels import dispatch
from weft.passes.rms_norm import FuseRmsNorm
from weft.rewrite.errors import ExampleInputsError, OptionError, UndoError, UnsupportedModelError, WeftError

from .models import Nested, NoBlocks, RootLoop, assert_same, batch, llama, outcome, quickly, twin, with_lora


class Plain(nn.Module):
    """A norm and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = nn.RMSNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


EXAMPLE = {"x": torch.ones(2, 4)}


def untouched(model: nn.Module) -> dict[str, Any]:
    """What optimize() must not leave changed when it refuses."""
    return {path: (m.training, vars(m).get("forward"), sorted(vars(m))) for path, m in model.named_modules()}


def refused(model: nn.Module, error: type[WeftError], match: str, **options: Any) -> None:
    """``optimize`` raises what it should, and the model is as it was."""
    before = untouched(model)
    with pytest.raises(error, match=match):
        weft.optimize(model, **{"example_inputs": EXAMPLE, **options})
    assert untouched(model) == before


# arguments ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [None, "model", 3, Plain, [Plain()]], ids=lambda m: type(m).__name__)
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(OptionError, match=r"takes a torch\.nn\.Module"):
        weft.optimize(model)
    with pytest.raises(UndoError, match="was not optimized"):
        weft.undo(model)


@pytest.mark.parametrize("options", [
    {"mode": "eval"}, {"mode": True}, {"passes": "rms_norm"}, {"passes": 5}, {"passes": [FuseRmsNorm()]},
    {"precision": 4}, {"memory": "much"}, {"memory": "6GB", "mode": "inference"}, {"calibration": []}, {"keep_weights": True},
    {"cuda_graphs": "all"}, {"verify": "yes"}, {"verify": 1}, {"verify": None}, {"keep_weights": "no"},
], ids=lambda options: "-".join((*options, type(next(iter(options.values()))).__name__)))  # fmt: skip
def test_options_of_wrong_types_and_values(options: dict[str, Any]) -> None:
    refused(Plain(), OptionError, next(iter(options)), **options)


@pytest.mark.parametrize("inputs", [3, [], "x", [3], {3: torch.ones(2, 4)}], ids=["3", "[]", "x", "[3]", "{3: x}"])
def test_examples_of_wrong_types(inputs: Any) -> None:
    refused(Plain(), ExampleInputsError, "example_inputs must be", example_inputs=inputs)


@pytest.mark.parametrize(
    "inputs", [{"y": 1}, {"x": torch.ones(2, 5)}, {"x": None}, {}], ids=["name", "size", "None", "none"]
)
def test_examples_that_the_model_does_not_take(inputs: Any) -> None:
    refused(
        Plain(), ExampleInputsError, r"forward fails on the example inputs .* optimize\(model, ", example_inputs=inputs
    )


def test_a_model_without_a_config_needs_examples() -> None:
    refused(Plain(), ExampleInputsError, "Plain has no transformers config .* example_inputs=", example_inputs=None)


# weights ------------------------------------------------------------------------------------------------------------
def test_no_parameters() -> None:
    refused(nn.Sequential(nn.ReLU()), UnsupportedModelError, "Sequential has no parameters")


def test_weights_on_the_meta_device() -> None:
    model = Plain()
    model.out = nn.Linear(4, 4, device="meta")
    refused(model, UnsupportedModelError, r"out\.weight is on the meta device: load")


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_weights_without_a_shape(mode: str) -> None:
    model = Plain()
    model.out = nn.LazyLinear(4)
    refused(model, UnsupportedModelError, r"out\.weight has no shape yet: call the model once", mode=mode)
    assert isinstance(model.out, nn.LazyLinear)


def test_training_under_inference_mode() -> None:
    model = Plain()
    with torch.inference_mode():
        refused(model, OptionError, r"torch\.inference_mode\(\) is on: call optimize\(\) outside of it")
        weft.optimize(model, mode="inference", example_inputs=EXAMPLE)
        assert [r.rule for r in model.rewrite_report.rewrites] == ["rms_norm"]


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = Plain()
    refused(model, UnsupportedModelError, r"norm\.weight was made under torch\.inference_mode\(\)")
    weft.optimize(model, mode="inference", example_inputs=EXAMPLE)
    with torch.no_grad():
        torch.testing.assert_close(model(**EXAMPLE), Plain()(**EXAMPLE))


def test_gradients_of_gradients_are_refused() -> None:
    model = weft.optimize(Plain(), example_inputs=EXAMPLE)
    x = normal_rows().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(WeftError, match=r"rms_norm_backward has no gradient.* call undo\(model\)"):
        gradient.square().sum().backward()
    weft.undo(model)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None


def normal_rows() -> Tensor:
    """Some rows that ``Plain`` takes."""
    return torch.linspace(-1, 2, 12).view(3, 4)


def test_buffers_on_the_meta_device() -> None:
    model = Plain()
    model.norm.register_buffer("table", torch.empty(2, device="meta"))
    refused(model, UnsupportedModelError, r"norm\.table is on the meta device: load")


def test_weights_on_several_devices() -> None:
    model = Plain()
    with FakeTensorMode():  # says of itself that it is on a GPU
        model.out.weight = nn.Parameter(torch.empty(4, 4, device="cuda"))
    refused(model, UnsupportedModelError, r"norm\.weight on cpu, out\.weight on cuda:0\): move the model to one")


def _offloaded(module: nn.Module, chained: bool) -> None:
    hook = AlignDevicesHook("cpu", offload=True, weights_map={n: p.data for n, p in module.named_parameters()})
    add_hook_to_module(module, SequentialHook(hook) if chained else hook)


@pytest.mark.parametrize("hook", [
    lambda m: _offloaded(m, False), lambda m: _offloaded(m, True),
    lambda m: add_hook_to_module(m, CpuOffload("cuda:0") if torch.cuda.is_available() else _Elsewhere()),
])  # fmt: skip
def test_offloaded_weights(hook: Callable[[nn.Module], None]) -> None:
    model = Plain()
    hook(model.out)
    refused(model, UnsupportedModelError, r"weights of out are offloaded .*device_map")


class _Elsewhere(CpuOffload):
    """A hook for a GPU that this machine has not."""

    def __init__(self) -> None:
        self.prev_module_hook, self.execution_device = None, torch.device("cuda:0")

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def test_a_hook_of_accelerate_that_moves_nothing() -> None:
    model = Plain()
    add_hook_to_module(model.norm, AlignDevicesHook("cpu"))
    hooked, wanted = vars(model.norm)["forward"], model(**EXAMPLE)
    weft.optimize(model, example_inputs=EXAMPLE)
    assert [r.rule for r in model.rewrite_report.rewrites] == ["rms_norm"]
    torch.testing.assert_close(model(**EXAMPLE), wanted)
    weft.undo(model)
    assert vars(model.norm)["forward"] is hooked


def test_weights_that_are_not_contiguous() -> None:
    model = RootLoop()
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.T.contiguous().T if p.shape[0] % 2 else torch.stack([p.data, -p.data], -1)[..., 0]
    assert not any(p.is_contiguous() for p in model.parameters() if p.ndim == 2)
    plain = twin(model)
    quickly(model)
    assert_same(outcome(model, batch()), outcome(plain, batch()))
    assert {"rms_norm", "lora_linear", "gated_mlp"} <= {r.rule for r in model.rewrite_report.rewrites}


def test_tied_weights() -> None:
    model = llama(hidden_size=16, intermediate_size=24, tie_word_embeddings=True).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = twin(model)
    quickly(model)
    assert_same(outcome(model, batch()), outcome(plain, batch()))
    assert list(model.state_dict()) == list(plain.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, plain)]
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        each(**batch()).loss.backward()
        optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(outcome(model, batch()), outcome(plain, batch()))


@pytest.mark.parametrize("make", [RootLoop, Nested])
def test_shared_modules(make: Callable[..., Any]) -> None:
    """One block that stands three times in the list, and one norm in two blocks."""
    model = make(layers=3)
    blocks = model.blocks if make is RootLoop else model.stack.blocks
    blocks[2] = blocks[0]
    blocks[1].before = blocks[0].between
    plain = twin(model)
    quickly(model)
    assert_same(outcome(model, batch()), outcome(plain, batch()))
    assert sum(r.rule == "lora_linear" for r in model.rewrite_report.rewrites) >= 2, str(model.rewrite_report)
    weft.undo(model)
    assert not any("forward" in vars(m) for m in model.modules())


# compiled, hooked ---------------------------------------------------------------------------------------------------
def _compile_forward(model: Plain) -> Plain:
    model.out.forward = torch.compile(model.out.forward, backend="eager")  # type: ignore[method-assign]
    return model


def _compile_inner(model: Plain) -> Plain:
    model.out.compile(backend="eager")
    return model


def _compile_whole(model: Plain) -> Plain:
    model.compile(backend="eager")
    return model


COMPILED: dict[str, tuple[Callable[[Plain], Any], str]] = {
    "torch.compile": (lambda m: torch.compile(m, backend="eager"), "OptimizedModule is compiled already"),
    "compile()": (_compile_whole, "Plain is compiled already"),
    "compile() of a part": (_compile_inner, "^out is compiled already"),
    "forward": (_compile_forward, "^out is compiled already"),
    "TorchScript": (lambda m: nn.Sequential(torch.jit.script(m.out)), "^0 is a TorchScript module"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_models(how: str) -> None:
    make, match = COMPILED[how]
    refused(make(Plain()), UnsupportedModelError, match)


def _with_hooks(model: nn.Module, seen: list[str]) -> None:
    """Hooks of every kind, on the root and on inner modules; some of them change what passes."""
    root, norm, linear = model, model.blocks[0].before, model.blocks[1].qkv
    root.register_forward_pre_hook(lambda m, args, kwargs: seen.append("before the root"), with_kwargs=True)
    root.register_forward_hook(lambda m, args, out: seen.append("after the root"))
    norm.register_forward_hook(lambda m, args, out: (seen.append("after a norm"), out * 1.5)[1])
    norm.register_forward_pre_hook(lambda m, args: (seen.append("before a norm"), (args[0] + 0.25,))[1])
    linear.register_forward_hook(lambda m, args, out: (seen.append("after a linear"), None)[1])
    linear.register_full_backward_hook(lambda m, gi, go: (seen.append("behind a linear"), (gi[0] * 0.5,))[1])
    linear.register_full_backward_pre_hook(lambda m, go: seen.append("into a linear"))
    model.head.register_full_backward_hook(lambda m, gi, go: seen.append("behind the head"))
    linear.weight.register_hook(lambda g: (seen.append("a gradient"), g * 2)[1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_once_and_do_what_they_do(when: str) -> None:
    model, seen = RootLoop(), list[str]()
    if when == "after":
        quickly(model)
    _with_hooks(model, seen)
    if when == "before":
        quickly(model)
    found = outcome(model, batch())
    seen.clear()
    assert_same(outcome(model, batch()), found)
    plain, wanted = RootLoop(), list[str]()
    _with_hooks(plain, wanted)
    assert_same(found, outcome(plain, batch()))
    assert sorted(seen) == sorted(wanted), (seen, wanted)
    weft.undo(model)
    seen.clear()
    assert_same(outcome(model, batch()), found)
    assert sorted(seen) == sorted(wanted)


# inputs -------------------------------------------------------------------------------------------------------------
SMALL = {"hidden_size": 16, "intermediate_size": 24}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: with_lora(llama(**SMALL)), "loop in the root": RootLoop, "no blocks": NoBlocks,
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """An optimized model and its twin."""
    model = MODELS[request.param]()
    plain = twin(model)
    return quickly(model), plain


def _error(model: nn.Module, inputs: dict[str, Any]) -> BaseException | None:
    try:
        outcome(model, inputs)
    except Exception as error:
        return error
    return None


BAD: dict[str, dict[str, Any]] = {
    "no rows": {"input_ids": torch.zeros(0, 6, dtype=torch.long)},
    "no tokens": {"input_ids": torch.zeros(2, 0, dtype=torch.long)},
    "one token": {"input_ids": torch.full((2, 1), 5), "labels": torch.full((2, 1), 5)},
    "no labels but ignored ones": {"input_ids": torch.full((2, 6), 5), "labels": torch.full((2, 6), -100)},
    "ids too large": {"input_ids": torch.full((2, 6), 1000)},
    "ids below zero": {"input_ids": torch.full((2, 6), -1)},
    "labels too large": {"input_ids": torch.full((2, 6), 5), "labels": torch.full((2, 6), 1000)},
    "labels of another length": {"input_ids": torch.full((2, 6), 5), "labels": torch.full((2, 5), 5)},
    "ids that are no integers": {"input_ids": torch.ones(2, 6)},
    "a list": {"input_ids": [[5, 6, 7]]},
    "an unknown argument": {"input_ids": torch.full((2, 6), 5), "nonsense": 3},
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_give_what_the_plain_model_gives(name: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """The same values, or an error of the same class with the same message."""
    model, plain = pair
    inputs = BAD[name]
    wanted = _error(plain, inputs)
    if wanted is None:
        assert_same_or_nan(outcome(model, inputs), outcome(plain, inputs))
        return
    found = _error(model, inputs)
    assert isinstance(found, type(wanted)), repr(found)
    assert str(wanted).splitlines()[0] in str(found)
    assert_same(outcome(model, batch()), outcome(plain, batch()))


def assert_same_or_nan(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """NaN and infinities in the same places, and otherwise the same."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(torch.isnan(found[name]), torch.isnan(value)), name
        assert torch.equal(torch.isinf(found[name]), torch.isinf(value)), name
    clean = [{k: v.nan_to_num(0, 0, 0) for k, v in each.items() if v.numel()} for each in (found, wanted)]
    assert_same(*clean)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_activations_that_are_not_finite(value: float, pair: tuple[nn.Module, nn.Module]) -> None:
    """They spread exactly as far as in the plain model, forward and backward."""
    inputs = batch(3, 6, seed=2)
    inputs["input_ids"][:2] = inputs["input_ids"][:2] % 30 + 3
    inputs["input_ids"][2, 3] = 40
    for model in pair:
        table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        table.weight.data[40] = value
    found, wanted = outcome(pair[0], inputs), outcome(pair[1], inputs)
    for model in pair:
        table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
        table.weight.data[40] = 0.5
    bad = ~torch.isfinite(wanted["logits"])
    assert (bad.any() or value == 1e30) and not bad.all()
    assert torch.equal(torch.isnan(found["logits"]), torch.isnan(wanted["logits"]))
    for name, gradient in wanted.items():
        assert torch.equal(torch.isfinite(found[name]), torch.isfinite(gradient)), name


# the machine --------------------------------------------------------------------------------------------------------
WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, weft
model = torch.nn.Sequential(torch.nn.RMSNorm(4), torch.nn.Linear(4, 4))
x = torch.ones(2, 4)
wanted = model(x)
weft.optimize(model, example_inputs={"input": x})
assert [r.rule for r in model.rewrite_report.rewrites] == ["rms_norm"]
torch.testing.assert_close(model(x), wanted)
"""


def test_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_gpu_without_triton_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "Triton is not installed, or does not support cuda:0" in dispatch.why_reference(device)
    assert not dispatch.why_reference(torch.device("cpu"))
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert not dispatch.why_reference(device)
