"""What the tiny models of the coverage sweep are made with: sizes by name of the field, and exceptions by type.

This is benchmark code: nothing in the engine knows a type by name.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 256
MOST_LAYERS = 6

SIZES: tuple[tuple[str, int], ...] = (
    (r"(index|indexer)_head_dim$", 32),
    (r"(^|_)(head_dim|d_kv|kv_channels|attention_head_size|d_head|dim_head|headdim|d_head)$", 16),
    (r"^rotary_dim$|^patch_size$", 8),
    (r"^(image|crop)_size$", 32),
    (r"^mm_tokens_per_image$|^image_seq_length$", 4),
    (r"^max_source_positions$", 48),
    (r"(mamba|ssm)\w*_n?_?heads$", 8),
    (r"(^|_)(n|num|n_mamba)?_?(\w+_)?heads?$", 4),
    (r"lora_rank$|low_?rank$|_rank$", 32),
    (r"first_k_dense_replace$|num_dense_layers$", 1),
    (r"(^|_)(num_)?(\w+_)?(layers|blocks|depth)$|^n_layer$|^resampler_depth$", 2),
    (r"experts_per_tok(en)?$|^moe_top_?k$|^moe_k$|^top_k_experts$", 2),
    (r"(num|n)_(shared_experts|expert_group|group)$|topk_group$", 1),
    (r"(num|n)_\w*experts$", 4),
    (r"groups$", 2),
    (r"num_filters$", 4),
    (r"^latent_query_num$", 16),
    (r"vocab_size\w*$", VOCABULARY),
    (r"moe_\w*intermediate_size$|expert_\w*(size|dim)$|experts_intermediate_size$", 32),
    (r"intermediate_size|ffn_dim$|^d_ff$|^dff$|^dim_ff$|^mlp_dim$|ffn_hidden_size$|^n_inner$|^feed_forward_size$", 128),
    (r"^mamba_d_ssm$", 128),
    (r"hidden_size|^d_model$|^n_embd$|(^|_)embed_dim$|^dim$|^width$|^emb_dim$|embedding_size$|proj_dim$", 64),
    (r"out_hidden", 64),
    (r"projection_dim$|output_dim$|^lru_width$", 64),
)
"""Field name → size. What must divide what: 4 heads of 16 make a hidden size of 64."""


RANDOM = r"drop|jitter|mask_(time|feature)_prob"
"""Fields that make a training step random; they are set to 0."""

NO_LINEARS = frozenset(("PhimoeTopKRouter",))
"""Subclasses of ``nn.Linear`` whose forward returns something else than a product: PEFT cannot adapt them."""

PREREQUISITES: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
"""What some default configs need to be valid at all."""

ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}

# fmt: off
OVERRIDES: dict[str, dict[str, Any]] = {
    # None by default, and no model without a number
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {
        "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    # hybrids whose kinds of layers follow from a period, or are all of one kind by default
    "bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    # parts that must agree, and that no pattern can make agree
    "aria": {"projector_patch_to_query_dict": {16: 4}, "image_token_index": 255},
    "blip-2": {"image_token_index": 255},
    "instructblip": {"image_token_index": 255},
    "instructblipvideo": {"video_token_index": 255},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "llama4": {
        "vision_config": {
            "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64, "intermediate_size": 256,
        },
    },
    "mllama": {
        "text_config": {"cross_attention_layers": [1], "num_hidden_layers": 4},
        "vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 128},
    },
    "paddleocr_vl": {"text_config": {"rope_parameters": ROTATION | {"mrope_section": [2, 3, 3]}}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 240},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 240},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "cohere_compass_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROTATION),
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": ROTATION | {"mrope_section": [3, 3, 2]}}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 64]}}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
    },
    "muse_glimmer": {"out_hidden_size": 256},
    "nemotron_h_omni": {"image_token_id": 255, "vision_config": {"video_temporal_patch_size": 2}},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "ReformerForMaskedLM": {"is_decoder": False, "axial_pos_embds": False, "num_buckets": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    # towers whose widths are lists
    "florence2": {
        "vision_config": {
            "embed_dim": [16, 32, 32, 64], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4,
        },
    },
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}},
    "perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 2},
    "granite_speech": {"encoder_config": {"hidden_dim": 64}},
    "granite_speech_plus": {"encoder_config": {"hidden_dim": 64}},
    # tables that no size in the config bounds
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
}
# fmt: on
OVERRIDES["cohere_compass"] = {"text_config": OVERRIDES["cohere_compass_text"]}
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}
"""Type (or class) → fields whose values no pattern can give."""
