"""What every published weights file holds: name, shape and dtype of each tensor, written down without the library.

The names and shapes are those of the modules that wrote the files (togethercomputer/stripedhyena, Zymrael/vortex,
HazyResearch/hyena-dna, LongSafari/hyenadna-*-hf); which dtypes they have differs from file to file.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

BF16, F32, I64, BYTES = torch.bfloat16, torch.float32, torch.int64, torch.uint8
Kind: TypeAlias = Literal["weight", "copy", "junk"]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; a copy repeats a weight, and junk holds nothing that a model needs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind = "weight"

    @property
    def numbers(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


Keys: TypeAlias = dict[str, Stored]


def weights(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Keys:
    """Weights of one dtype; "__" stands for the dot."""
    return {name.replace("__", "."): Stored(shape, dtype) for name, shape in shapes.items()}


def below(prefix: str, keys: Keys) -> Keys:
    return {prefix + name: stored for name, stored in keys.items()}


# --- StripedHyena-7B, Evo 1 ---


def stripedhyena(config: dict[str, Any], prefix: str = "", *, copied_head: bool = False) -> Keys:
    """A file of StripedHyena 1. Tied ones of the standalone layout repeat the embedding as ``unembed.weight``."""
    d, v = config["hidden_size"], config["vocab_size"]
    keys = weights(BF16, embedding_layer__weight=(v, d), norm__scale=(d,))
    if not config["tie_embeddings"]:
        keys["unembed.weight"] = Stored((v, d), BF16)
    elif copied_head:
        keys["unembed.weight"] = Stored((v, d), BF16, "copy")
    width = config["inner_mlp_size"] or 10928  # ceil(10922 / 16) * 16, of int(2 * 4096 * 4 / 3)
    for layer in range(config["num_layers"]):
        block = weights(
            BF16,
            pre_norm__scale=(d,),
            post_norm__scale=(d,),
            mlp__l1__weight=(width, d),
            mlp__l2__weight=(width, d),
            mlp__l3__weight=(d, width),
        )
        block |= _attention_1(config) if layer in config["attn_layer_idxs"] else _hyena_1(config)
        keys |= below(f"blocks.{layer}.", block)
    return below(prefix, keys)


def _attention_1(config: dict[str, Any]) -> Keys:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    size = d // heads
    rows = heads * size + 2 * (heads // config["proj_groups"]) * size
    keys = weights(BF16, Wqkv__weight=(rows, d), out_proj__weight=(d, d))
    if config["qkv_proj_bias"]:
        keys["Wqkv.bias"] = Stored((rows,), BF16)
    if config["mha_out_proj_bias"]:
        keys["out_proj.bias"] = Stored((d,), BF16)
    keys["rotary_emb.inv_freq"] = Stored((size // 2,), BF16, "junk")
    return below("inner_mha_cls.", keys)


def _hyena_1(config: dict[str, Any]) -> Keys:
    d, modes = config["hidden_size"], config["state_size"]
    return weights(
        BF16,
        projections__weight=(3 * d, d),
        projections__bias=(3 * d,),
        filter__short_filter_weight=(3 * d, 1, 3),
        filter__short_filter_bias=(3 * d,),
        filter__D=(d,),
        out_filter_dense__weight=(d, d),
        out_filter_dense__bias=(d,),
    ) | weights(F32, filter__poles=(d, modes, 1, 2), filter__residues=(d, modes, 1, 2))


# --- Evo 2 ---


@dataclass(frozen=True)
class File2:
    """What differs between the files of Evo 2 and is not in their configurations."""

    norm: torch.dtype = BF16
    frequencies: torch.dtype = BF16
    projection: torch.dtype = BF16
    times: int | None = None
    """Length of the grid of positions that Hyena-LI layers of models with extended context left behind."""
    pickles: tuple[str, ...] = ("projections",)
    """Modules with pickles of Transformer Engine."""


_IN_EVERY_LAYER = (
    "projections", "out_filter_dense", "mlp.l1", "mlp.l2", "mlp.l3", "mixer.attn", "mixer.dense", "inner_mha_cls.Wqkv",
)  # fmt: skip
_7B = ("projections", "mixer.attn", "mixer.dense")
EVO2_FILES = {
    "evo2-1b-8k": File2(pickles=("projections", "mixer.attn")),
    "evo2-7b-8k": File2(pickles=_7B),
    "evo2-7b-262k": File2(times=262144, pickles=_7B),
    "evo2-7b-1m": File2(times=1048576, pickles=_7B),
    "evo2-20b-1m": File2(frequencies=F32, projection=F32, pickles=_IN_EVERY_LAYER),
    "evo2-40b-8k": File2(norm=F32, frequencies=F32, pickles=_IN_EVERY_LAYER),
    "evo2-40b-1m": File2(norm=F32, frequencies=F32, pickles=_IN_EVERY_LAYER),
}


def evo2(config: dict[str, Any], file: File2) -> Keys:
    """A merged .pt file for vortex. Pickles are listed as bytes, though most files hold them outside of tensors."""
    d, width = config["hidden_size"], config["inner_mlp_size"]
    keys = weights(BF16, embedding_layer__weight=(512, d)) | weights(file.norm, norm__scale=(d,))
    keys["unembed.weight"] = Stored((512, d), BF16, "copy")
    for layer in range(config["num_layers"]):
        block = weights(file.norm, pre_norm__scale=(d,), post_norm__scale=(d,))
        block |= weights(BF16, mlp__l1__weight=(width, d), mlp__l2__weight=(width, d), mlp__l3__weight=(d, width))
        attends = layer in config["attn_layer_idxs"]
        block |= _attention_2(config, file) if attends else _hyena_2(config, file, layer)
        for module in file.pickles:
            if module.startswith("mlp.") or attends == module.startswith(("mixer.", "inner_mha_cls.")):
                block[f"{module}._extra_state"] = Stored((0,), BYTES, "junk")
        keys |= below(f"blocks.{layer}.", block)
    return keys


def _attention_2(config: dict[str, Any], file: File2) -> Keys:
    d, size = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    keys = weights(BF16, Wqkv__weight=(3 * d, d), out_proj__weight=(d, d), out_proj__bias=(d,))
    return below("inner_mha_cls.", keys | weights(file.frequencies, rotary_emb__inv_freq=(size // 2,)))


def _hyena_2(config: dict[str, Any], file: File2, layer: int) -> Keys:
    d = config["hidden_size"]
    keys = weights(file.projection, projections__weight=(3 * d, d))
    keys |= weights(BF16, filter__short_filter_weight=(3 * d, 1, 3))
    keys |= weights(BF16, out_filter_dense__weight=(d, d), out_filter_dense__bias=(d,))
    if layer in config["hcs_layer_idxs"]:
        return keys | weights(BF16, filter__h=(config["hcs_filter_groups"], 1, 7))
    if layer in config["hcm_layer_idxs"]:
        return keys | weights(BF16, filter__h=(config["hcm_filter_groups"], 1, 128), filter__D=(d,))
    assert layer in config["hcl_layer_idxs"]
    keys |= weights(F32, filter__log_poles=(d, 16, 1), filter__residues=(d, 16)) | weights(BF16, filter__D=(d,))
    if file.times:
        keys["mixer.mixer.filter.t"] = Stored((1, 1, file.times), F32, "junk")
    return keys


# --- HyenaDNA ---


def hyenadna(width: int, layers: int, length: int, *, checkpointed: bool = False) -> Keys:
    """The state dict in a weights.ckpt. Checkpointed layers are wrapped once more, and freq is one shared tensor."""
    keys = weights(F32, word_embeddings__weight=(16, width))
    keys = below("backbone.embeddings.", keys)
    for layer in range(layers):
        keys |= below(f"backbone.layers.{layer}.", _layer(width, length, ".layer" if checkpointed else ""))
    keys |= weights(F32, backbone__ln_f__weight=(width,), backbone__ln_f__bias=(width,))
    keys["lm_head.weight"] = Stored((16, width), F32, "copy")
    metrics = {f"{split}_torchmetrics.num_tokens.count": Stored((), I64, "junk") for split in ("train", "val", "test")}
    return below("model.", keys) | metrics


def hyenadna_hf(width: int, layers: int, length: int, *, trained_features: bool = False) -> Keys:
    """The model.safetensors of the port: freq is stored once, and the head is a tensor of its own."""
    keys = below("backbone.embeddings.", weights(F32, word_embeddings__weight=(16, width)))
    for layer in range(layers):
        keys |= below(f"backbone.layers.{layer}.", _layer(width, length, ""))
    keys |= weights(F32, backbone__ln_f__weight=(width,), backbone__ln_f__bias=(width,))
    keys = {name: stored for name, stored in keys.items() if stored.kind != "copy"}
    if trained_features:
        keys |= {n: Stored(s.shape, s.dtype) for n, s in keys.items() if n.endswith("pos_emb.z")}
    return below("hyena.", keys) | {"lm_head.weight": Stored((16, width), F32)}


def _layer(width: int, length: int, wrapper: str) -> Keys:
    norms = weights(F32, norm1__weight=(width,), norm1__bias=(width,), norm2__weight=(width,), norm2__bias=(width,))
    mlp = weights(
        F32,
        fc1__weight=(4 * width, width),
        fc1__bias=(4 * width,),
        fc2__weight=(width, 4 * width),
        fc2__bias=(width,),
    )
    mixer = weights(
        F32,
        in_proj__weight=(3 * width, width),
        in_proj__bias=(3 * width,),
        out_proj__weight=(width, width),
        out_proj__bias=(width,),
        short_filter__weight=(3 * width, 1, 3),
        short_filter__bias=(3 * width,),
        filter_fn__bias=(width,),
    )
    mixer |= below("filter_fn.", _implicit(width, length))
    return norms | below(f"mlp{wrapper}.", mlp) | below(f"mixer{wrapper}.", mixer)


def _implicit(width: int, length: int) -> Keys:
    keys: Keys = {
        "0.weight": Stored((64, 5), F32),
        "0.bias": Stored((64,), F32),
        "1.freq": Stored((1, 64), F32),
        "2.weight": Stored((64, 64), F32),
        "2.bias": Stored((64,), F32),
        "3.freq": Stored((1, 64), F32, "copy"),
        "4.weight": Stored((64, 64), F32),
        "4.bias": Stored((64,), F32),
        "5.freq": Stored((1, 64), F32, "copy"),
        "6.weight": Stored((width, 64), F32),
    }
    computed = {
        "pos_emb.z": Stored((1, length, 5), F32, "junk"),
        "pos_emb.t": Stored((1, length, 1), F32, "junk"),
        "modulation.deltas": Stored((1, 1, width), F32, "junk"),
    }
    return below("implicit_filter.", keys) | computed
