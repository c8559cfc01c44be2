"""HEAPr: scores are those of its formula, what is removed is really gone, and it beats removing at random."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import workbench as wb
from workbench.engine.banks import banks_of
from workbench.engine.calibration import Calibration, Document
from workbench.engine.neurons import neurons
from workbench.engine.routed import routed
from workbench.experiments.calibrate import prose_documents
from workbench.models.anatomy import expert_modules
from workbench.testing import ids, random_model

TEXT = ids(30)[0].tolist()


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def lm(request, tiny) -> wb.LM:
    return wb.load((random_model(request.param), tiny.tokenizer))


def calibrated(lm: wb.LM, texts=(TEXT,)) -> torch.Tensor:
    return wb.calibrate(lm, "heapr", documents=[Document(tuple(text), len(text)) for text in texts]).tables["scores"]


def told(scores: torch.Tensor, ratio: float) -> wb.HEAPr:
    return wb.HEAPr(ratio=ratio).with_calibration(Calibration("heapr", {}, "none", (), {}, {"scores": scores}))


def outputs_by_expert(lm: wb.LM) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Layer, expert, what goes into its second product and the gradient of the loss by what comes out, one at a time."""
    seen = []

    def forward(layer, module, layout, hidden, experts, weights):
        out = torch.zeros_like(hidden)
        for expert in experts.unique().tolist():
            tokens, slots = (experts == expert).nonzero(as_tuple=True)
            inner = layout.inner(expert, hidden[tokens])
            given = inner @ layout.columns(expert).T + layout.constant(expert)
            given.retain_grad()
            seen.append((layer, expert, inner, given))
            out = out.index_add(0, tokens, given * weights[tokens, slots, None])
        return out

    modules = expert_modules(lm.model)
    try:
        for layer, module in modules.items():
            layout = neurons(module)
            module.forward = lambda *args, layer=layer, module=module, layout=layout: forward(layer, module, layout, *args)
        with torch.enable_grad():
            logits = lm.model(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0, :-1]
            F.cross_entropy(logits, torch.tensor(TEXT[1:])).backward()
    finally:
        for module in modules.values():
            del module.forward
        lm.model.zero_grad()
    return [(layer, expert, inner.detach(), given.grad) for layer, expert, inner, given in seen]


def test_scores_are_those_of_the_formula_with_the_matrix_of_gradients(lm):
    scores = calibrated(lm)
    expected = torch.full_like(scores, -1.0)
    numbers = {layer: number for number, layer in enumerate(expert_modules(lm.model))}
    for layer, expert, inner, gradient in outputs_by_expert(lm):
        columns = neurons(expert_modules(lm.model)[layer]).columns(expert).detach()
        outer = gradient.T @ gradient / len(gradient)
        curvature = torch.einsum("dk,de,ek->k", columns, outer, columns)
        expected[numbers[layer], expert] = inner.square().mean(0) * curvature
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3 * expected.max().item())
    assert ((scores >= 0) | (scores == -1)).all() and lm.model.get_output_embeddings().weight.grad is None


def test_experts_that_saw_no_token_go_first(tiny):
    lm = wb.load((random_model("qwen3_moe"), tiny.tokenizer))
    scores = calibrated(lm, [[5, 5]])
    used = torch.stack([torch.zeros(6).index_fill(0, each.experts.unique(), 1) for each in routed(lm, [5, 5])[0].values()])
    assert torch.equal((scores == -1).all(-1), used == 0) and (used == 0).any()
    kept = told(scores, ratio=float((used == 0).float().mean())).kept()
    assert torch.equal(kept.any(-1), used == 1) and torch.equal(kept.all(-1), used == 1)


def test_a_neuron_without_weight_or_input_scores_nothing_and_leaves_nothing_missing(tiny):
    lm = wb.load((random_model("mixtral"), tiny.tokenizer))
    modules = expert_modules(lm.model)
    with torch.no_grad():
        for module in modules.values():
            module.down_proj[:, :, 7] = 0
            module.gate_up_proj[:, 11] = 0  # gate of neuron 11: silu(0) = 0
    scores = calibrated(lm)
    seen = (scores != -1).all(-1)
    assert (
        (scores[..., 7][seen] == 0).all() and (scores[..., 11][seen] == 0).all() and (scores[seen] == 0).sum() == 2 * seen.sum()
    )
    method = told(torch.where(scores == 0, 0.0, 1.0), ratio=(scores == 0).float().mean().item())
    assert torch.equal(method.kept(), scores != 0)
    dense, cut = wb.Session(lm), wb.Session(lm, wb.HEAPr(ratio=(scores <= 0).float().mean().item()))
    torch.testing.assert_close(cut.prefill(TEXT), dense.prefill(TEXT), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.9, 1.0])
def test_what_is_said_to_be_removed_is_gone(lm, ratio):
    scores = calibrated(lm)
    method = wb.Session(lm, wb.HEAPr(ratio=ratio)).setup.routing
    kept, banks = method.kept(), banks_of(method, lm)
    assert kept.sum() == scores.numel() - round(ratio * scores.numel())
    a_neuron = 3 * 32 * 4
    for stays, (layer, module) in zip(kept, expert_modules(lm.model).items(), strict=True):
        if layer not in banks:
            assert stays.all()
            continue
        bank, layout = banks[layer], neurons(module)
        assert bank.weight_bytes == [a_neuron * int(each.sum()) for each in stays]
        assert bank.flops == [2 * 3 * 32 * int(each.sum()) for each in stays]
        hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        for expert, each in enumerate(stays):
            expected = (layout.inner(expert, hidden) * each) @ layout.columns(expert).T + layout.constant(expert)
            torch.testing.assert_close(bank.compute(expert, hidden), expected, atol=1e-6, rtol=1e-4)
    assert method.resident_bytes(lm) == a_neuron * int(kept.sum()) + dense_bytes(lm)


def dense_bytes(lm: wb.LM) -> int:
    """FFN weights beside the routed experts."""
    return sum(
        4 * each.in_features * each.out_features
        for layer in lm.anatomy.layers
        for each in layer.linears
        if each.component == "mlp"
    )


@torch.no_grad()
def test_removing_by_score_beats_removing_at_random_at_the_same_ratio():
    lm = wb.load("tiny-moe")
    scores = wb.Session(lm, wb.HEAPr()).setup.routing.tables["scores"]
    (document,) = prose_documents(lm, 1, seed=5)
    modules = expert_modules(lm.model)

    def loss(ranked: torch.Tensor) -> float:
        before = {module: module.down_proj.clone() for module in modules.values()}
        try:
            for module, stays in zip(before, told(ranked, 0.4).kept(), strict=True):
                module.down_proj.mul_(stays[:, None])
            logits = lm.model(input_ids=torch.tensor([document.tokens])).logits[0]
        finally:
            for module, weight in before.items():
                module.down_proj.copy_(weight)
        return F.cross_entropy(logits[:-1], torch.tensor(document.tokens[1:])).item()

    drawn = [torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert loss(scores) < min(map(loss, drawn)) - 0.5
