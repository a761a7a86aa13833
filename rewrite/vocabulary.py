"""The operations that matching knows, each with the one signature that all its spellings are bound to.

``x.mean(-1, True)``, ``torch.mean(x, dim=[-1], keepdim=True)`` and ``torch.ops.aten.mean.dim(x, [-1], True)`` all bind to
``mean(x, dim=-1, keepdim=True)``. An operation that is not listed keeps its name and its arguments as they were written, so
a pattern may use any operation; listing it only makes its spellings equal.
"""

from __future__ import annotations

import ast
import operator
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import fx

# signature                                                                    further spellings
TABLE = """
add(x, y, alpha=1)                                                           | iadd add_ __add__ __radd__
sub(x, y, alpha=1)                                                           | isub sub_ subtract
rsub(x, y, alpha=1)                                                          | __rsub__
mul(x, y)                                                                    | imul mul_ multiply
div(x, y, rounding_mode=None)                                                | truediv itruediv div_ divide true_divide
addcmul(x, y, z, value=1)                                                    | addcmul_
addcdiv(x, y, z, value=1)                                                    | addcdiv_
neg(x)                                                                       | negative
pow(x, y)                                                                    | pow_ ipow
square(x)                                                                    |
sqrt(x)                                                                      |
rsqrt(x)                                                                     |
reciprocal(x)                                                                |
exp(x)                                                                       |
log(x)                                                                       |
logsigmoid(x)                                                                | log_sigmoid
tanh(x)                                                                      |
erf(x)                                                                       | special_erf
erfc(x)                                                                      | special_erfc
ndtr(x)                                                                      | special_ndtr
sigmoid(x)                                                                   | expit special_expit
relu(x, inplace=False)                                                       | relu_
silu(x, inplace=False)                                                       | silu_ swish
gelu(x, approximate='none')                                                  |
glu(x, dim=-1)                                                               |
clamp(x, min=None, max=None)                                                 | clip clamp_
clamp_min(x, min)                                                            | clamp_min_
maximum(x, y)                                                                |
gt(x, y)                                                                     | greater
ge(x, y)                                                                     | greater_equal
lt(x, y)                                                                     | less
le(x, y)                                                                     | less_equal
where(condition, x, y)                                                       |
masked_fill(x, mask, value)                                                  |
threshold(x, threshold, value, inplace=False)                                | _threshold
mean(x, dim=None, keepdim=False, dtype=None)                                 |
sum(x, dim=None, keepdim=False, dtype=None)                                  |
var(x, dim=None, unbiased=None, keepdim=False, correction=None)              |
std(x, dim=None, unbiased=None, keepdim=False, correction=None)              |
var_mean(x, dim=None, unbiased=None, keepdim=False, correction=None)         |
std_mean(x, dim=None, unbiased=None, keepdim=False, correction=None)         |
norm(x, p=2, dim=None, keepdim=False, out=None, dtype=None)                  |
vector_norm(x, ord=2, dim=None, keepdim=False, dtype=None, out=None)         | linalg_vector_norm
linalg_norm(x, ord=None, dim=None, keepdim=False, out=None, dtype=None)      |
amax(x, dim=(), keepdim=False, out=None)                                     |
max(x, dim=None, keepdim=False)                                              |
vecdot(x, y, dim=-1, out=None)                                               | linalg_vecdot
normalize(x, p=2.0, dim=1, eps=1e-12, out=None)                              |
softmax(x, dim=None, _stacklevel=3, dtype=None)                              | special_softmax
scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) |
rms_norm(x, normalized_shape, weight=None, eps=None)                         |
layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-05, cudnn_enable=True) |
native_layer_norm(x, normalized_shape, weight, bias, eps)                    |
group_norm(x, num_groups, weight=None, bias=None, eps=1e-05, cudnn_enabled=True) |
linear(x, weight, bias=None)                                                 |
matmul(x, y)                                                                 | mm bmm __matmul__
tensordot(x, y, dims=2, out=None)                                            |
addmm(x, mat1, mat2, beta=1, alpha=1)                                        |
baddbmm(x, batch1, batch2, beta=1, alpha=1)                                  |
grouped_mm(x, weight, offs=None, bias=None, out_dtype=None)                  | _grouped_mm transformers.grouped_mm_fallback
einsum(equation, *operands)                                                  |
t(x)                                                                         | numpy_T
transpose(x, dim0, dim1)                                                     | swapaxes swapdims
permute(x, *dims)                                                            |
movedim(x, source, destination)                                              | moveaxis
flip(x, *dims)                                                               |
view(x, *shape)                                                              | reshape
flatten(x, start_dim=0, end_dim=-1)                                          |
unflatten(x, dim, sizes)                                                     |
unsqueeze(x, dim)                                                            |
squeeze(x, dim=None)                                                         |
expand(x, *sizes)                                                            |
roll(x, shifts, dims=None)                                                   |
repeat(x, *sizes)                                                            |
repeat_interleave(x, repeats, dim=None, output_size=None)                    |
contiguous(x, memory_format=None)                                            |
clone(x, memory_format=None)                                                 |
cat(tensors, dim=0)                                                          | concat concatenate
stack(tensors, dim=0)                                                        |
chunk(x, chunks, dim=0)                                                      |
split(x, size, dim=0)                                                        | split_with_sizes
tensor_split(x, sections, dim=0)                                             |
unbind(x, dim=0)                                                             |
narrow(x, dim, start, length)                                                |
select(x, dim, index)                                                        |
getitem(x, index)                                                            | __getitem__
dropout(x, p=0.5, training=True, inplace=False)                              |
view_as_complex(x)                                                           |
view_as_real(x)                                                              |
complex(x, y)                                                                |
polar(x, y)                                                                  |
pad(x, pad, mode='constant', value=None)                                     | constant_pad_nd
cross_entropy(x, target, weight=None, old=None, ignore_index=-100, old2=None, reduction='mean', smoothing=0.0)| cross_entropy_loss
nll_loss(x, target, weight=None, old=None, ignore_index=-100, old2=None, reduction='mean') |
log_softmax(x, dim=None, _stacklevel=3, dtype=None)                          | special_log_softmax
gather(x, dim, index, sparse_grad=False)                                     |
logsumexp(x, dim, keepdim=False, out=None)                                   | special_logsumexp
gemm_4bit(x, weight, shape, absmax, block_size, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None) |
"""

CASTS = frozenset((
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "_to_copy", "_autocast_to_full_precision",
    "_autocast_to_reduced_precision", "convert_element_type",
))  # fmt: skip
"""Conversions of dtype or device: what they convert to is read off the result, not off their many argument forms."""

ALIASES = {
    "axis": "dim",
    "keepdims": "keepdim",
    "input": "x",
    "other": "y",
    "self": "x",
    "exponent": "y",
    "tensor": "x",
    "label_smoothing": "smoothing",
    "size_average": "old",
    "reduce": "old2",
}
"""Keyword names that some spellings of one signature use."""


def _parse(line: str) -> tuple[str, Signature, list[str]]:
    head, _, others = line.partition("|")
    call = ast.parse(f"def {head.strip()}: ...").body[0]
    assert isinstance(call, ast.FunctionDef)
    names = [a.arg for a in call.args.args]
    defaults = [Parameter.empty] * (len(names) - len(call.args.defaults)) + [
        ast.literal_eval(d) for d in call.args.defaults
    ]
    parameters = [
        Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=d) for n, d in zip(names, defaults, strict=True)
    ]
    if call.args.vararg:
        parameters.append(Parameter(call.args.vararg.arg, Parameter.VAR_POSITIONAL))
    return call.name, Signature(parameters), others.split()


_PARSED = [_parse(line) for line in TABLE.strip().splitlines()]
SIGNATURES: dict[str, Signature] = {name: signature for name, signature, _ in _PARSED}
SPELLINGS: dict[str, str] = {s: name for name, _, others in _PARSED for s in (name, *others)}

_IN_PLACE_OPERATORS = {
    getattr(operator, n)
    for n in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift", "setitem",
    )
}  # fmt: skip
_NAMED_LIKE_KEYWORDS = {operator.and_, operator.or_, operator.not_, operator.is_}


def target_name(target: Any) -> str:
    """The bare name of an fx target: ``aten.mean.dim``, ``torch.mean`` and the method ``"mean"`` are all ``mean``."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        whole = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = whole.partition("::")
        return name if namespace in ("aten", "bitsandbytes", "prims") else f"{namespace}.{name}"
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", type(target).__name__)
    return f"weft.{name}" if module.startswith("weft.") else name


def operation(node: fx.Node) -> str:
    """The canonical name of the operation that ``node`` performs; ``cast`` for every conversion of dtype."""
    name = str(node.args[1]) if node.target is getattr else target_name(node.target)
    return "cast" if name in CASTS else SPELLINGS.get(name, name)


def is_in_place(node: fx.Node) -> bool:
    """Whether ``node`` overwrites its first argument."""
    if node.op not in ("call_function", "call_method") or node.target in _NAMED_LIKE_KEYWORDS:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.op == "call_method":
        return False
    if node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable) or _inplace_position(node)


def _inplace_position(node: fx.Node) -> bool:
    name = operation(node)
    if name not in ("relu", "silu", "dropout", "threshold"):
        return False
    bound = bind(name, node.args, dict(node.kwargs))
    return bound is not None and bound[list(SIGNATURES[name].parameters).index("inplace")] is True


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Arguments in the order of the canonical signature, defaults filled in; None where they do not fit it."""
    signature = SIGNATURES.get(name)
    if signature is None:
        return None
    known = {
        k if k in signature.parameters else ALIASES.get(k, k): v for k, v in kwargs.items() if k != "memory_format"
    }
    known = {_first_name(signature, k): v for k, v in known.items()}
    try:
        bound = signature.bind(*args, **known)
    except TypeError:
        return None
    bound.apply_defaults()
    values: list[Any] = []
    for parameter in signature.parameters.values():
        value = bound.arguments[parameter.name]
        if (
            parameter.kind is Parameter.VAR_POSITIONAL
            and len(value) == 1
            and isinstance(value[0], tuple | list | torch.Size)
        ):
            value = tuple(value[0])
        values.append(value)
    return tuple(values)


def _first_name(signature: Signature, keyword: str) -> str:
    """``cat(tensors=...)`` and ``cat(x=...)``: the alias ``x`` stands for whatever the first parameter is called."""
    return next(iter(signature.parameters)) if keyword == "x" and "x" not in signature.parameters else keyword
