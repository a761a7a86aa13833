"""What the training benchmark can run: arms, shapes, and the options of one run. Free of torch, so that an arm whose
library must be imported first can be chosen before.

``hf`` (transformers + PEFT), ``regional`` (each decoder layer under ``torch.compile``), ``compile`` (the whole model),
``weft``, ``weft_fp8`` (the same with products of frozen weights in FP8), ``weft_fp8_kept`` (which keeps these weights in FP8),
``unsloth``, ``liger``; with ``_nf4`` over a 4-bit base.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

ARMS = ("hf", "regional", "compile", "weft", "weft_fp8", "weft_fp8_kept", "unsloth", "liger")
READY = "READY"
"""What an arm prints when it waits for its turn."""
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "GPTNeoXConfig": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "Phi3Config": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "MixtralConfig": ATTENTION,
}
"""Names of all linears, where they are not those of :data:`ATTENTION` and :data:`MLP`. Mixtral's experts are no linears."""
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama8b": ("LlamaConfig", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }),
    "llama70b": ("LlamaConfig", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }),
    "qwen1.5b": ("Qwen2Config", {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }),
    "neox1.4b": ("GPTNeoXConfig", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16,
        "vocab_size": 50304, "rotary_pct": 0.25, "max_position_embeddings": 2048, "use_parallel_residual": True,
    }),
    "gemma3-4b": ("Gemma3TextConfig", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
        "max_position_embeddings": 8192,
    }),
    "phi3-3.8b": ("Phi3Config", {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }),
    "mixtral-2b": ("MixtralConfig", {
        "hidden_size": 2048, "intermediate_size": 3584, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }),
    "tiny": ("LlamaConfig", {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 640, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What one arm trains, and how."""

    arm: str
    shape: str = "llama8b"
    layers: int | None = None
    batch: int = 4
    length: int = 2048
    steps: int = 6
    warmup: int = 3
    checkpointing: bool = False
    memory: str = ""
    verify: bool = True
    models: str = ""
    in_turns: bool = False

    @property
    def base(self) -> str:
        """The arm without its number formats."""
        return self.arm.removesuffix("_nf4").split("_fp8")[0]

    @property
    def products(self) -> Literal["stored", "fp8", "fp8_kept"]:
        """In what products of frozen weights are computed."""
        arm = self.arm.removesuffix("_nf4")
        return "fp8_kept" if arm.endswith("_fp8_kept") else "fp8" if arm.endswith("_fp8") else "stored"

    @property
    def nf4(self) -> bool:
        """Whether the base weights are stored in 4 bits."""
        return self.arm.endswith("_nf4")

    @property
    def folder(self) -> Path:
        """Where the random model is saved for the arms that load one."""
        root = Path(self.models) if self.models else Path(tempfile.gettempdir()) / "weft-benchmark-models"
        return root / (self.shape if self.layers is None else f"{self.shape}-{self.layers}")

    @property
    def loads(self) -> bool:
        """Whether the arm reads its model from disk, where quantization and Unsloth expect it."""
        return self.nf4 or self.base == "unsloth"


def missing(arm: str) -> str | None:
    """The package that ``arm`` needs and that is not installed."""
    needed = {"unsloth": ["unsloth"], "liger": ["liger_kernel"]}.get(arm.removesuffix("_nf4"), [])
    needed += ["bitsandbytes"] if arm.endswith("_nf4") else []
    return next((package for package in (*needed, "peft") if find_spec(package) is None), None)
