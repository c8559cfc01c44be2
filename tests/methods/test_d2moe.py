"""D2MoE: tokens get the bits they need, and an expert is read up to the highest that is asked for."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.cost.ffn import read_bytes, resident_bytes
from workbench.engine.calibration import Document
from workbench.engine.experts import OwnBank
from workbench.engine.routed import routed
from workbench.experiments.calibrate import recall_documents
from workbench.methods.routing.d2moe import NestedBank, expected_error, oracle_levels
from workbench.methods.routing.quantised import experts_of
from workbench.testing import ids, random_model

TEXT = "The statement is executed repeatedly until the iterator is exhausted. " * 4


@pytest.fixture(scope="module")
def moe() -> wb.LM:
    return wb.load("tiny-moe")


@pytest.fixture(scope="module")
def states(moe):
    return list(routed(moe, moe.tokenizer(TEXT).input_ids)[0].values())


def ready(lm, **knobs) -> wb.D2MoE:
    return wb.Setup(wb.D2MoE(**knobs)).ready(lm).routing


def run(lm, method, new_tokens=2) -> wb.Session:
    session = wb.Session(lm, method)
    session.prefill(TEXT)
    for _ in range(new_tokens):
        session.step()
    return session


@pytest.mark.parametrize("router", ["linear", "weight"])
def test_tokens_are_given_the_mean_width_that_was_asked_for(moe, router):
    """Over a text like those it was calibrated on, roughly; at both ends, exactly."""
    (document,) = recall_documents(moe, 1, context=300, seed=5)
    means = []
    for bits in (2.0, 2.5, 3.0, 3.5, 4.0):
        method = ready(moe, bits=bits, router=router)
        levels = torch.stack([method.levels(state) for state in routed(moe, document.tokens)[0].values()])
        means.append(1 + levels.float().mean().item())
        assert abs(means[-1] - bits) < 0.15
    assert means == sorted(means) and (means[0], means[-1]) == (2, 4)


def test_the_fitted_map_foretells_the_error(moe, states):
    """On prose, while it was fitted on other texts; better than the gate weight alone."""
    method = ready(moe)
    packed = {layer: bank.experts for layer, bank in method.banks(moe).items()}
    for number, (layer, module, experts) in enumerate(experts_of(moe.model, moe.anatomy)):
        state, own = states[number], OwnBank(module, experts, 4)
        true = torch.zeros(state.experts.shape)
        with torch.no_grad():
            for expert in state.experts.unique().tolist():
                chosen = state.experts == expert
                hidden = state.hidden[chosen.nonzero(as_tuple=True)[0]]
                true[chosen] = (packed[layer][expert].compute(hidden, 1) - own.compute(expert, hidden)).norm(dim=-1).log()
        true = true + state.weights.log()
        found = expected_error(state, method.tables["router"][number])
        by_map, by_weight = (
            torch.corrcoef(torch.stack([x.flatten(), true.flatten()]))[0, 1] for x in (found, state.weights.log())
        )
        assert by_map > max(0.85, by_weight)


def test_the_oracle_gives_the_fewest_bits_that_are_near_enough(moe, states):
    method = ready(moe, router="oracle")
    layer, module, experts = next(experts_of(moe.model, moe.anatomy))
    packed, own, state = method.banks(moe)[layer].experts, OwnBank(module, experts, 4), states[0]
    with torch.no_grad():
        levels = oracle_levels(state, own, packed, 0.3)
        for token in range(0, len(levels), 7):
            for slot, expert in enumerate(state.experts[token].tolist()):
                hidden = state.hidden[token : token + 1]
                exact = own.compute(expert, hidden)
                off = [((packed[expert].compute(hidden, level) - exact).norm() / exact.norm()).item() for level in (1, 2)]
                assert levels[token, slot] == next((level for level, each in enumerate(off, 1) if each < 0.3), 3)
        assert (oracle_levels(state, own, packed, 0.0) == 3).all() and (oracle_levels(state, own, packed, 1e9) == 1).all()
        assert levels.unique().numel() > 1


def test_an_expert_is_read_up_to_the_highest_width_and_computed_at_each_tokens_own(moe):
    method = ready(moe)
    layer, module, experts = next(experts_of(moe.model, moe.anatomy))
    packed = method.banks(moe)[layer].experts
    bank = NestedBank(OwnBank(module, experts, 4), packed)
    bank.ask(torch.tensor([[0, 1], [0, 2], [8, 1]]), torch.tensor([[1, 2], [3, 1], [1, 2]]))
    assert bank.weight_bytes == [packed[0].nbytes(3), packed[1].nbytes(2), packed[2].nbytes(1), 0, 0, 0, 0, 0]
    asked = [(expert, level, tokens) for expert, level, tokens, _ in bank.planes()]
    assert asked == [(0, 1, 2), (0, 2, 1), (0, 3, 1), (1, 1, 2), (1, 2, 2), (2, 1, 1)]
    assert sum(size for *_, size in bank.planes()) == sum(bank.weight_bytes)
    hidden = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = bank.compute(0, hidden)
        torch.testing.assert_close(out[:1], packed[0].compute(hidden[:1], 1))
        torch.testing.assert_close(out[1:], packed[0].compute(hidden[1:], 3))


def test_what_was_read_is_in_the_trace(moe):
    session = run(moe, wb.D2MoE(bits=2.5))
    planes, routing = session.trace.table("planes"), session.trace.table("routing")
    read = read_bytes(session.trace).set_index(["step", "layer"])["read_bytes"]
    assert planes.groupby(["step", "layer"])["plane_bytes"].sum().to_dict() == read.to_dict()
    base = planes[planes["bits"] == 2].set_index(["step", "layer", "expert"])["tokens"]
    hit = routing[routing["tokens"] > 0].set_index(["step", "layer", "expert"])["tokens"]
    assert base.to_dict() == hit.to_dict(), "every token given to an expert computes with its base"
    by_width = planes.groupby("bits")["tokens"].sum()
    assert by_width[2] > by_width[3] > by_width[4] > 0
    router = session.trace.table("work").query("component == 'method' and layer == 0")["flops"]
    tokens = len(moe.tokenizer(TEXT).input_ids)
    assert 2 * tokens * 2 * 128 in router.tolist()
    fetched = session.trace.bytes(by="component", model="fused").set_index("component")["bytes"]["experts"]
    assert fetched > read.sum()


def test_more_bits_are_nearer_to_the_model_and_all_are_held(moe):
    dense = run(moe, None, 0).logits.log_softmax(-1)
    off, read = [], []
    for bits in (2.0, 3.0, 4.0):
        session = run(moe, wb.D2MoE(bits=bits), 0)
        off.append((dense.exp() * (dense - session.logits.log_softmax(-1))).sum().item())
        read.append(read_bytes(session.trace)["read_bytes"].sum())
        held = session.setup.routing.resident_bytes(moe)
        assert session.setup.routing.banks(moe) is ready(moe, bits=2.5, router="weight").banks(moe), "planes are shared"
        assert 4 / 32 < held / resident_bytes(moe.anatomy) < 5 / 32
    assert off[0] > max(off[1:]) > 0 and read == sorted(read) and read[0] < read[2]


def test_sixteen_bits_are_the_model_itself(moe):
    left_alone, dense = run(moe, wb.D2MoE(bits=16)), run(moe, None)
    assert torch.equal(left_alone.logits, dense.logits) and left_alone.trace.table("work").empty
    assert wb.D2MoE(bits=16).resident_bytes(moe) == resident_bytes(moe.anatomy)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_another_family_is_calibrated_and_runs(family, tiny):
    lm = wb.load((random_model(family), tiny.tokenizer))
    texts = [Document(tuple(ids(30, seed=seed)[0].tolist()), 30) for seed in (1, 2)]
    found = wb.calibrate(lm, wb.D2MoE(group=16), documents=texts)
    assert found.tables["router"].shape == (3, 6, 33) and found.tables["by_error"].shape == (3, 101)
    for router in ("linear", "oracle"):
        session = wb.Session(lm, wb.D2MoE(group=16, router=router))
        session.prefill([ids(12)[0].tolist(), ids(7, seed=1)[0].tolist()])
        session.generate(3, stop_at_end=False)
        assert set(session.trace.table("planes")["layer"]) == {0, 1, 2}
        assert torch.equal(session.branch().step(), session.step())


def test_what_cannot_be_is_one_sentence(moe):
    with pytest.raises(wb.UserError, match="2 to 4 bits, or 16"):
        wb.D2MoE(bits=5)
    with pytest.raises(wb.UserError, match="'linear' or 'weight' or 'oracle'"):
        wb.D2MoE(router="best")
