"""Precision plans on a vision-language model that was trained to caption generated pictures.

    python -m benchmarks.precision_vision [--model qwen2-vl|llava] [--size tiny|full] [--minutes 4] [--out FILE]

transformers' Qwen2-VL or Llava class, small, is trained until it captions pictures of scenes it has never seen, or until
time is up; then stored in each way and compared on such pictures: captions that are right in every word, and KL divergence
of the caption's words from the model in 16 bits, with 95 % confidence intervals over pictures. NF4 in one part of the
model alone shows where the error sits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from .environment import cpu_model, gpu, slug, write
from .pictures import CAPTION, SIDE, SPECIAL, WORDS, scenes
from .precision_arms import (
    choices,
    interval,
    measured_record,
    only_in,
    parts_of,
    plan_record,
    rounded_otherwise,
    stored_copy,
)

PATCH = 8
SEEN = {"qwen2-vl": (SIDE // PATCH // 2) ** 2, "llava": (SIDE // PATCH) ** 2}
"""Tokens that a picture takes."""
MORE_BYTES = (0.0, 0.05, 0.10)


@dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    hidden: int
    layers: int
    batch: int
    steps: int
    rate: float
    judged: int
    calibration: int


SIZES = {
    "tiny": Size(64, 2, 16, 20, 2e-3, 64, 16),
    "middle": Size(128, 3, 32, 100_000, 1e-3, 256, 32),
    "full": Size(256, 4, 64, 100_000, 1e-3, 1024, 64),
}


def qwen2_vl(size: Size) -> nn.Module:
    """Packed patches, two by two merged; positions in three dimensions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = _text(size) | {"rope_parameters": rope}
    vision: dict[str, Any] = {
        "embed_dim": size.hidden, "hidden_size": size.hidden, "depth": size.layers,
        "num_heads": size.hidden // 32, "mlp_ratio": 4, "patch_size": PATCH, "initializer_range": 0.05,
    }  # fmt: skip
    ids: dict[str, Any] = {f"{n}_token_id": i for i, n in enumerate(("image", "video", "vision_start", "vision_end"))}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text, **ids))


def llava(size: Size) -> nn.Module:
    """CLIP's tower, and a projector of two linears."""
    vision = CLIPVisionConfig(
        hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32, image_size=SIDE, patch_size=PATCH, initializer_factor=2.0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(size)), image_token_index=0, vision_feature_layer=-1,
        image_seq_length=SEEN["llava"],
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _text(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden, "intermediate_size": 3 * size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 32, "num_key_value_heads": size.hidden // 64, "vocab_size": len(WORDS),
        "max_position_embeddings": 256, "initializer_range": 0.05, "tie_word_embeddings": False,
    }  # fmt: skip


MODELS = {"qwen2-vl": qwen2_vl, "llava": llava}


def questions(model: str, pictures: Tensor, captions: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs whose only predictions are those of the captions' words."""
    count, seen, device = len(pictures), SEEN[model], pictures.device
    see, seen_, say = (SPECIAL.index(word) for word in ("<see>", "<seen>", "<say>"))
    prompt = torch.tensor([see, *[0] * seen, seen_, say], device=device).expand(count, -1)
    inputs: dict[str, Any] = {"input_ids": torch.cat([prompt, captions[:, :-1]], 1), "logits_to_keep": CAPTION}
    if model == "llava":
        return inputs | {"pixel_values": pictures.to(dtype)}
    across = SIDE // PATCH
    grid = torch.tensor([[1, across, across]], device=device).expand(count, -1)
    return inputs | {
        "pixel_values": _packed(pictures).to(dtype), "image_grid_thw": grid,
        "mm_token_type_ids": (inputs["input_ids"] == 0).int(),
    }  # fmt: skip


def _packed(pictures: Tensor) -> Tensor:
    """Patches as Qwen2-VL takes them: each picture twice in time, patches in groups of two by two."""
    count, merged = len(pictures), SIDE // PATCH // 2
    twice = pictures[:, None].expand(count, 2, 3, SIDE, SIDE)
    cut = twice.reshape(count, 2, 3, merged, 2, PATCH, merged, 2, PATCH)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * PATCH * PATCH)


def trained(name: str, size: Size, device: torch.device, minutes: float) -> tuple[Any, dict[str, Any]]:
    """The model, trained until it is right on scenes held out, and how that went."""
    torch.manual_seed(0)
    model: Any = MODELS[name](size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.98), weight_decay=0.01)
    deadline, right, step = time.monotonic() + 60 * minutes, 0.0, 0
    for step in range(1, size.steps + 1):
        left = min(1 - step / size.steps, (deadline - time.monotonic()) / (60 * minutes))
        if left <= 0 or right > 0.995:
            break
        optimizer.param_groups[0]["lr"] = size.rate * min(step / 200, 3 * left, 1)
        pictures, captions = scenes(size.batch, step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**questions(name, pictures, captions, torch.float32)).logits
        loss = cross_entropy(logits.float().flatten(0, 1), captions.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            right = float(
                judge(name, model.eval(), *scenes(4 * size.calibration, 10**7, device, held_out=True))[1].float().mean()
            )
            model.train()
            print(f"step {step}: loss {loss.detach():.3f}, captions right {right:.1%}", flush=True)
    return model.to(torch.bfloat16).eval(), {
        "steps": step,
        "seconds": round(60 * minutes - deadline + time.monotonic()),
    }


@torch.no_grad()
def judge(name: str, model: nn.Module, pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the words' probabilities, (pictures, CAPTION, words), and which captions are right in every word."""
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    parts = zip(pictures.split(128), captions.split(128), strict=True)
    logits = torch.cat([model(**questions(name, p, c, dtype)).logits.float() for p, c in parts]).log_softmax(-1)
    return logits, (logits.argmax(-1) == captions).all(-1)


def main() -> None:
    """Train, plan, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2-vl")
    parser.add_argument("--size", choices=SIZES, default="full" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name, size = options.model, SIZES[options.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, how = trained(name, size, device, options.minutes)
    sets = [scenes(size.calibration, -1 - i, device) for i in range(4)]
    calibration = [questions(name, pictures, captions, torch.bfloat16) for pictures, captions in sets]
    found = choices(model, calibration, MORE_BYTES)
    arms = dict(found.plans) | {f"NF4 in {part} only": only_in(found.curve, part) for part in parts_of(found.curve)}
    test = scenes(size.judged, 10**6, device, held_out=True)
    before, right = judge(name, model, *test)
    records: list[dict[str, Any]] = [{"arm": "16 bits", "right": interval(right.float()), "kl": None}]

    def compare(arm: str, other: nn.Module, **more: Any) -> None:
        after, right = judge(name, other, *test)
        kl = (before.exp() * (before - after)).sum(-1).mean(-1)
        records.append({"arm": arm, **more, "right": interval(right.float()), "kl": interval(kl)})
        print(
            f"{arm:50} right {right.float().mean():6.1%}  KL {kl.mean():.5f} ± {interval(kl)['half']:.5f}", flush=True
        )

    compare("16 bits, rounded otherwise", rounded_otherwise(model, found.curve))
    for arm, plan in arms.items():
        compare(arm, stored_copy(model, plan, calibration), **plan_record(plan))
    host = (gpu() or {}).get("name") or cpu_model()
    file = f"precision-vision-{name}-{options.size}-{slug(host)}.json"
    write(options.out or Path(__file__).parent / "results" / file, "precision-vision", model=name, size=options.size,
          training=how, records=records, parameters=sum(p.numel() for p in model.parameters()), held_out=size.judged,
          **measured_record(found))  # fmt: skip


if __name__ == "__main__":
    main()
