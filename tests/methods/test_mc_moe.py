"""MC-MoE: bits by an integer program, within their budget in real bytes, and last experts left out where they weigh little."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.cost.ffn import read_bytes, resident_bytes, weights_bytes
from workbench.engine.calibration import Document
from workbench.engine.routed import routed
from workbench.methods.routing.budgets import PRESENT, WIDTHS, bits_by_expert, least_bits
from workbench.methods.routing.mc_moe import importance, last_falls_short, most_important, packed_expert, without_last
from workbench.models.anatomy import expert_modules
from workbench.testing import ids, random_model

TEXT = "The statement is executed repeatedly until the iterator is exhausted. " * 4


@pytest.fixture(scope="module")
def moe() -> wb.LM:
    return wb.load("tiny-moe")


@pytest.fixture(scope="module")
def states(moe):
    return list(routed(moe, moe.tokenizer(TEXT).input_ids)[0].values())


def run(lm, method, new_tokens=3, **options) -> wb.Session:
    session = wb.Session(lm, method, **options)
    session.prefill(TEXT)
    for _ in range(new_tokens):
        session.step()
    return session


def costs(num_experts: int, seed: int) -> np.ndarray:
    """Less with every bit."""
    return np.sort(np.random.default_rng(seed).random((num_experts, len(WIDTHS))) ** 4, axis=1)[:, ::-1]


def spent(table: np.ndarray, bits) -> float:
    return sum(table[expert, WIDTHS.index(width)] for expert, width in enumerate(bits))


@pytest.mark.parametrize(("num_experts", "seed"), [(3, 0), (5, 1), (6, 2)])
def test_the_integer_program_finds_what_brute_force_finds(num_experts, seed):
    table, before = costs(num_experts, seed), float("inf")
    divisions = [each for each in itertools.product(WIDTHS, repeat=num_experts) if set(PRESENT) <= set(each)]
    for total in range(least_bits(num_experts), 3 * num_experts + 2):
        found = bits_by_expert(table, total)
        best = min(spent(table, each) for each in divisions if sum(each) <= total)
        assert sum(found) <= total and set(PRESENT) <= set(found)
        assert spent(table, found) == pytest.approx(best, abs=1e-6)
        assert spent(table, found) <= before + 1e-6, "more bits never cost more"
        before = spent(table, found)
    with pytest.raises(ValueError, match="No division"):
        bits_by_expert(table, least_bits(num_experts) - 1)


def test_tiny_costs_are_told_apart():
    table = np.array([[3e-12, 2e-12, 1e-12], [3e-14, 2e-14, 1e-14], [3e-13, 2e-13, 1e-13]])
    assert bits_by_expert(table, 6) == [3, 1, 2]


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.5, 3.0])
def test_the_budget_is_met_by_the_bytes_held(moe, bits):
    method = wb.Setup(wb.McMoE(bits=bits)).ready(moe).routing
    scales = 2 * 2 * sum(2 * rows for rows in (288, 128))  # of a matrix of 128 columns, and of 144: two groups at most
    for of_layer, bank in zip(method.widths(), method.banks(moe).values(), strict=True):
        assert sum(of_layer) <= bits * 8
        for width, held in zip(of_layer, bank.weight_bytes, strict=True):
            assert 0 < held - width * 3 * 128 * 144 / 8 <= scales
    total = sum(sum(bank.weight_bytes) for bank in method.banks(moe).values())
    assert total == method.resident_bytes(moe) < resident_bytes(moe.anatomy) * (bits + 0.6) / 32
    assert method.banks(moe) is wb.Setup(wb.McMoE(bits=bits, pruning=False)).ready(moe).routing.banks(moe), "built once"


def test_bytes_read_are_those_of_the_experts_hit(moe):
    session = run(moe, wb.McMoE(bits=2.0, pruning=False))
    banks = session.setup.routing.banks(moe)
    hit = session.trace.table("routing").query("tokens > 0")
    expected = {key: sum(banks[key[1]].weight_bytes[e] for e in rows["expert"]) for key, rows in hit.groupby(["step", "layer"])}
    read = read_bytes(session.trace).set_index(["step", "layer"])["read_bytes"]
    assert read.to_dict() == expected
    experts = moe.anatomy.layers[0].experts
    assert max(expected.values()) < 8 * weights_bytes(experts.linears, 4) / 8


def test_more_bits_are_nearer_to_the_model(moe):
    dense = run(moe, None, 0).logits.log_softmax(-1)
    off = [
        (dense.exp() * (dense - run(moe, wb.McMoE(bits=bits, pruning=False), 0).logits.log_softmax(-1))).sum().item()
        for bits in (1.5, 2.0, 3.0)
    ]
    assert off[0] > off[1] > off[2] > 0


def test_nothing_to_do_is_the_model_itself(moe):
    left_alone, dense = run(moe, wb.McMoE(bits=16, pruning=False)), run(moe, None)
    assert torch.equal(left_alone.logits, dense.logits) and left_alone.trace.table("work").empty
    none = run(moe, wb.McMoE(bits=16, layers=0))
    assert torch.equal(none.logits, dense.logits)


def test_a_share_of_zero_leaves_nothing_out_and_of_one_all_but_ties(states):
    for state in states:
        assert not last_falls_short(state.weights, 0.0).any() and last_falls_short(state.weights, 1.0).all()
    assert last_falls_short(torch.tensor([[0.5, 0.5], [0.7, 0.3]]), 1.0).tolist() == [False, True]
    assert last_falls_short(torch.tensor([[0.6, 0.4], [0.8, 0.2]]), 0.5).tolist() == [False, True]


def test_a_token_without_its_last_expert_has_its_first_alone(states):
    for state in states:
        leave_out = torch.arange(len(state.experts)) % 2 == 0
        given = without_last(state, leave_out)
        assert torch.equal(given.experts[~leave_out], state.experts[~leave_out])
        torch.testing.assert_close(given.weights[~leave_out], state.weights[~leave_out])
        assert (
            torch.equal(given.experts[leave_out, 0], state.experts[leave_out, 0]) and (given.experts[leave_out, 1] == 8).all()
        )
        torch.testing.assert_close(given.weights[leave_out], torch.tensor([[1.0, 0.0]]).expand(int(leave_out.sum()), 2))


def test_protected_tokens_keep_all_their_experts(moe):
    """Of a prompt; a decoded token has only its own weights to go by."""
    for share in (0.0, 0.1, 1.0):
        session = run(moe, wb.McMoE(bits=16, protected=share), 12, routing="choices")
        table = session.trace.table("choices").merge(session.trace.table("steps")[["step", "phase"]], on="step")
        table["kept"] = [sum(expert >= 0 for expert in experts) for experts in table["experts"]]
        prompt = table[table["phase"] == "prefill"]
        tokens = len(prompt) // 4
        for _, of_layer in prompt.groupby("layer"):
            assert (of_layer["kept"] == 2).sum() >= share * tokens
            assert (of_layer["kept"] == 1).any() == (share < 1)
        assert (table[table["phase"] == "decode"]["kept"] == 1).any()


def test_importance_is_attention_received_by_hand(moe):
    """Column sums of the attention matrix over the queries that see a token, times the 1-norm of its hidden state."""
    tokens = moe.tokenizer(TEXT).input_ids
    recording = wb.record(moe, tokens, new_tokens=1)
    layer, length = recording.layers[2], len(tokens)
    scores = (
        torch.einsum("hqd,hkd->hqk", layer.queries[:, :length], layer.keys[:, :length].repeat_interleave(4, 0)) * layer.scaling
    )
    mass = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1).sum((0, 1))
    state = routed(moe, tokens)[0][2]
    expected = mass / torch.arange(length, 0, -1) * state.hidden.abs().sum(-1)
    torch.testing.assert_close(importance(state, mass[None], [length], None)[0], expected)
    session = run(moe, wb.McMoE(bits=16, protected=0.1), 0, routing="choices")
    seen = session.trace.table("choices").query("layer == 0")
    layer = recording.layers[0]
    scores = (
        torch.einsum("hqd,hkd->hqk", layer.queries[:, :length], layer.keys[:, :length].repeat_interleave(4, 0)) * layer.scaling
    )
    mass = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1).sum((0, 1))
    state = routed(moe, tokens)[0][0]
    best = most_important(importance(state, mass[None], [length], None), state.positions, 0.1)
    kept = torch.tensor([min(experts) >= 0 for experts in seen["experts"]])
    ratio = session.setup.routing.tables["ratio"][0].item()
    assert torch.equal(kept, ~last_falls_short(state.weights, ratio) | best)
    work = session.trace.table("work").query("component == 'method' and layer == 0")
    assert 2 * 8 * length * length * 16 in work["flops"].tolist()  # 8 heads of 16


def test_the_most_important_are_a_share_of_each_row():
    scores = torch.tensor([[9.0, 1, 3, 2, 5], [1, 2, 3, 4, 5]])
    positions = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    # a third of 3 and of 5, rounded up: 1 and 2
    found = most_important(scores, positions, 1 / 3).view(2, 5)
    assert found.tolist() == [[False, False, False, False, True], [False, False, False, True, True]]
    assert not most_important(scores, positions, 0.0).any()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_another_family_is_calibrated_and_runs(family, tiny):
    lm = wb.load((random_model(family), tiny.tokenizer))
    method = wb.McMoE(bits=2.0, group=16, layers=2)
    with pytest.raises(wb.UserError, match="not calibrated"):
        wb.Session(lm, method)
    told = []
    texts = [Document(tuple(ids(30, seed=seed)[0].tolist()), 30) for seed in (1, 2)]
    found = wb.calibrate(lm, method, documents=texts, on_progress=lambda *each: told.append(each))
    assert told[-1] == ("mc-moe: steps", 8, 8) and found.tables["freq"].sum().item() == 3 * 2 * 2 * 30
    assert (found.tables["errors"].diff(dim=-1) <= 0).all() and (found.tables["errors"].sum((1, 2)) > 0).all()
    session = wb.Session(lm, method, routing="choices")
    session.prefill([ids(12)[0].tolist(), ids(7, seed=1)[0].tolist()])
    session.append([[3, 4], [5, 6]])
    session.generate(4, stop_at_end=False)
    left_out = {row.layer for row in session.trace.table("choices").itertuples() if min(row.experts) < 0}
    assert left_out == set(session.setup.routing.pruned_layers(lm)) and len(left_out) == 2
    trunk = session.branch()
    assert torch.equal(trunk.step(), session.step())


def test_calibrated_errors_are_those_of_the_whole_block(moe):
    """One expert in one bit, the others as they are: the distance of the layer's output, measured as a whole."""
    text = Document(tuple(moe.tokenizer(TEXT).input_ids), 20)
    method = wb.McMoE()
    found = method.calibrate(dataclasses.make_dataclass("S", ["lm", "documents", "advance"])(moe, (text,), lambda *_: None))
    state, module = routed(moe, text.tokens)[0][1], expert_modules(moe.model)[1]
    with torch.no_grad():
        expected = module(state.hidden, state.experts, state.weights)
        changed = 0
        for expert in range(8):
            packed = packed_expert(module, expert, moe, 1, 128)
            weights = {name: stack.detach().clone() for name, stack in module.named_parameters()}
            for name, parts in packed.parts.items():
                weights[name][expert] = parts[0].dense()
            out = torch.func.functional_call(module, weights, (state.hidden, state.experts, state.weights))
            assert found["errors"][1, expert, 0].item() == pytest.approx((out - expected).norm().item(), rel=1e-3, abs=1e-4)
            changed += (out - expected).norm() > 0
    assert changed >= 4


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"bits": 4.0}, "1 to 3 bits, or 16"), ({"bits": 1.2}, "too little for 8 experts.*give 1.375 or more")],
)
def test_what_cannot_be_is_one_sentence(moe, knobs, message):
    with pytest.raises(wb.UserError, match=message) as caught:
        wb.Session(moe, wb.McMoE(**knobs))
    assert "\n" not in str(caught.value)
