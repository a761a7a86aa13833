"""Error feedback: less error than searched scales, which err less than plain ones, on inputs whose channels go together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.quant.encode import encode_weight, pack
from weft.quant.error_measures import energy, output_error, weight_error
from weft.quant.errors import QuantizationError
from weft.quant.feedback import damping_for, feedback_weight, inverse_factor
from weft.quant.formats import Format, dequantize, quantize
from weft.quant.four_bit import block_scales
from weft.quant.scales import FreeScales
from weft.quant.statistics import Statistics


def formats(size: int, double_quantized: bool = True) -> list[Format]:
    """Plain, searched, with feedback."""
    more = ({}, {"searched": True}, {"searched": True, "feedback": True})
    return [Format("nf4", "nf4", size, double_quantized, **m) for m in more]


def correlated(in_features: int, seed: int, tokens: int = 1000) -> tuple[Statistics, Statistics]:
    """Statistics of inputs with a quarter as many causes as channels, and of others from the same source."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features // 4, generator=generator)
    size = torch.randn(in_features, generator=generator).mul(0.5).exp()
    both = (Statistics(in_features, hessian=True), Statistics(in_features, hessian=True))
    for statistics in both:
        causes = torch.randn(tokens, in_features // 4, generator=generator)
        statistics.update((causes @ mix.T + torch.randn(tokens, in_features, generator=generator)) * size)
    return both


def weight(out_features: int, in_features: int, seed: int) -> Tensor:
    """Normal values of usual size."""
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed + 100)) * 0.02


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("out_features", "in_features", "size", "double_quantized"),
    [(96, 256, 64, True), (33, 320, 64, False), (64, 192, 32, True), (40, 384, 128, True), (16, 512, 256, True)],
)
def test_each_step_errs_less(out_features: int, in_features: int, size: int, double_quantized: bool, seed: int) -> None:
    """By the calibration's measure, and by that of other inputs from the same source."""
    w = weight(out_features, in_features, seed)
    known, held_out = correlated(in_features, seed)
    stored = [dequantize(quantize(w, f, known)) for f in formats(size, double_quantized)]
    for statistics in (known, held_out):
        plain, searched, fed_back = (output_error(w, s, statistics) for s in stored)
        assert searched < 0.97 * plain
        assert fed_back < 0.6 * searched


def test_no_row_is_worse_than_with_searched_scales() -> None:
    """Not even where the matrix comes from fewer tokens than channels."""
    w = weight(200, 128, 0)
    statistics, _ = correlated(128, 0, tokens=5)
    assert statistics.hessian is not None
    _, searched, fed_back = (w - dequantize(quantize(w, f, statistics)) for f in formats(64))
    before, after = (energy(error, statistics.hessian) for error in (searched, fed_back))
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.5 * before.sum()


@pytest.mark.parametrize("size", [32, 64, 256])
def test_unrelated_channels_give_plain_rounding(size: int) -> None:
    """With the identity for a Hessian, nothing is fed back: each code is the nearest one under its stored scale."""
    w = weight(24, 256, 1)
    statistics = Statistics(256, hessian=True)
    statistics.update(torch.eye(256))
    _, searched, fed_back = (quantize(w, f, statistics) for f in formats(size))
    assert torch.equal(fed_back.tensors["packed"], pack(encode_weight(w, block_scales(*fed_back.operands()), size)))
    before, after = (weight_error(w, dequantize(s)) for s in (searched, fed_back))
    assert before * 0.99 < after <= before


def test_is_the_textbook_algorithm() -> None:
    """Against columns rounded one by one in float64 with the inverse Hessian itself, rows and columns struck out."""
    w, size = weight(80, 192, 2), 64
    statistics, _ = correlated(192, 2)
    assert statistics.hessian is not None
    scales = w.view(-1, size).abs().amax(1)
    codes, keys = feedback_weight(w, statistics.hessian, _Fixed(), scales, size)
    assert torch.equal(keys, scales)
    table = quantize(w, formats(size)[0]).tensors["quant_map"].double()
    found = table[codes.int()] * scales.view(80, -1).repeat_interleave(size, 1)
    expected = _textbook(w.double(), statistics.hessian.double(), scales.view(80, -1).double(), size, table)
    same = (found - expected).abs() < 1e-9
    assert same.all(1).double().mean() > 0.9  # a tie that float32 breaks the other way changes what follows in its row


class _Fixed(FreeScales):
    """One scale a block, as at the start."""

    def nearest(self, target: Tensor) -> Tensor:
        return torch.full_like(target, 1e9)

    def moved(self, keys: Tensor, steps: int) -> Tensor:
        return torch.full_like(keys, 1e9)


def _textbook(w: Tensor, hessian: Tensor, scales: Tensor, size: int, table: Tensor) -> Tensor:
    hessian = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(len(hessian))
    inverse, w, result = torch.linalg.inv(hessian), w.clone(), torch.zeros_like(w)
    for j in range(w.shape[1]):
        scale = scales[:, j // size, None]
        result[:, j] = table[(w[:, j, None] / scale - table).abs().argmin(1)] * scale[:, 0]
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w = w - error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return result


def test_the_factor_is_that_of_the_inverse() -> None:
    statistics, _ = correlated(48, 3)
    hessian = statistics.hessian
    assert hessian is not None
    upper = inverse_factor(hessian, 0.05).double()
    damped = hessian.double() / hessian.double().diagonal().mean() + 0.05 * torch.eye(48)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(48, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("tokens", [64, 256, 2048])
def test_few_tokens_are_not_taken_at_their_word(tokens: int) -> None:
    """On other inputs from the same source, also those of fewer tokens than channels help."""
    w = weight(64, 256, 7)
    known, _ = correlated(256, 7, tokens)
    _, held_out = correlated(256, 7, 4000)
    _, searched, fed_back = (output_error(w, dequantize(quantize(w, f, known)), held_out) for f in formats(64))
    assert fed_back < 0.75 * searched
    assert 0.01 < damping_for(10**6, 256) < damping_for(tokens, 256) < damping_for(1, 256) == 1


def test_channels_that_were_always_zero_are_rounded_as_they_are() -> None:
    w = weight(16, 128, 4)
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    x[:, 64:] = 0
    statistics = Statistics(128, hessian=True)
    statistics.update(x)
    stored = dequantize(quantize(w, formats(64)[2], statistics))
    assert ((stored - w)[:, 64:].norm() / w[:, 64:].norm()) < 0.12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    w = weight(64, 256, 5).to(dtype)
    statistics, _ = correlated(256, 5)
    plain, searched, fed_back = (
        output_error(w, dequantize(quantize(w, f, statistics)), statistics) for f in formats(64)
    )
    assert fed_back < 0.6 * searched < 0.6 * plain


def test_each_expert_has_its_own_matrix() -> None:
    """And one that saw nothing keeps searched scales."""
    w = weight(48, 128, 6).view(3, 16, 128)
    form = formats(64, double_quantized=False)[2]
    each = [correlated(128, 0)[0], Statistics(128, hessian=True), correlated(128, 1)[0]]
    together = dequantize(quantize(w, form, each))
    for i in (0, 2):
        assert torch.equal(together[i], dequantize(quantize(w[i], form, each[i])))
    assert torch.equal(together[1], dequantize(quantize(w[1], formats(64, double_quantized=False)[1])))


@pytest.mark.parametrize(
    ("in_features", "statistics", "says"),
    [
        (96, Statistics(96, hessian=True), "divisible by the block: 96 and 64"),
        (128, None, "needs statistics"),
        (128, Statistics(128), "no input was seen|Hessian"),
        (128, Statistics(128, hessian=True), "no input was seen"),
    ],
)
def test_what_has_no_feedback_is_refused(in_features: int, statistics: Statistics | None, says: str) -> None:
    with pytest.raises(QuantizationError, match=says):
        quantize(torch.randn(8, in_features), formats(64)[2], statistics)


def test_statistics_without_the_matrix_are_refused() -> None:
    statistics = Statistics(128)
    statistics.update(torch.randn(4, 128))
    with pytest.raises(QuantizationError, match="hessian=True"):
        quantize(torch.randn(8, 128), formats(64)[2], statistics)


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (torch.zeros(64, 64), "mean diagonal of 0"),
        (torch.full((64, 64), float("nan")), "mean diagonal of nan"),
        (torch.eye(64) - 2 * torch.ones(64, 64).triu(1) - 2 * torch.ones(64, 64).tril(-1), "not positive definite"),
        (torch.eye(63), "63"),
    ],
)
def test_a_matrix_of_no_use_is_refused(matrix: Tensor, says: str) -> None:
    w = torch.randn(4, 64)
    with pytest.raises(QuantizationError, match=says):
        feedback_weight(w, matrix, FreeScales(), w.abs().amax(1), 64)


@pytest.mark.gpu
def test_each_step_errs_less_on_a_gpu() -> None:
    w = weight(1024, 2048, 0).cuda().bfloat16()
    statistics, _ = correlated(2048, 0, tokens=8192)
    stored = [dequantize(quantize(w, f, statistics)) for f in formats(64)]
    plain, searched, fed_back = (output_error(w.cpu(), s.cpu(), statistics) for s in stored)
    assert fed_back < 0.6 * searched < 0.6 * plain
