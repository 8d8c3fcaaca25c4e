"""The package ``stripedhyena`` 0.2.2: its filter, its engine, its model and its decoding, on a CPU as they are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from suite.peers.flash_attention import standing_in
from suite.steps import operator_training, rows_of, step_task
from suite.task import Settings, Task, Tensors

with standing_in():
    from stripedhyena.cache import RecurrentInferenceParams
    from stripedhyena.generation import Generator
    from stripedhyena.model import ParallelHyenaFilter, StripedHyena
    from stripedhyena.sample import sample
    from stripedhyena.utils import dotdict


class Operator:
    """Modal filter and gates of the package, with gates of ones: u [1 d l] -> y [1 d l], and the state.

    The gates' three multiplications stay in its time.
    """

    def __init__(self, inputs: Tensors, sizes: Settings) -> None:
        d = sizes["channels"]
        self.filter = ParallelHyenaFilter(filter_settings(d, sizes["modes"]), 0)
        self.filter.poles = nn.Parameter(inputs["poles"][:, :, None].clone())
        self.filter.residues = nn.Parameter(inputs["residues"][:, :, None].clone())
        self.filter.D = nn.Parameter(inputs["skip"].clone())
        self.u = inputs["u"].transpose(1, 2).contiguous()
        self.ones = torch.ones_like(self.u)
        self.dims = (d, 1, d, sizes["modes"], 1)

    def __call__(self, z: Tensor, cache: RecurrentInferenceParams | None = None) -> Tensor:
        """z = [ones | u | ones] [1 3d l] -> y [1 l d]."""
        filter_, length = self.filter, z.shape[-1]
        h = filter_.compute_filter(length, z.device)[0]
        return filter_.engine.parallel_iir(
            z, h, filter_.D, length, filter_.poles, filter_.residues, filter_.t, self.dims, 0, cache
        )


def filter_settings(hidden: int, modes: int) -> dotdict:
    """Thirds of channels, because the package's other order would cost it three copies more."""
    return dotdict(
        hidden_size=hidden,
        num_filters=hidden,
        num_attention_heads=1,
        short_filter_length=3,
        short_filter_bias=True,
        state_size=modes,
        hyena_filter_groups=1,
        column_split_hyena=False,
        use_flashfft=False,
    )


def modal_prefill(inputs: Tensors, sizes: Settings) -> Task:
    """The filter from its poles, the convolution, and the state by the engine's modal FFT."""
    operator = Operator(inputs, sizes)
    z = torch.cat([operator.ones, operator.u, operator.ones], 1)

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor]:
        cache = RecurrentInferenceParams()
        y = operator(z, cache)
        return y, torch.view_as_real(cache.state_dict[0])

    return Task(run, lambda: dict(zip(("y", "state"), run(), strict=True)))


def cached_filter(inputs: Tensors, sizes: Settings) -> Task:
    """The best case of the formulation: taps made beforehand, no state, no gates, and u already channels-first.

    y = irfft(fft(u, 2l)[.. l+1] · rfft(h, 2l) / 2l) + D u
    """
    operator = Operator(inputs, sizes)
    u, skip, size = operator.u, operator.filter.D[:, None], 2 * operator.u.shape[-1]
    with torch.no_grad():
        h = operator.filter.compute_filter(u.shape[-1], u.device)[0]

    @torch.no_grad()
    def run() -> Tensor:
        spectrum = torch.fft.rfft(h, n=size) / size
        seen = torch.fft.fft(u, n=size)[..., : spectrum.shape[-1]]
        return torch.fft.irfft(seen * spectrum, n=size, norm="forward")[..., : u.shape[-1]] + u * skip

    return Task(run, lambda: {"y": run().transpose(1, 2)})


def modal_training(inputs: Tensors, sizes: Settings) -> Task:
    """Forward and backward through the package by autograd; it has no training code of its own."""
    operator = Operator(inputs, sizes)
    filter_ = operator.filter
    leaves = {"u": operator.u, "poles": filter_.poles, "residues": filter_.residues, "skip": filter_.D}

    def forward() -> Tensor:
        return operator(torch.cat([operator.ones, leaves["u"], operator.ones], 1))

    layouts = {"u": lambda grad: grad.transpose(1, 2), "poles": _modes, "residues": _modes}
    return operator_training(forward, leaves, inputs["dy"], layouts)


def _modes(grad: Tensor) -> Tensor:
    return grad[:, :, 0]


# --- whole models ---

OUR_NAMES = {
    "pre_norm.scale": "pre_norm.scale",
    "post_norm.scale": "post_norm.scale",
    "projections.weight": "mixer.projection.weight",
    "projections.bias": "mixer.projection.bias",
    "filter.short_filter_weight": "mixer.short_taps",
    "filter.short_filter_bias": "mixer.short_bias",
    "filter.poles": "mixer.filter.poles",
    "filter.residues": "mixer.filter.residues",
    "filter.D": "mixer.skip",
    "out_filter_dense.weight": "mixer.output.weight",
    "out_filter_dense.bias": "mixer.output.bias",
    "inner_mha_cls.Wqkv.weight": "mixer.qkv.weight",
    "inner_mha_cls.Wqkv.bias": "mixer.qkv.bias",
    "inner_mha_cls.out_proj.weight": "mixer.output.weight",
    "inner_mha_cls.out_proj.bias": "mixer.output.bias",
    "mlp.l1.weight": "mlp.gate.weight",
    "mlp.l2.weight": "mlp.up.weight",
    "mlp.l3.weight": "mlp.down.weight",
}
"""The package's parameter of a block and ours."""


def our_name(name: str) -> str:
    """Ours for a parameter of the package's model."""
    match name.split(".", 2):
        case ["blocks", number, rest]:
            return f"blocks.{number}.{OUR_NAMES[rest]}"
        case ["embedding_layer", _]:
            return "embedding.weight"
        case _:
            return name


def our_layout(name: str, tensor: Tensor) -> Tensor:
    """A tensor of theirs as we hold it; ``their_layout`` is the inverse."""
    if name.endswith("short_filter_weight"):
        return tensor[:, 0].flip(1)
    return tensor[:, :, 0] if name.endswith(("poles", "residues")) else tensor


def their_layout(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("short_filter_weight"):
        return tensor.flip(1)[:, None]
    return tensor[:, :, None] if name.endswith(("poles", "residues")) else tensor


def heads_of(hidden: int) -> int:
    """Attention heads of 64 channels."""
    return max(1, hidden // 64)


def model_settings(sizes: Settings) -> dotdict:
    """Tied embeddings, all in float32; attention in the layers that the case names."""
    attention = sizes.get("attention", [])
    settings = filter_settings(sizes["hidden"], sizes["modes"])
    settings |= dict(
        vocab_size=sizes["vocabulary"],
        num_layers=sizes["layers"],
        num_attention_heads=heads_of(sizes["hidden"]),
        attn_layer_idxs=attention,
        hyena_layer_idxs=[layer for layer in range(sizes["layers"]) if layer not in attention],
        attn_block_dtype=torch.float32,
        eps=1e-6,
        params_dtype=torch.float32,
        mlp_dtype=torch.float32,
        model_parallel_size=1,
        tie_embeddings=True,
    )
    return dotdict(settings)


def model_of(inputs: Tensors, sizes: Settings) -> StripedHyena:
    """The package's model with our weights."""
    model = StripedHyena(model_settings(sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(their_layout(name, inputs[f"{sizes.get('group', 'weights')}.{our_name(name)}"]))
    if sizes.get("dtype") == "bfloat16":
        model.to_bfloat16_except_poles_residues()
    return model


def prefill(inputs: Tensors, sizes: Settings) -> Task:
    """Logits of every token, and the state by the engine's modal FFT."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.no_grad()
    def run() -> Tensor:
        return model(ids, inference_params_dict=model.initialize_inference_params())[0]

    return Task(run, lambda: {"logits": run()})


def forward(inputs: Tensors, sizes: Settings) -> Task:
    """Logits of every token, without a state."""
    model, ids = model_of(inputs, sizes).eval(), inputs["ids"]

    @torch.no_grad()
    def run() -> Tensor:
        return model(ids)[0]

    return Task(run, lambda: {"logits": run()})


def training_step(inputs: Tensors, sizes: Settings) -> Task:
    """The step that ours does, with autograd through the package's stateless forward."""
    model, ids, targets = model_of(inputs, sizes).train(), inputs["ids"], inputs["targets"]
    return step_task(model, lambda: cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten()), our_name, our_layout)


def score(inputs: Tensors, sizes: Settings) -> Task:
    """One sequence after the other: the package's batches want sequences of one length."""
    model, rows = model_of(inputs, sizes).eval(), rows_of(inputs)

    @torch.no_grad()
    def run() -> Tensor:
        means = []
        for row in rows:
            log_probs = model(row[None, :-1])[0][0].log_softmax(-1)
            means.append(log_probs.gather(1, row[1:, None]).mean())
        return torch.stack(means)

    return Task(run, lambda: {"mean": run()}, units=len(rows))


def embed(inputs: Tensors, sizes: Settings) -> Task:
    """The mean of the hidden states after the final norm, sequence by sequence; the head is left out."""
    model, rows = model_of(inputs, sizes).eval(), rows_of(inputs)

    @torch.no_grad()
    def run() -> Tensor:
        hidden = [model.norm(model.stateless_forward(model.embedding_layer.embed(row[None]))[0]) for row in rows]
        return torch.stack([states[0].mean(0) for states in hidden])

    return Task(run, lambda: {"embedding": run()}, units=len(rows))


# --- generation and loading ---


def decode(inputs: Tensors, sizes: Settings) -> Task:
    """The loop of the package's generation: model, then its ``sample``, a token at a time; a unit is a token."""
    model, prompt, count = model_of(inputs, sizes).eval(), sizes["prompt"], sizes["length"] - sizes["prompt"]

    @torch.no_grad()
    def read() -> tuple[dict[str, Any], Tensor]:
        cache = model.initialize_inference_params()
        logits, cache = model(inputs["ids"][:, :prompt], inference_params_dict=cache)
        return cache, logits[:, -1].argmax(-1)

    cache, start = read()

    @torch.no_grad()
    def run() -> None:
        ids = start
        for _ in range(count):
            logits, _unused = model(ids[:, None], inference_params_dict=cache)
            ids = sample(logits[:, -1], top_k=50, top_p=0.7, temperature=1)

    @torch.no_grad()
    def answers() -> Tensors:
        fresh, _ = read()
        tokens = inputs["ids"][:, prompt:].unbind(1)
        told = [model(ids[:, None], inference_params_dict=fresh)[0][:, -1] for ids in tokens]
        return {"logits": torch.stack(told, 1).float()}

    return Task(run, answers, units=count)


def generate(inputs: Tensors, sizes: Settings) -> Task:
    """The package's ``Generator`` with its cache, from prompt to last token; a unit is a token."""
    model, prompt = model_of(inputs, sizes).eval(), inputs["ids"][:, : sizes["prompt"]]
    tokenizer = SimpleNamespace(eos=0, vocab_size=sizes["vocabulary"])

    def continued(tokens: int, top_k: int) -> Tensor:
        generator = Generator(model, tokenizer, top_k=top_k, top_p=0.7, temperature=1)
        choices = {"cached_generation": True, "print_generation": False, "stop_at_eos": False}
        return generator.generate("cpu", input_ids=prompt, num_tokens=tokens, **choices)[0][0]

    return Task(lambda: continued(sizes["tokens"], 50), lambda: {"greedy": continued(32, 1)}, units=sizes["tokens"])


def load(inputs: Tensors, sizes: Settings) -> Task:
    """As the package's own script does: build the model, ``torch.load``, ``load_state_dict(strict=False)``."""
    path = Path("checkpoint.pt").resolve()
    torch.save(model_of(inputs, sizes).state_dict(), path)
    settings = model_settings(sizes)

    def run() -> StripedHyena:
        model = StripedHyena(settings)
        model.load_state_dict(torch.load(path, map_location="cpu"), strict=False)
        return model

    @torch.no_grad()
    def answers() -> Tensors:
        return {"logits": run()(inputs["ids"])[0]}

    return Task(run, answers)
