"""Swapping the method between two tokens: what is gone stays gone, what is held is decided anew, the trace says who ruled."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.cost.metrics import fired
from workbench.methods import METHODS
from workbench.testing import calibrate_all, ids, random_gemma, random_llama

PROMPT = 40
EVICTING = [cls for cls in METHODS.values() if cls.slot == "cache" and cls.name != "dense" and not cls.selects]


def small(cls, budget):
    """The method with knobs that fit prompts of a few dozen tokens, and models nothing was trained for."""
    fitting = {"window": 2 if cls.name == "lazy-eviction" else 8, "mode": "pseudo"}
    return cls(budget=budget, **{name: value for name, value in fitting.items() if name in cls.__dataclass_fields__})


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return calibrate_all(wb.load((random_llama(), tiny.tokenizer)))


def started(lm: wb.LM, method=None, new_tokens: int = 0, **options) -> wb.Session:
    session = wb.Session(lm, method, **options)
    session.prefill(ids(PROMPT)[0].tolist())
    for _ in range(new_tokens):
        session.step()
    return session


def held(session: wb.Session, row: int = 0) -> list[list[set[int]]]:
    """Positions held, by layer and kv head."""
    return [[set(head.tolist()) - {-1} for head in layer.store.positions[row]] for layer in session._cache.layers]


def counts(session: wb.Session) -> set[float]:
    """Tokens each head holds, on average over the layers, which may share their budget unevenly; if ragged, over heads too."""
    by_head = zip(*held(session), strict=True)
    if getattr(session.setup.cache, "ragged", False):
        return {sum(len(head) for layer in held(session) for head in layer) / sum(map(len, held(session)))}
    return {sum(len(layer) for layer in layers) / len(layers) for layers in by_head}


@pytest.mark.parametrize("cls", [cls for cls in METHODS.values() if cls.slot == "cache"], ids=lambda cls: cls.name)
def test_a_swap_to_the_same_method_changes_nothing(lm, cls):
    method = cls() if cls.name == "dense" else small(cls, 0.4)
    left_alone, swapped = started(lm, method, 3), started(lm, method, 3)
    swapped.swap(method)
    for _ in range(5):
        assert torch.equal(left_alone.step(), swapped.step())
    assert held(swapped) == held(left_alone) and swapped.trace.meta["swaps"] == []


@pytest.mark.parametrize("cls", EVICTING, ids=lambda cls: cls.name)
def test_a_method_swapped_in_decides_in_the_next_call(lm, cls):
    session, dense = started(lm), started(lm)
    before = session.physical_bytes
    method = small(cls, 0.4)
    session.swap(method)
    assert counts(session) == {PROMPT}
    for _ in range(method.every):
        assert counts(session) == {len(session.tokens[0])}
        assert torch.equal(session.step(), dense.step())
    assert counts(session) == {16}
    assert session.physical_bytes < before
    session.generate(4, stop_at_end=False)
    limits = [layer.limits()[0] for layer in session._cache.layers]
    assert counts(session) == ({sum(limits) / 3} if "decode" in method.acts else {20})


@pytest.mark.parametrize("cls", EVICTING, ids=lambda cls: cls.name)
def test_a_method_swapped_in_before_a_further_turn_decides_after_it(lm, cls):
    session = started(lm)
    session.swap(small(cls, 12))
    session.append(ids(5, seed=2)[0].tolist())
    assert counts(session) == {12}


def test_tokens_before_the_swap_are_unchanged(lm):
    dense, session = started(lm, None, 6), started(lm, None, 6)
    session.swap(wb.StreamingLLM(budget=0.2))
    session.generate(6, stop_at_end=False)
    assert session.tokens[0][: PROMPT + 6] == dense.tokens[0]


def test_evicted_positions_never_return_after_any_sequence_of_swaps(lm):
    session = started(lm)
    before = held(session)
    for number, method in enumerate(
        [wb.SnapKV(budget=0.8, window=8), wb.H2O(budget=0.5), wb.Dense(), wb.StreamingLLM(budget=0.9), wb.H2O(budget=0.3), None]
    ):
        session.swap(method)
        for step in range(3):
            session.step()
            newest = PROMPT + 3 * number + step
            now = held(session)
            for old_layer, layer in zip(before, now, strict=True):
                assert all(head <= old_head | {newest} for old_head, head in zip(old_layer, layer, strict=True))
            before = now
    # The last budget was 12 tokens, three steps under dense came after it.
    assert counts(session) == {15}


def test_a_fraction_is_one_of_the_prompt(lm):
    session = started(lm, None, 20)
    session.swap(wb.H2O(budget=0.5))
    session.step()
    assert counts(session) == {PROMPT // 2}


def test_accumulated_attention_starts_at_the_swap_and_is_freed_by_the_next(lm):
    session = started(lm)
    session.swap(wb.H2O(budget=1000))
    assert all(layer.store.side["mass"].sum() == 0 for layer in session._cache.layers)
    session.step()
    for layer in session._cache.layers:
        torch.testing.assert_close(
            layer.store.side["mass"].sum(-1), torch.full((1, 2), 2.0)
        )  # one query a query head, two in a group
    with_mass = session.physical_bytes
    session.swap(wb.H2O(budget=999))
    assert all(layer.store.side["mass"].sum() > 0 for layer in session._cache.layers)
    session.swap(None)
    slots = session._cache.layers[0].store._buffers["keys"].shape[2]
    assert with_mass - session.physical_bytes == 3 * 2 * slots * 4  # layers, kv heads, slots, bytes of a float32


def test_a_batch_swaps_like_each_prompt_alone(lm):
    prompts = [ids(length, seed=length)[0].tolist() for length in (40, 9, 23)]

    def run(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        session = wb.Session(lm, wb.H2O(budget=0.6))
        session.prefill(rows)
        first = session.generate(3, stop_at_end=False).ids
        session.swap(wb.SnapKV(budget=0.4, window=8))
        second = session.generate(5, stop_at_end=False).ids
        session.swap(wb.StreamingLLM(budget=6))
        return tuple(a + b + c for a, b, c in zip(first, second, session.generate(5, stop_at_end=False).ids, strict=True))

    assert run(prompts) == tuple(run([prompt])[0] for prompt in prompts)


def test_sliding_layers_are_left_alone(tiny):
    session = started(wb.load((random_gemma(), tiny.tokenizer)))
    session.swap(wb.H2O(budget=0.2))
    session.generate(3, stop_at_end=False)
    assert set(session.trace.table("evictions")["layer"]) == {1}
    assert ["mass" in layer.store.side for layer in session._cache.layers] == [False, True, False]


def test_branches_and_swaps_do_not_touch_each_other(lm):
    session = started(lm)
    expected = session.branch().generate(8, stop_at_end=False).ids
    fork = session.branch()
    fork.swap(wb.StreamingLLM(budget=0.2))
    fork_of_fork = fork.branch()
    assert fork.generate(8, stop_at_end=False).ids == fork_of_fork.generate(8, stop_at_end=False).ids
    assert session.generate(8, stop_at_end=False).ids == expected
    assert counts(fork) == counts(fork_of_fork) == {8} and counts(session) == {PROMPT + 8}
    assert session.trace.meta["swaps"] == []
    assert fork_of_fork.trace.setup == "streaming-llm(budget=0.2)"


def test_the_trace_says_which_method_ruled_each_step(lm, tmp_path):
    session = started(lm, wb.SnapKV(budget=0.5, window=8), 2, out=tmp_path / "run.trace")
    session.swap(wb.StreamingLLM(budget=10))
    session.generate(2, stop_at_end=False)
    session.swap(wb.Dense())
    session.generate(1, stop_at_end=False)
    snapkv, streaming = "snapkv(budget=0.5, window=8)", "streaming-llm(budget=10)"
    assert wb.Trace.load(tmp_path / "run.trace").meta["swaps"][-1] == {"step": 5, "from": streaming, "to": "dense"}
    session.close()
    trace = wb.Trace.load(tmp_path / "run.trace")
    assert trace.table("steps")["setup"].tolist() == [snapkv] * 3 + [streaming] * 2 + ["dense"]
    assert trace.setup == f"{snapkv}, then {streaming}, then dense" and trace.setup in trace._repr_html_()
    promised = trace.table("cache").groupby("step")["nominal_bytes"].last() // (2 * 2 * 8 * 4)
    assert promised.tolist() == [20, 20, 20, 10, 10, 45]


def test_what_fired_is_counted_over_all_methods(lm):
    session = started(lm, wb.SnapKV(budget=0.5, window=8), 2)
    assert str(fired(session.trace, [0, 1, 2])) == "fired on 3/3 layers, 1/1 steps"
    session.swap(wb.H2O(budget=10))
    session.generate(4, stop_at_end=False)
    session.swap(None)
    session.generate(3, stop_at_end=False)
    assert str(fired(session.trace, [0, 1, 2])) == "fired on 3/3 layers, 5/5 steps"


def test_a_profile_around_a_swap_sees_the_same_bytes(lm):
    with wb.profile(lm.model) as prof:
        session = started(lm, None, 2)
        session.swap(wb.H2O(budget=0.3))
        session.generate(3, stop_at_end=False)
    columns = ["held_tokens", "physical_bytes"]
    own = session.trace.table("cache").groupby(["step", "layer"])[columns].last()
    seen = prof.trace.table("cache").groupby(["step", "layer"])[columns].last()
    assert own.equals(seen)


def test_a_swap_before_the_prompt_is_a_choice_of_method(lm):
    session = wb.Session(lm)
    session.swap(wb.StreamingLLM(budget=0.2))
    session.prefill(ids(PROMPT)[0].tolist())
    session.generate(3, stop_at_end=False)
    assert counts(session) == {8} and set(session.trace.table("steps")["setup"]) == {"streaming-llm(budget=0.2)"}
    with pytest.raises(wb.UserError, match="is not a method"):
        session.swap("h2o")
