"""Running a model from a block on gives what running all of it gives, and runs nothing before that block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weft.passes.divergence import divergence, logits_of, mask_of, predictions
from weft.passes.prefix import Prefix
from weft.rewrite.regions import find_blocks


def llama(**options: Any) -> LlamaForCausalLM:
    """A small Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes, **options)).eval()


def batch() -> dict[str, Tensor]:
    """Two rows of seven tokens, the second padded."""
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("index", range(4))
def test_from_each_block_on(index: int) -> None:
    model = llama()
    blocks = list(find_blocks(model).values())
    prefix = Prefix(model, blocks, batch())
    before = logits_of(prefix.record())
    with torch.no_grad():
        blocks[index].mlp.up_proj.weight.mul_(1.5)
        expected = model(**batch()).logits
    ran = list[int]()
    handles = [b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    start = prefix.position(blocks[index])
    assert torch.equal(logits_of(prefix.run_from(start)), expected)
    assert ran == list(range(index, 4)) and not torch.equal(expected, before)
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(b) for b in blocks)


def test_a_change_of_the_head_runs_no_block() -> None:
    model = llama()
    blocks = list(find_blocks(model).values())
    prefix = Prefix(model, blocks, batch())
    prefix.record()
    start = prefix.first_use[model.lm_head]
    assert start == 4 and prefix.first_use[model.model.embed_tokens] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        assert torch.equal(logits_of(prefix.run_from(start)), model(**batch()).logits)


def test_until_a_block() -> None:
    model = llama()
    blocks = list(find_blocks(model).values())
    prefix = Prefix(model, blocks, batch())
    prefix.record(results=False)
    ran = list[int]()
    for i, b in enumerate(blocks):
        b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    prefix.run_until(blocks[2])
    assert ran == [0, 1, 2]


class Twice(nn.Module):
    """Calls its first block again at the end, and writes into what the second returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """first(second(first(x)) + 1)"""
        h = self.layers[1](self.layers[0](x))
        h += 1
        return self.layers[0](h)


def test_a_block_called_twice_and_a_result_written_into() -> None:
    torch.manual_seed(0)
    model = Twice()
    blocks = list(find_blocks(model).values())
    prefix = Prefix(model, blocks, {"x": torch.randn(3, 8)})
    before = prefix.record()
    for _ in range(3):  # what is remembered must not change
        for position in range(3):
            assert torch.equal(prefix.run_from(position), before)


def test_errors_give_the_forwards_back() -> None:
    model = llama()
    blocks = list(find_blocks(model).values())
    with pytest.raises(IndexError):
        Prefix(model, blocks, {"input_ids": torch.full((1, 3), 1000)}).record()
    assert not any("forward" in vars(b) or b._forward_pre_hooks for b in model.modules())


def test_divergence_is_that_of_torch() -> None:
    a, b = torch.randn(3, 5, 11).double(), torch.randn(3, 5, 11).double()
    p, q = torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    expected = torch.distributions.kl_divergence(p, q)
    assert divergence(a, b) == pytest.approx(float(expected.sum()), rel=1e-5)
    mask = torch.tensor([[1, 1, 0, 0, 1]] * 3)
    assert divergence(a, b, mask) == pytest.approx(float(expected[mask != 0].sum()), rel=1e-5)
    assert predictions(a, None) == 15 and predictions(a, mask) == 9
    assert divergence(a, a) == pytest.approx(0, abs=1e-6)


def test_forbidden_classes_and_masks_of_other_shapes() -> None:
    a = torch.randn(2, 3, 4)
    a[..., 1] = -torch.inf
    assert divergence(a, a.clone()) == pytest.approx(0, abs=1e-6)
    assert mask_of({"attention_mask": torch.ones(2, 9)}, a) is None
    assert mask_of({"attention_mask": torch.ones(2, 3)}, a) is not None
    with pytest.raises(ValueError, match="no predictions"):
        logits_of({"ids": torch.ones(3, dtype=torch.long)})
