"""FFNs with branches: what each token takes is what is computed, and what is counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.cost.ffn import read_bytes
from workbench.engine.branches import Skip, branch_forwards
from workbench.engine.ffn import ffns
from workbench.methods.routing.base import FfnMethod
from workbench.models.anatomy import mlp_modules
from workbench.testing import ids, random_model

GATED = ["llama", "phi3", "gemma2", "qwen3"]
PLAIN = ["gpt2", "gpt_neox", "falcon", "starcoder2"]


class ByPosition(FfnMethod):
    """Every third token takes its own FFN, a small one, or none."""

    name, paper = "by-position", "none"

    def forwards(self, lm, call):
        small = {layer: ffn.only(torch.arange(5)) for layer, ffn in ffns(lm).items()}
        branches = {layer: [ffn, Skip()] for layer, ffn in small.items()}
        return branch_forwards(lm, call, lambda state: state.positions.flatten().clamp(min=0).long() % 3, branches)

    def resident_bytes(self, lm):
        return 0


@pytest.fixture(scope="module")
def tokenizer():
    return wb.load("tiny-dense").tokenizer


@pytest.mark.parametrize("family", GATED + PLAIN)
def test_an_ffn_is_read_off_any_family_and_gives_its_output(family, tokenizer):
    lm = wb.load((random_model(family), tokenizer))
    found = ffns(lm)
    assert len(found) == 3 and all((ffn.gate is not None) == (family in GATED) for ffn in found.values())
    hidden = torch.randn(7, 32)
    for layer, ffn in found.items():
        torch.testing.assert_close(ffn(hidden), mlp_modules(lm.model)[layer](hidden[None])[0], atol=1e-6, rtol=1e-5)
        assert ffn.only(torch.arange(ffn.neurons)).flops == ffn.flops
        assert ffn.flops == 2 * sum(each.in_features * each.out_features for each in mlps(lm, layer))


def mlps(lm, layer):
    return [linear for linear in lm.anatomy.layers[layer].linears if linear.component == "mlp"]


@pytest.mark.parametrize("family", ["mixtral", "bloom", "opt"])
def test_a_model_without_a_dense_ffn_of_its_own_is_refused_in_a_sentence(family, tokenizer):
    with pytest.raises(wb.UserError, match="no dense FFN in a module of its own"):
        ffns(wb.load((random_model(family), tokenizer)))
    if family == "mixtral":
        with pytest.raises(wb.UserError, match="'by-position' acts on dense FFNs, and MixtralForCausalLM has none"):
            wb.Session(wb.load((random_model(family), tokenizer)), ByPosition())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_token_gets_what_its_branch_computes(family, batch, tokenizer):
    lm = wb.load((random_model(family), tokenizer))
    session = wb.Session(lm, ByPosition(), routing="choices")
    taken = {}
    modules = mlp_modules(lm.model)
    hooks = [
        module.register_forward_hook(lambda _, args, out, layer=layer: taken.update({layer: (args[0], out)}))
        for layer, module in modules.items()
    ]
    session.prefill([ids(11 - row, seed=row)[0].tolist() for row in range(batch)])
    for hook in hooks:
        hook.remove()
    positions = session._call.positions.clamp(min=0)
    for layer, ffn in ffns(lm).items():
        hidden, out = taken[layer]
        small = ffn.only(torch.arange(5))
        expected = torch.stack([ffn(hidden), small(hidden), torch.zeros_like(hidden)])
        expected = expected.gather(0, (positions % 3)[None, ..., None].expand(1, *hidden.shape))[0]
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    routing = session.trace.table("routing")
    assert set(routing["layer"]) == {0, 1, 2} and routing.groupby("layer")["tokens"].sum().tolist() == [batch * 11] * 3
    choices = session.trace.table("choices")
    assert all(row.experts[0] == row.position % 3 for row in choices.itertuples())


def counted(lm, setup, batch=1):
    """What torch counts of a prompt and three tokens, and the trace of it."""
    session, counter = wb.Session(lm, setup), FlopCounterMode(display=False)
    with counter:
        session.prefill(ids(10, batch))
        for token in (3, 4, 5):
            session.step([token] * batch)
    return counter.get_total_flops(), session.trace


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_those_torch_counts(family, tokenizer):
    lm = wb.load((random_model(family), tokenizer))
    wb.Session(lm)  # whose check of the engine is none of this
    ffns(lm)
    dense, before = counted(lm, None)
    fewer, trace = counted(lm, ByPosition())
    assert before.flops() - trace.flops() == dense - fewer > 0
    by = trace.flops(by=["slot", "component"]).set_index(["slot", "component"])["flops"]
    own, small = (
        sum(2 * each.in_features * each.out_features for each in mlps(lm, 0)),
        ffns(lm)[0].only(torch.arange(5)).flops,
    )
    # of positions 0 to 12: 0, 3, 6, 9, 12 big; 1, 4, 7, 10 small; of the steps 10 and 11 compute less, 12 is the model's own
    assert by["routing", "mlp"] == 3 * (4 * own + 4 * small) and by["model", "mlp"] == 3 * own


def test_weights_read_are_those_of_the_branches_taken(tokenizer):
    lm = wb.load((random_model("llama"), tokenizer))
    _, trace = counted(lm, ByPosition())
    ffn = ffns(lm)[0]
    big, small = ffn.weight_bytes, ffn.only(torch.arange(5)).weight_bytes
    read = read_bytes(trace).groupby("step")["read_bytes"].sum()
    assert read.tolist() == [3 * (big + small), 3 * small, 0, 3 * big]
    moved = trace.bytes(by=["step", "component"]).set_index(["step", "component"])["bytes"]
    assert moved[1, "mlp"] == 3 * (small + ffn.only(torch.arange(5)).token_bytes) and moved[2, "mlp"] == 0


def test_the_model_is_left_as_it_was(tokenizer):
    lm = wb.load((random_model("llama"), tokenizer))
    prompt = ids(9)
    with torch.no_grad():
        before = lm.model(prompt).logits
        session = wb.Session(lm, ByPosition())
        session.prefill(prompt)
        assert not torch.equal(session.logits, before[:, -1]) and torch.equal(lm.model(prompt).logits, before)
