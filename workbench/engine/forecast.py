"""Tokens executed or approximated: a small network forecasts what a module would give, and a router says for which tokens.

Informed routing, Han et al. 2025, arXiv 2510.13831. Shapes: T tokens, d hidden, r rank, h the router's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from workbench.engine.branches import Cost, costs, linears_of
from workbench.engine.call import Call
from workbench.engine.fitting import hidden_of
from workbench.engine.replacing import Forward
from workbench.models.anatomy import attention_modules, output_projections
from workbench.trace.anatomy import Linear

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class Network:
    """Two layers: `second act(first x)`, each with a bias."""

    first: torch.Tensor
    first_bias: torch.Tensor
    second: torch.Tensor
    second_bias: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]

    @property
    def parts(self) -> list[torch.Tensor]:
        """All that is trained."""
        return [self.first, self.first_bias, self.second, self.second_bias]

    @property
    def flops(self) -> int:
        """Of one token."""
        return 2 * (self.first.numel() + self.second.numel())

    @property
    def weight_bytes(self) -> int:
        """Read if any token goes through."""
        return (self.first.numel() + self.second.numel()) * self.first.element_size()

    @property
    def bias_bytes(self) -> int:
        """Of the biases."""
        return (self.first_bias.numel() + self.second_bias.numel()) * self.first.element_size()

    @property
    def token_bytes(self) -> int:
        """Activations one token moves."""
        return sum(sum(matrix.shape) for matrix in (self.first, self.second)) * self.first.element_size()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d]` in, `[..., out]` out."""
        return F.linear(self.act(F.linear(hidden, self.first, self.first_bias)), self.second, self.second_bias)

    def tables(self, name: str) -> dict[str, torch.Tensor]:
        """Its parts in half precision, by name."""
        return {f"{name}.{number}": part.detach().half() for number, part in enumerate(self.parts)}

    @classmethod
    def of(cls, tables: Mapping[str, torch.Tensor], name: str, act: Callable, like: torch.Tensor) -> Self:
        """The network that `tables` made."""
        return cls(*(tables[f"{name}.{number}"].to(like.device, like.dtype) for number in range(4)), act)

    @classmethod
    def small(cls, sizes: tuple[int, int, int], act: Callable, seed: int, device: torch.device) -> Self:
        """Weights of N(0, 1e-3) and no bias to begin with; `sizes` are in, inside and out."""
        chosen = torch.Generator().manual_seed(seed)
        inputs, inside, outputs = sizes
        first, second = (1e-3 * torch.randn(shape, generator=chosen) for shape in ((inside, inputs), (outputs, inside)))
        return cls(*(part.to(device) for part in (first, torch.zeros(inside), second, torch.zeros(outputs))), act)


Choose = Callable[[torch.Tensor], torch.Tensor]
"""Of hidden states `[T, d]`, which tokens are approximated: `[T]` bool."""

Judge = Callable[[torch.Tensor], torch.Tensor]
"""The same of how far forecasts are from what the module gives, `[T]`: for an oracle, which runs the module first."""


def errors(forecast: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`[T]` float32: how far forecasts `[T, d]` are off, as they are trained: smooth L1, the mean over dimensions."""
    return F.smooth_l1_loss(forecast.float(), output.float(), reduction="none").mean(-1)


def attention_forwards(
    lm: LM, call: Call, layer: int, forecaster: Network, choose: Choose | None, judge: Judge | None
) -> dict[nn.Module, Forward]:
    """Forwards of a layer's attention, of its output projection and, where it has one of its own, of its query projection.

    K and V are computed of every token, since others attend to it; queries and outputs only of those that are executed.
    Either `choose` or `judge` says which. An oracle's figures are those of a method that knew.
    """
    module, out = attention_modules(lm.model)[layer], output_projections(lm.model)[layer]
    query = getattr(module, "q_proj", None)
    qkv = linears_of(lm.anatomy, layer, "attention.qkv")
    if not isinstance(query, nn.Linear) or any(linear.per_key for linear in qkv):
        query = None
    running = _Attention(lm, call, layer, forecaster, choose, judge, query)
    forwards = {module: running.attend, out: running.project}
    return {**forwards, query: running.ask} if query is not None else forwards


class _Attention:
    """One layer's attention, of which some tokens are approximated."""

    def __init__(
        self,
        lm: LM,
        call: Call,
        layer: int,
        forecaster: Network,
        choose: Choose | None,
        judge: Judge | None,
        query: nn.Linear | None,
    ):
        self._call, self._layer, self._forecaster, self._choose, self._judge = call, layer, forecaster, choose, judge
        size, qkv = lm.anatomy.element_bytes, linears_of(lm.anatomy, layer, "attention.qkv")
        self._out = Cost.of(linears_of(lm.anatomy, layer, "attention.out"), size)
        self._query = self._others = None
        if query is not None:
            own = Linear("attention.qkv", query.in_features, query.out_features, query.bias is not None)
            others = list(qkv)
            others.remove(own)
            self._query, self._others = Cost.of([own], size), Cost.of(others, size)
        self._hidden: torch.Tensor | None = None
        self._executed: torch.Tensor | None = None
        """Which tokens are, `[n]`; None: all."""
        self._left: torch.Tensor | None = None
        """Which are not."""

    def attend(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Chooses, then runs the model's own attention."""
        self._hidden, self._executed = hidden_of(args, kwargs).flatten(0, -2), None
        if self._choose is not None:
            self._decide(self._choose(self._hidden))
        return original(*args, **kwargs)

    def ask(self, original: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Queries of the tokens that are executed; zeros of others, whose attention nobody reads."""
        if self._executed is None:
            return original(hidden)
        out = hidden.new_zeros(len(self._hidden), original.__self__.out_features)
        if len(self._executed):
            out[self._executed] = original(hidden.flatten(0, -2)[self._executed])
        return out.view(*hidden.shape[:-1], -1)

    def project(self, original: Callable[[torch.Tensor], torch.Tensor], heads: torch.Tensor) -> torch.Tensor:
        """Outputs of the tokens that are executed, forecasts of the others."""
        if self._judge is not None:
            output = original(heads)
            self._decide(self._judge(errors(self._forecaster(self._hidden), output.flatten(0, -2))))
        if self._executed is None:
            return original(heads)
        out = torch.empty_like(self._hidden)
        out[self._left] = self._forecaster(self._hidden[self._left])
        if len(self._executed):
            out[self._executed] = original(heads.flatten(0, -2)[self._executed])
        return out.view(*heads.shape[:-1], -1)

    def _decide(self, approximated: torch.Tensor) -> None:
        """Says in the trace what is computed of which tokens."""
        executed, self._left = (~approximated).nonzero()[:, 0], approximated.nonzero()[:, 0]
        kept, left = len(executed), len(self._left)
        if not left:
            self._executed = None
            self._call.work(self._layer, "attention.out", changed=0)
            return
        self._executed = executed
        given = costs([self._out, self._forecaster], [kept, left])
        self._call.work(self._layer, "attention.out", changed=left, **given)
        if self._query is not None:
            given = costs([self._query, self._others], [kept, kept + left])
            self._call.work(self._layer, "attention.qkv", changed=left, **given)
