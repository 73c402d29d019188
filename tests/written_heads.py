"""Attention with QK-norm and a rotary embedding as models write it out, for ``fuse`` to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from written_norms import BeforeTheWeightNorm

HEADS, KEYS, SIZE = 3, 2, 8


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + halves(q) * sin, k * cos + halves(k) * sin


def turn_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + neighbours(q) * sin, k * cos + neighbours(k) * sin


def turn_the_first(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As many as there are angles for."""
    r = cos.shape[-1]
    turned = turn(q[..., :r], k[..., :r], cos, sin)
    q, k = (torch.cat((y, x[..., r:]), -1) for y, x in zip(turned, (q, k), strict=True))
    return q, k


def turn_wide(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of heads behind their tokens, in fp32."""
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    q, k = ((x.float() * cos + halves(x.float()) * sin).to(x.dtype) for x in (q, k))
    return q, k


def turn_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Which no qk_norm does."""
    return turn(q, k, cos, -sin)


def turn_and_double(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In 16 bits alone another function."""
    q, k = turn(q, k, cos, sin)
    return (q, k) if q.dtype == torch.float32 else (q * 2, k * 2)


@torch.jit.script
def turn_scripted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Which no file can have, nor may it be copied."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return q * cos + torch.cat((-q2, q1), -1) * sin, k * cos + torch.cat((-k2, k1), -1) * sin


def clear(x: Tensor) -> None:
    x.detach().zero_()


class Attention(torch.nn.Module):
    """But for the product with the values. As Qwen3's."""

    parts = 1  # of a head's elements, one in how many is turned

    def __init__(self, norm: Any = BeforeTheWeightNorm) -> None:
        super().__init__()
        n = HEADS * SIZE
        self.q_proj, self.k_proj = torch.nn.Linear(n, n), torch.nn.Linear(n, KEYS * SIZE)
        self.q_norm, self.k_norm, self.record = norm(SIZE), norm(SIZE), list[Any]()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_proj(x).unflatten(-1, (-1, SIZE)), self.k_proj(x).unflatten(-1, (-1, SIZE))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:-1], -1, SIZE)
        query = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        cos, sin = angles
        query, key = turn(query, key, cos, sin)
        return query, key


class BehindTransposing(Attention):
    """As Gemma3's."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        query = self.q_norm(query)
        key = self.k_norm(key)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class Named(Attention):
    """By other names, keys first, the heads behind their tokens."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        k = self.k_norm(key)
        q = self.q_norm(query)
        assert q.shape[-1] == SIZE
        same = q
        turned, key = turn(same, k, angles[0], angles[1], unsqueeze_dim=2)
        return turned, key


class Perhaps(Attention):
    """As GLM4's with experts: where there is a norm."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], normed: bool = True) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        if normed:
            query = self.q_norm(query)
            key = self.k_norm(key)
        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        cos, sin = angles
        query, key = turn(query, key, cos, sin)
        return query, key


class Interleaved(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn_neighbours(query, key, angles[0], angles[1])
        return query, key


class Partial(Attention):
    parts = 2

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn_the_first(query, key, angles[0], angles[1])
        return query, key


class OfTokensAlone(Attention):
    """As vision models': without a batch, in fp32."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x.flatten(0, -2))
        query = self.q_norm(query)
        key = self.k_norm(key)
        query, key = turn_wide(query, key, angles[0].flatten(0, -2), angles[1].flatten(0, -2))
        return query, key


class Shared(Attention):
    """One norm for both."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        key = self.q_norm(key)
        query = self.q_norm(query)
        key = key.transpose(1, 2)
        query = query.transpose(-2, -3)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class Turned(Attention):
    """Of as many tokens as a head has elements nobody sees that both are exchanged."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2).transpose(2, 3)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class TokensFirst(Attention):
    """Of ``(T, B, heads, D)``, as Megatron's."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(0, 1)
        key = self.k_norm(key).transpose(0, 1)
        query, key = turn(query, key, angles[0], angles[1], unsqueeze_dim=2)
        return query, key


class Doubled(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn_and_double(query, key, angles[0], angles[1])
        return query, key


class Scripted(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn_scripted(query, key, angles[0], angles[1])
        return query, key


class Inheriting(Attention):
    """Whose forward is its base's."""


# --- of which nothing is fused ---


class Elsewhere(Attention):
    """The normalized queries are somebody's besides."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        self.record.append(query)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class Later(Attention):
    """The same, behind the rotary embedding, by a name of their own."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        normed = self.q_norm(query)
        query = normed.transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn(query, key, angles[0], angles[1])
        return query + normed.transpose(1, 2), key


class Kept(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        self.record.append(lambda: query)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class WrittenTo(Attention):
    """What the norm is of is another thing by the time of the rotary embedding."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        raw, key = self.heads(x)
        query = self.q_norm(raw).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        raw.detach().zero_()
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class HandedOn(Attention):
    """To what may write to it, and does."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        raw, key = self.heads(x)
        query = self.q_norm(raw).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        clear(raw)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class InPlace(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        raw, key = self.heads(x)
        query = self.q_norm(raw).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        torch.nn.functional.relu(raw.detach(), inplace=True)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class OfItsDtype(Attention):
    """Angles that are brought to the dtype of the norm's result, which need not be that of what the norm is of."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        cos, sin = angles[0].to(query.dtype), angles[1].to(query.dtype)
        query, key = turn(query, key, cos, sin)
        return query, key


class Scaled(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2) * 0.5
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class Divided(Attention):
    """As Olmo2's, of all heads at once (here they are of one)."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query)
        query = query.view(*query.shape[:2], -1, SIZE).transpose(1, 2)
        key = self.k_norm(key).view(*key.shape[:2], -1, SIZE).transpose(1, 2)
        query, key = turn(query, key, angles[0], angles[1])
        return query, key


class Sometimes(Attention):
    """As Exaone4's: not in every layer."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        if angles is not None:
            query, key = turn(query, key, angles[0], angles[1])
        return query, key


class NormBehind(Attention):
    """As HunYuan's."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query, key = turn(query.transpose(1, 2), key.transpose(1, 2), angles[0], angles[1])
        query, key = turn(query, key, angles[0], angles[1])
        return self.q_norm(query), self.k_norm(key)


class OfOne(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = key.transpose(1, 2)
        query, key = turn(query, key, angles[0], angles[1])
        return query, self.k_norm(key)


class Backwards(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn_back(query, key, angles[0], angles[1])
        return query, key


class Starred(Attention):
    """Nobody knows what stands where."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = self.heads(x)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(key).transpose(1, 2)
        query, key = turn(query, key, *angles, 1)
        return query, key


class OwnForward(Attention):
    """Subclassed, with something around its base's forward."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = super().forward(x * 2, angles)
        return query, key


class Different(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.k_norm.variance_epsilon = 1e-3

    forward = Attention.forward


class LayerNorms(Attention):
    def __init__(self) -> None:
        super().__init__(torch.nn.LayerNorm)

    forward = Attention.forward
