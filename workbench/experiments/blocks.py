"""What trained blocks learn from, and what their training reached: rows of the recipe of the built-in models."""

from __future__ import annotations

from typing import Any

import torch

from workbench.engine.calibration import Document, Needle
from workbench.methods.routing.trained import TrainedBlock
from workbench.models import card
from workbench.models.blocks.training import TOKENS, measured
from workbench.models.load import LM
from workbench.models.rows import Row, Rows

LENGTHS = (128, 256, 512)
"""Tokens of a row."""
SEED = 977
"""One that neither the recipe nor a workload starts with."""
MOST_STEPS = 300
"""Rows for so many steps are made; a longer training takes them again."""


def rows_of(lm: LM, held_out: bool = False) -> Rows:
    """Rows in a model's tokens. A tokenizer without a token for the beginning or padding gets one all the same."""
    rows = Rows(lm.tokenizer, card.SEED if held_out else SEED, held_out)
    rows.pad = lm.pad_token
    rows.bos = rows.pad if rows.bos is None else rows.bos
    return rows


def documents(rows: Rows, steps: int) -> tuple[Document, ...]:
    """Half prose and half recall documents, as many as training takes in so many steps; of the latter the answers count."""
    made, tokens = [], 0
    while tokens < TOKENS * min(steps, MOST_STEPS):
        row = rows.row(("text", "recall")[len(made) % 2], rows.rng.choice(LENGTHS))
        made.append(_document(row))
        tokens += len(made[-1].tokens)
    return tuple(made)


def _document(row: Row) -> Document:
    """Without what fills a row up behind its last answer. A needle is an answer's words, where they were first said."""
    places = [place for place, task in enumerate(row.tasks) if task == "recall"]
    if not places:
        return Document(tuple(row.ids), len(row.ids))
    starts = [place for place in places if place - 1 not in places]
    needles = []
    for start in starts:
        stop = next(place for place in range(start, len(row.ids) + 1) if place - 1 in places and place not in places)
        words = row.ids[start : stop - 1]  # without the full stop
        said = next((at for at in range(start) if row.ids[at : at + len(words)] == words), start)
        needles.append(Needle(said, said + len(words), tuple(range(start - 1, stop - 2))))
    return Document(tuple(row.ids[: places[-1] + 1]), starts[0], tuple(needles))


@torch.no_grad()
def reached(lm: LM, method: TrainedBlock, rows: Rows) -> dict[str, Any]:
    """Recall and loss on rows that nothing was trained on.

    `before` are those of the model as it is, `untrained` with the block training began with, `after` in the ways of running it.
    """
    untrained = method.placed(method.untrained(lm).eval(), lm, None)
    ways = {way.label: measured(lm.model, rows, way.forwards(lm, None)) for way in method.ways()}
    return {"before": measured(lm.model, rows), "untrained": measured(lm.model, rows, untrained), "after": ways}
