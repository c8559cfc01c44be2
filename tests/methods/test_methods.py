"""Properties of every registered method, and the sheets' worked examples for each."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import workbench as wb
from workbench.engine.policy import THINNING, LayerState
from workbench.methods import METHODS, describe, parse_method
from workbench.probes.rotation import Rotation
from workbench.testing import calibrate_all, ids, random_gemma, random_llama


class Variant:
    """A method class with a knob that changes what it does, for tests that take a class."""

    def __init__(self, cls, **knobs):
        self.cls, self.knobs = cls, knobs
        self.name = f"{cls.name}-{'-'.join(knobs)}"

    def __call__(self, **knobs):
        return self.cls(**self.knobs, **knobs)

    def __getattr__(self, name):
        return getattr(self.cls, name)


VARIANTS = [Variant(wb.EMS, head_adaptive=True), Variant(wb.DuoAttention, gates="prompt")]
ACTING = [cls for cls in METHODS.values() if cls.slot == "cache" and cls.name != "dense"] + VARIANTS
SELECTING = [cls for cls in ACTING if cls.selects]
EVICTING = [cls for cls in ACTING if cls not in SELECTING]
"""Methods whose budget is what they keep; that of those that select is what a decode step reads (`test_selection.py`)."""
AFTER_THE_PROMPT = [cls for cls in ACTING if THINNING not in cls().needs]
"""Methods that leave the prompt's computation as it is."""


def named(cls) -> str:
    return cls.name


@pytest.fixture(params=[1, 2, 4], ids=["MQA", "GQA", "MHA"])
def lm(request, tiny) -> wb.LM:
    return calibrate_all(wb.load((random_llama(request.param), tiny.tokenizer)))


def small(cls, budget, **knobs):
    """The method with knobs that fit prompts of a few dozen tokens, and models nothing was trained for."""
    fitting = {"window": 2 if cls.name == "lazy-eviction" else 8, "mode": "pseudo", "page": 4, "dense_layers": 0, **knobs}
    return cls(budget=budget, **{name: value for name, value in fitting.items() if name in cls.__dataclass_fields__})


def budget_held(session: wb.Session, cls) -> list[float]:
    """Tokens each kv head holds, by layer: the same in each, or on average where they may differ."""
    layers = session._cache.layers
    if cls.ragged:
        return [layer.store.held_tokens() / layer.attention.num_kv_heads for layer in layers]
    return [layer.store.length for layer in layers]


def kept(session: wb.Session, layer: int, head: int) -> set[int]:
    return set(session._cache.layers[layer].store.positions[0, head].tolist()) - {-1}


def state(keys=None, positions=None, capacity=4, mass=None, queries=None, scaling=1.0, phase="prefill") -> LayerState:
    """A layer state of one row and one kv head, unless tensors say otherwise."""
    reference = next(tensor for tensor in (keys, mass) if tensor is not None)
    num_slots = reference.shape[2]
    keys = keys if keys is not None else torch.zeros(1, 1, num_slots, 2)
    positions = torch.arange(num_slots).expand(keys.shape[:3]) if positions is None else positions
    return LayerState(keys, keys, positions, torch.tensor([capacity]), scaling, 0, 1, phase, queries, mass)


@pytest.mark.parametrize("cls", ACTING, ids=named)
@pytest.mark.parametrize("budget", [1.0, 30, 1000])
def test_budget_of_the_whole_prompt_is_dense_bit_for_bit(lm, cls, budget):
    prompt = ids(30)[0].tolist()
    dense, session = wb.Session(lm), wb.Session(lm, small(cls, budget))
    assert torch.equal(session.prefill(prompt), dense.prefill(prompt))
    assert session.trace.table("evictions").empty
    if cls in SELECTING and budget == 1000:
        assert torch.equal(session.step([5]), dense.step([5]))


@pytest.mark.parametrize("cls", AFTER_THE_PROMPT, ids=named)
def test_prefill_logits_are_those_of_dense(lm, cls):
    prompt = ids(40)[0].tolist()
    assert torch.equal(wb.Session(lm, small(cls, 0.3)).prefill(prompt), wb.Session(lm).prefill(prompt))


@pytest.mark.parametrize("cls", EVICTING, ids=named)
@pytest.mark.parametrize("budget", [1, 5, 0.25, 0.9])
def test_budget_is_met_and_memory_is_freed(lm, cls, budget):
    method = small(cls, budget)
    session = wb.Session(lm, method)
    session.prefill(ids(40)[0].tolist())
    limit = method.capacity(40)
    assert limit == (budget if isinstance(budget, int) else round(budget * 40))
    method = session.setup.cache  # which knows its calibration, if it needs one
    shares = method.allocate(40, lm.anatomy.num_layers)
    if method.joint:
        shares = [session._call.capacity[layer][0] for layer in range(lm.anatomy.num_layers)]
    lost = cls is wb.CAKE and 40 in shares  # a layer cannot use more than the prompt, and CAKE shares that out only once
    assert sum(shares) == limit * lm.anatomy.num_layers or (lost and sum(shares) < limit * lm.anatomy.num_layers)
    assert budget_held(session, cls) == (shares if "prefill" in cls().acts else [40] * 3)
    session.generate(20)
    now = [method.grown(share, 40, 60) for share in shares]
    if "decode" in cls().acts:
        assert budget_held(session, cls) == now
    if "prefill" not in cls().acts:
        return
    steps = session.trace.table("steps")
    decided = steps["step"][steps["phase"] != "decode"].max()  # the prompt, or the last step of a rehearsal
    cache = session.trace.table("cache").query(f"op == 'evict' and step == {decided}").groupby("layer").last().reindex(range(3))
    evicted = [share < 40 for share in shares]
    assert cache["held_tokens"].notna().tolist() == evicted
    cache, shares = cache[evicted], [share for share in shares if share < 40]
    num_kv_heads = lm.anatomy.layers[0].attention.num_kv_heads
    assert cache["held_tokens"].tolist() == [share * num_kv_heads for share in shares]
    a_token = lm.anatomy.layers[0].attention.cached_elements * 4
    assert cache["nominal_bytes"].tolist() == [share * a_token for share in shares]


@pytest.mark.parametrize("cls", ACTING, ids=named)
def test_evicted_positions_never_return(lm, cls):
    session = wb.Session(lm, small(cls, 0.3))
    session.prefill(ids(40)[0].tolist())
    before = [
        [kept(session, layer, head) for head in range(lm.anatomy.layers[layer].attention.num_kv_heads)] for layer in range(3)
    ]
    for length in range(41, 55):
        session.step()
        for layer, heads in enumerate(before):
            for head, held in enumerate(heads):
                now = kept(session, layer, head)
                assert now <= held | {length - 1}
                heads[head] = now


@pytest.mark.parametrize("cls", [cls for cls in AFTER_THE_PROMPT if cls not in SELECTING], ids=named)
def test_evicting_equals_masking_a_full_cache(lm, cls):
    """Plain transformers with everything cached, and a mask of what the method evicted, gives the same logits.

    A merge changes K and V of what stays, so EMS is run where it merges nothing.
    """
    prompt = ids(40)[0].tolist()
    session = wb.Session(lm, small(cls, 0.3, tau=2))
    session.prefill(prompt)
    anatomy = lm.anatomy.layers[0].attention
    cache = DynamicCache()
    with torch.no_grad():
        lm.model(torch.tensor([prompt]), past_key_values=cache)
    for token in (7, 8, 9, 10):
        allowed = [[kept(session, layer, head) for head in range(anatomy.num_kv_heads)] for layer in range(3)]

        def masked(module, query, key, value, attention_mask, scaling, allowed=allowed, **_):
            key, value = (states.repeat_interleave(anatomy.group, 1) for states in (key, value))
            scores = query @ key.transpose(-1, -2) * scaling
            last = key.shape[2] - 1
            for head in range(query.shape[1]):
                visible = sorted(allowed[module.layer_idx][head // anatomy.group] | {last})
                hidden = torch.ones(key.shape[2], dtype=torch.bool).index_fill(0, torch.tensor(visible), False)
                scores[:, head, :, hidden] = -math.inf
            return (scores.softmax(-1) @ value).transpose(1, 2), None

        AttentionInterface._global_mapping["masked_oracle"] = masked
        lm.model.config._attn_implementation_internal = "masked_oracle"
        try:
            with torch.no_grad():
                expected = lm.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        finally:
            lm.model.config._attn_implementation_internal = "sdpa"
            del AttentionInterface._global_mapping["masked_oracle"]
        torch.testing.assert_close(session.step([token])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", ACTING, ids=named)
def test_sliding_layers_are_left_alone(tiny, cls):
    lm = calibrate_all(wb.load((random_gemma(), tiny.tokenizer)))
    method = small(cls, 0.1)
    if THINNING in cls().needs:  # sliding layers cannot be thinned, so there is no thinning
        method = dataclasses.replace(method, before=1.0)
    session = wb.Session(lm, method)
    session.prefill(ids(200)[0].tolist())
    session.generate(4)
    layers = {"evict": set(session.trace.table("evictions")["layer"])}
    layers["select"] = set(session.trace.table("cache").query("op == 'select'")["layer"])
    assert layers["evict"] == ({1} if cls().acts else set()) and layers["select"] == ({1} if cls in SELECTING else set())


@pytest.mark.parametrize("cls", METHODS.values(), ids=named)
def test_description_is_complete(cls):
    described = describe(cls)
    assert described["summary"].endswith(".") and described["paper"]
    assert all(knob["help"].endswith(".") and knob["unit"] is not None for knob in described["knobs"])
    assert parse_method(cls.name) == cls()
    if cls.slot == "cache" and cls.name != "dense":
        assert "budget" in cls.__dataclass_fields__
        assert parse_method(f"{cls.name}:budget=0.3") == cls(budget=0.3)
        assert parse_method(f"{cls.name}:budget=30%") == cls(budget=0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "no method named 'nope'.*Known: .*dense"),
        ("snapk", "Did you mean 'snapkv'"),
        ("h2o:colour=3", "no knob 'colour'; its knobs are budget, recent"),
        ("dense:budget=0.5", "it has no knobs"),
        ("h2o:budget", "needs a value"),
        ("h2o:budget=0", "cannot be 0"),
        ("h2o:budget=-1", "cannot be -1"),
        ("h2o:budget=0.0", "cannot be 0.0"),
        ("h2o:budget=1.5", "cannot be 1.5"),
        ("h2o:budget=nan", "cannot be nan"),
        ("h2o:budget=5000%", "'5000%'"),
        ("h2o:budget=lots", "cannot be 'lots'"),
        ("h2o:recent=2", "from 0.0 to 1.0"),
        ("snapkv:window=0", "from 1 to 1024"),
        ("snapkv:window=1.5", "a whole number"),
        ("snapkv:pooling=median", "'avg' or 'max'"),
    ],
)
def test_bad_text_is_one_sentence(text, message):
    with pytest.raises(wb.UserError, match=message) as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("excess", [10**6, 1])
def test_a_new_method_is_one_class(tiny, excess):
    """Registering is the whole of adding a method; one that keeps too much is found out by the comparison."""

    @wb.register
    @dataclasses.dataclass(frozen=True)
    class Greedy(METHODS["streaming-llm"]):
        """Keeps more than its budget."""

        name = "greedy"

        def keep(self, state):
            return super().keep(dataclasses.replace(state, capacity=state.capacity + excess))

    try:
        with pytest.raises(wb.MethodDidNotFire, match=r"greedy.*0 of 4 layers"):
            wb.compare(tiny, wb.workloads.recall(context=96, samples=1, facts=1), ["greedy:budget=0.5"])
    finally:
        del METHODS._entries["greedy"]


def test_streaming_llm_keeps_sinks_and_recent():
    # capacity 6, 4 sinks: {0..3} and the last 2 of 10
    mask = wb.StreamingLLM(budget=6).keep(state(mass=torch.zeros(1, 1, 10), capacity=6))
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9]
    mask = wb.StreamingLLM(budget=3, sinks=0).keep(state(mass=torch.zeros(1, 1, 10), capacity=3))
    assert mask[0, 0].nonzero().flatten().tolist() == [7, 8, 9]


def test_h2o_worked_example():
    """Rows [1], [.5 .5], [.2 .6 .2], [.1 .6 .2 .1] sum to [1.8 1.7 .4 .1]; hh=1, recent=2 keeps {0, 2, 3}."""
    rows = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.6, 0.2, 0], [0.1, 0.6, 0.2, 0.1]])
    mass = rows.sum(0)
    torch.testing.assert_close(mass, torch.tensor([1.8, 1.7, 0.4, 0.1]))
    h2o = wb.H2O(budget=3, recent=0.67)
    mask = h2o.keep(state(mass=mass.view(1, 1, 4), capacity=3))
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 2, 3]
    # The next row [.1 .1 .3 .5] over {0, 2, 3, 4} keeps {0, 3, 4}.
    mass = torch.cat([mass[[0, 2, 3]], torch.zeros(1)]) + torch.tensor([0.1, 0.1, 0.3, 0.5])
    positions = torch.tensor([0, 2, 3, 4]).view(1, 1, 4)
    mask = h2o.keep(state(mass=mass.view(1, 1, 4), positions=positions, capacity=3))
    assert positions[mask].tolist() == [0, 3, 4]


def test_h2o_mass_is_the_column_sum_of_eager_attention(tiny):
    """Over prefill, an appended turn and decoded tokens, of whatever is still held."""
    lm = wb.load((random_llama(attn_implementation="eager"), tiny.tokenizer))
    prompt, turn = ids(20)[0].tolist(), ids(5, seed=1)[0].tolist()
    session = wb.Session(lm, wb.H2O(budget=1000))
    session.prefill(prompt)
    session.append(turn)
    session.step([4])
    with torch.no_grad():
        attentions = lm.model(torch.tensor([[*prompt, *turn, 4]]), output_attentions=True).attentions
    for layer, attention in zip(session._cache.layers, attentions, strict=True):
        expected = attention.sum(2).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(layer.store.side["mass"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_snapkv_equals_a_plain_loop(pooling, kernel):
    """The kept sets of a looping implementation written from the sheet, with no shared code."""
    torch.manual_seed(3)
    num_q_heads, num_kv_heads, length, window, capacity, dim = 4, 2, 37, 6, 15, 8
    queries, keys = torch.randn(1, num_q_heads, length, dim), torch.randn(1, num_kv_heads, length, dim)
    scaling = dim**-0.5
    scores = torch.zeros(num_q_heads, length)
    for head in range(num_q_heads):
        for query in range(length - window, length):
            logits = [float(queries[0, head, query] @ keys[0, head // 2, key]) * scaling for key in range(query + 1)]
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            for key, weight in enumerate(weights):
                scores[head, key] += weight / sum(weights)
    half = kernel // 2
    pooled = torch.zeros_like(scores)
    for head in range(num_q_heads):
        for key in range(length - window):
            around = [float(scores[head, j]) if 0 <= j < length - window else 0.0 for j in range(key - half, key + half + 1)]
            pooled[head, key] = sum(around) / kernel if pooling == "avg" else max(around)
    method = wb.SnapKV(budget=capacity, window=window, kernel=kernel, pooling=pooling)
    mask = method.keep(state(keys=keys, queries=queries, scaling=scaling, capacity=capacity))
    for head in range(num_kv_heads):
        group = (pooled[2 * head] + pooled[2 * head + 1]) / 2
        best = sorted(range(length - window), key=lambda key: -float(group[key]))[: capacity - window]
        assert set(mask[0, head].nonzero().flatten().tolist()) == set(best) | set(range(length - window, length))


def test_snapkv_keeps_a_planted_key():
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 2, 50, 8), torch.randn(1, 1, 50, 8)
    queries[..., 0], keys[:, :, 11, 0] = 5.0, 8.0
    mask = wb.SnapKV(budget=16, window=8).keep(state(keys=keys, queries=queries, capacity=16))
    assert mask[0, 0, 11] and mask[0, 0, 42:].all()


@pytest.mark.parametrize(("keep_newest", "expected"), [(False, [0, 2]), (True, [0, 3])])
def test_tova_worked_example(keep_newest, expected):
    """The mean row [.4 .1 .3 .2] of two heads keeps {0, 2}, or {0, 3} if the newest token must stay."""
    rows = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.3, 0.15, 0.3, 0.25]])
    keys = torch.eye(4).view(1, 1, 4, 4)
    tova = wb.TOVA(budget=2, keep_newest=keep_newest)
    mask = tova.keep(state(keys=keys, queries=rows.log().view(1, 2, 1, 4), capacity=2))
    assert mask[0, 0].nonzero().flatten().tolist() == expected


def test_tova_heads_share_one_set(lm):
    session = wb.Session(lm, wb.TOVA(budget=0.3))
    session.prefill(ids(40)[0].tolist())
    session.generate(5)
    for layer in session._cache.layers:
        assert (layer.store.positions == layer.store.positions[:, :1]).all()


def test_knorm_worked_example():
    """A key of ten times its length goes first; rotating a key changes nothing."""
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 20, 8)
    keys[0, 0, 7] = keys[0, 0].norm(dim=-1).median() * torch.nn.functional.normalize(keys[0, 0, 7], dim=0)
    before = wb.KNorm(budget=19).keep(state(keys=keys, capacity=19))
    assert before[0, 0, 7]
    keys[0, 0, 7] *= 10
    mask = wb.KNorm(budget=19).keep(state(keys=keys, capacity=19))
    assert not mask[0, 0, 7] and mask[0, 0].sum() == 19 and torch.equal(mask[0, 1], before[0, 1])
    turned = torch.cat([-keys[..., 4:], keys[..., :4]], -1)
    assert torch.equal(
        wb.KNorm(budget=9).keep(state(keys=turned, capacity=9)), wb.KNorm(budget=9).keep(state(keys=keys, capacity=9))
    )
    assert wb.KNorm(budget=5, keep_recent=3).keep(state(keys=keys, capacity=5))[..., 17:].all()


def test_keydiff_worked_example():
    """Keys [1 0], [1 .1], [.9 0], [0 1]: [0 1] is unlike the mean and stays to the last, [1 .1] goes first."""
    keys = torch.tensor([[1, 0], [1, 0.1], [0.9, 0], [0, 1]]).view(1, 1, 4, 2)

    def kept_of(keys, capacity):
        return wb.KeyDiff(budget=capacity).keep(state(keys=keys, capacity=capacity))[0, 0].nonzero().flatten().tolist()

    assert kept_of(keys, 1) == [3] and kept_of(keys, 3) == [0, 2, 3]
    lengths = torch.tensor([3, 0.2, 7, 40]).view(1, 1, 4, 1)
    assert kept_of(keys * lengths, 3) == [0, 2, 3]


def test_expected_attention_of_one_repeated_query_is_its_attention():
    """No spread and one future position: the query's own attention, without the sinks, times the norm of the value."""
    torch.manual_seed(0)
    rotation = Rotation(torch.tensor([1.0, 0.2]))
    keys, values = torch.randn(1, 1, 30, 4), torch.randn(1, 1, 30, 4)
    query = torch.randn(1, 2, 1, 4)
    positions = torch.arange(30)[None]
    queries = rotation.undone(query.expand(1, 2, 30, 4), -positions)  # rotated by each position
    following = rotation.undone(query, torch.tensor([[-30]]))
    seen = dataclasses.replace(state(keys=keys, queries=queries, scaling=0.5), values=values, rotation=rotation)
    attention = (0.5 * following @ keys[:, :, 4:].transpose(-1, -2)).softmax(-1).mean(1)[0, 0]
    order = (attention * values[0, 0, 4:].norm(dim=-1)).argsort(descending=True) + 4
    for capacity in (4, 5, 9, 20):
        method = wb.ExpectedAttention(budget=capacity, future=1)
        for scale in (1, 7):  # all values times a number leave the set as it is
            mask = method.keep(dataclasses.replace(seen, capacity=torch.tensor([capacity]), values=scale * values))
            assert set(mask[0, 0].nonzero().flatten().tolist()) == {0, 1, 2, 3, *order[: capacity - 4].tolist()}


def test_random_draws_evenly_and_anew_for_each_seed_layer_and_head():
    keys = torch.zeros(1, 50, 100, 2)
    draws = [wb.Random(budget=20, seed=seed).keep(state(keys=keys, capacity=20)) for seed in (0, 1)]
    draws.append(wb.Random(budget=20).keep(dataclasses.replace(state(keys=keys, capacity=20), layer=1)))
    heads = {tuple(row.nonzero().flatten().tolist()) for draw in draws for row in draw[0]}
    assert len(heads) == 150
    # 150 draws of 20 in 100: each position is kept 30 times, give or take 4.9 (one standard deviation)
    times = torch.cat(draws).sum((0, 1))
    assert times.sum() == 3000 and times.min() > 10 and times.max() < 50


def test_pyramidkv_worked_example():
    # prefix budget 120: last layer 120 // 20 = 6, first 2 x 120 - 6 = 234, step 228 / 3 = 76; the window of 8 on top
    assert wb.PyramidKV(budget=128).allocate(4096, 4) == [242, 166, 90, 14]
    # the first layer can have no more than 241 - 8 = 233, the last 240 - 233 = 7, step 226 // 3 = 75: 233 158 83 8 are
    # two too many, which the last two layers give back
    assert wb.PyramidKV(budget=128).allocate(241, 4) == [241, 166, 90, 15]
    assert wb.PyramidKV(budget=128).allocate(239, 4) == [128] * 4  # shorter than twice the prefix budget
    assert wb.PyramidKV(budget=128, beta=1).allocate(4096, 4) == [128] * 4
    assert wb.PyramidKV(budget=128).allocate(4096, 1) == [128]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7, 16, 33])
def test_pyramids_fall_and_sum_to_the_uniform_budget(num_layers):
    for budget in (1, 2, 5, 17, 100, 511, 0.1, 0.37):
        for length in (2, 9, 40, 129, 1000, 4096):
            method = wb.PyramidKV(budget=budget)
            capacity, shares = method.capacity(length), method.allocate(length, num_layers)
            assert sum(shares) == num_layers * capacity and shares == sorted(shares, reverse=True)
            assert shares[-1] >= min(8, max(capacity // 2, 1)) and (shares[0] <= length or capacity > length)


def test_pyramidkv_layers_that_keep_everything_need_not_fire(tiny):
    """The first layer's share is the whole prompt, so three of four layers have something to do."""
    workload = wb.workloads.recall(context=96, samples=1, facts=1)
    length = len(workload.episodes(tiny)[0].context)
    method = wb.PyramidKV(budget=54)
    assert method.allocate(length, 4) == [length, 68, 40, 12]
    row = wb.compare(tiny, workload, [method]).rows[1]
    assert (row.fired_layers, row.layers) == (3, 3)


@pytest.mark.parametrize(("budget", "window"), [(30, 8), (10, 5)])
def test_scoring_is_not_free(tiny, budget, window):
    """SnapKV's window (at most half the budget) and H2O's whole prompt are multiplied with all keys once more."""
    lm = wb.load((random_llama(), tiny.tokenizer))
    extra = {}
    for method in (wb.SnapKV(budget=budget, window=8), wb.H2O(budget=budget)):
        session = wb.Session(lm, method)
        session.prefill(ids(40)[0].tolist())
        extra[method.name] = session.trace.flops(by="component").set_index("component")["flops"]["method"]
    # 3 layers x 2 x 4 query heads x queries x 40 keys x head size 8
    assert extra == {"snapkv": 3 * 2 * 4 * window * 40 * 8, "h2o": 3 * 2 * 4 * 40 * 40 * 8}
