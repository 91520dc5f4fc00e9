"""Every causal language model type of the installed transformers, made tiny by the names of its config's fields."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
LARGEST = 40_000_000  # parameters of a model that is still tiny

# A field whose whole name matches gets this size, if its default is larger; the first that matches counts.
SIZES = (
    (r".*_group_size|.*_pattern|.*_interval|.*_period|.*_step|.*_offset", None),
    (r".*(kv_heads|key_value_heads|query_groups|num_key_heads|kv_n_heads)", 2),
    (r".*(num_attention_heads|attention_heads|num_heads|n_heads?|mamba_heads|value_heads)|num_heads_.*", 4),
    (r"(num_)?(hidden_layers|layers|decoder_layers|encoder_layers)|n_layers?|depth|num_blocks", 2),
    (r"qk_head_dim", 32),
    (r"adapter_(in|out)_dim|adapter_input_size", 64),
    (r".*(head_dim|head_size|d_head|kv_channels|dim_head|headdim)|d_kv|linear_(key|value)_head_dim", 16),
    (r".*(lora_rank|_rank|lowrank)", 8),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|n_inner|d_ff|dff|dim_ff|d_inner|feed_forward_size|mlp_dim)", 96),
    (r".*(experts_per_tok|experts_per_token|topk|moe_k)|index_topk", 2),
    (r".*(num_experts|local_experts|routed_experts)|zero_expert_num", 4),
    (r"n_group|topk_group|num_expert_group|(mamba_)?n_groups|num_layers_per_stack", 1),
    (r".*(window|window_size|chunk_size|window_len|chunk_length)|local_attention|block_size|floor_scale", 8),
    (r".*(state_size|d_state)", 16),
    (r".*(hidden_size.*|d_model|n_embd|_embed_dim|embedding_size|embedding_dim|proj_dim|emb_dim|lru_width|width)", 64),
    (r".*vocab_size.*|.*_vocab|vocab_size_base", VOCABULARY),
    (r"max_.*positions?|max_position_embeddings|n_positions|max_seq_len|n_ctx|model_max_length|context_length", 256),
    (r".*(token_id|token_index|_token)", 90),
)

# What a type needs beyond that: fields that depend on each other.
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
SHARED_KV = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
NO_LAYER_INPUTS = {
    "model_type": "gemma4_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        **SLIDING_AND_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in SLIDING_AND_FULL["layer_types"]
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": EXPERTS,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {**SHARED_KV, "intermediate_size": 96, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED_KV,
    "gemma4_unified_text": SHARED_KV,
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "mamba_d_head": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma4_assistant": {"text_config": NO_LAYER_INPUTS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {"attention_head_dim": 32, "num_key_value_heads": 4, "mamba_headdim": 32, "attention_hidden_size": 128},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of the type with few small layers: one for each kind of layer of the default config, and two at least."""
    cls = CONFIG_MAPPING[model_type]
    try:
        default = cls()
    except Exception:  # a type whose config has no default
        return cls(**NEEDS[model_type], **changes)
    fields = _shrunk(default)
    if "is_decoder" in vars(default):
        fields["is_decoder"] = True
    return cls(**{**fields, **changes})


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of the type, in eval mode, without dropout."""
    config = tiny_config(model_type, **changes)
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    parts = [part for part in (config, *vars(config).values()) if isinstance(part, cls.config_class)]
    config = parts[0] if parts else config  # a class may read one part of what its type describes
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in cls._from_config(config).parameters())
    except (ImportError, ValueError):  # it needs a library that is not there, or transformers contradicts itself
        return _unbuilt(cls.__name__, config)
    if size > LARGEST:
        raise ValueError(f"{model_type}: {size} parameters are not tiny")
    torch.manual_seed(seed)
    model = cls._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the symmetric start (unit norms, zero biases)
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _unbuilt(name: str, config: Any) -> Any:
    """What can be had of a model that cannot be built: a module of its class's name, with its config."""
    model = type(name, (nn.Module,), {})()
    model.config = config
    return model


def _shrunk(config: Any) -> dict[str, Any]:
    """Arguments for a tiny config of the same class."""
    given = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type")}
    small: dict[str, Any] = {}
    for key, value in given.items():
        inner = vars(config).get(key)
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            small[key] = _shrunk(inner)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _size(key, value)
        elif re.fullmatch(r".*token_ids?", key) and isinstance(value, list):
            small[key] = 90
        elif re.fullmatch(r".*(dropout|pdrop).*", key) and isinstance(value, float):
            small[key] = 0.0
    if "head_dim" in given and given["head_dim"] is None:
        small["head_dim"] = 16
    if small.get("kv_lora_rank"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return {**small, **_layers(given), **NEEDS.get(config.model_type, {})}


def _size(key: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return value if size is None else min(value, size)
    return value


def _layers(given: dict[str, Any]) -> dict[str, Any]:
    """The per-layer lists, cut to one layer of each kind that they tell apart, in order."""
    count = next((given[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if given.get(key)), None)
    if not isinstance(count, int):
        return {}
    lists = {k: v for k, v in given.items() if isinstance(v, list) and len(v) == count and count > 4}
    if not lists:
        return {}
    kept: dict[Any, int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True)):
        kept.setdefault(repr(kind), layer)
    chosen = sorted(kept.values()) if len(kept) > 1 else [0, 1]
    return {"num_hidden_layers": len(chosen), **{k: [v[i] for i in chosen] for k, v in lists.items()}}
