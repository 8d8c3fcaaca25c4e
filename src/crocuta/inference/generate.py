"""Generation: the readable loop. Prefill and decoding are both ``extend``; a row is one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from crocuta.errors import InputError
from crocuta.inference.batches import TextOrIds, evaluating, pad_right, to_ids
from crocuta.inference.sampling import SamplingConfig, row_generators, sample, token_history
from crocuta.inference.stop import StopText
from crocuta.model.lm import Model
from crocuta.tokenizers.base import Tokenizer

FinishReason: TypeAlias = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one step added to one row: a token, the text that is now certain, and why the row ended, if it did.

    ``text`` may lag behind the tokens while they may be half of a character or of a stop string. ``log_prob`` is
    the token's under the model's own distribution, before temperature and filters.
    """

    row: int
    id: int
    log_prob: float
    text: str
    finish_reason: FinishReason | None


@dataclass
class Generation:
    """One finished sample: what was added to the prompt. Neither EOS nor the stop string is in ``text``."""

    prompt: int
    """Index of the prompt it continues."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[TextOrIds],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    samples: int = 1,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Generation]:
    """``samples`` continuations of each prompt; those of a prompt stand together. See ``stream``."""
    pieces = stream(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        samples=samples,
        seed=seed,
        seeds=seeds,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    results = [Generation(prompt=row // samples) for row in range(len(prompts) * samples)]
    for piece in pieces:
        result = results[piece.row]
        result.text += piece.text
        result.ids.append(piece.id)
        result.log_probs.append(piece.log_prob)
        result.finish_reason = piece.finish_reason
    return results


@torch.no_grad()
def stream(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[TextOrIds],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    samples: int = 1,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Iterator[Piece]:
    """Generate step by step; yields one ``Piece`` a live row and step. Row r continues prompt r // samples.

    Prompts (text or ids) may have different lengths: each is read once, and its samples start from copies of its
    state. Row r draws from its own generator, seeded ``seeds[r]``, or ``seed`` + r, so that neither its neighbours
    nor their number change it (but for rounding). A row ends at EOS, at a stop string or after ``max_tokens``,
    and then costs nothing any more.

    Raises:
        InputError: no prompts, an empty prompt, ids outside the vocabulary, stop strings without a tokenizer, or
            more tokens than the model's filters are defined for.
        NonFiniteError: logits that are no distribution.
    """
    rows = [to_ids(model, tokenizer, prompt, f"prompt {i}") for i, prompt in enumerate(_listed(prompts))]
    count = len(rows) * samples
    _check(model, tokenizer, rows, max_tokens, samples, stop, seeds)
    choice = sampling or SamplingConfig()
    seeds = [seed + row for row in range(count)] if seeds is None else seeds
    generators = None if choice.greedy else row_generators(seeds)
    device = next(model.parameters()).device
    eos = None if tokenizer is None or ignore_eos else tokenizer.eos_id
    texts = [StopText(tokenizer, stop) for _ in range(count)]
    history = token_history([rows[r // samples] for r in range(count)], model.config.vocab_size, device)

    with evaluating(model):
        state = model.init_state(len(rows), max(map(len, rows)) + max_tokens)
        ids, lengths = pad_right(rows)
        ragged = None if bool((lengths == lengths[0]).all()) else lengths
        hidden = model.extend_hidden(ids.to(device), state, ragged)
        last = hidden[torch.arange(len(rows)), lengths - 1]
        live = torch.arange(count)  # row numbers, in the order of the state's rows
        state = state.select(live // samples) if samples > 1 else state
        logits = model.logits(last[:, None])[:, 0][(live // samples).to(device)]
        for step in range(max_tokens):
            own = None if generators is None else [generators[row] for row in live.tolist()]
            drawn = sample(logits, choice, own, history)
            drawn_rows = zip(live.tolist(), drawn.ids.tolist(), drawn.log_probs.tolist())
            going = []
            for place, (row, token, log_prob) in enumerate(drawn_rows):
                text, reason = _read(texts[row], token, is_eos=token == eos, is_last=step == max_tokens - 1)
                if reason is None:
                    going.append(place)
                yield Piece(row, token, log_prob, text, reason)
            if not going:
                return
            if len(going) < len(live):
                kept = torch.tensor(going)
                live, state, history = live[kept], state.select(kept), history[kept.to(device)]
                next_ids = drawn.ids[kept.to(device)]
            else:
                next_ids = drawn.ids
            logits = model.extend(next_ids[:, None], state)[:, 0]


def _read(text: StopText, token: int, *, is_eos: bool, is_last: bool) -> tuple[str, FinishReason | None]:
    """The text that a token makes certain, and why its row ends with it, if it does."""
    if is_eos:
        return text.finish(), "eos"
    piece, stopped = text.feed(token)
    if stopped:
        return piece, "stop"
    return (piece + text.finish(), "length") if is_last else (piece, None)


def _listed(prompts: Sequence[TextOrIds]) -> Sequence[TextOrIds]:
    if isinstance(prompts, str | bytes | Tensor) or not len(prompts):
        raise InputError(
            "prompts must be a list with at least one prompt", given=type(prompts).__name__, fix="pass [prompt]"
        )
    return prompts


def _check(
    model: Model,
    tokenizer: Tokenizer | None,
    rows: list[Tensor],
    max_tokens: int,
    samples: int,
    stop: Sequence[str],
    seeds: Sequence[int] | None,
) -> None:
    for name, value in (("max_tokens", max_tokens), ("samples", samples)):
        if value < 1:
            raise InputError(f"{name} must be positive", given=value, expected=">= 1")
    if isinstance(stop, str) or not all(stop):
        raise InputError("stop must be a list of strings that are not empty", given=repr(stop))
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer", fix="pass one, or no stop strings")
    if seeds is not None and len(seeds) != len(rows) * samples:
        raise InputError("seeds must be one a row", given=len(seeds), expected=len(rows) * samples)
    longest, limit = max(map(len, rows)) + max_tokens, model.config.max_length
    if limit is not None and longest > limit:
        raise InputError(
            "prompt and new tokens are longer than the model's filters are defined for",
            given=f"{longest} tokens",
            expected=f"at most {limit}",
            fix="ask for fewer tokens",
        )
