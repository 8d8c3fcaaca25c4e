"""StripedHyena as its authors' public package computes it, written anew in plain torch from its published facts.

The formulation (package ``stripedhyena`` 0.2.2, stateless forward, no attention layers) is kept, costs included:

    filter   h[c, t] = Re Σ_s R_cs exp(log(p_cs) · t): all [d s l] complex terms in memory, then their sum
    long     irfft(fft(x1·v, 2l)[.. l+1] · rfft(h, 2l) / 2l): a complex transform of a real input, length 2l
    short    depthwise ``conv1d`` with 3 taps, the last of which meets the current token; bias added after
    norm     scale · x / (‖x‖ / √d + eps);   MLP  W3( silu(W1 x) · W2 x )

Channels come in thirds x2, x1, v; the package's other order (thirds within heads) would cost three more copies.
float32 stays float32 as in the package; a float64 model computes everything in float64, so that it can serve as truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crocuta.model.lm import Model


def mlp_width(hidden: int) -> int:
    """8/3 of the hidden size, rounded up to a multiple of 64: the package's default."""
    return -(-(2 * hidden * 4 // 3) // 64) * 64


class PublishedNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        root = x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return self.scale * (x / (root + self.eps))


class PublishedFilter(nn.Module):
    """Short convolution, gate, long convolution with the materialised modal filter, gate; [b l 3d] -> [b l d]."""

    def __init__(self, hidden: int, modes: int) -> None:
        super().__init__()
        self.short_weight = nn.Parameter(torch.zeros(3 * hidden, 1, 3))
        self.short_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.poles = nn.Parameter(torch.zeros(hidden, modes, 1, 2))
        self.residues = nn.Parameter(torch.zeros(hidden, modes, 1, 2))
        self.D = nn.Parameter(torch.zeros(hidden))

    def forward(self, z: Tensor) -> Tensor:
        length = z.shape[1]
        channels = z.permute(0, 2, 1)
        short = F.conv1d(channels, self.short_weight, padding=2, groups=channels.shape[1])[..., :length]
        x2, x1, v = (short + self.short_bias[None, :, None]).chunk(3, dim=1)
        u = x1 * v
        size = 2 * length
        spectrum = torch.fft.rfft(self.taps(length), n=size) / size
        inputs = torch.fft.fft(u, n=size)[..., : length + 1]
        y = torch.fft.irfft(inputs * spectrum, n=size, norm="forward")[..., :length]
        return ((y + u * self.D[:, None]) * x2).permute(0, 2, 1)

    def taps(self, length: int) -> Tensor:
        """The whole filter [1 d l]."""
        t = torch.arange(length)[None, None]
        logs = torch.view_as_complex(self.poles).log()
        return (torch.view_as_complex(self.residues) * (logs * t).exp()).real.sum(1)[None]


class PublishedBlock(nn.Module):
    def __init__(self, hidden: int, modes: int, eps: float) -> None:
        super().__init__()
        width = mlp_width(hidden)
        self.pre_norm, self.post_norm = PublishedNorm(hidden, eps), PublishedNorm(hidden, eps)
        self.projections = nn.Linear(hidden, 3 * hidden)
        self.filter = PublishedFilter(hidden, modes)
        self.out = nn.Linear(hidden, hidden)
        self.l1 = nn.Linear(hidden, width, bias=False)
        self.l2 = nn.Linear(hidden, width, bias=False)
        self.l3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(self.filter(self.projections(self.pre_norm(x)))) + x
        normed = self.post_norm(x)
        return self.l3(F.silu(self.l1(normed)) * self.l2(normed)) + x


class PublishedModel(nn.Module):
    """ids [b l] -> logits [b l v], embedding and head tied."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, modes: int, eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(PublishedBlock(hidden, modes, eps) for _ in range(layers))
        self.norm = PublishedNorm(hidden, eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


def next_token_loss(model: PublishedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


# --- the same weights on both sides ---

_PER_BLOCK = {
    "pre_norm.scale": "pre_norm.scale",
    "post_norm.scale": "post_norm.scale",
    "mixer.projection.weight": "projections.weight",
    "mixer.projection.bias": "projections.bias",
    "mixer.short_taps": "filter.short_weight",
    "mixer.short_bias": "filter.short_bias",
    "mixer.filter.poles": "filter.poles",
    "mixer.filter.residues": "filter.residues",
    "mixer.skip": "filter.D",
    "mixer.output.weight": "out.weight",
    "mixer.output.bias": "out.bias",
    "mlp.gate.weight": "l1.weight",
    "mlp.up.weight": "l2.weight",
    "mlp.down.weight": "l3.weight",
}
"""Our parameter of a block and theirs."""

_LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "mixer.short_taps": lambda taps: taps.flip(1)[:, None],
    "mixer.filter.poles": lambda modes: modes[:, :, None],
    "mixer.filter.residues": lambda modes: modes[:, :, None],
}
"""Where their layout differs from ours."""


@dataclass(frozen=True)
class Pair:
    """One parameter on both sides; ``layout`` turns our layout into theirs."""

    name: str
    """Ours, without the number of the block."""
    ours: nn.Parameter
    peer: nn.Parameter
    layout: Callable[[Tensor], Tensor]


def pairs(ours: Model, peer: PublishedModel) -> Iterator[Pair]:
    """Every parameter of both models; ValueError if one has no partner."""
    mine, theirs = dict(ours.named_parameters()), dict(peer.named_parameters())
    names = {"embedding.weight": "embedding.weight", "norm.scale": "norm.scale"}
    for i in range(len(peer.blocks)):
        names |= {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in _PER_BLOCK.items()}
    if names.keys() != mine.keys() or set(names.values()) != theirs.keys():
        raise ValueError(f"parameters without a partner: {sorted(names.keys() ^ mine.keys())}")
    for name, other in names.items():
        kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
        yield Pair(kind, mine[name], theirs[other], _LAYOUT.get(kind, _same))


def _same(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def copy_weights(ours: Model, peer: PublishedModel) -> None:
    """Give the peer our weights."""
    for pair in pairs(ours, peer):
        pair.peer.copy_(pair.layout(pair.ours))
