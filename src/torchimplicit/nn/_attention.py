"""`CausalCell`: one transformer block as the map `z ↦ f(z, x)`, over a whole sequence or over its next token."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._options import nearest

Attend = Literal["past", "upto"]
_ATTEND = ("past", "upto")


class CausalCell(nn.Module):
    """`f(z, x) = rms(h + FF(h))`, `h = rms(x + attention(z))`, causal with relative positions.

    Position t attends to the states of the positions `t − span, …, t − 1` (`attend="past"`) or `t − span + 1, …, t`
    (`"upto"`), or to none of them: a key of its own, whose value is zero, stands beside them. Its scores are
    `q·k/√d + bias`, with a bias learned for each head and distance (Shaw et al. 2018; Raffel et al. 2020, without
    buckets). In the first case queries are made of x, so that `f_t` depends on the states before t alone; in the second
    of `z + x`.

    Args:
        features: d, of each position.
        heads: number of heads, a divisor of `features`.
        span: how far a position looks.
        hidden: width of the feed-forward part.
        attend: `"past"` or `"upto"`.
        device: of the parameters.
        dtype: of the parameters.
    """

    samplewise = True
    pure = True

    def __init__(
        self,
        features: int,
        heads: int,
        span: int,
        hidden: int,
        attend: Attend,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("heads", heads), ("span", span), ("hidden", hidden)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not valid; give an integer >= 1.")
        if features % heads:
            raise ValueError(f"heads={heads} is not valid; give a divisor of features={features}.")
        if attend not in _ATTEND:
            raise ValueError(f"attend={attend!r} is not known; {nearest(str(attend), _ATTEND)}")
        self.features, self.heads, self.span, self.attend = features, heads, span, attend
        self.query = nn.Linear(features, features, device=device, dtype=dtype)
        self.key_value = nn.Linear(features, 2 * features, bias=False, device=device, dtype=dtype)
        self.mix = nn.Linear(features, features, device=device, dtype=dtype)
        self.widen = nn.Linear(features, hidden, device=device, dtype=dtype)
        self.narrow = nn.Linear(hidden, features, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(heads, span, device=device, dtype=dtype))
        self.nothing = nn.Parameter(torch.zeros(heads, device=device, dtype=dtype))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`(B, T, d)`, `(B, T, d)` to `(B, T, d)`: every position at once."""
        distance = self._distance(0, z.shape[1], z.shape[1], z.device)
        return self._finish(x, self._attention(z if self.attend == "upto" else None, x, self.keys_values(z), distance))

    def token(self, z: Tensor, x: Tensor, past: Tensor) -> Tensor:
        """The map of the last position alone, `(B, d)`, `(B, d)` to `(B, d)`.

        Args:
            z: its state.
            x: its input.
            past: keys and values of the positions before, `(B, t, 2d)`.
        """
        keys_values = past
        if self.attend == "upto":
            keys_values = torch.cat([past, self.keys_values(z[:, None])], dim=1)
        distance = self._distance(past.shape[1], 1, keys_values.shape[1], z.device)
        state = z[:, None] if self.attend == "upto" else None
        return self._finish(x[:, None], self._attention(state, x[:, None], keys_values, distance))[:, 0]

    def keys_values(self, z: Tensor) -> Tensor:
        """`(B, t, d)` to `(B, t, 2d)`."""
        return self.key_value(z)

    def _distance(self, first: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """How far each key lies behind each position from `first` on, `(queries, keys)`; 0 is the nearest one seen."""
        own = torch.arange(first, first + queries, device=device)[:, None]
        nearest_seen = own - 1 if self.attend == "past" else own
        return nearest_seen - torch.arange(keys, device=device)

    def _attention(self, z: Tensor | None, x: Tensor, keys_values: Tensor, distance: Tensor) -> Tensor:
        batch, queries = x.shape[:2]
        width = self.features // self.heads
        query = self._split(self.query(x if z is None else z + x))
        key, value = (self._split(functional.pad(t, (0, 0, 0, 1))) for t in keys_values.chunk(2, dim=-1))
        seen = (distance >= 0) & (distance < self.span)
        bias = self.bias[:, distance.clamp(0, self.span - 1)].masked_fill(~seen, -torch.inf)
        nothing = self.nothing[:, None, None].expand(-1, queries, -1)
        bias = torch.cat([bias, nothing], dim=2).repeat(batch, 1, 1)
        weight = torch.softmax(torch.baddbmm(bias, query, key.mT, alpha=width**-0.5), dim=-1)
        mixed = torch.bmm(weight, value).unflatten(0, (batch, self.heads))
        return mixed.transpose(1, 2).reshape(batch, queries, self.features)

    def _split(self, t: Tensor) -> Tensor:
        """`(B, t, d)` to `(B·heads, t, d/heads)`."""
        return t.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def _finish(self, x: Tensor, attention: Tensor) -> Tensor:
        h = rms(x + self.mix(attention))
        return rms(h + self.narrow(functional.gelu(self.widen(h))))


def rms(t: Tensor) -> Tensor:
    """Divided by its root mean square (Zhang & Sennrich 2019), so that `‖rms(t)‖₂ < √d` whatever t is."""
    return t * torch.rsqrt(t.square().mean(dim=-1, keepdim=True) + 1e-5)
