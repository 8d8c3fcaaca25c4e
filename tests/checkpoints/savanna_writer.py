"""Checkpoints as savanna would have written them, of models of ours: its formulas, the other way round."""

from __future__ import annotations

import io
import json
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crocuta.config import (
    AttentionConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    RealModalFilterConfig,
    RMSNormConfig,
)
from crocuta.model.lm import Model

SEQUENCE = 24
"""The training length, which is that of the taps of Hyena-MR before they are cut, if these are few."""
_MLP = {"gate": "w1", "up": "w2", "down": "w3"}
_ROWS = ("mixer.dense_projection.weight", "mixer.dense_projection.bias")
_CONV = ("mixer.hyena_proj_conv.short_conv_weight", "mixer.hyena_proj_conv.short_conv_bias")
_WHOLE = ("layernorm", "norm.", "mixer.dense.bias", "inv_freq", "filter.t")


def thirds_to_triples(rows: Tensor) -> Tensor:
    """Rows x2 | x1 | v to (x2, x1, v) of channel 0, then of channel 1, and so on."""
    return torch.stack(rows.chunk(3), dim=1).flatten(0, 1)


def heads_together(rows: Tensor, heads: int) -> Tensor:
    """Rows q | k | v to (q, k, v) of head 0, then of head 1, and so on."""
    q, k, v = (part.unflatten(0, (heads, -1)) for part in rows.chunk(3))
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


class SavannaCheckpoint:
    """The tensors of ``model`` under savanna's names ("2.mixer.dense.weight"), and the settings it was run with.

    ``norm`` "weight" or "scale" is how norms are called; ``rule`` picks the parametrisation of complex filters;
    ``folded`` multiplies decays in and stores none.
    """

    def __init__(
        self,
        model: Model,
        *,
        norm: str = "weight",
        interleaved: bool = True,
        folded: bool = False,
        rule: str = "exponential",
        flat_taps: bool = False,
        seed: int = 0,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.norm, self.interleaved, self.folded, self.rule = norm, interleaved, folded, rule
        self.flat_taps = flat_taps
        self.tensors: dict[str, Any] = {}
        self.ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.tensors["0.word_embeddings.weight"] = self.ours["embedding.weight"]
        for index, block in enumerate(model.config.blocks):
            self._block(index, block)
        last = len(model.config.blocks) + 3
        self.tensors[f"{last}.norm.{norm}"] = self.ours["norm.scale"]
        if not model.config.tie_embeddings:
            self.tensors[f"{last + 1}.final_linear.weight"] = self.ours["head.weight"]
        self.settings = self._settings(model)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    # --- tensors ---

    def _block(self, index: int, block: Any) -> None:
        ours, theirs = f"blocks.{index}.", f"{index + 2}."
        put, take = self.tensors, self.ours
        channels = len(take[f"{ours}pre_norm.scale"])
        put[f"{theirs}input_layernorm.{self.norm}"] = take[f"{ours}pre_norm.scale"]
        for unused in ("post_attention_layernorm", "outer_mlp_layernorm"):
            put[f"{theirs}{unused}.{self.norm}"] = self.random(channels)
        put[f"{theirs}pre_mlp_layernorm.{self.norm}"] = take[f"{ours}post_norm.scale"]
        for name, other in _MLP.items():
            put[f"{theirs}mlp.{other}.weight"] = take[f"{ours}mlp.{name}.weight"]
        match block.mixer:
            case AttentionConfig() as attention:
                for kind in ("weight", "bias"):
                    if f"{ours}mixer.qkv.{kind}" in take:
                        rows = heads_together(take[f"{ours}mixer.qkv.{kind}"], attention.num_heads)
                        put[f"{theirs}mixer.dense_projection.{kind}"] = rows
                if f"{ours}mixer.rope.inverse" in take:
                    put[f"{theirs}mixer.rotary_emb.inv_freq"] = take[f"{ours}mixer.rope.inverse"]
            case HyenaConfig() as hyena:
                self._hyena(ours, theirs, hyena)
        for kind in ("weight", "bias"):
            if f"{ours}mixer.output.{kind}" in take:
                put[f"{theirs}mixer.dense.{kind}"] = take[f"{ours}mixer.output.{kind}"]

    def _rows(self, rows: Tensor) -> Tensor:
        return thirds_to_triples(rows) if self.interleaved else rows

    def _hyena(self, ours: str, theirs: str, hyena: HyenaConfig) -> None:
        put, take = self.tensors, self.ours
        taps = self._rows(take[f"{ours}mixer.short_taps"].flip(-1))
        put[f"{theirs}mixer.hyena_proj_conv.short_conv_weight"] = taps if self.flat_taps else taps[:, None]
        put[f"{theirs}mixer.dense_projection.weight"] = self._rows(take[f"{ours}mixer.projection.weight"])
        for our_name, their_name in (("projection.bias", "dense_projection.bias"), ("short_bias", _CONV[1][6:])):
            if f"{ours}mixer.{our_name}" in take:
                put[f"{theirs}mixer.{their_name}"] = self._rows(take[f"{ours}mixer.{our_name}"])
        if hyena.skip:
            put[f"{theirs}mixer.mixer.conv_bias"] = take[f"{ours}mixer.skip"]
        filter_ = f"{ours}mixer.filter."
        inner = f"{theirs}mixer.mixer.filter."
        match hyena.filter:
            case ExplicitFilterConfig() if not hyena.skip:
                h = take[f"{filter_}weight"].flip(-1)
                put[f"{theirs}mixer.mixer.short_conv.short_conv_weight"] = h if self.flat_taps else h[:, None]
            case ExplicitFilterConfig(taps=kept):
                h = take[f"{filter_}weight"]
                if self.folded:
                    put[f"{inner}h"] = h
                    return
                whole = self.random(len(h), max(SEQUENCE, 2 * kept))  # what lies beyond the cut does not count
                decay = 0.1 + torch.rand(whole.shape, generator=self.generator)
                whole[:, :kept] = h / decay[:, :kept]
                put[f"{inner}h"], put[f"{inner}decay"] = whole, decay
            case RealModalFilterConfig():
                log_poles = take[f"{filter_}log_poles"]
                gamma = self.random(*log_poles.shape)
                put[f"{inner}gamma"], put[f"{inner}p"] = gamma, torch.log(-log_poles) - gamma
                put[f"{inner}R"] = take[f"{filter_}residues"]
                put[f"{inner}t"] = torch.arange(SEQUENCE).float().view(1, 1, -1)
            case ComplexModalFilterConfig():
                poles, residues = (take[f"{filter_}{n}"].double() for n in ("poles", "residues"))
                self._continuous(inner, torch.view_as_complex(poles), torch.view_as_complex(residues))

    def _continuous(self, inner: str, poles: Tensor, residues: Tensor) -> None:
        """A, B, C and dt of a continuous system whose samples have these modes."""
        log_dt = self.random(len(poles)).double()
        dt = torch.exp(log_dt)[:, None]
        b = torch.complex(1 + self.random(*poles.shape).double() / 4, self.random(*poles.shape).double())
        if self.rule == "bilinear":
            half = (poles - 1) / (poles + 1)
            a, c, module = 2 * half / dt, residues * (1 - half) / (2 * b * dt), "kernel"
        else:
            a, c, module = torch.log(poles) / dt, residues / 2, "inner_cls"
        values = {
            "inv_A_real": torch.log(-a.real),
            "A_imag": a.imag,
            "log_dt": log_dt,
            "B": torch.view_as_real(b),
            "C": torch.view_as_real(c)[None],
        }
        self.tensors |= {f"{inner}{module}.{name}": value.float().contiguous() for name, value in values.items()}

    # --- settings ---

    def _settings(self, model: Model) -> dict[str, Any]:
        config, operators = model.config, []
        assert isinstance(config.norm, RMSNormConfig)
        settings: dict[str, Any] = {
            "pipe_parallel_size": 0,
            "model_parallel_size": 1,
            "make_vocab_size_divisible_by": 8,
            "num_layers": len(config.blocks),
            "hidden_size": config.hidden_size,
            "num_attention_heads": 4,
            "seq_length": SEQUENCE,
            "pos_emb": "rotary",
            "prenorm": True,
            "pre_mlp_norm": True,
            "no_weight_tying": not config.tie_embeddings,
            "norm": "rmsnorm",
            "rms_norm_epsilon": config.norm.eps,
            "mlp_type": "llama",
            "optimizer": {"type": "Adam", "params": {"lr": 0.0003, "betas": [0.9, 0.95]}},
            "tokenizer_type": "CharLevelTokenizer",
            "output_layer_parallelism": "column",
            "interleave_projections": self.interleaved,
        }
        for block in config.blocks:
            assert isinstance(block.mlp, GatedMLPConfig)
            match block.mixer:
                case AttentionConfig(num_heads=heads, rope=rope):
                    operators.append("flash_v2")
                    settings |= {"num_attention_heads": heads}
                    if rope is None:
                        settings["pos_emb"] = "none"
                    elif rope.scale != 1:
                        settings |= {"pos_emb": "rotary_linear_scaled", "rotary_emb_scaling_factor": rope.scale}
                    if rope is not None:
                        settings["rotary_emb_base"] = rope.base
                case HyenaConfig() as hyena:
                    operators.append(self._operator(settings, hyena, config.hidden_size))
        settings["operator-config"] = [[[operator], 1] for operator in operators]
        return settings

    def _operator(self, settings: dict[str, Any], hyena: HyenaConfig, channels: int) -> str:
        settings["short-conv-L"] = hyena.short_taps
        settings["use_fp8_input_projections"] = hyena.fp8_projection
        groups = getattr(hyena.filter, "groups", None) or channels
        match hyena.filter:
            case ExplicitFilterConfig(taps=taps) if not hyena.skip:
                settings |= {"hyena_se_len": taps, "num_groups_hyena_short": groups}
                return "hyena_se"
            case ExplicitFilterConfig(taps=taps):
                settings |= {"hyena_mr_len": taps, "num_groups_hyena_medium": groups}
                settings["hyena_medium_filter_cls"] = "explicit_single_decay"
                return "hyena_mr"
            case RealModalFilterConfig(modes=modes):
                settings |= {"hyena_filter_cls": "implicit_modal", "hyena_filter_order": modes}
            case ComplexModalFilterConfig(modes=modes):
                settings |= {"hyena_filter_cls": "implicit_complex_modal", "hyena_filter_order": 2 * modes}
        settings["num_groups_hyena"] = groups
        return "hyena"

    # --- files ---

    def shards(self, count: int) -> list[dict[str, Any]]:
        """The tensors cut among ``count`` ranks."""
        cut: list[dict[str, Any]] = [{} for _ in range(count)]
        for name, value in self.tensors.items():
            own = name.partition(".")[2]
            if not isinstance(value, Tensor) or any(word in own for word in _WHOLE):
                parts = [value] * count
            elif own.startswith(("mixer.dense.", "mlp.w3.")) or own.endswith("filter.inner_cls.C"):
                parts = list(value.chunk(count, dim=1))
            elif own in (*_ROWS, *_CONV) and not self.interleaved and not self._is_attention(name):
                thirds = [third.chunk(count) for third in value.chunk(3)]
                parts = [torch.cat([third[rank] for third in thirds]) for rank in range(count)]
            else:
                parts = list(value.chunk(count))
            for rank, part in enumerate(parts):
                cut[rank][name] = part
        return cut

    def _is_attention(self, name: str) -> bool:
        return f"{name.partition('.')[0]}.{_CONV[0]}" not in self.tensors


def stored(value: Any) -> Any:
    """A tensor in memory of its own, as what is saved is not a view."""
    return value.clone().contiguous() if isinstance(value, Tensor) else value


def write_layers(folder: Path, shards: list[dict[str, Any]]) -> None:
    """layer_XX-model_YY-model_states.pt, and a file of the rank that holds no weights."""
    for rank, shard in enumerate(shards):
        layers: dict[int, dict[str, Any]] = {}
        for name, value in shard.items():
            layer, _, own = name.partition(".")
            layers.setdefault(int(layer), OrderedDict())[own] = stored(value)
        for layer, values in layers.items():
            torch.save(values, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
        torch.save({"module": None, "iteration": 7}, folder / f"mp_rank_{rank:02d}_model_states.pt")


def write_ranks(folder: Path, shards: list[dict[str, Any]], prefix: str = "sequential.") -> None:
    """mp_rank_XX_model_states.pt with all that DeepSpeed and savanna put beside the weights."""
    for rank, shard in enumerate(shards):
        everything = {
            "module": OrderedDict((prefix + name, stored(value)) for name, value in shard.items()),
            "optimizer": None,
            "lr_scheduler": {"num_iters": 7, "max_lr": 3e-4},
            "dp_world_size": 1,
            "args": {"num_layers": 4, "tokenizer_type": "CharLevelTokenizer"},
            "random_rng_state": random.Random(0).getstate(),
            "torch_rng_state": torch.get_rng_state(),
        }
        torch.save(everything, folder / f"mp_rank_{rank:02d}_model_states.pt")


def write_flat(file: Path, tensors: Mapping[str, Any], prefix: str = "sequential.") -> None:
    """One file with every tensor, as on the Hub."""
    torch.save(OrderedDict((prefix + name, stored(value)) for name, value in tensors.items()), file)


def write_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """YAML that looks like JSON, with a comment and a comma at the end, as most files of savanna do."""
    file.parent.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in settings.items()]
    file.write_text("{\n  # a tiny model\n" + "\n".join(lines) + "\n}\n")


def extra_state(input_scale: float, weight_scale: float) -> io.BytesIO:
    """What Transformer Engine keeps of an FP8 layer: the scales of its input, its weight and its output."""
    scale = torch.tensor([input_scale, weight_scale, 1.0])
    file = io.BytesIO()
    torch.save({"scale_fwd": scale, "scale_inv_fwd": 1 / scale, "amax_history_fwd": torch.zeros(16, 3)}, file)
    return file
