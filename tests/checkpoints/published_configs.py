"""The configuration files of every published checkpoint, as dictionaries with all of their keys.

``.yml`` of togethercomputer/stripedhyena 7e13f61, evo-design/evo 6856bba and ArcInstitute/evo2 53f1959, key by key.
The ``config.json`` of repositories at the Hub hold the keys of their configuration classes, with the values that are
known of them; the wrong one of Evo 1 with 131k is a copy of an older commit, which circulates.
"""

from typing import Any, TypeAlias

Published: TypeAlias = dict[str, Any]

ODD, EVEN = list(range(1, 32, 2)), list(range(0, 33, 2))  # the last one is beyond the last layer, as published
EVO1_HYENA = [layer for layer in range(32) if layer not in (8, 16, 24)]

# --- StripedHyena-7B ---

STRIPEDHYENA_7B: Published = {
    "model_name": "sh-7b-32k-v1",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_filters": 4096,
    "attn_layer_idxs": ODD,
    "hyena_layer_idxs": EVEN,
    "num_layers": 32,
    "short_filter_length": 3,
    "num_attention_heads": 32,
    "short_filter_bias": True,
    "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_",
    "eps": 0.00001,
    "state_size": 2,
    "rotary_emb_base": 500000,
    "make_vocab_size_divisible_by": 8,
    "log_intermediate_values": False,
    "proj_groups": 4,
    "hyena_filter_groups": 1,
    "column_split_hyena": True,
    "column_split": False,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "tie_embeddings": False,
    "inner_mlp_size": 14336,
    "mha_out_proj_bias": False,
    "qkv_proj_bias": False,
    "max_seqlen": 32768,
    "max_batch_size": 1,
    "final_norm": True,
    "use_flash_attn": True,
    "use_flash_rmsnorm": True,
    "use_flash_depthwise": False,
    "use_flashfft": False,
    "use_laughing_hyena": False,
    "inference_mode": False,
    "tokenizer_type": "HFAutoTokenizer",
    "vocab_file": "tokenizer/tokenizer.json",
    "prefill_style": "fft",
}
STRIPEDHYENA_STEM: Published = STRIPEDHYENA_7B | {
    "attn_layer_idxs": [],
    "hyena_layer_idxs": [0, 1, 2, 3],
    "num_layers": 4,
    "mlp_init_method": "torch.nn.init.normal_",
    "mlp_output_init_method": "torch.nn.init.normal_",
}

_STRIPEDHYENA_CLASS: Published = {
    "model_type": "stripedhyena",
    "architectures": ["StripedHyenaModelForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_hyena.StripedHyenaConfig",
        "AutoModelForCausalLM": "modeling_hyena.StripedHyenaModelForCausalLM",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.1",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_filters": 4096,
    "inner_mlp_size": 14336,
    "attn_layer_idxs": ODD,
    "hyena_layer_idxs": EVEN,
    "num_layers": 32,
    "tie_embeddings": False,
    "short_filter_length": 3,
    "num_attention_heads": 32,
    "proj_groups": 4,
    "hyena_filter_groups": 1,
    "split_k0": True,
    "column_split_hyena": True,
    "column_split": False,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "short_filter_bias": True,
    "mha_out_proj_bias": False,
    "qkv_proj_bias": False,
    "final_norm": True,
    "use_cache": True,
    "use_flash_attention_2": True,
    "use_flash_rmsnorm": True,
    "use_flash_depthwise": False,
    "use_flashfft": False,
    "inference_mode": False,
    "prefill_style": "fft",
    "max_seqlen": 32768,
    "eps": 1e-05,
    "state_size": 2,
    "rotary_emb_base": 500000,
    "smeared_gqa": False,
    "make_vocab_size_divisible_by": 8,
    "log_intermediate_values": False,
}
STRIPEDHYENA_7B_HF = _STRIPEDHYENA_CLASS

# --- Evo 1 ---

EVO1_8K: Published = {
    "vocab_size": 512,
    "hidden_size": 4096,
    "num_filters": 4096,
    "max_sequence_len": 8192,
    "attn_layer_idxs": [8, 16, 24],
    "hyena_layer_idxs": EVO1_HYENA,
    "num_layers": 32,
    "short_filter_length": 3,
    "num_attention_heads": 32,
    "short_filter_bias": True,
    "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_",
    "eps": 1.0e-6,
    "state_size": 8,
    "inner_size_multiple_of": 16,
    "smeared_gqa": False,
    "make_vocab_size_divisible_by": 8,
    "log_intermediate_values": False,
    "proj_groups": 1,
    "hyena_filter_groups": 1,
    "split_k0": True,
    "model_parallel_size": 1,
    "pile_parallel_size": 1,
    "tie_embeddings": True,
    "inner_mlp_size": None,
    "mha_out_proj_bias": True,
    "qkv_proj_bias": True,
    "final_norm": True,
    "rng_fork": False,
    "use_flash_attn": True,
    "use_flash_rmsnorm": False,
    "use_flash_depthwise": False,
    "use_flashfft": False,
    "column_split": True,
    "inference_mode": True,
    "tokenizer_type": "CharLevelTokenizer",
    "prefill_style": "fft",
    "mlp_activation": "gelu",
}
EVO1_131K: Published = EVO1_8K | {"use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16}

EVO1_8K_HF: Published = _STRIPEDHYENA_CLASS | {
    "_name_or_path": "togethercomputer/evo-1-8k-base",
    "vocab_size": 512,
    "inner_mlp_size": 10928,
    "attn_layer_idxs": [8, 16, 24],
    "hyena_layer_idxs": EVO1_HYENA,
    "tie_embeddings": True,
    "proj_groups": 1,
    "column_split": True,
    "mha_out_proj_bias": True,
    "qkv_proj_bias": True,
    "use_flash_rmsnorm": False,
    "max_seqlen": 8192,
    "eps": 1e-06,
    "state_size": 8,
    "rotary_emb_base": 10000,
    "inner_size_multiple_of": 16,
    "mlp_activation": "gelu",
    "tokenizer_type": "CharLevelTokenizer",
    "use_interpolated_rotary_pos_emb": False,
    "rotary_emb_scaling_factor": 1,
}
EVO1_131K_HF: Published = EVO1_8K_HF | {
    "_name_or_path": "togethercomputer/evo-1-131k-base",
    "max_seqlen": 131072,
    "use_interpolated_rotary_pos_emb": True,
    "rotary_emb_scaling_factor": 16.0,
}
EVO1_131K_HF_WRONG: Published = EVO1_131K_HF | {
    "use_interpolated_rotary_pos_emb": False,
    "rotary_emb_scaling_factor": 1,
}

# --- Evo 2 ---

_EVO2_40B_8K: Published = {
    "model_name": "shc-evo2-40b-8k-11T-v2",
    "vocab_size": 512,
    "hidden_size": 8192,
    "num_filters": 8192,
    "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23, 27, 30, 34, 38, 41, 45, 48],
    "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22, 26, 29, 33, 37, 40, 44, 47],
    "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 36, 39, 43, 46],
    "attn_layer_idxs": [3, 10, 17, 24, 31, 35, 42, 49],
    "hcm_filter_length": 128,
    "hcl_filter_groups": 8192,
    "hcm_filter_groups": 512,
    "hcs_filter_groups": 512,
    "hcs_filter_length": 7,
    "num_layers": 50,
    "short_filter_length": 3,
    "num_attention_heads": 64,
    "short_filter_bias": False,
    "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_",
    "eps": 0.000001,
    "state_size": 16,
    "rotary_emb_base": 1000000,
    "make_vocab_size_divisible_by": 8,
    "inner_size_multiple_of": 128,
    "inner_mlp_size": 21888,
    "log_intermediate_values": False,
    "proj_groups": 1,
    "hyena_filter_groups": 1,
    "column_split_hyena": False,
    "column_split": True,
    "interleave": True,
    "evo2_style_activations": True,
    "use_fp8_input_projections": True,
    "model_parallel_size": 1,
    "pipe_parallel_size": 1,
    "tie_embeddings": True,
    "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True,
    "hyena_flip_x1x2": False,
    "qkv_proj_bias": False,
    "max_seqlen": 8192,
    "max_batch_size": 1,
    "final_norm": True,
    "use_flash_attn": True,
    "use_flash_rmsnorm": False,
    "use_flash_depthwise": False,
    "use_flashfft": False,
    "use_laughing_hyena": False,
    "inference_mode": True,
    "tokenizer_type": "CharLevelTokenizer",
    "prefill_style": "fft",
    "mlp_activation": "gelu",
    "print_activations": False,
}
_EVO2_40B_1M: Published = _EVO2_40B_8K | {
    "inner_mlp_size": 22528,
    "rotary_emb_scaling_factor": 128,
    "use_interpolated_rotary_pos_emb": True,
    "max_seqlen": 1048576,
}
_EVO2_20B_1M: Published = _EVO2_40B_1M | {
    "model_name": "shc-evo2-20b",
    "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23],
    "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22],
    "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21],
    "attn_layer_idxs": [3, 10, 17],
    "num_layers": 24,
}
_EVO2_7B_8K: Published = _EVO2_40B_8K | {
    "model_name": "shc-evo2-7b-8k-2T-v2",
    "hidden_size": 4096,
    "num_filters": 4096,
    "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23, 27, 30],
    "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22, 26, 29],
    "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21, 25, 28],
    "attn_layer_idxs": [3, 10, 17, 24, 31],
    "hcl_filter_groups": 4096,
    "hcm_filter_groups": 256,
    "hcs_filter_groups": 256,
    "num_layers": 32,
    "num_attention_heads": 32,
    "rotary_emb_base": 10000,
    "inner_size_multiple_of": 16,
    "inner_mlp_size": 11008,
    "max_seqlen": 32768,
}
_EVO2_7B_262K: Published = _EVO2_7B_8K | {
    "rotary_emb_scaling_factor": 32,
    "use_interpolated_rotary_pos_emb": True,
    "max_seqlen": 262144,
}
_EVO2_7B_1M: Published = _EVO2_7B_262K | {
    "rotary_emb_scaling_factor": 128,
    "inner_mlp_size": 11264,
    "max_seqlen": 1048576,
}
_EVO2_1B_8K: Published = _EVO2_7B_8K | {
    "model_name": "shc-evo2-1b-8k-2T-v2",
    "hidden_size": 1920,
    "num_filters": 1920,
    "attn_layer_idxs": [3, 10, 17, 24],
    "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23],
    "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22],
    "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21],
    "hcl_filter_groups": 1920,
    "hcm_filter_groups": 128,
    "hcs_filter_groups": 128,
    "num_layers": 25,
    "num_attention_heads": 15,
    "inner_mlp_size": 5120,
    "max_seqlen": 8192,
}
EVO2: dict[str, Published] = {
    "evo2-1b-8k": _EVO2_1B_8K,
    "evo2-7b-8k": _EVO2_7B_8K,
    "evo2-7b-262k": _EVO2_7B_262K,
    "evo2-7b-1m": _EVO2_7B_1M,
    "evo2-20b-1m": _EVO2_20B_1M,
    "evo2-40b-8k": _EVO2_40B_8K,
    "evo2-40b-1m": _EVO2_40B_1M,
}

# --- HyenaDNA ---

_CHECKPOINTING = {"checkpoint_mixer": True, "checkpoint_mlp": True}


def _hyenadna(width: int, layers: int, length: int) -> Published:
    return {
        "d_model": width,
        "n_layer": layers,
        "d_inner": 4 * width,
        "vocab_size": 12,
        "resid_dropout": 0.0,
        "embed_dropout": 0.1,
        "fused_mlp": False,
        "fused_dropout_add_ln": True,
        "residual_in_fp32": True,
        "pad_vocab_size_multiple": 8,
        "return_hidden_state": True,
        "layer": {
            "_name_": "hyena",
            "emb_dim": 5,
            "filter_order": 64,
            "local_order": 3,
            "l_max": length,
            "modulate": True,
            "w": 10,
            "lr": 0.0006,
            "wd": 0.0,
            "lr_pos_emb": 0.0,
        },
    }


def _hyenadna_hf(width: int, layers: int, length: int) -> Published:
    return {
        "model_type": "hyenadna",
        "architectures": ["HyenaDNAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_hyena.HyenaConfig",
            "AutoModel": "modeling_hyena.HyenaDNAModel",
            "AutoModelForCausalLM": "modeling_hyena.HyenaDNAForCausalLM",
            "AutoModelForSequenceClassification": "modeling_hyena.HyenaDNAForSequenceClassification",
        },
        "torch_dtype": "float32",
        "transformers_version": "4.35.0.dev0",
        "vocab_size": 12,
        "d_model": width,
        "d_inner": 4 * width,
        "use_bias": True,
        "train_freq": True,
        "max_seq_len": length,
        "emb_dim": 5,
        "n_layer": layers,
        "num_inner_mlps": 2,
        "hyena_order": 2,
        "short_filter_order": 3,
        "filter_order": 64,
        "activation_freq": 10,
        "embed_dropout": 0.1,
        "hyena_dropout": 0.0,
        "hyena_filter_dropout": 0.0,
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "pad_vocab_size_multiple": 8,
        "tie_word_embeddings": False,
        "pad_token_id": 4,
    }


HYENADNA_SIZES = {
    "hyenadna-tiny-1k": (128, 2, 1026),
    "hyenadna-tiny-1k-d256": (256, 2, 1026),
    "hyenadna-tiny-16k-d128": (128, 2, 16386),
    "hyenadna-small-32k": (256, 4, 32770),
    "hyenadna-medium-160k": (256, 8, 160002),
    "hyenadna-medium-450k": (256, 8, 450002),
    "hyenadna-large-1m": (256, 8, 1000002),
}
"""Width, layers and max_seq_len of each."""

HYENADNA = {
    name: _hyenadna(*sizes) | (_CHECKPOINTING if sizes[1] == 8 else {}) for name, sizes in HYENADNA_SIZES.items()
}
HYENADNA_HF = {name: _hyenadna_hf(*sizes) for name, sizes in HYENADNA_SIZES.items()}
