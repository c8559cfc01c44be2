"""What follows from routing: each figure by hand on small cases, and on real runs against a plain recount."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import workbench as wb
from workbench.cost import routing
from workbench.models.anatomy import anatomy_of, router_modules
from workbench.testing import SMALL, ids, random_model, random_qwen_moe


def traced(model, length: int = 12, new_tokens: int = 4, **options) -> wb.Trace:
    with wb.profile(model, **options) as prof, torch.no_grad():
        model.generate(ids(length, 2), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return prof.trace


@pytest.fixture(scope="module")
def trace() -> wb.Trace:
    return traced(random_qwen_moe(), routing="logits")


def test_choices_add_up_to_the_load(trace):
    pairs = trace.table("choices").explode("experts")
    counted = pairs.groupby(["step", "layer", "experts"]).size()
    table = trace.table("routing").query("tokens > 0").set_index(["step", "layer", "expert"])["tokens"]
    assert counted.to_dict() == table.to_dict()
    tokens = trace.table("choices").query("layer == 0")[["step", "row", "position"]]
    assert tokens.to_numpy().tolist() == trace.table("tokens")[["step", "row", "position"]].to_numpy().tolist()


def test_choices_follow_from_the_logits(trace):
    for row in trace.table("choices").itertuples():
        odds = torch.tensor(row.logits).softmax(-1)
        top = odds.topk(2)
        assert sorted(top.indices.tolist()) == sorted(row.experts)
        given = dict(zip(row.experts, row.weights, strict=True))
        share = top.values / top.values.sum() if row.weights.sum() > 0.999 else top.values
        for expert, weight in zip(top.indices.tolist(), share.tolist(), strict=True):
            assert given[expert] == pytest.approx(weight, abs=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_logits_are_those_of_the_gate(family):
    model = random_model(family)
    trace = traced(model, routing="logits")
    choices = trace.table("choices")
    assert choices["logits"].notna().all() and len(choices)
    experts = trace.anatomy.layers[-1].experts
    assert choices["logits"].map(len).eq(experts.num_experts).all()
    if family not in {"deepseek_v3"}:  # which adds a bias before it chooses
        for row in choices.itertuples():
            assert set(np.argsort(row.logits)[-experts.top_k :]) == set(row.experts)


def test_the_router_is_not_mistaken_where_keys_have_as_many_features_as_there_are_experts():
    model = random_model("qwen3_moe", num_experts=16)
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    assert router_modules(model) == {index: layer.mlp.gate for index, layer in enumerate(model.model.layers)}


def test_a_session_says_where_each_token_went():
    lm = wb.load("tiny-moe")
    session = wb.Session(lm, routing="choices")
    session.prefill(["The statement is executed once.", "A name"])
    session.step()
    trace = session.trace
    tokens = trace.table("tokens").sort_values(["step", "row", "position"])
    for _, of_layer in trace.table("choices").groupby("layer"):
        where = of_layer.sort_values(["step", "row", "position"])
        assert where[["step", "row", "position"]].to_numpy().tolist() == tokens[["step", "row", "position"]].to_numpy().tolist()
    assert trace.table("choices")["logits"].isna().all()


def test_balance_of_known_loads():
    assert routing._balance(np.array([5.0, 5, 5, 5])) == pytest.approx({"cv": 0, "max_over_mean": 1, "entropy": 1, "gini": 0})
    # mean 2, deviations 6 and three of -2: sqrt((36 + 3 * 4) / 4) = sqrt(12); Gini (E - 1) / E
    one = routing._balance(np.array([8.0, 0, 0, 0]))
    assert one == pytest.approx({"cv": math.sqrt(12) / 2, "max_over_mean": 4, "entropy": 0, "gini": 0.75})


def test_expected_unique_experts():
    assert routing.expected_unique(1, 8, 2) == pytest.approx(2)  # one token hits its K
    assert routing.expected_unique(2, 8, 2) == pytest.approx(8 * (1 - 0.75**2))  # 3.5
    assert routing.expected_unique(10_000, 8, 2) == pytest.approx(8)
    assert routing.expected_unique(3, 4, 4) == 4
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(5, 8, generator=generator).topk(2).indices.unique().numel() for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(routing.expected_unique(5, 8, 2), rel=0.02)


def test_unique_experts_and_their_bytes(trace):
    table = routing.unique_experts(trace)
    counted = trace.table("routing").query("tokens > 0").groupby(["step", "layer"]).size()
    assert table.set_index(["step", "layer"])["unique"].to_dict() == counted.to_dict()
    # gate and up 2 x 24 x 32, down 24 x 32, 4 bytes each: 9,216 an expert
    assert (table["read_bytes"] == table["unique"] * 9216).all()
    assert (table["unique"] <= np.minimum(6, 2 * table["tokens"])).all()


@pytest.mark.parametrize(
    ("family", "changes", "shared"),
    [
        ("deepseek_v3", {"n_shared_experts": 2}, [0, 2, 2]),  # the first layer is dense
        ("qwen2_moe", {}, [40 / 24] * 3),  # one shared expert of 40 neurons beside experts of 24
        ("qwen3_moe", {"mlp_only_layers": [1]}, [0, 0, 0]),
        ("gpt_oss", {}, [0, 0, 0]),
    ],
)
def test_layer_kinds_tell_dense_layers_and_shared_experts(family, changes, shared):
    anatomy = anatomy_of(random_model(family, **changes))
    kinds = routing.layer_kinds(anatomy)
    dense = {"deepseek_v3": [0], "qwen3_moe": [1]}.get(family, [])
    assert kinds.query("kind == 'dense'")["layer"].tolist() == dense
    assert kinds["shared_experts"].tolist() == pytest.approx(shared)
    moe = kinds["kind"] == "moe"
    assert (kinds["expert_bytes"] > 0).equals(moe)
    assert (kinds["shared_bytes"] > 0).equals(~moe | (kinds["shared_experts"] > 0))


def test_a_gate_that_is_a_plain_linear_is_a_router_and_no_shared_expert():
    sizes = {"num_experts": 6, "moe_topk": 2, "moe_intermediate_size": 24, "num_shared_expert": 1, "head_dim": 8}
    config = AutoConfig.for_model("hunyuan_v1_moe", **SMALL, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert type(router_modules(model)[0]) is torch.nn.Linear
    layer = anatomy_of(model).layers[0]
    assert [linear.out_features for linear in layer.linears if linear.component == "router"] == [6]
    assert routing.layer_kinds(anatomy_of(model))["shared_experts"].tolist() == pytest.approx([1] * 3)


def test_reuse_and_co_activation(trace):
    choices = trace.table("choices")
    table = routing.reuse(trace).set_index("layer")
    again = []
    for _, of_row in choices[choices["layer"] == 1].groupby("row"):
        chosen = of_row.sort_values("position")["experts"].tolist()
        again += [len(set(now) & set(before)) / 2 for before, now in itertools.pairwise(chosen)]
    assert table.loc[1, "reuse"] == pytest.approx(np.mean(again)) and table.loc[1, "by_chance"] == pytest.approx(1 / 3)
    counts = routing.co_activation(trace, 1)
    load = routing.load(trace).query("layer == 1")["tokens"]
    assert counts.diagonal().tolist() == load.tolist() and (counts == counts.T).all()
    assert counts.sum() == 4 * len(choices.query("layer == 1"))
    with pytest.raises(wb.UserError, match="has no experts"):
        routing.co_activation(trace, 9)


def test_confidence(trace):
    table = routing.confidence(trace)
    assert (table["margin"] >= 0).all() and table["entropy"].between(0, 1).all()
    assert (table["top_weight"] == trace.table("choices")["weights"].map(max)).all()


def test_specialisation_is_one_where_the_expert_gives_the_class_away():
    lm = wb.load("tiny-moe")
    session = wb.Session(lm, routing="choices")
    session.prefill("The statement (1) is executed, 22 times in 3 lines.")
    trace = session.trace
    share = routing.specialisation(trace)
    assert share["information"].between(0, 1).all() and len(share) == len(routing.load(trace)["layer"].unique())
    first = trace.table("choices").query("layer == @trace.anatomy.num_layers - 1")
    texts = trace.table("tokens").set_index("position")["text"]
    by_expert = {texts[row.position]: str(row.experts[0]) for row in first.itertuples()}
    assert routing.specialisation(trace, lambda text: by_expert.get(text, "")).iloc[-1]["information"] > 0.3


def test_token_classes():
    assert [routing.token_class(text) for text in (" the", "42", "...", "  ", "+")] == [
        "word",
        "number",
        "punctuation",
        "space",
        "punctuation",
    ]


def best_possible(asked: list[int], slots: int) -> int:
    """The most hits any policy can reach, by trying all."""
    states = {frozenset(): 0}
    for expert in asked:
        following: dict[frozenset, int] = {}
        for held, hits in states.items():
            if expert in held:
                options = [(held, hits + 1)]
            elif len(held) < slots:
                options = [(held | {expert}, hits)]
            else:
                options = [((held - {gone}) | {expert}, hits) for gone in held]
            for state, count in options:
                following[state] = max(following.get(state, 0), count)
        states = following
    return max(states.values())


def test_belady_is_the_best_possible():
    generator = torch.Generator().manual_seed(3)
    for slots in (1, 2, 3):
        asked = torch.randint(0, 5, (30,), generator=generator).tolist()
        best = best_possible(asked, slots)
        assert routing._belady(asked, slots) == best
        assert routing._lru(asked, slots) <= best and routing._lfu(asked, slots) <= best


def test_caches_by_hand():
    # LRU with 2 slots: 1 miss, 2 miss, 1 hit, 3 throws out 2, 2 throws out 1, 1 miss
    assert routing._lru([1, 2, 1, 3, 2, 1], 2) == 1
    # LFU keeps 1 (asked for twice): 3 throws out 2, 2 throws out 3, 1 is a hit
    assert routing._lfu([1, 2, 1, 3, 2, 1], 2) == 2


def test_an_expert_cache_over_a_trace(trace):
    table = routing.expert_cache(trace, [1, 3, 6])
    everything = table[table["slots"] == 6]
    first_loads = trace.table("routing").query("tokens > 0").drop_duplicates(["layer", "expert"])
    assert (everything["loaded_bytes"] == len(first_loads) * 9216).all()
    for _, of_policy in table.groupby("policy"):
        assert of_policy.sort_values("slots")["hit_rate"].is_monotonic_increasing
    best = table[table["policy"] == "belady"].set_index("slots")["hits"]
    assert (table["hits"] <= table["slots"].map(best)).all()
    with pytest.raises(wb.UserError, match="no cache policy 'fifo'"):
        routing.expert_cache(trace, [1], ["fifo"])
    with pytest.raises(wb.UserError, match="holds nothing"):
        routing.expert_cache(trace, [0])


def test_what_is_missing_is_said():
    dense = traced(random_model("llama"))
    with pytest.raises(wb.UserError, match="No expert was called"):
        routing.load(dense)
    with pytest.raises(wb.UserError, match='routing="choices"'):
        routing.reuse(traced(random_qwen_moe()))
    with pytest.raises(wb.UserError, match="no routing mode 'all'"):
        wb.profile(random_qwen_moe(), routing="all")


def test_dropped_tokens_are_visible():
    from workbench.probes.moe import Choice, choice_rows, routing_rows

    choice = Choice(0, 4, torch.tensor([[1, 4], [2, 3]]), torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    rows = list(choice_rows(0, [choice], [0]))
    assert [row[4] for row in rows] == [[1, -1], [2, 3]]
    assert pd.DataFrame(routing_rows([(0, [choice])]))[3].sum() == 3


def test_a_run_that_drops_says_how_many_choices_of_which_step_and_layer():
    """A gate of layer 1 that sends the second choice of all but a row's first token to no expert, whose number is 6."""
    model = random_model("mixtral", experts_implementation="eager")

    def drop(gate, args, output):
        logits, weights, experts = output
        experts[1:, 1], weights[1:, 1] = 6, 0
        return logits, weights, experts

    model.model.layers[1].mlp.gate.register_forward_hook(drop)
    with wb.profile(model, routing="choices") as prof, torch.no_grad():
        model(ids(5, 1))
        model(ids(1, 1))
    table = routing.unique_experts(prof.trace).set_index(["step", "layer"])
    assert table["dropped"].to_dict() == {(0, 0): 0, (0, 1): 4, (0, 2): 0, (1, 0): 0, (1, 1): 0, (1, 2): 0}
    assert table.loc[(0, 1), "unique"] <= 6
    # layer 1 is due 2 x 5 choices at step 0 and 2 x 1 at step 1
    assert routing.balance(prof.trace)["dropped"].tolist() == pytest.approx([0, 4 / 12, 0])
    chosen = prof.trace.table("choices").query("layer == 1 and step == 0")["experts"].map(list).tolist()
    assert [experts[1] for experts in chosen[1:]] == [-1] * 4
    again = [len({now[0]} & set(before)) for before, now in itertools.pairwise(chosen)]
    assert routing.reuse(prof.trace).set_index("layer").loc[1, "reuse"] == pytest.approx(np.mean(again))


@pytest.mark.parametrize("favourites", [1, 3])
def test_expert_bytes_follow_the_experts_hit(favourites):
    """A router that always chooses the same experts reads those, however many tokens there are, prefill and decode."""
    model = random_model("mixtral", num_experts_per_tok=favourites)
    for gate in router_modules(model).values():
        gate.weight.data.zero_()  # all logits equal: top-k takes the same experts for every token
    trace = traced(model)
    hit = trace.table("routing").query("tokens > 0").groupby(["step", "layer"]).size()
    assert (hit == favourites).all()
    experts = trace.anatomy.layers[0].experts
    weights = 4 * sum(linear.in_features * linear.out_features for linear in experts.linears)
    activations = 4 * sum(linear.in_features + linear.out_features for linear in experts.linears)
    moved = trace.bytes(by=["step", "component"], model="fused").query("component == 'experts'").set_index("step")["bytes"]
    for step in trace.table("steps").itertuples():
        assert moved[step.step] == trace.anatomy.num_layers * favourites * (weights + step.tokens * activations)
