"""Quest and MPCache: the sheets' properties and worked examples, and what the trace says of what was read."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import workbench as wb
from workbench.cost.metrics import fired
from workbench.engine.cache import engine_cache
from workbench.engine.call import Call
from workbench.engine.policy import LayerState, PageLevel, ReadState
from workbench.engine.selection import Pages
from workbench.engine.stores.rectangular import RectangularStore
from workbench.methods.cache.mpcache import centres
from workbench.methods.cache.quest import page_scores
from workbench.testing import footprint, ids, random_llama, random_model
from workbench.trace.store import TraceWriter


@pytest.fixture(params=[1, 2, 4], ids=["MQA", "GQA", "MHA"])
def lm(request, tiny) -> wb.LM:
    return wb.load((random_llama(request.param), tiny.tokenizer))


def level(keys: torch.Tensor, size: int) -> PageLevel:
    """The bounds of keys `[B, H, N, D]`, N a multiple of the size."""
    pages = keys.unflatten(2, (-1, size))
    return PageLevel(size, pages.amax(3), pages.amin(3), torch.ones(pages.shape[:3], dtype=torch.bool))


def filled_store(keys: torch.Tensor, positions: torch.Tensor | None = None) -> RectangularStore:
    store = RectangularStore()
    positions = torch.arange(keys.shape[2], dtype=torch.int32)[None] if positions is None else positions
    store.append(keys, keys, positions.expand(len(keys), -1), has_padding=bool((positions < 0).any()))
    return store


def run(lm, method, length, steps):
    session = wb.Session(lm, method)
    session.prefill(ids(length)[0].tolist())
    for _ in range(steps):
        session.step()
    return session


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_page_scores_no_less_than_any_of_its_keys(num_kv_heads):
    torch.manual_seed(0)
    keys, query = torch.randn(2, num_kv_heads, 48, 8), torch.randn(2, 4, 1, 8)
    scores = page_scores(query, level(keys, 16))
    logits = (query @ keys.repeat_interleave(4 // num_kv_heads, 1).transpose(-1, -2)).squeeze(2)
    assert (scores + 1e-6 >= logits.unflatten(2, (-1, 16)).amax(3)).all()
    expected = torch.maximum(*(query * bound.repeat_interleave(4 // num_kv_heads, 1) for bound in bounds(keys))).sum(-1)
    torch.testing.assert_close(scores, expected)


def bounds(keys):
    both = level(keys, 16)
    return both.highest, both.lowest


def test_worked_example_of_both_scores():
    """q = [1 -1], keys [2 0] and [3 -1]: Quest scores 4, the true maximum; MPCache 3.0, which is no bound."""
    query, keys = torch.tensor([1.0, -1]).view(1, 1, 1, 2), torch.tensor([[2.0, 0], [3, -1]]).view(1, 1, 2, 2)
    cluster = level(keys, 2)
    assert cluster.highest.flatten().tolist() == [3, 0] and cluster.lowest.flatten().tolist() == [2, -1]
    assert page_scores(query, cluster).item() == 4 == (query * keys).sum(-1).max().item()
    centre = centres(cluster, 0.6)
    torch.testing.assert_close(centre.flatten(), torch.tensor([2.6, -0.4]))
    assert (query * centre).sum().item() == pytest.approx(3.0)


def test_mpcache_similarity_is_a_product_with_one_vector():
    torch.manual_seed(1)
    keys, query = torch.randn(1, 2, 64, 8), torch.randn(1, 4, 1, 8)
    both = level(keys, 16)
    for alpha in (0.0, 0.5, 0.6, 1.0):
        grouped = query.view(1, 2, 2, 1, 8)
        terms = alpha * grouped * both.highest[:, :, None] + (1 - alpha) * grouped * both.lowest[:, :, None]
        given = wb.MPCache(alpha=alpha)._similarity(query, both)
        torch.testing.assert_close(given, terms.sum(-1).mean(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(centres(both, 0.5), (both.highest + both.lowest) / 2)
    torch.testing.assert_close(
        wb.MPCache(alpha=1.0)._similarity(query.abs(), both), page_scores(query.abs(), both).view(1, 2, 2, -1).mean(2)
    )


@pytest.mark.parametrize("calls", [[1] * 40, [37, 1, 1, 1], [5, 30, 1, 4], [40]])
def test_bounds_kept_up_to_date_equal_those_computed_anew(calls):
    """Pages begin at a row's first token, so one of the two rows, padded on the left, has pages of its own."""
    torch.manual_seed(2)
    keys = torch.randn(2, 2, 40, 4)
    padding = torch.tensor([0, 3 if calls[0] > 3 else 0])
    positions = (torch.arange(40)[None] - padding[:, None]).clamp(min=-1).int()
    store, kept, start = RectangularStore(), Pages((8, 4)), 0
    for count in calls:
        part = slice(start, start + count)
        store.append(keys[:, :, part], keys[:, :, part], positions[:, part], has_padding=bool((positions[:, part] < 0).any()))
        kept.add(store, count)
        start += count
    anew = Pages((8, 4))
    anew.rebuild(store)
    for one, other in zip(kept.levels(40), anew.levels(40), strict=True):
        assert torch.equal(one.there, other.there)
        assert torch.equal(one.highest[one.there], other.highest[one.there])
        assert torch.equal(one.lowest[one.there], other.lowest[one.there])
        for row, missing in enumerate(padding.tolist()):
            for page, start in enumerate(range(missing, 40, one.size)):
                inside = keys[row, :, start : min(start + one.size, 40)]
                assert torch.equal(one.highest[row, :, page], inside.amax(1))
                assert torch.equal(one.lowest[row, :, page], inside.amin(1))


def test_a_row_that_reads_everything_lets_others_read_less():
    store, pages = RectangularStore(), Pages((4,))
    keys = torch.randn(2, 2, 10, 4, generator=torch.Generator().manual_seed(0))
    store.append(keys, keys, torch.arange(10, dtype=torch.int32).expand(2, -1), has_padding=False)
    pages.add(store, 10)
    chosen = torch.tensor([[[True, True, True], [False, True, False]], [[False, True, False], [True, False, False]]])
    source = pages.gather(store, chosen)
    read = [[sorted(set(head.tolist()) - {-1}) for head in row] for row in source.positions]
    assert read == [[list(range(10))] * 2, [[4, 5, 6, 7], [0, 1, 2, 3]]]
    assert pages.gather(store, chosen[:, :1] | chosen[:1, :1]) is None


@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_quest_equals_a_masked_full_cache(lm, page, share_heads):
    """Plain transformers where every query head masks all but the pages of highest bound; pages of one are exact top-k."""
    prompt, budget = ids(70)[0].tolist(), 20
    session = wb.Session(lm, wb.Quest(budget=budget, page=page, dense_layers=1, share_heads=share_heads))
    session.prefill(prompt)
    group = lm.anatomy.layers[0].attention.group
    cache = DynamicCache()
    with torch.no_grad():
        lm.model(torch.tensor([prompt]), past_key_values=cache)

    def masked(module, query, key, value, attention_mask, scaling, **_):
        key, value = (states.repeat_interleave(group, 1) for states in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        length = key.shape[2]
        bounds = []
        for head in range(query.shape[1]):
            pages = [key[0, head, start : start + page] for start in range(0, length, page)]
            q = query[0, head, 0]
            bounds.append([float(torch.maximum(q * each.amax(0), q * each.amin(0)).sum()) for each in pages])
        for head in range(query.shape[1]):
            first = head // group * group
            mates = bounds[first : first + group] if share_heads else [bounds[head]]
            best = [max(column) for column in zip(*mates, strict=True)]
            chosen = sorted(range(len(best)), key=lambda number: -best[number])[: max(3, budget // page)]
            visible = torch.zeros(length, dtype=torch.bool)
            for number in chosen:
                visible[number * page : (number + 1) * page] = True
            if module.layer_idx >= 1:
                scores[:, head, :, ~visible] = -math.inf
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    for token in (7, 8, 9):
        AttentionInterface._global_mapping["masked_oracle"] = masked
        lm.model.config._attn_implementation_internal = "masked_oracle"
        try:
            with torch.no_grad():
                expected = lm.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        finally:
            lm.model.config._attn_implementation_internal = "sdpa"
            del AttentionInterface._global_mapping["masked_oracle"]
        torch.testing.assert_close(session.step([token])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("page", [1, 4, 16])
def test_quest_with_the_whole_text_as_budget_is_dense(lm, page):
    dense = run(lm, None, 50, 6).logits
    for budget in (56, 57, 1000):
        assert torch.equal(run(lm, wb.Quest(budget=budget, page=page, dense_layers=0), 50, 6).logits, dense)
    assert torch.equal(run(lm, wb.Quest(budget=1, page=page, dense_layers=3), 50, 6).logits, dense)
    assert not torch.equal(run(lm, wb.Quest(budget=1, page=page, dense_layers=2), 50, 6).logits, dense)


def test_mpcache_with_every_share_at_one_is_dense(lm):
    for static in ("topk", "code"):
        method = wb.MPCache(budget=1.0, static=static, theta=0.0, ratio1=1.0, ratio2=1.0)
        assert torch.equal(run(lm, method, 80, 20).logits, run(lm, None, 80, 20).logits)


@pytest.mark.parametrize("length", [100, 333])
def test_mpcache_reads_no_more_than_its_share_and_two_clusters(lm, length):
    session = run(lm, wb.MPCache(budget=0.06), length, 40)
    calls = session.trace.table("attention").query("step > 0")
    clusters = -(-calls["kv_held"] // 16)
    assert (calls["kv_held"] == round(round(0.06 * length) / 0.2) + calls["step"]).all()
    assert (calls["kv_read"] <= 16 * ((clusters * 0.2).astype(int) + 2)).all()


def test_mpcache_hierarchy_and_its_first_and_last_cluster():
    """128 tokens; the likeliest cluster of 16 lies in an unlikely one of 32, so it is never looked at."""
    keys = torch.zeros(1, 1, 128, 1)
    keys[0, 0, :, 0] = torch.tensor([0.0, 0, 5, 5, -30, 9, 4, 0]).repeat_interleave(16)
    store, pages = filled_store(keys), Pages((32, 16))
    pages.rebuild(store)
    state = ReadState(torch.ones(1, 1, 1, 1), pages.levels(128), 0, (128,), (640,))
    method = wb.MPCache(budget=26, ratio2=0.25, alpha=0.5)  # a quarter of 8 clusters; half of 4 pairs: means 0, 5, -10.5, 2
    assert method.select(state)[0, 0].nonzero().flatten().tolist() == [0, 2, 3, 7]
    source = pages.gather(store, method.select(state))
    assert source is not None and sorted(source.positions[0, 0].tolist()) == [*range(16), *range(32, 64), *range(112, 128)]


def test_mpcache_static_sets():
    """Of ten queries two vote. Head mean of their attention: masked and scaled under topk, neither under code."""
    torch.manual_seed(3)
    queries, keys = torch.randn(1, 4, 10, 6) * 2, torch.randn(1, 2, 10, 6)
    positions = torch.arange(10).expand(1, 2, 10)
    state = LayerState(keys, keys, positions, torch.tensor([4]), 6**-0.5, 0, 1, "prefill", queries)
    total, best = [0.0] * 10, [0.0] * 10
    for query in (8, 9):
        plain = [0.0] * 10
        for head in range(4):
            dots = [float(queries[0, head, query] @ keys[0, head // 2, j]) for j in range(10)]
            scaled = [math.exp(dot / math.sqrt(6)) if j <= query else 0.0 for j, dot in enumerate(dots)]
            for j in range(10):
                total[j] += scaled[j] / sum(scaled) / 4
                plain[j] += math.exp(dots[j]) / sum(map(math.exp, dots)) / 4
        best = list(map(max, best, plain))
    ranked = sorted(range(10), key=lambda j: -total[j])[:4]
    by_code = sorted(range(10), key=lambda j: -best[j])[:4]
    theta = (best[by_code[1]] + best[by_code[2]]) / 2
    for method, expected in (
        (wb.MPCache(budget=4, ratio2=1.0), ranked),
        (wb.MPCache(budget=4, ratio2=1.0, static="code"), by_code),
        (wb.MPCache(budget=4, ratio2=1.0, static="code", theta=theta), by_code[:2]),
        (wb.MPCache(budget=4, ratio2=1.0, static="code", theta=1.0), by_code[:1]),
    ):
        mask = method.keep(state)
        assert all(mask[0, head].nonzero().flatten().tolist() == sorted(expected) for head in range(2))


@pytest.mark.parametrize("name", ["quest", "mpcache"])
def test_a_short_row_of_a_batch_reads_what_it_reads_alone(lm, name):
    long, short = ids(90)[0].tolist(), ids(61, seed=5)[0].tolist()
    method = wb.Quest(budget=0.3, page=4, dense_layers=0) if name == "quest" else wb.MPCache(budget=0.1)
    together, alone = wb.Session(lm, method), wb.Session(lm, method)
    together.prefill([long, short])
    alone.prefill(short)
    for token in (4, 5, 6):
        both = together.step([token, token])
        torch.testing.assert_close(both[1], alone.step([token])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_scores_that_are_bounded_or_share_with_sinks_are_selected_too(tiny, family):
    """With one page fewer than all, by a query that gives the rest nothing to speak of, the result is close to dense."""
    lm = wb.load((random_model(family), tiny.tokenizer))
    prompt = ids(60)[0].tolist()
    dense = wb.Session(lm)
    dense.prefill(prompt)
    session = wb.Session(lm, wb.Quest(budget=59, page=1, dense_layers=0))
    session.prefill(prompt)
    torch.testing.assert_close(session.step([3]), dense.step([3]), atol=0.05, rtol=0.05)
    assert fired(session.trace, []).steps == 1


def test_the_trace_counts_what_is_read_and_what_choosing_costs(tiny):
    lm = wb.load((random_llama(2), tiny.tokenizer))
    traces = {}
    for method in (None, wb.Quest(budget=64, dense_layers=1), wb.Quest(budget=64, dense_layers=1, share_heads=False)):
        session = run(lm, method, 200, 1)
        traces[session.setup.label] = session.trace
        if method is not None:
            layers = session._cache.layers
            # Maximum and minimum, 2 heads, 13 pages and one in reserve; the dense layer has none.
            assert layers[0].pages is None and [each.pages.nbytes for each in layers[1:]] == 2 * [2 * 2 * 14 * 8 * 4]
            assert session.physical_bytes == sum(each.store.nbytes for each in layers) + 2 * layers[1].pages.nbytes
            held = session.trace.table("cache").query("step == 1 and op == 'append'")["physical_bytes"].sum()
            assert held == session.physical_bytes
    _, shared, own = traces.values()
    for trace in (shared, own):
        assert trace.table("attention").query("step == 1")["kv_read"].tolist() == [201, 64, 64]
        assert trace.table("attention").query("step == 1")["kv_held"].tolist() == [201, 201, 201]
        assert (trace.table("attention").query("step == 1 and layer > 0")["pairs"] <= 64).all()
    moved = {name: trace.bytes(by=["step", "component"]).query("step == 1") for name, trace in traces.items()}
    scores = [frame.query("component == 'attention.scores'")["bytes"].sum() for frame in moved.values()]
    a_token = 2 * 2 * 8 * 4  # K and V of 2 heads of 8 floats
    assert scores[0] - scores[1] == 2 * (201 - 64) * a_token and scores[1] == scores[2]
    method = [frame.query("component == 'method'")["bytes"].sum() for frame in moved.values()]
    choosing = 2 * 2 * (13 + 2) * 8 * 4 + 4 * 13 * 4  # bounds read, a page's written, a score a query head and page
    assert method == [0, 2 * choosing, 2 * (choosing + 64 * a_token)]  # each of two query heads reads 64 tokens of its own
    products = [trace.flops(by=["step", "component"]).query("step == 1 and component == 'method'") for trace in (shared, own)]
    assert all(frame["flops"].sum() == 2 * 4 * 4 * 13 * 8 for frame in products)


def test_a_selection_fires_where_less_was_read_than_held(tiny):
    lm = wb.load((random_llama(2), tiny.tokenizer))
    trace = run(lm, wb.Quest(budget=64, dense_layers=1), 70, 20).trace
    # 71 tokens are 5 pages and 4 are read; from 81 on, 6
    assert dataclasses.astuple(fired(trace, [])) == (2, 2, 20, 20)
    assert dataclasses.astuple(fired(run(lm, wb.Quest(budget=96), 70, 20).trace, [])) == (0, 0, 0, 0)
    trace = run(lm, wb.MPCache(budget=0.1), 200, 5).trace
    assert dataclasses.astuple(fired(trace, [0, 1, 2])) == (3, 3, 6, 6)


def test_a_selection_that_reads_everything_is_found_out(tiny):
    @wb.register
    @dataclasses.dataclass(frozen=True)
    class Lazy(wb.Quest):
        """Says it reads a few pages and reads all."""

        name = "lazy"

        def select(self, state):
            return state.levels[0].there

    workload = wb.workloads.recall(context=96, samples=1, facts=1)
    try:
        with pytest.raises(wb.MethodDidNotFire, match=r"lazy.*on 0 of 2 layers and at 0 of \d+ steps"):
            wb.compare(tiny, workload, ["lazy:budget=0.5"])
    finally:
        del wb.METHODS._entries["lazy"]
    row = wb.compare(tiny, workload, ["quest:budget=0.5"]).rows[1]
    assert (row.fired_layers, row.layers) == (2, 2) and 0 < row.fired_steps == row.steps
    assert row.kl_to_dense > 0


def test_swapping_to_a_selection_and_back(lm):
    session = wb.Session(lm, wb.H2O(budget=60))
    session.prefill(ids(90)[0].tolist())
    session.step()
    session.swap(wb.Quest(budget=32, page=4, dense_layers=0))
    session.step()
    branch = session.branch()
    assert torch.equal(branch.step([5]), session.step([5]))
    calls = session.trace.table("attention").query("step == 3")
    assert calls["kv_read"].tolist() == [32] * 3 and calls["kv_held"].tolist() == [62] * 3
    session.swap(None)
    session.step([6])
    assert (session.trace.table("attention").query("step == 4")["kv_read"] == 63).all()
    assert session.physical_bytes == sum(layer.store.nbytes for layer in session._cache.layers)


@pytest.mark.parametrize("method", [wb.Quest(budget=24, page=4, dense_layers=0), wb.MPCache(budget=0.1)])
def test_an_appended_turn_reads_everything_and_enters_the_bounds(lm, method):
    session = run(lm, method, 80, 2)
    session.append(ids(9, seed=3)[0].tolist())
    session.step([4])
    calls = session.trace.table("attention")
    turn, step = calls[calls["step"] == 3], calls[calls["step"] == 4]
    assert (turn["kv_read"] == turn["kv_held"]).all() and (step["kv_read"] < step["kv_held"]).all()
    for layer in session._cache.layers:
        anew = Pages(layer.pages.sizes)
        anew.rebuild(layer.store)
        for one, other in zip(layer.pages.levels(layer.store.length), anew.levels(layer.store.length), strict=True):
            assert torch.equal(one.highest, other.highest) and torch.equal(one.lowest, other.lowest)


def test_importance_of_a_selecting_step_is_that_of_what_it_read(lm):
    session = wb.Session(lm, wb.Quest(budget=16, page=4, dense_layers=0), importance="decode")
    session.prefill(ids(60)[0].tolist())
    session.step()
    rows = session.trace.table("importance")
    assert len(rows) == 3 * 4
    for row in rows.itertuples():
        assert (row.mass > 0).sum() <= 16 and row.mass.astype(float).sum() == pytest.approx(1, abs=5e-3)


LAYERS, FOLLOWERS = 9, {3: 2, 5: 4}
"""Of nine layers 0, 1, 7 and 8 choose for themselves, and so do the even ones, which choose for the odd ones after them."""


@pytest.fixture
def deep(tiny) -> wb.LM:
    return wb.load((random_llama(num_hidden_layers=LAYERS), tiny.tokenizer))


@pytest.mark.parametrize(
    ("count", "followers"), [(6, {3: 2}), (7, {3: 2}), (8, {3: 2, 5: 4}), (9, FOLLOWERS), (10, {3: 2, 5: 4, 7: 6})]
)
def test_odd_layers_follow_but_for_the_outer_ones(count, followers):
    method = wb.MPCache(share_layers=True)
    assert {number: leader for number in range(count) if (leader := method.leader(number, count)) is not None} == followers
    assert not any(wb.MPCache().leader(number, count) for number in range(count))


@pytest.mark.parametrize("static", ["topk", "code"])
def test_layers_that_share_keep_and_read_the_same(deep, static):
    """Followers what their leaders do, and these what they would without sharing, as far as nothing before them differs."""
    chosen = []

    class Watched(wb.MPCache):
        def select(self, state):
            chosen.append((state.layer, super().select(state)))
            return chosen[-1][1]

    session = run(deep, Watched(budget=0.1, static=static, share_layers=True), 200, 0)
    own = run(deep, wb.MPCache(budget=0.1, static=static), 200, 0)
    kept = [layer.store.positions for layer in session._cache.layers]
    assert all(torch.equal(kept[layer], kept[leader]) for layer, leader in FOLLOWERS.items())
    for layer in set(range(LAYERS)) - set(FOLLOWERS):
        assert torch.equal(kept[layer], own._cache.layers[layer].store.positions)
    assert not torch.equal(kept[3], own._cache.layers[3].store.positions)
    read = {}
    for layer in session._cache.layers:
        gather = layer.pages.gather
        layer.pages.gather = lambda store, pages, gather=gather, index=layer.index: read.setdefault(index, gather(store, pages))
    session.step()
    assert [layer for layer, _ in chosen] == sorted(set(range(LAYERS)) - set(FOLLOWERS))
    for layer, leader in FOLLOWERS.items():
        assert torch.equal(read[layer].positions, read[leader].positions)
        assert not torch.equal(read[layer].keys, read[leader].keys)
    assert not torch.equal(read[7].positions, read[6].positions)


def test_layers_that_follow_pay_nothing_for_choosing(deep):
    session = run(deep, wb.MPCache(budget=0.1, share_layers=True), 200, 6)
    cache = session.trace.table("cache")
    assert set(cache.query("op == 'score'")["layer"]) == set(range(LAYERS)) - set(FOLLOWERS)
    followed = cache[cache["layer"].isin(FOLLOWERS)]
    assert (followed[["extra_flops"]] == 0).all().all() and (followed.query("op == 'select'")["extra_bytes"] == 0).all()
    for layer in session._cache.layers:
        assert (layer.pages.nbytes == 0) == (layer.index in FOLLOWERS)
    own = run(deep, wb.MPCache(budget=0.1), 200, 6)
    assert dataclasses.astuple(fired(session.trace, [])) == dataclasses.astuple(fired(own.trace, [])) == (LAYERS, LAYERS, 7, 7)
    spent = [trace.flops(by="component").set_index("component")["flops"]["method"] for trace in (own.trace, session.trace)]
    assert spent[1] * LAYERS == spent[0] * (LAYERS - len(FOLLOWERS))
    assert own.physical_bytes > session.physical_bytes


def test_a_replay_shares_as_a_session_does(deep):
    """One layer at a time could not."""
    method = wb.MPCache(budget=0.1, share_layers=True)
    recording = wb.record(deep, ids(200)[0].tolist(), new_tokens=3)
    point = wb.replay(recording, [method], [0.1]).points[0]
    session = run(deep, method, 200, 0)
    for layer, gone in enumerate(torch.from_numpy(point.gone)):
        for head in range(2):
            held = session._cache.layers[layer].store.positions[0, head].tolist()
            assert set((gone[head, :200] > 0).nonzero().flatten().tolist()) == set(held)
    with pytest.raises(
        wb.UserError, match=r"lets layers choose for others, and layers \[0, 1, 2, 4, 5, 6, 7, 8\] were not recorded"
    ):
        wb.replay(wb.record(deep, ids(200)[0].tolist(), new_tokens=3, layers=[3]), [method], [0.1])


def test_sharing_with_every_share_at_one_is_dense(deep):
    method = wb.MPCache(budget=1.0, ratio1=1.0, ratio2=1.0, share_layers=True)
    assert torch.equal(run(deep, method, 80, 20).logits, run(deep, None, 80, 20).logits)


def test_layers_share_in_a_branch_after_a_turn_and_in_a_batch(deep):
    before = footprint(deep.model)
    method = wb.MPCache(budget=0.1, share_layers=True)
    session = run(deep, method, 120, 2)
    fork = session.branch()
    assert torch.equal(fork.append(ids(9, seed=3)[0].tolist()), session.append(ids(9, seed=3)[0].tolist()))
    assert torch.equal(fork.step([4]), session.step([4])) and torch.equal(fork.step([7]), session.step([7]))
    long, short = ids(150)[0].tolist(), ids(101, seed=5)[0].tolist()
    together, alone = wb.Session(deep, method), wb.Session(deep, method)
    together.prefill([long, short])
    alone.prefill(short)
    for token in (4, 5, 6):
        both = together.step([token, token])
        torch.testing.assert_close(both[1], alone.step([token])[0], atol=1e-4, rtol=1e-4)
    assert footprint(deep.model) == before


@pytest.mark.parametrize(("first", "shares"), [(None, True), (wb.StreamingLLM(budget=60), True), (wb.SnapKV(budget=60), False)])
def test_a_swap_lets_layers_share_that_hold_the_same(deep, first, shares):
    session = run(deep, first, 200, 1)
    session.swap(wb.MPCache(budget=12, share_layers=True))
    session.step()
    session.step()
    step = session.trace.table("cache").query("step == 3 and op == 'score'")
    assert set(step["layer"]) == set(range(LAYERS)) - (set(FOLLOWERS) if shares else set())
    for layer, leader in FOLLOWERS.items():
        positions = [session._cache.layers[index].store.positions for index in (layer, leader)]
        assert torch.equal(*positions) == shares
    session.swap(wb.MPCache(budget=12))
    session.step()
    assert set(session.trace.table("cache").query("step == 4 and op == 'score'")["layer"]) == set(range(LAYERS))


def test_sharing_is_refused_where_no_layer_could_share(tiny, deep):
    with pytest.raises(
        wb.UserError, match="where 6 or more have no sliding window, and this model has 4; use mpcache with share"
    ):
        wb.Session(tiny, wb.MPCache(share_layers=True))
    session = run(tiny, None, 30, 1)
    with pytest.raises(wb.UserError, match="this model has 4"):
        session.swap(wb.MPCache(share_layers=True))
    assert session.setup.label == "dense" and session.step().shape[0] == 1
    attention = dataclasses.replace(deep.anatomy.layers[3].attention, num_kv_heads=4)
    layers = list(deep.anatomy.layers)
    layers[3] = dataclasses.replace(layers[3], attention=attention)
    uneven = dataclasses.replace(deep.anatomy, layers=tuple(layers))
    with pytest.raises(wb.UserError, match="lets layer 3 take the choices of layer 2, but they have 4 and 2 kv heads"):
        engine_cache(deep.model, uneven, wb.MPCache(share_layers=True), Call(TraceWriter({})))
