"""From one position's logits to one token a row, by rules that treat every row on its own.

The order is fixed: repetition penalty, temperature, top-k, top-p, min-p, then one draw from what is left.
Each filter sees the result of the ones before it. A row's token depends on that row's logits, generator and
history only, bit for bit, so it does not change with the batch around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError
from crocuta.ops.kernels import decode
from crocuta.ops.kernels.library import available

_WIDE = torch.float64


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to draw a token; the default is the model's own distribution.

    Raises:
        InputError: for a value outside the range that its field states.
    """

    temperature: float = 1.0
    """>= 0. Logits are divided by it; 0 is greedy: the largest logit, the lowest id among equals."""
    top_k: int | None = None
    """>= 1. Keep the k most likely tokens; among equals the lower id is the more likely."""
    top_p: float | None = None
    """In (0, 1]. Keep the fewest most likely tokens whose probabilities reach it (Holtzman et al. 2020)."""
    min_p: float | None = None
    """In [0, 1]. Keep tokens at least this fraction as likely as the most likely (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """> 0. Logits of tokens in the history are divided by it if positive, else multiplied (CTRL, eq. 2)."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number >= 0")
        k = self.top_k
        whole = isinstance(k, int) and not isinstance(k, bool) and k >= 1
        _check("top_k", k, k is None or whole, "a whole number >= 1, or None")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "a number in (0, 1], or None")
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "a number in [0, 1], or None")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number > 0 (1 is none)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Sampled:
    """The tokens drawn, and what the model itself thought of them.

    ``log_probs`` is the fp32 log-softmax of the raw logits: before penalty, temperature and filters.
    """

    ids: Int[Tensor, " b"]
    log_probs: Float[Tensor, " b"]


def sample(
    logits: Float[Tensor, "b v"],
    config: SamplingConfig,
    generators: Sequence[torch.Generator] | None = None,
    history: Bool[Tensor, "b v"] | None = None,
    names: Sequence[int] | None = None,
) -> Sampled:
    """One token a row; softmax in fp32, the draw by inverse CDF in fp64.

    Args:
        logits: any floating dtype. -inf masks a token; NaN, +inf and a row of only -inf are errors.
        generators: one a row, each its own object; a call takes one number from each, whatever the filters.
            None is for greedy configs, which take none.
        history: the tokens that the repetition penalty applies to, from ``token_history``; the drawn tokens
            are added to it in place.
        names: what errors call the rows; by default their places.

    Raises:
        InputError: for shapes that do not agree, or generators that are missing or shared between rows.
        NonFiniteError: naming the rows whose logits are no distribution.
    """
    _check_arguments(logits, config, generators, history)
    plain = logits.dtype == torch.float32 and not logits.requires_grad and logits.is_contiguous()
    raw = logits if plain else logits.detach().float().contiguous()
    if raw.device.type == "cpu" and available() and (history is None or config.repetition_penalty == 1):
        return _sample_compiled(raw, config, generators, history, names)
    _require_distribution(raw, names)
    scores = raw
    if history is not None and config.repetition_penalty != 1:
        penalised = torch.where(raw > 0, raw / config.repetition_penalty, raw * config.repetition_penalty)
        scores = torch.where(history, penalised, raw)
        _require_distribution(scores, names)
    if config.greedy or generators is None:
        ids = scores.argmax(dim=-1)
    else:
        ids = _draw(_filtered(scores, config), generators)
    if history is not None:
        history.scatter_(1, ids[:, None], True)
    return Sampled(ids, torch.log_softmax(raw, dim=-1).gather(1, ids[:, None])[:, 0])


def _sample_compiled(
    raw: Float[Tensor, "b v"],
    config: SamplingConfig,
    generators: Sequence[torch.Generator] | None,
    history: Bool[Tensor, "b v"] | None,
    names: Sequence[int] | None,
) -> Sampled:
    """``sample`` in one call, which is several times faster for the few logits of a decoding step."""
    drawn = not config.greedy and generators is not None
    uniform = _uniform(generators).cpu() if drawn and generators else raw.new_zeros(raw.shape[0], dtype=_WIDE)
    ids, log_probs = decode.sample(
        raw,
        uniform,
        temperature=config.temperature if drawn else 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
    if min(ids.tolist(), default=0) < 0:
        _require_distribution(raw, names)
    if history is not None:
        history.scatter_(1, ids[:, None], True)
    return Sampled(ids, log_probs)


def token_history(
    prompts: Sequence[Int[Tensor, " l"]], vocab_size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "b v"]:
    """For each prompt, which tokens occur in it: the start of a ``history`` for ``sample``."""
    history = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(history, prompts, strict=True):
        row[prompt.to(device=device, dtype=torch.int64)] = True
    return history


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a seed, on the CPU, so that a seed means the same on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _filtered(scores: Float[Tensor, "b v"], config: SamplingConfig) -> Float[Tensor, "b v"]:
    """Unnormalised probabilities after temperature and filters; at least one a row is 1."""
    # The largest becomes 0 before the division, so that no temperature that fp32 can hold overflows.
    temperature = max(config.temperature, torch.finfo(torch.float32).tiny)
    scaled = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    weights = scaled.exp()
    vocab_size = scores.shape[-1]
    top_k = vocab_size if config.top_k is None else min(config.top_k, vocab_size)
    top_p = 1.0 if config.top_p is None else config.top_p
    if top_k < vocab_size or top_p < 1:
        largest = scaled.topk(top_k, dim=-1).values
        number = torch.full_like(largest[:, :1], top_k, dtype=torch.int64)
        if top_p < 1:
            mass = largest.exp().double()
            reached = mass.cumsum(dim=-1)
            number = (reached - mass < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True)
        weights = weights.where(_at_least(scaled, largest.gather(1, number - 1), number), 0)
    if config.min_p:
        weights = weights.where(scaled >= math.log(config.min_p), 0)
    return weights


def _at_least(
    scaled: Float[Tensor, "b v"], least: Float[Tensor, "b 1"], number: Int[Tensor, "b 1"]
) -> Bool[Tensor, "b v"]:
    """Where the ``number`` largest of a row are, ``least`` the smallest of them; equals go by the lower id."""
    above, equal = scaled > least, scaled == least
    return above | (equal & (equal.cumsum(dim=-1) <= number - above.sum(dim=-1, keepdim=True)))


def _draw(weights: Float[Tensor, "b v"], generators: Sequence[torch.Generator]) -> Int[Tensor, " b"]:
    """The first token whose cumulative weight exceeds u · total, u in [0, 1) from the row's generator."""
    uniform = _uniform(generators).to(weights.device)[:, None]
    cumulative = weights.double().cumsum(dim=-1)
    # The largest weight is 1 and u <= 1 - 2^-53, so u · total rounds to less than the total.
    target = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _uniform(generators: Sequence[torch.Generator]) -> Float[Tensor, " b"]:
    """One number of [0, 1) from each."""
    drawn = [torch.rand(1, generator=g, dtype=_WIDE, device=g.device) for g in generators]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def _require_distribution(logits: Float[Tensor, "b v"], names: Sequence[int] | None) -> None:
    # The largest of a row is NaN if any is, +inf if any is, and -inf only if all are.
    largest = logits.amax(dim=-1)
    finite = largest.isfinite()
    if not finite.all():
        rows = (~finite).nonzero()[:, 0].tolist()
        named = range(len(logits)) if names is None else names
        found = ", ".join(f"{largest[row].item()} in row {named[row]}" for row in rows[:4])
        more = f" and {len(rows) - 4} more rows" if len(rows) > 4 else ""
        raise NonFiniteError(
            "logits to sample from are no distribution",
            given=f"a largest logit of {found}{more}",
            expected="no NaN, no +inf and at least one finite logit a row",
            fix="check the weights and the precision",
        )


def _check_arguments(
    logits: Tensor,
    config: SamplingConfig,
    generators: Sequence[torch.Generator] | None,
    history: Tensor | None,
) -> None:
    if logits.ndim != 2 or logits.shape[-1] == 0 or not logits.is_floating_point():
        given = f"{logits.dtype} of shape {list(logits.shape)}"
        raise InputError("cannot sample from these logits", given=given, expected="floats of shape [b v], v >= 1")
    if history is not None and (history.shape != logits.shape or history.dtype != torch.bool):
        given = f"{history.dtype} of shape {list(history.shape)}"
        raise InputError("history does not fit the logits", given=given, expected=f"bool {list(logits.shape)}")
    if generators is None:
        if not config.greedy:
            fix = "pass row_generators(seeds), or temperature=0 for greedy"
            raise InputError("drawing needs generators", given=f"None, temperature={config.temperature}", fix=fix)
    elif not len({id(g) for g in generators}) == len(generators) == logits.shape[0]:
        given = f"{len(generators)} generators, {len({id(g) for g in generators})} distinct"
        raise InputError("each row needs its own generator", given=given, expected=f"{len(logits)} distinct ones")


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"SamplingConfig.{name} is out of range", given=value, expected=expected)
