"""A session under a budget may go on for thousands of tokens: but for tokens and the rows of its trace, nothing grows."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch

import workbench as wb
from workbench.testing import calibrate_all, ids, random_llama

PROMPT, SETTLED = 64, 200


def alive() -> tuple[Counter[str], int]:
    """Objects of each type that the process holds, and bytes of its tensors."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [each for each in objects if issubclass(type(each), torch.Tensor) and each.layout is torch.strided]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return Counter(type(each).__name__ for each in objects), sum(storages.values())


@pytest.mark.parametrize(
    ("method", "tokens"),
    [(wb.StreamingLLM(budget=24), 4000), (wb.UNComp(budget=24), 600)],
    ids=["rectangular", "ragged"],
)
def test_thousands_of_tokens_are_decoded_in_the_memory_of_the_first(tiny, method, tokens):
    lm = wb.load((random_llama(num_hidden_layers=1, max_position_embeddings=PROMPT + 4000), tiny.tokenizer))
    session = wb.Session(calibrate_all(lm), method)
    session.prefill(ids(PROMPT))
    occupied = []
    for step in range(tokens):
        session.step()
        occupied.append(session.physical_bytes)
        if step == SETTLED:
            alive()  # which gives each tensor's storage an object of its own
            objects, tensor_bytes = alive()
    later_objects, later_bytes = alive()
    assert len(session.tokens[0]) == PROMPT + tokens
    assert set(occupied[SETTLED:]) == {occupied[SETTLED]}
    assert later_bytes <= tensor_bytes
    # Rows and tokens are numbers in lists that are there from the start, so of no kind of object are there more a step.
    steps = tokens - SETTLED
    growing = {name: count - objects[name] for name, count in later_objects.items() if count - objects[name] > steps / 10}
    assert not growing
    held = session.trace.select(phase="decode").table("cache").query("op == 'evict'")["held_tokens"]
    assert held.max() <= 2 * 24 and len(held) >= tokens - 1
