"""One decoding step as a CUDA graph: a hundred launches of the host become one.

    step = CapturedStep(model, state)      # a state of model.init_state or after a prompt; it now belongs to the step
    logits = step(ids)                     # [b v], as model.extend(ids[:, None], step.state)[:, 0]

A graph is a list of kernels with their addresses, so nothing in it may look at a number on the host, allocate what
outlives it, or differ from one step to the next. Hence ids, positions and states stay at their addresses, attention
masks its whole buffer, and all checks happen before the graph runs. On a CPU the same step runs without a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.errors import InputError, KernelUnavailableError
from crocuta.model.backbone import check_ids
from crocuta.model.lm import Model
from crocuta.model.precision import Memo
from crocuta.model.state import AttentionState, ModelState, OnlineState, PlacedAttentionState, State

_WARM_UP = 3
"""Steps before the capture, as torch advises: kernels are compiled, workspaces and tables made."""


class CapturedStep:
    """A decoding step for a fixed number of rows, one token each; ``state`` may at any time be read, saved or written.

    The graph has the weights of the moment when it was captured: capture again after changing them. Steps write into
    the tensors of ``state`` and never replace them.

    Raises:
        KernelUnavailableError: a block whose steps differ from one another (online convolutions), naming it.
        StateError: a state of another model, or without room for another token.
    """

    def __init__(self, model: Model, state: ModelState) -> None:
        model.check_owner(state)
        _check_capturable(state)
        model._check_room(state, torch.ones_like(state.lengths))
        self.state = state
        self._model = model
        device = model.norm.scale.device
        self._ids = torch.zeros(state.batch, 1, dtype=torch.int64, device=device)
        self._positions = state.lengths.to(device, copy=True)
        self._layers = on_device(state, self._positions)
        self._slots = [slot for layer in self._layers for slot in _replaced(layer)]
        self._addressed: list[object] = []
        self._logits: Tensor | None = None
        self._graph = self._capture() if device.type == "cuda" else None

    def __call__(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        """Logits after each row's next id, and ``state`` moved on. The next call overwrites the logits.

        Raises InputError for bad ids, StateError when a row outgrows the state; neither changes anything.
        """
        if ids.shape != (self.state.batch,):
            raise InputError("a step takes one id a row", given=tuple(ids.shape), expected=(self.state.batch,))
        check_ids(ids[:, None], self._model.config.vocab_size)
        added = torch.ones_like(self.state.lengths)
        self._model._check_room(self.state, added)
        self._settle()
        self._ids.copy_(ids[:, None])
        self._positions.copy_(self.state.lengths)
        if self._graph is None:
            self._logits = self._run()
        else:
            self._graph.replay()
        self.state.lengths = self.state.lengths + added
        for layer in self.state.layers:
            if isinstance(layer, AttentionState):
                layer.lengths = layer.lengths + added
        assert self._logits is not None
        return self._logits

    @torch.inference_mode()
    def _run(self) -> Tensor:
        """What is captured."""
        logits = self._model.logits(self._model.advance(self._ids, self._layers))[:, 0]
        self._settle()
        return logits

    @torch.inference_mode()
    def _settle(self) -> None:
        """Brings what replaced a tensor of the state to where that was."""
        for part, name, tensor in self._slots:
            current = getattr(part, name)
            if current is not tensor:
                tensor.copy_(current)
                setattr(part, name, tensor)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The graph of ``_run``; the steps that warm it up leave no trace in the state."""
        before = [tensor.clone() for *_, tensor in self._slots]
        with torch.cuda.device(self._ids.device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._run()
        self._restore(before)
        self._addressed = [*_derived(self._model), *(t.detach() for t in self._model.state_dict().values())]
        return graph

    @torch.inference_mode()
    def _restore(self, values: list[Tensor]) -> None:
        for (*_, tensor), value in zip(self._slots, values, strict=True):
            tensor.copy_(value)


def _check_capturable(state: ModelState) -> None:
    for block, layer in enumerate(state.layers):
        if any(isinstance(part, OnlineState) for part in _parts(layer)):
            raise KernelUnavailableError(
                "a CUDA graph cannot hold a step that differs from the next",
                given=f"the online convolution of block {block}",
                expected="modal or short explicit filters, and attention",
                fix="use model.extend, or make the filter modal with crocuta distill",
            )


def on_device(state: ModelState, positions: Int[Tensor, " b"]) -> list[State]:
    """The states of the layers for ``model.advance``, in the same memory; ``positions`` of the next tokens."""
    return [
        PlacedAttentionState(layer.keys, layer.values, positions) if isinstance(layer, AttentionState) else layer
        for layer in state.layers
    ]


def _replaced(layer: State) -> Iterator[tuple[State, str, Tensor]]:
    """Where ``extend`` puts new tensors: part, field and tensor. Keys and values are written in place."""
    for part in _parts(layer):
        if not isinstance(part, PlacedAttentionState):
            values = ((field.name, getattr(part, field.name)) for field in fields(part))  # type: ignore[arg-type]
            yield from ((part, name, value) for name, value in values if isinstance(value, Tensor))


def _parts(state: State) -> Iterator[State]:
    """A state and all states in it."""
    yield state
    for field in fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, State):
                yield from _parts(inner)


def _derived(model: Model) -> Iterator[object]:
    """What modules keep of their parameters: a graph has its addresses, so it must stay where it is."""
    for module in model.modules():
        yield from (value.kept() for value in vars(module).values() if isinstance(value, Memo))
