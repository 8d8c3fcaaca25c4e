"""Hugging Face's transformers: Llama with torch's fused attention, and Mamba-2, of the size of our models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from suite.steps import step_task
from suite.task import Settings, Task, Tensors

_OUR_NAMES = {
    "self_attn.o_proj.weight": "mixer.output.weight",
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
    "input_layernorm.weight": "pre_norm.scale",
    "post_attention_layernorm.weight": "post_norm.scale",
}


def llama(inputs: Tensors, sizes: Settings) -> LlamaForCausalLM:
    """Llama with the weights of our Transformer (the group "other"): RoPE, RMSNorm, SiLU gated MLP, tied head."""
    hidden = sizes["hidden"]
    heads = max(1, hidden // 64)
    width = inputs["other.blocks.0.mlp.gate.weight"].shape[0]
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=heads,
        max_position_embeddings=max(sizes["length"], 64),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_llama_weight(name, inputs))
    return model


def _llama_weight(name: str, inputs: Tensors) -> Tensor:
    match name.removeprefix("model.").split(".", 2):
        case ["embed_tokens", _]:
            return inputs["other.embedding.weight"]
        case ["norm", _]:
            return inputs["other.norm.scale"]
        case ["layers", number, rest] if rest.startswith("self_attn.") and rest != "self_attn.o_proj.weight":
            thirds = inputs[f"other.blocks.{number}.mixer.qkv.weight"].chunk(3)
            return thirds[("q_proj", "k_proj", "v_proj").index(rest.split(".")[1])]
        case ["layers", number, rest]:
            return inputs[f"other.blocks.{number}.{_OUR_NAMES[rest]}"]
        case _:
            raise KeyError(f"no weight of ours is {name}")


def llama_training_step(inputs: Tensors, sizes: Settings) -> Task:
    return _training_step(llama(inputs, sizes), inputs)


def llama_forward(inputs: Tensors, sizes: Settings) -> Task:
    """Logits of every token."""
    model, ids = llama(inputs, sizes).eval(), inputs["ids"]

    @torch.no_grad()
    def run() -> Tensor:
        return model(input_ids=ids).logits

    return Task(run, lambda: {"logits": run()})


def mamba(sizes: Settings) -> Mamba2ForCausalLM:
    """Mamba-2 with as many parameters as our blocks: two of its layers weigh about as much as one of ours.

    On a CPU transformers runs it by its own torch code, the only one it has there.
    """
    hidden = sizes["hidden"]
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=sizes["vocabulary"],
        hidden_size=hidden,
        num_hidden_layers=2 * sizes["layers"],
        expand=2,
        head_dim=64,
        num_heads=2 * hidden // 64,
        n_groups=1,
        state_size=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Mamba2ForCausalLM(config)


def mamba_training_step(inputs: Tensors, sizes: Settings) -> Task:
    model = mamba(sizes)
    return _training_step(model.double() if sizes.get("dtype") == "float64" else model, inputs)


def _training_step(model: nn.Module, inputs: Tensors) -> Task:
    """The step that ours does; its gradients have other names, so the loss alone is judged."""
    model.train()
    ids, targets = inputs["ids"], inputs["targets"]
    step = step_task(
        model,
        lambda: F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten()),
        str,
        lambda _, gradient: gradient,
    )
    return Task(step.run, lambda: {"loss": step.answers()["loss"]})
