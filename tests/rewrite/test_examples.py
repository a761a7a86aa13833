"""Example inputs: every kind of model takes those made for it, and says so where none can be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from weft.rewrite.errors import ExampleInputsError
from weft.rewrite.examples import Scale, check_examples, make_examples

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"} | {"num_labels": 5}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def mllama() -> PreTrainedModel:
    """Cross-attention over tiles."""
    vision = VISION | {"attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "max_num_tiles": 4}
    text = TEXT | {"cross_attention_layers": [1], "num_hidden_layers": 3}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=120))


def qwen2_vl() -> PreTrainedModel:
    """Images as packed patches with a grid."""
    vision = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    config = Qwen2VLConfig(vision_config=vision, text_config=TEXT | {"rope_parameters": ROPE}, **ids)
    return Qwen2VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "sequence": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "regression": lambda: BertForSequenceClassification(BertConfig(**BERT | {"num_labels": 1})),
    "multi-label": lambda: BertForSequenceClassification(BertConfig(**BERT, problem_type="multi_label_classification")),
    "token": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "answers": lambda: BertForQuestionAnswering(BertConfig(**BERT | {"num_labels": 2})),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**SEQ2SEQ, num_mel_bins=16, max_source_positions=20, max_target_positions=40)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VISION, num_labels=5)),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=120)
    ),
    "qwen2_vl": qwen2_vl,
    "mllama": mllama,
    "idefics3": lambda: Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=VISION, text_config=TEXT | {"model_type": "llama"}, image_token_id=120, scale_factor=1
        )
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One tiny model of each kind."""
    torch.manual_seed(0)
    return MODELS[request.param]()


def test_training_examples_give_a_loss_with_gradients(model: PreTrainedModel) -> None:
    for inputs in make_examples(model, "train"):
        loss = model(**inputs).loss
        assert torch.isfinite(loss) and loss.requires_grad


def test_training_examples_come_without_and_with_padding(model: PreTrainedModel) -> None:
    examples = make_examples(model, "train")
    masked = [e for e in examples if "input_ids" in e and "attention_mask" in e]
    assert len(examples) == (2 if "input_ids" in examples[0] else 1)
    for inputs in masked:
        hidden = inputs["attention_mask"] == 0
        assert hidden.any() and not hidden.all()
        if "labels" in inputs and inputs["labels"].shape == hidden.shape:
            assert (inputs["labels"][hidden] == -100).all() and (inputs["labels"][~hidden] != -100).any()


def test_inference_example_is_one_prefill_without_labels(model: PreTrainedModel) -> None:
    (inputs,) = make_examples(model, "inference")
    assert not {"labels", "use_cache", "attention_mask", "start_positions"} & set(inputs) or "input_features" in inputs
    with torch.no_grad():
        model.eval()(**inputs)


def test_making_examples_changes_nothing_and_repeats_itself(model: PreTrainedModel) -> None:
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = torch.get_rng_state()
    first, second = make_examples(model, "train"), make_examples(model, "train")
    assert torch.equal(before, torch.get_rng_state())
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(v, b[k]) for k, v in a.items() if isinstance(v, Tensor))


def test_another_scale_gives_other_sizes_and_values(model: PreTrainedModel) -> None:
    for inputs in make_examples(model, "train", Scale(batch=3, length=23, target_length=7, seed=1)):
        assert torch.isfinite(model(**inputs).loss)
        text = inputs.get("input_ids", inputs.get("decoder_input_ids"))
        assert text is None or text.shape[0] == 3


@pytest.mark.parametrize(("name", "token"), [("llava", 120), ("qwen2_vl", 120), ("idefics3", 120)])
def test_placeholders_are_as_many_as_the_tower_makes_features(name: str, token: int) -> None:
    model = MODELS[name]()
    (inputs,) = make_examples(model, "inference")
    with torch.no_grad():
        wanted = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw", "pixel_attention_mask")}
        features = model.get_image_features(**wanted).pooler_output
    rows = sum(f.numel() // f.shape[-1] for f in (features if isinstance(features, list | tuple) else [features]))
    assert int((inputs["input_ids"] == token).sum()) == rows > 0


def test_images_get_no_loss() -> None:
    inputs = make_examples(MODELS["llava"](), "train")[0]
    assert ((inputs["labels"] == -100) == (inputs["input_ids"] == 120)).all()


def test_class_labels_fit_the_head() -> None:
    shapes = {
        n: make_examples(MODELS[n](), "train")[0]["labels"] for n in ("sequence", "token", "multi-label", "regression")
    }
    assert shapes["sequence"].shape == (2,) and shapes["sequence"].dtype == torch.long
    assert shapes["token"].shape == (2, 19)
    assert shapes["multi-label"].shape == (2, 5) and shapes["multi-label"].is_floating_point()
    assert shapes["regression"].shape == (2,) and shapes["regression"].is_floating_point()


def test_a_model_without_labels_gets_none() -> None:
    assert "labels" not in make_examples(BertModel(BertConfig(**BERT)), "train")[0]


def test_images_follow_the_dtype_of_the_model() -> None:
    model = MODELS["llava"]().bfloat16()
    assert make_examples(model, "inference")[0]["pixel_values"].dtype == torch.bfloat16


def test_special_tokens_are_not_drawn() -> None:
    inputs = make_examples(MODELS["llama"](), "inference")[0]
    assert not torch.isin(inputs["input_ids"], torch.tensor([0, 1, 2])).any()


def test_a_plain_module_asks_for_example_inputs() -> None:
    with pytest.raises(ExampleInputsError, match="example_inputs"):
        make_examples(nn.Linear(2, 2), "train")


def test_a_head_that_fits_no_example_asks_for_example_inputs() -> None:
    # without a padding token this head cannot tell where two rows end
    model = LlamaForSequenceClassification(LlamaConfig(**TEXT | {"pad_token_id": None}, num_labels=3))
    with pytest.raises(ExampleInputsError, match=r"which labels .* example_inputs"):
        make_examples(model, "train")


def test_images_in_no_known_layout_ask_for_example_inputs() -> None:
    class OneChannelMore(LlavaForConditionalGeneration):
        def get_image_features(self, pixel_values: Tensor, **_: Any) -> Any:
            raise ValueError(f"these {pixel_values.ndim} dimensions mean nothing to me")

    config = MODELS["llava"]().config
    with pytest.raises(ExampleInputsError, match=r"mean nothing to me.* example_inputs"):
        make_examples(OneChannelMore(config), "train")


@pytest.mark.parametrize("given", [None, 3, [], [3], "input_ids"])
def test_examples_that_are_no_keyword_arguments_are_refused(given: Any) -> None:
    with pytest.raises(ExampleInputsError, match="example_inputs"):
        check_examples(given)


def test_one_example_and_several_are_taken() -> None:
    one = {"x": torch.zeros(1)}
    assert check_examples(one) == [one] and check_examples((one, one)) == [one, one]
