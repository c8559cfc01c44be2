"""A replay: what cache methods would have kept of a recorded run, and what that would have cost in attention. A value."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import UserError
from workbench.trace.display import RichDisplay, table_html
from workbench.trace.recording import Recording


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Shapes: L recorded layers, Hq query heads, H kv heads, S decoded tokens, N prompt and decoded tokens.
    """

    method: str
    """What the method is called without its budget."""
    budget: float
    setup: str
    mass_retained: np.ndarray = field(repr=False)
    """`[L, Hq, S]` share of the dense attention of each decoded token that fell on tokens the method read."""
    output_error: np.ndarray = field(repr=False)
    """`[L, Hq, S]` distance of the head's output from the dense one, as a share of the dense one's length."""
    oracle_mass: np.ndarray = field(repr=False)
    """`[L, H, S]` mass retained, mean over the group's query heads, by the best set of as many tokens."""
    held_bytes: np.ndarray = field(repr=False)
    """`[L, S]` bytes of K and V held while each token was decoded, its own included."""
    read_bytes: np.ndarray = field(repr=False)
    """`[L, S]` bytes of K and V its attention read: those held, unless the method selects."""
    gone: np.ndarray = field(repr=False)
    """`[L, H, N]` the step from which on a token was not held any more; S for a token held to the end."""
    read: np.ndarray | None = field(default=None, repr=False)
    """`[L, H, S, N / 8]` bits (`numpy.packbits`): what any query head of a kv head read; None if all that was held."""


@dataclass(frozen=True)
class Replay(RichDisplay):
    """What methods at several budgets would have kept of a recording. Made by `wb.replay`.

    The decoded tokens' queries, keys and values are those of the dense run. A live run differs from it once its own
    evictions change what later layers compute: at the decision at the end of the prompt, and in layer 0 at every step,
    the kept sets are those of a live run led along the same tokens; further on they are a prediction. So are the sets a
    method reads, if it selects, but in the first layer in which it does.

    Mass retained is of the recorded attention, over what is read. What a method merged into tokens it keeps counts as lost
    there, and where tokens close ranks their mass is that from before; the output error is that of attention as it would be.

    The oracle knows the recorded attention. For a method that decides once, it keeps of the prompt the tokens with the
    most attention from all decoded tokens together, as many in each kv head as the method did; averaged over steps, no
    kept set of that size retains more. For a method that decides or selects at every step, it chooses as many tokens as
    are read anew at each step, which no policy can pass.
    """

    about: dict[str, Any]
    """Model, layers, prompt tokens and steps."""
    points: tuple[Point, ...]

    @classmethod
    def of(cls, recording: Recording, points: Iterable[Point]) -> Replay:
        """What was replayed on a recording, with what it is about."""
        about = {
            "model": recording.trace.anatomy.class_name,
            "layers": [layer.layer for layer in recording.layers],
            "prompt_tokens": recording.prompt_tokens,
            "steps": recording.steps,
        }
        return cls(about, tuple(points))

    def curves(self) -> pd.DataFrame:
        """One row a method and budget, means over layers, heads and steps.

        `bytes` of K and V held and `read_bytes` of those read are of the last step, summed over layers.
        """
        table = pd.DataFrame(
            [
                {
                    "method": point.method,
                    "budget": point.budget,
                    "mass_retained": float(point.mass_retained.mean()),
                    "output_error": float(point.output_error.mean()),
                    "bytes": int(point.held_bytes[:, -1].sum()),
                    "read_bytes": int(point.read_bytes[:, -1].sum()),
                    "oracle_mass": float(point.oracle_mass.mean()),
                }
                for point in self.points
            ]
        )
        # A column of numbers would make 1 token of the whole prompt, 1.0.
        return table.assign(budget=pd.Series([point.budget for point in self.points], dtype=object))

    def table(self, method: str, budget: float) -> pd.DataFrame:
        """One row a layer, query head and step.

        `kept` tokens, those `read` of them, the `bytes` kept and `oracle_mass` are of the kv head it reads.
        """
        point = self.point(method, budget)
        num_layers, num_q_heads, steps = point.mass_retained.shape
        group = num_q_heads // point.gone.shape[1]
        layer, head, step = np.indices((num_layers, num_q_heads, steps)).reshape(3, -1)
        kept, read = (
            np.stack([mask(point, number).sum(-1) for number in range(steps)], -1) for mask in (self._held, self._read)
        )  # [L, H, S]
        a_token = point.held_bytes / kept.sum(1)
        return pd.DataFrame(
            {
                "layer": np.array(self.about["layers"])[layer],
                "head": head,
                "step": step,
                "kept": kept[layer, head // group, step],
                "read": read[layer, head // group, step],
                "bytes": (kept * a_token[:, None]).round().astype(int)[layer, head // group, step],
                "mass_retained": point.mass_retained.reshape(-1),
                "output_error": point.output_error.reshape(-1),
                "oracle_mass": point.oracle_mass[layer, head // group, step],
            }
        )

    def kept(self, method: str, budget: float, layer: int, step: int) -> list[np.ndarray]:
        """Positions held by each kv head of a layer when decoded token `step` attended, its own included."""
        return self._positions(self._held, method, budget, layer, step)

    def read(self, method: str, budget: float, layer: int, step: int) -> list[np.ndarray]:
        """Positions any query head of each kv head read when decoded token `step` attended: those held, unless it selects."""
        return self._positions(self._read, method, budget, layer, step)

    def _positions(
        self, mask: Callable[[Point, int], np.ndarray], method: str, budget: float, layer: int, step: int
    ) -> list[np.ndarray]:
        point = self.point(method, budget)
        if layer not in self.about["layers"]:
            raise UserError(f"Layer {layer} was not recorded; the layers here are {self.about['layers']}.")
        if not 0 <= step < self.about["steps"]:
            raise UserError(f"There is no step {step}; the decoded tokens are 0 to {self.about['steps'] - 1}.")
        heads = mask(point, step)[self.about["layers"].index(layer)]
        return [np.flatnonzero(head) for head in heads]

    def point(self, method: str, budget: float) -> Point:
        """A method at a budget. Raises UserError if it was not replayed."""
        for point in self.points:
            same_kind = isinstance(point.budget, int) == isinstance(budget, int)  # 1 token is not 1.0 of the prompt
            if method in (point.method, point.setup) and same_kind and point.budget == budget:
                return point
        known = ", ".join(point.setup for point in self.points)
        raise UserError(f"{method!r} at budget {budget} was not replayed; replayed are {known}.")

    def _read(self, point: Point, step: int) -> np.ndarray:
        """`[L, H, N]` what is read at a step."""
        if point.read is None:
            return self._held(point, step)
        return np.unpackbits(point.read[:, :, step], axis=-1, count=point.gone.shape[2]).astype(bool)

    def _held(self, point: Point, step: int) -> np.ndarray:
        """`[L, H, N]` what is held at a step."""
        written = np.arange(point.gone.shape[2]) <= self.about["prompt_tokens"] + step
        return (point.gone > step) & written

    def __repr__(self) -> str:
        shape = f"{self.about['prompt_tokens']} + {self.about['steps']} tokens, {len(self.about['layers'])} layers"
        return f"Replay({len(self.points)} setups on {self.about['model']}, {shape})"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(repr(self))}</b></p>{table_html(self.curves())}"
