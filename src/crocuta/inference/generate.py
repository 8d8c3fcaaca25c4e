"""Generation: the readable loop. Prefill and decoding are both ``extend``; a row is one sequence.

A long text is made in turns, which any process may take up again:

    first = crocuta.generate(model, tokenizer, [prompt], max_tokens=1000, keep_state=True)[0]
    first.prefix.save("text.safetensors")
    prefix = crocuta.load_prefix(model, "text.safetensors")
    second = crocuta.generate(model, tokenizer, [prefix], max_tokens=1000, keep_state=True)[0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from crocuta.errors import InputError, NonFiniteError
from crocuta.inference.batches import TextOrIds, evaluating, to_ids
from crocuta.inference.prefix import Prefix, check_prefix, first_fault, generator_of, growing_room, read_rows
from crocuta.inference.sampling import Sampled, SamplingConfig, row_generators, sample
from crocuta.inference.stop import StopText
from crocuta.model.lm import Model
from crocuta.model.memory import Size
from crocuta.model.state import ModelState
from crocuta.model.step import Stepper, rejects_model
from crocuta.ops.kernels.decode import Weights
from crocuta.tokenizers.base import Tokenizer

_LEAST = 8
"""Tokens from which it pays to write the model's program: that takes as long as 1 to 4 tokens save."""

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
    prefix: Prefix | None = None
    """With ``keep_state``, of the last piece of a row: all that was read and generated, to go on from."""


@dataclass
class Generation:
    """One finished sample: what was added to the prompt. Neither EOS nor the stop string is in ``text``."""

    prompt: int
    """Index of the prompt it continues."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prefix: Prefix | None = None
    """With ``keep_state``: prompt and sample, to go on from."""


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[TextOrIds | Prefix],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    samples: int = 1,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    keep_state: bool = False,
    max_memory: Size | None = None,
    weights: Weights = "float32",
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
        keep_state=keep_state,
        max_memory=max_memory,
        weights=weights,
    )
    results = [Generation(prompt=row // samples) for row in range(len(_listed(prompts)) * samples)]
    for piece in pieces:
        result = results[piece.row]
        result.text += piece.text
        result.ids.append(piece.id)
        result.log_probs.append(piece.log_prob)
        result.finish_reason = piece.finish_reason
        result.prefix = piece.prefix
    return results


@torch.inference_mode()
def stream(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[TextOrIds | Prefix],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
    samples: int = 1,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    keep_state: bool = False,
    max_memory: Size | None = None,
    weights: Weights = "float32",
) -> Iterator[Piece]:
    """Generate step by step; yields one ``Piece`` a live row and step. Row r continues prompt r // samples.

    Prompts (text, ids, or prefixes, which are left as they are) may have different lengths, of any size: each is read
    once, in chunks, and its samples start from copies of its state. Row r draws from its own generator, seeded
    ``seeds[r]``, or ``seed`` (0) + r, so that neither its neighbours nor their number change it (but for rounding).
    A row ends at EOS, at a stop string or after ``max_tokens``, and then costs nothing any more.

    With ``keep_state`` the last piece of each row has a ``Prefix`` of its text with all that was generated. A row that
    continues one alone (``samples=1``) and without a seed draws on where that one stopped: the tokens are those of a
    generation that was never interrupted. Stop strings are looked for in the new text only. ``max_memory``: bytes, or
    text such as "2GiB", that reading the prompts may take beyond the loaded model, states included.

    On a CPU tokens are decoded by compiled code where that is possible. ``weights`` "bfloat16" or "int8" make it read
    narrow copies of the matrices, a half or a quarter of their size, packed for this call: faster for long texts, and
    less exact (``Stepper.log_probs`` tells by how much). Prompts are read with the model's own.

    Raises:
        InputError: no prompts, an empty prompt, ids outside the vocabulary, stop strings without a tokenizer, or
            more tokens than the model's filters are defined for.
        StateError: a prefix of another model.
        NonFiniteError: logits that are no distribution, naming the rows and the part of the state where it began.
        KernelUnavailableError: narrow weights for a model, or on a machine, that cannot use them.
    """
    begun = [_begun(model, tokenizer, prompt, f"prompt {i}") for i, prompt in enumerate(_listed(prompts))]
    count, longest = len(begun) * samples, max(map(_length, begun))
    _check(model, tokenizer, longest, max_tokens, (len(begun), samples), stop, seeds)
    choice = sampling or SamplingConfig()
    generators = None if choice.greedy else _generators(begun, samples, seed, seeds)
    eos = None if tokenizer is None or ignore_eos else tokenizer.eos_id
    texts = [StopText(tokenizer, stop) for _ in range(count)]

    with evaluating(model):
        step = decoder(model, max_tokens, weights)
        room = longest + max_tokens
        rows = read_rows(model, begun, growing_room(model, room) if keep_state else room, max_memory)
        live = list(range(count))  # row numbers, in the order of the state's rows
        if samples > 1:
            rows = rows.select([row // samples for row in live])
        for number in range(max_tokens):
            own = None if generators is None else [generators[row] for row in live]
            drawn = _drawn(rows, choice, own, live)
            going = []
            for place, (row, token, log_prob) in enumerate(zip(live, drawn.ids.tolist(), drawn.log_probs.tolist())):
                text, reason = _read(texts[row], token, is_eos=token == eos, is_last=number == max_tokens - 1)
                if reason is None:
                    going.append(place)
                kept = None
                if reason is not None and keep_state:
                    kept = _ended(model, rows, place, drawn.ids, None if own is None else own[place])
                yield Piece(row, token, log_prob, text, reason, kept)
            if not going:
                return
            next_ids = drawn.ids
            if len(going) < len(live):
                live, rows = [live[place] for place in going], rows.select(going)
                next_ids = next_ids[torch.tensor(going, device=next_ids.device)]
            rows.logits = step(next_ids, rows.state)


def decoder(model: Model, tokens: int, weights: Weights = "float32") -> Callable[[Tensor, ModelState], Tensor]:
    """What reads the next token of each row, (ids [b], state) -> logits [b v], so many times: compiled if it can be.

    Raises KernelUnavailableError where narrow weights are asked for and cannot be used.
    """
    if weights != "float32" or (tokens >= _LEAST and rejects_model(model) is None):
        return Stepper(model, weights).step
    return lambda ids, state: model.extend(ids[:, None], state)[:, 0]


def _begun(model: Model, tokenizer: Tokenizer | None, prompt: TextOrIds | Prefix, name: str) -> Tensor | Prefix:
    if not isinstance(prompt, Prefix):
        return to_ids(model, tokenizer, prompt, name)
    check_prefix(model, prompt, name)
    return prompt


def _length(prompt: Tensor | Prefix) -> int:
    return prompt.length if isinstance(prompt, Prefix) else len(prompt)


def _generators(
    prompts: Sequence[Tensor | Prefix], samples: int, seed: int | None, seeds: Sequence[int] | None
) -> list[torch.Generator]:
    """One generator a row: of its seed, or the one that its prefix was generated with."""
    count = len(prompts) * samples
    made = row_generators([(seed or 0) + row for row in range(count)] if seeds is None else seeds)
    if samples > 1 or seed is not None or seeds is not None:
        return made
    kept = [generator_of(prompt) if isinstance(prompt, Prefix) else None for prompt in prompts]
    return [fresh if old is None else old for fresh, old in zip(made, kept, strict=True)]


def _drawn(
    rows: Prefix, choice: SamplingConfig, generators: Sequence[torch.Generator] | None, names: Sequence[int]
) -> Sampled:
    """``sample``, and for logits that are no distribution an error that says where in the model it began."""
    try:
        return sample(rows.logits, choice, generators, rows.seen, names)
    except NonFiniteError as error:
        fault = first_fault(rows.state, names)
        raise NonFiniteError(error.what, given=error.given, expected=error.expected, fix=fault) from None


def _ended(model: Model, rows: Prefix, place: int, ids: Tensor, generator: torch.Generator | None) -> Prefix:
    """The prefix that a row leaves behind: the last token is read, too. Of tensors that any mode may write to."""
    with torch.inference_mode(False), torch.no_grad():
        row = rows.select([place])
        row.logits = model.extend(ids[place : place + 1, None].clone(), row.state)[:, 0]
        row.generator = None if generator is None else generator.get_state()[None]
        return row


def _read(text: StopText, token: int, *, is_eos: bool, is_last: bool) -> tuple[str, FinishReason | None]:
    """The text that a token makes certain, and why its row ends with it, if it does."""
    if is_eos:
        return text.finish(), "eos"
    piece, stopped = text.feed(token)
    if stopped:
        return piece, "stop"
    return (piece + text.finish(), "length") if is_last else (piece, None)


def _listed(prompts: Sequence[TextOrIds | Prefix]) -> Sequence[TextOrIds | Prefix]:
    if isinstance(prompts, str | bytes | Tensor | Prefix) or not len(prompts):
        raise InputError(
            "prompts must be a list with at least one prompt", given=type(prompts).__name__, fix="pass [prompt]"
        )
    return prompts


def _check(
    model: Model,
    tokenizer: Tokenizer | None,
    longest: int,
    max_tokens: int,
    rows: tuple[int, int],
    stop: Sequence[str],
    seeds: Sequence[int] | None,
) -> None:
    for name, value in (("max_tokens", max_tokens), ("samples", rows[1])):
        if value < 1:
            raise InputError(f"{name} must be positive", given=value, expected=">= 1")
    if isinstance(stop, str) or not all(stop):
        raise InputError("stop must be a list of strings that are not empty", given=repr(stop))
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer", fix="pass one, or no stop strings")
    if seeds is not None and len(seeds) != rows[0] * rows[1]:
        raise InputError("seeds must be one a row", given=len(seeds), expected=rows[0] * rows[1])
    limit = model.config.max_length
    if limit is not None and longest + max_tokens > limit:
        raise InputError(
            "prompt and new tokens are longer than the model's filters are defined for",
            given=f"{longest + max_tokens} tokens",
            expected=f"at most {limit}",
            fix="ask for fewer tokens",
        )
