"""The routing slot's engine: forwards put in place and taken back, gates found by trying, experts computed one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.engine.experts import OwnBank, Routed, by_expert
from workbench.engine.gate import gates
from workbench.engine.replacing import Replacement
from workbench.methods import ExpertMethod
from workbench.models.anatomy import expert_modules
from workbench.probes.moe import RoutingProbe
from workbench.testing import ids, random_model

SOFTMAX = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": False, "olmoe": False, "granitemoe": True, "gpt_oss": True}
"""Whether a family makes the weights of a token's experts sum to one; they all score by softmax."""


@dataclass(frozen=True)
class Same(ExpertMethod):
    """Gives every token what the model gave it, through the engine's own loop over experts."""

    name: ClassVar[str] = "same"
    paper: ClassVar[str] = "none"

    def route(self, state):
        """The model's own choice, weighed anew from the logits."""
        return Routed(state.experts, state.gate.weights(state.logits, state.experts))


def loaded(family: str, **changes):
    torch.manual_seed(0)
    model = random_model(family, experts_implementation="eager", **changes)
    for name, tensor in model.named_buffers():
        if "correction" in name:
            tensor.uniform_(-0.1, 0.1)
    return wb.load((model, wb.load("tiny-dense").tokenizer))


@pytest.mark.parametrize("family", SOFTMAX)
def test_a_gate_is_found_by_trying(family):
    for gate in gates(loaded(family)).values():
        assert (gate.score, gate.renormalises, gate.scale, gate.groups) == ("softmax", SOFTMAX[family], 1.0, (1, 1))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_a_gate_is_found_though_half_precision_makes_ties(family):
    """A router that scores in half precision may choose the other of two near experts."""
    model = random_model(family, experts_implementation="eager", num_local_experts=32, num_experts=32).to(torch.bfloat16)
    for gate in gates(wb.load((model, wb.load("tiny-dense").tokenizer))).values():
        assert (gate.score, gate.renormalises, gate.scale) == ("softmax", SOFTMAX[family], 1.0)


def test_groups_a_bias_and_a_factor_are_found():
    lm = loaded("deepseek_v3")
    found = gates(lm)
    assert set(found) == {1, 2}, "the first layer is dense"
    for gate in found.values():
        assert (gate.score, gate.renormalises, gate.groups) == ("sigmoid", True, (2, 1)) and gate.bias is not None
        assert gate.scale == pytest.approx(lm.model.config.routed_scaling_factor)


@torch.no_grad()
@pytest.mark.parametrize("family", [*SOFTMAX, "deepseek_v3"])
def test_experts_one_at_a_time_are_what_the_module_computes(family):
    lm = loaded(family)
    layer, module = next(iter(expert_modules(lm.model).items()))
    told = []
    handle = module.register_forward_hook(lambda _, args, kwargs, out: told.append((args, kwargs, out)), with_kwargs=True)
    probe = RoutingProbe(lm.model)
    probe.attach()
    lm.model(ids(9) % lm.anatomy.vocab_size)
    handle.remove()
    probe.detach()
    (args, kwargs, out), choice = told[0], probe.take()[0]
    bank = OwnBank(module, lm.anatomy.layers[layer].experts, 4)
    mine = by_expert(bank, [*args, *kwargs.values()][0], Routed(choice.experts, choice.weights))
    assert torch.allclose(mine, out, atol=1e-6)


@pytest.mark.parametrize("family", SOFTMAX)
def test_weights_made_of_logits_are_the_models_own(family):
    lm = loaded(family)
    prompt = (ids(12)[0] % lm.anatomy.vocab_size).tolist()
    assert torch.allclose(wb.Session(lm, Same()).prefill(prompt), wb.Session(lm).prefill(prompt), atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_flops_under_a_method_are_those_of_torchs_counter(k):
    lm = loaded("qwen3_moe")
    session = wb.Session(lm, wb.TopK(k=k))
    with FlopCounterMode(display=False) as counter:
        session.prefill((ids(10)[0] % lm.anatomy.vocab_size).tolist())
    trace = session.trace
    own_kernels = trace.flops(by="component").set_index("component")["flops"]["attention.scores"]
    assert counter.get_total_flops() == trace.flops() - own_kernels
    assert trace.table("routing")["tokens"].sum() == 10 * k * lm.anatomy.num_layers
    router = trace.flops(by=["slot", "component"]).set_index(["slot", "component"])["flops"]
    assert router["model", "router"] == router.get(("routing", "method"), 0), "the logits are computed once more"


def test_forwards_are_taken_back_whatever_stood_there():
    module = torch.nn.Linear(2, 2)
    replaced = Replacement({module: lambda original, x: -original(x)})
    x = torch.ones(1, 2)
    expected = module(x)
    replaced.attach()
    assert torch.equal(module(x), -expected)
    replaced.detach()
    assert torch.equal(module(x), expected) and "forward" not in vars(module)
    module.forward = lambda x: x
    replaced.attach()
    replaced.detach()
    assert module(x) is x


def test_a_call_that_fails_leaves_the_model_alone(monkeypatch):
    lm = wb.load("tiny-moe")
    monkeypatch.setattr(wb.TopK, "route", lambda self, state: 1 / 0)
    session = wb.Session(lm, wb.TopK(k=1))
    with pytest.raises(ZeroDivisionError):
        session.prefill("a text that is cut off")
    assert all("forward" not in vars(module) for module in lm.model.modules())


def test_what_a_method_gave_is_what_the_trace_says():
    lm = wb.load("tiny-moe")
    session = wb.Session(lm, wb.TopK(k=1), routing="logits")
    session.prefill("The keeper of the lighthouse counts the ships.")
    choices = session.trace.table("choices")
    assert {len(experts) for experts in choices["experts"]} == {1}
    for row in choices.itertuples():
        assert row.experts[0] == row.logits.argmax() and row.weights[0] == pytest.approx(1)
    work = session.trace.table("work")
    tokens = len(session.tokens[0])
    rerouted = work[work["component"] == "experts"]
    assert rerouted[["layer", "changed"]].values.tolist() == [[layer, tokens] for layer in range(4)]


def test_a_method_of_each_slot_rule_one_run():
    lm = wb.load("tiny-moe")
    text = "The keeper of the lighthouse counts the ships. " * 4
    session = wb.Session(lm, [wb.SnapKV(budget=16, window=8), wb.TopK(k=1)])
    session.prefill(text)
    session.generate(3)
    trace = session.trace
    by_slot = trace.flops(by="slot").set_index("slot")["flops"]
    assert by_slot["cache"] == trace.table("cache")["extra_flops"].sum() > 0 and by_slot.sum() == trace.flops()
    assert (trace.table("cache")["op"] == "evict").any() and trace.table("work").query(
        "component == 'experts' and changed == 0"
    ).empty
    session.swap(wb.SnapKV(budget=16, window=8))
    session.generate(2)
    assert set(session.trace.table("work")["step"]) == set(trace.table("work")["step"]), "routing went back to the model"


def test_what_is_wrong_is_one_sentence():
    moe, dense = wb.load("tiny-moe"), wb.load("tiny-dense")
    with pytest.raises(wb.UserError, match="more than the 8 that layer 0 has"):
        wb.Session(moe, wb.TopK(k=9))
    with pytest.raises(wb.UserError, match="has none that can be told"):
        wb.Session(dense, wb.TopK(k=1))
    with pytest.raises(wb.UserError, match="one method a slot"):
        wb.Setup(wb.TopK(k=1), wb.TopK(k=2))
    session = wb.Session(dense)
    session.prefill("some text")
    with pytest.raises(wb.UserError, match="has none that can be told"):
        session.swap(wb.TopK(k=1))
    session.generate(2)
