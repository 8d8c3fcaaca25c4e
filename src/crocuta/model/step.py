"""Decoding by one native call a token: the whole model as one program, on the state that ``extend`` uses.

``Stepper(model).step(ids, state)`` is ``model.extend(ids[:, None], state)[:, 0]``, but for rounding. Weights are read
where the model has them, or packed in bfloat16 or 8 bits beside them; the program is written anew when a parameter
changes. What has no native form (a mixer of another kind than Hyena's and attention) is left to its own ``extend``: the
program is cut there. States may be read by ``extend``, saved, joined and selected between steps as ever.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.config import AttentionConfig, ModelConfig, RMSNormConfig
from crocuta.errors import InputError, KernelUnavailableError, StateError
from crocuta.model import precision
from crocuta.model.attention import AttentionMixer, Rope
from crocuta.model.backbone import check_ids
from crocuta.model.block import Block
from crocuta.model.filters import ExplicitFilter, ModalFilter
from crocuta.model.fp8 import FP8Linear
from crocuta.model.hyena import HyenaMixer
from crocuta.model.lm import Model
from crocuta.model.lora import lora_layers
from crocuta.model.mixer import Mixer
from crocuta.model.mlp import GatedMLP
from crocuta.model.norm import LayerNorm, RMSNorm
from crocuta.model.state import AttentionState, FIRState, HyenaState, ModelState, OnlineState, State
from crocuta.ops import modal
from crocuta.ops.kernels.decode import (
    LARGEST_HEAD,
    LONGEST_SUM,
    Addresses,
    Buffer,
    Finish,
    Program,
    Weights,
)
from crocuta.ops.kernels.library import library, why_not
from crocuta.ops.kernels.norm import Norm
from crocuta.ops.kernels.online_conv import Bound, bound
from crocuta.ops.online_conv import BLOCK
from crocuta.ops.rope import inverse_frequencies

_LOOK = 64
"""Steps of one state after which it is looked whether parameters were replaced: that takes as long as a small model's
step. Whether they were changed in place is asked at every step."""


def rejects(config: ModelConfig, weights: Weights = "float32") -> str | None:
    """Why a model of this configuration cannot be decoded by a ``Stepper`` here, or None if it can."""
    if weights not in ("float32", "bfloat16", "int8"):
        return f"weights={weights!r} is none of float32, bfloat16 and int8"
    if library() is None:
        return why_not()
    if not config.causal:
        return "a model that looks ahead cannot generate"
    if weights == "int8" and (widest := _widest_sum(config)) > LONGEST_SUM:
        return f"a product over {widest} inputs does not fit 32-bit sums of 8-bit products: at most {LONGEST_SUM}"
    for index, block in enumerate(config.blocks):
        match block.mixer:
            case AttentionConfig(num_heads=heads, rope=rope):
                if rope is not None and config.hidden_size // heads > LARGEST_HEAD:
                    return f"block {index}: heads of {config.hidden_size // heads} channels: at most {LARGEST_HEAD}"
    return None


def rejects_model(model: Model, weights: Weights = "float32") -> str | None:
    """The same for this very model: what it is made of, and where."""
    reason = rejects(model.config, weights)
    if reason is not None:
        return reason
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "the model is not on the CPU"
    if any(p.is_inference() for p in model.parameters()):
        return "parameters made in torch.inference_mode do not count their changes"
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(("crocuta.", "torch.nn.modules.")):
            return f"{name} was replaced: {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has forward hooks, which would not be called"
    dtype = model.norm.scale.dtype
    if dtype not in (torch.float32, torch.float64):
        return f"the model is {dtype}: load it in float32, and ask for narrow weights here"
    if dtype == torch.float64 and weights != "float32":
        return f"{weights} weights of a float64 model"
    adapted = lora_layers(model)
    return f"{next(iter(adapted))} has an adapter, which must be merged first" if adapted else None


def _widest_sum(config: ModelConfig) -> int:
    return max([config.hidden_size, *(b.mlp.intermediate_size for b in config.blocks if b.mlp is not None)])


@dataclass(frozen=True)
class _Place:
    """Where a state tensor is that the program uses: an attribute of a layer's state, or of a part of that."""

    layer: int | None
    """None: the model's own."""
    part: str | None
    name: str

    def owner(self, state: ModelState) -> Any:
        if self.layer is None:
            return state
        layer = state.layers[self.layer]
        return layer if self.part is None else getattr(layer, self.part)

    @property
    def look(self) -> tuple[int, Callable[[Any], Any]]:
        """Which of [*state.layers, state] has it, and what reads it there."""
        path = self.name if self.part is None else f"{self.part}.{self.name}"
        return -1 if self.layer is None else self.layer, operator.attrgetter(path)


_Left = Callable[[State, list[Tensor]], None]
"""What is left to Python: reads and writes buffers, moves on the state of its layer."""


class Stepper:
    """Decodes ``model``, one token of each row a call; see the module.

    ``weights``: "float32" (the model's own, also float64), "bfloat16" or "int8", packed copies which halve and quarter
    what is read for a token, and cost accuracy in the products alone: norms, filters, states and attention are as ever.
    Dropout is not applied. One ``Stepper`` serves one thread at a time. Raises KernelUnavailableError, with the reason,
    for a model that it cannot decode.
    """

    def __init__(self, model: Model, weights: Weights = "float32") -> None:
        reason = rejects_model(model, weights)
        if reason is not None:
            raise KernelUnavailableError("this model cannot be decoded natively", given=reason, fix="use model.extend")
        self.model = model
        self.weights: Weights = weights
        self._limit = model.config.max_length
        self._steps = 0
        self._last: Callable[[], ModelState | None] = lambda: None
        self._program = Program(model.norm.scale.dtype, weights)
        self._places: list[_Place] = []
        self._looks: list[tuple[int, Callable[[Any], Any]]] = []
        self._cuts: list[tuple[int, _Left, int]] = []
        self._seen: list[Callable[[], Tensor | None]] = []
        self._state_addresses = Addresses([])
        self._online: list[Bound] = []
        self._buffers: list[Tensor] = []
        self._buffer_addresses = Addresses([])
        self._rows = 0
        self._write()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, beside the model's own."""
        return self._program.nbytes

    def step(self, ids: Int[Tensor, " b"], state: ModelState) -> Float[Tensor, "b v"]:
        """Logits after the next token of each row; ``state`` is moved on in place. No gradients.

        Raises InputError for bad ids, StateError for another model's state, another batch or a row that outgrows it.
        """
        self._check(ids, state)
        if self._has_changed(state):
            self._write()
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            ids = ids.to(torch.int64).contiguous()
        rows = ids.shape[0]
        states, buffers = self._bound(state), self._memory(rows)
        if self._online:
            for start in state.lengths.tolist():
                if start % BLOCK == 0:
                    self._begin_block(start)
        logits = torch.empty(rows, self.model.config.vocab_size, dtype=self._program.dtype)
        first = 0
        for last, left, layer in self._cuts:
            self._run(first, last, self._buffer_addresses.address, states, ids, logits)
            with torch.no_grad():
                left(state.layers[layer], buffers)
            first = last
        self._run(first, len(self._program), self._buffer_addresses.address, states, ids, logits)
        return logits

    def log_probs(self, ids: Int[Tensor, "b l"], state: ModelState | None = None) -> Float[Tensor, "b m"]:
        """log p of each token but the first given those before it, read step by step; for what packing costs."""
        check_ids(ids, self.model.config.vocab_size)
        state = self.model.init_state(*ids.shape) if state is None else state
        steps = [torch.log_softmax(self.step(column, state), -1) for column in ids[:, :-1].unbind(1)]
        if not steps:
            return torch.empty(len(ids), 0, dtype=self._program.dtype)
        return torch.stack(steps, 1).gather(2, ids[:, 1:, None].long())[..., 0]

    # --- the state ---

    def _check(self, ids: Tensor, state: ModelState) -> None:
        vocab_size = self.model.config.vocab_size
        if not isinstance(ids, Tensor) or ids.ndim != 1:
            given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError("a step reads one id a row", given=given, expected="a tensor [batch] of int64")
        if ids.dtype not in (torch.int64, torch.int32) or not ids.numel() or _least(ids, vocab_size) < 0:
            check_ids(ids[:, None], vocab_size)
        if not isinstance(state, ModelState):
            raise StateError("there is no state to step", given=type(state).__name__, fix="use model.init_state")
        if state.lengths.shape[0] != ids.shape[0]:
            raise StateError(
                "the state has another number of rows than the input",
                given=f"{len(ids)} rows",
                expected=f"{len(state.lengths)} rows",
            )
        self.model.check_owner(state)
        limits = [limit for limit in (state.max_length, self._limit) if limit is not None]
        if limits and max(state.lengths.tolist()) >= min(limits):
            self.model._check_room(state, torch.ones_like(state.lengths))

    def _bound(self, state: ModelState) -> int:
        """Where the addresses of the state's tensors are, each first laid out as the program reads it."""
        owners = [*state.layers, state]
        there = [read(owners[index]) for index, read in self._looks]
        if len(there) == len(self._seen) and all(map(operator.is_, there, [seen() for seen in self._seen])):
            return self._state_addresses.address
        self._online = []
        self._state_addresses = Addresses([value for place in self._places for value in self._values(place, state)])
        self._seen = [weakref.ref(getattr(place.owner(state), place.name)) for place in self._places]
        return self._state_addresses.address

    def _values(self, place: _Place, state: ModelState) -> list[Tensor | int]:
        """What the program wants of a place, which is first laid out as it reads it."""
        owner = place.owner(state)
        if isinstance(owner, OnlineState) and place.name == "buffers":
            assert place.layer is not None
            mixer = self.model.blocks[place.layer].mixer
            assert isinstance(mixer, HyenaMixer)
            with torch.no_grad():
                self._online.append(bound(mixer.filter.online(owner), owner.writable(), mixer.skip))
            return [self._online[-1].address]
        value = getattr(owner, place.name)
        fitting = _fitting(value, place.name, self._program.dtype)
        if fitting is not value:
            setattr(owner, place.name, fitting)
        room = isinstance(owner, AttentionState) and place.name == "lengths"
        return [fitting, owner.keys.shape[1]] if room else [fitting]

    def _begin_block(self, start: int) -> None:
        for held in self._online:
            held.begin_block(start)

    def _memory(self, rows: int) -> list[Tensor]:
        if rows != self._rows:
            with torch.inference_mode(False):  # what is made inside of it could not be written outside
                self._buffers = self._program.buffers(rows)
                self._buffer_addresses = Addresses(self._buffers)
            self._rows = rows
        return self._buffers

    # --- the program ---

    def _has_changed(self, state: ModelState) -> bool:
        if self._versions != (precision._optimizer_steps, sum(map(_version, self._parameters))):
            return True
        self._steps += 1
        if self._last() is state and self._steps % _LOOK:
            return False
        self._last = weakref.ref(state)
        return self._places_of_parameters != _places_of(self.model)

    def _write(self) -> None:
        """Pack everything, and forget what belonged to the old program."""
        with torch.inference_mode(False), torch.no_grad():
            # Aliases share the counts of their tensors, and made together they lie together: a few µs a token.
            self._parameters = [tensor.detach() for tensor in _tensors_of(self.model)]
            self._places_of_parameters = _places_of(self.model)
            self._versions = precision._optimizer_steps, sum(map(_version, self._parameters))
            self._program = Program(self.model.norm.scale.dtype, self.weights)
            self._places, self._cuts, self._seen, self._rows = [], [], [], 0
            self._write_model()
            self._looks = [place.look for place in self._places]
            self._run = self._program.runner()

    def _write_model(self) -> None:
        model, program = self.model, self._program
        program.embed(model.embedding.weight)
        for layer, (block, state) in enumerate(zip(model.blocks, model.init_state(1, 1).layers)):
            assert isinstance(block, Block)
            self._norm(block.pre_norm)
            self._mixer(layer, block, state)
            if block.mlp is not None:
                assert block.post_norm is not None
                self._norm(block.post_norm)
                self._mlp(block)
        self._norm(model.norm)
        head = model.embedding if model.head is None else model.head
        program.linear(head.weight, None, Buffer.NORMED, Buffer.LOGITS)
        program.count()
        self._places.append(_Place(None, None, "lengths"))

    def _norm(self, norm: Any) -> None:
        match norm:
            case RMSNorm(config=RMSNormConfig(eps=eps, eps_inside_root=inside)):
                self._program.norm(Norm.RMS_INSIDE if inside else Norm.RMS_OUTSIDE, norm.scale, None, eps)
            case LayerNorm():
                self._program.norm(Norm.LAYER, norm.scale, norm.bias, norm.eps)

    def _mlp(self, block: Block) -> None:
        mlp, program = block.mlp, self._program
        assert mlp is not None
        if isinstance(mlp, GatedMLP):
            biases = None if mlp.gate.bias is None else (mlp.gate.bias, mlp.up.bias)
            program.gated(mlp.gate.weight, mlp.up.weight, biases, mlp.activation)
        else:
            program.linear(*(mlp.up.weight, mlp.up.bias, Buffer.NORMED, Buffer.MIDDLE, Finish.ACTIVATE, mlp.activation))
        program.linear(mlp.down.weight, mlp.down.bias, Buffer.MIDDLE, Buffer.STREAM, Finish.ADD)

    def _mixer(self, layer: int, block: Block, state: State) -> None:
        mixer, program = block.mixer, self._program
        match mixer:
            case HyenaMixer() if not isinstance(mixer.projection, FP8Linear):
                assert isinstance(state, HyenaState)
                self._hyena(layer, mixer, state.long)
            case AttentionMixer():
                self._attention(layer, mixer)
            case Mixer():
                channels = program.reserve(len(block.pre_norm.scale), Buffer.MIXED)
                self._cuts.append((len(program), functools.partial(_mix, mixer), layer))
                return program.residual(channels)
        program.linear(mixer.output.weight, mixer.output.bias, Buffer.MIXED, Buffer.STREAM, Finish.ADD)

    def _hyena(self, layer: int, mixer: HyenaMixer, state: State) -> None:
        """``state`` is one of the long filter: how it carries its past says how it is run."""
        program, filter_, skip = self._program, mixer.filter, mixer.skip
        program.linear(mixer.projection.weight, mixer.projection.bias, Buffer.NORMED, Buffer.WIDE)
        program.short_filter(mixer.short_taps, mixer.short_bias)
        self._places.append(_Place(layer, "short", "tail"))
        if isinstance(filter_, ModalFilter):
            program.modal(*modal.modal_step_constants(filter_.logs(), filter_.residues, filter_.channels), skip)
            self._places.append(_Place(layer, "long", "modes"))
        elif isinstance(filter_, ExplicitFilter) and isinstance(state, FIRState):
            taps = filter_.taps(filter_.config.taps)
            program.long_fir(taps.repeat_interleave(filter_.channels // len(taps), 0), skip)
            self._places.append(_Place(layer, "long", "tail"))
        else:
            program.online(mixer.output.in_features)
            self._places += [_Place(layer, "long", name) for name in ("buffers", "lengths")]

    def _attention(self, layer: int, mixer: AttentionMixer) -> None:
        rope, size = mixer.rope, mixer.head_size
        self._program.linear(mixer.qkv.weight, mixer.qkv.bias, Buffer.NORMED, Buffer.WIDE)
        scale = 1.0 if rope is None else rope.config.scale
        self._program.attention(mixer.heads, mixer.kv_heads, size, _frequencies(rope, size), scale)
        self._places += [_Place(layer, None, name) for name in ("keys", "values", "lengths")]


def _mix(mixer: Mixer, state: State, buffers: list[Tensor]) -> None:
    buffers[Buffer.MIXED].copy_(mixer.extend(buffers[Buffer.NORMED][:, None], state)[:, 0])


def _frequencies(rope: Rope | None, head_size: int) -> Tensor | None:
    if rope is None:
        return None
    return inverse_frequencies(head_size, rope.config.base) if rope.inverse is None else rope.inverse


_version = operator.attrgetter("_version")


def _tensors_of(model: Model) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _places_of(model: Model) -> list[tuple[int, int]]:
    return [(id(tensor), tensor.data_ptr()) for tensor in _tensors_of(model)]


def _least(ids: Tensor, vocab_size: int) -> int:
    """The smallest id, or -1 if one is too large: a list is faster here than two operations on tensors."""
    values = ids.tolist()
    return -1 if max(values) >= vocab_size else min(values)


def _fitting(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """``tensor``, or a copy with the memory that the program wants: modes [b d n *z] with channels side by side."""
    wanted = torch.int64 if name == "lengths" else dtype
    if tensor.dtype != wanted or tensor.device.type != "cpu":
        raise StateError(f"{name} of the state cannot be used here", given=f"{tensor.dtype} on {tensor.device}")
    order = tuple(range(tensor.ndim)) if name != "modes" else (0, *reversed(range(1, tensor.ndim)))
    rows = tensor.permute(order)
    if rows.is_contiguous() and not tensor.requires_grad:
        return tensor
    return rows.detach().clone(memory_format=torch.contiguous_format).permute(order)
