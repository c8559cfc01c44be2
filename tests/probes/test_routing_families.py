"""Routing tables against each family's published rule, applied in plain torch to the hidden states and the gate's weights."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import workbench as wb
from workbench.cost import routing
from workbench.testing import SMALL, ids, random_model

UNNAMED = "ernie4_5_moe"
"""A family that the workbench itself never names."""

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", UNNAMED]


def softmax_top_k(gate, logits):
    """Mixtral (arXiv 2401.04088) renormalises the chosen probabilities, Qwen3-MoE and OLMoE (arXiv 2409.02060) if told so."""
    weights, experts = logits.softmax(-1).topk(gate.top_k)
    return experts, weights / weights.sum(-1, keepdim=True) if getattr(gate, "norm_topk_prob", True) else weights


def top_k_softmax(gate, logits):
    """GPT-OSS (arXiv 2508.10925): a softmax over the logits of those chosen."""
    chosen, experts = logits.topk(gate.top_k)
    return experts, chosen.softmax(-1)


def grouped_sigmoid(gate, logits):
    """DeepSeek-V3 (arXiv 2412.19437): biased sigmoids choose groups by their two best, then experts; weights are unbiased."""
    scores = logits.sigmoid()
    biased = scores + gate.e_score_correction_bias
    groups = biased.unflatten(-1, (gate.num_group, -1))
    best = groups.topk(2).values.sum(-1).topk(gate.topk_group).indices
    kept = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
    experts = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2).topk(gate.top_k).indices
    weights = scores.gather(-1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor


def biased_softmax(gate, logits):
    """ERNIE 4.5: a bias helps to choose, and the chosen probabilities are renormalised without it."""
    odds = logits.softmax(-1)
    experts = (odds + gate.moe_statics.e_score_correction_bias.flatten()).topk(gate.top_k).indices
    weights = odds.gather(-1, experts)
    return experts, weights / weights.sum(-1, keepdim=True)


RULES = {"deepseek_v3": grouped_sigmoid, "gpt_oss": top_k_softmax, UNNAMED: biased_softmax}


def gate_of(block):
    return block.gate if hasattr(block, "gate") else block.router


def built(family: str):
    """A model whose gates, biases included, are sure of themselves, so that no choice hangs on a rounding error."""
    if family == UNNAMED:
        torch.manual_seed(0)
        sizes = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1}
        config = AutoConfig.for_model(UNNAMED, **SMALL, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = random_model(family)
    generator = torch.Generator().manual_seed(5)
    for block in moe_blocks(model).values():
        for name, tensor in [*gate_of(block).named_parameters(), *gate_of(block).named_buffers()]:
            tensor.data.normal_(0, 0.1 if "correction" in name else 1.0, generator=generator)
    return model


def moe_blocks(model) -> dict:
    return {index: layer.mlp for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


class Recomputed:
    """What entered each MoE block `[B, Q, hidden]`, call by call, and what its gate makes of that."""

    def __init__(self, model, family: str):
        self.rule, self.blocks, self.entered = RULES.get(family, softmax_top_k), moe_blocks(model), defaultdict(list)
        self.handles = [
            block.register_forward_pre_hook(lambda _, args, layer=layer: self.entered[layer].append(args[0].clone()))
            for layer, block in self.blocks.items()
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def calls(self):
        """Step, layer, `[B, Q, E]` logits, `[B, Q, k]` experts and weights."""
        for layer, states in self.entered.items():
            gate = gate_of(self.blocks[layer])
            for step, state in enumerate(states):
                bias = getattr(gate, "bias", None)
                logits = state @ gate.weight.T + (0 if bias is None else bias)
                yield step, layer, logits, *self.rule(gate, logits)


@torch.no_grad()
def check(trace: wb.Trace, recomputed: Recomputed, padding: list[int]):
    """Both tables against the recomputation; `padding` is how many tokens each row's first call begins with in vain."""
    num_experts = trace.anatomy.layers[-1].experts.num_experts
    routing = trace.table("routing").set_index(["step", "layer"])
    choices = trace.table("choices").set_index(["step", "layer", "row", "position"])
    seen = rows = 0
    positions = {}
    for step, layer, logits, experts, weights in recomputed.calls():
        of_call = routing.loc[(step, layer)].sort_values("expert")
        assert of_call["expert"].tolist() == list(range(num_experts))
        experts, weights = experts.numpy(), weights.numpy()
        assert of_call["tokens"].tolist() == np.bincount(experts.flatten(), minlength=num_experts).tolist()
        sums = np.bincount(experts.flatten(), weights=weights.flatten(), minlength=num_experts)
        np.testing.assert_allclose(of_call["weight_sum"], sums, rtol=1e-4, atol=1e-5)
        rows += len(of_call)
        start = positions.setdefault((layer, step), sum(state.shape[1] for state in recomputed.entered[layer][:step]))
        for row, column in np.ndindex(*experts.shape[:2]):
            position = start + column - padding[row]
            if position < 0:
                assert (step, layer, row, position) not in choices.index
                continue
            seen += 1
            found = choices.loc[(step, layer, row, position)]
            order, expected = np.argsort(found["experts"]), np.argsort(experts[row, column])
            assert found["experts"][order].tolist() == experts[row, column][expected].tolist()
            np.testing.assert_allclose(found["weights"][order], weights[row, column][expected], rtol=1e-4)
            np.testing.assert_allclose(found["logits"], logits[row, column].numpy(), rtol=1e-3, atol=1e-4)
    assert seen == len(choices) > 0 and rows == len(routing)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_equal_a_recomputation_from_hidden_states_and_gates(family):
    model, prompt = built(family), ids(7, 2)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    with wb.profile(model, routing="logits") as prof, Recomputed(model, family) as generated, torch.no_grad():
        model.generate(prompt, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    check(prof.trace, generated, padding=[0, 3])
    with wb.profile(model, routing="logits") as prof, Recomputed(model, family) as called, torch.no_grad():
        model(prompt, attention_mask=mask)
    check(prof.trace, called, padding=[0, 3])
    assert prof.trace.notes == []


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_v3"])  # which a session refuses
def test_a_session_s_tables_equal_a_recomputation(family):
    model = built(family)
    session = wb.Session(wb.load((model, wb.load("tiny-moe").tokenizer)), routing="logits")
    with Recomputed(model, family) as recomputed:
        session.prefill([ids(7)[0].tolist(), ids(4, seed=1)[0].tolist()])
        session.step()
        session.append(torch.full((2, 2), 5))
    check(session.trace, recomputed, padding=[0, 3])
    assert session.trace.notes == []


def test_the_unnamed_family_is_named_nowhere():
    sources = Path(wb.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if "ernie" in path.read_text().lower()]


@pytest.mark.parametrize(("family", "holder"), [("llama4_text", "Llama4TextMoe"), ("jetmoe", "JetMoeMoE")])
def test_experts_that_are_not_told_which_are_chosen_are_named(family, holder):
    model = random_model(family)
    with wb.profile(model, routing="choices") as prof, torch.no_grad():
        model(ids(5))
    sentence = f"{holder} of layers 0, 1, 2 is not told which of its experts are chosen"
    assert [note for note in prof.trace.notes if note.startswith(sentence)]
    with pytest.raises(wb.UserError, match="none could be seen"):
        routing.load(prof.trace)


def test_logits_that_cannot_be_seen_are_said_to_be_missing():
    model = random_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight = torch.nn.Parameter(torch.cat([layer.mlp.gate.weight] * 2))  # no row for each expert
        layer.mlp.gate.forward = lambda hidden: (
            hidden,
            torch.full((len(hidden), 2), 0.5),
            torch.tensor([[0, 1]] * len(hidden)),
        )
    with wb.profile(model, routing="logits") as prof, torch.no_grad():
        model(ids(5)[0][None])
    assert prof.trace.table("choices")["logits"].isna().all()
    assert [
        note for note in prof.trace.notes if note.startswith("The logits of the routers of layers 0, 1, 2 could not be seen")
    ]


def test_seeing_the_logits_is_no_part_of_the_model_s_work():
    model, flops = random_model("mixtral"), {}
    for mode in ("load", "logits"):
        with wb.profile(model, routing=mode) as prof, torch.no_grad():
            model.generate(ids(5), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert prof.trace.table("unattributed").empty
        flops[mode] = prof.trace.flops()
    assert flops["load"] == flops["logits"]
