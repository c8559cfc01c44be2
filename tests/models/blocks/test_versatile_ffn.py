"""VersatileFFN's parts: slices, passes, how they are joined, and what was computed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.models.blocks.attach import attached, llama_layers
from workbench.models.blocks.versatile_ffn import VersatileBlock, VersatileLayer, fusion
from workbench.testing import ids, random_llama

TOKENS = 40


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def layer(model) -> VersatileLayer:
    torch.manual_seed(0)
    return VersatileLayer(model.model.layers[0].mlp).eval().requires_grad_(False)


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(1))


def norm(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(states, states.shape[-1:])


def test_all_slices_together_are_the_ffn(model, layer, stream):
    whole = layer.ffn(stream)
    torch.testing.assert_close(sum(layer.ffn(stream, number) for number in range(8)), whole)
    torch.testing.assert_close(whole, model.model.layers[0].mlp(stream))


def test_the_wide_path_has_no_weight_at_four_passes_and_at_most_three_quarters():
    assert fusion(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [0.75, 0.5, 0.25, 0.0]


def test_one_pass_alone_is_the_layer_of_the_model(model, layer, stream):
    (once,) = layer.deep(stream, norm, 1)
    torch.testing.assert_close(once, model.model.layers[0].mlp(norm(stream)))


def test_passes_are_the_loop_of_the_paper(layer, stream):
    state = stream
    for added in layer.deep(stream, norm):
        state = state + layer.ffn(norm(state))
        torch.testing.assert_close(stream + added, state)


def test_the_wide_path_weighs_the_two_best_slices_by_a_softmax_over_the_two(layer, stream):
    added, chosen, weights = layer.wide(stream, norm)
    for token in range(TOKENS):
        scores = layer.expert_gate(stream[token])
        best = scores.argsort(descending=True)[:2]
        assert chosen[token].tolist() == best.tolist()
        shares = scores[best].softmax(-1)
        torch.testing.assert_close(weights[token], shares)
        outs = [stream[token] + layer.ffn(norm(stream[token]), int(each)) for each in best]
        torch.testing.assert_close(stream[token] + added[token], shares[0] * outs[0] + shares[1] * outs[1])


def test_what_is_added_is_both_paths_by_their_weights_whichever_way_they_are_computed(layer, stream):
    loops = torch.arange(TOKENS) % 4 + 1
    deep, (wide, _, _) = layer.deep(stream, norm), layer.wide(stream, norm)
    expected = torch.stack([loops[t] / 4 * deep[loops[t] - 1][t] + (4 - loops[t]) / 4 * wide[t] for t in range(TOKENS)])
    for ragged in (True, False):
        torch.testing.assert_close(layer.served(stream, norm, loops, ragged)[0], expected)


def test_tokens_of_four_passes_never_enter_the_wide_path(layer, stream):
    loops = torch.tensor([4, 1] * (TOKENS // 2))
    _, served = layer.served(stream, norm, loops, True)
    assert (served.slices[::2] == -1).all() and (served.weights[::2] == 0).all() and served.easy == TOKENS // 2
    assert (served.slices[1::2] >= 0).all()
    torch.testing.assert_close(served.weights[1::2].sum(-1), torch.full((TOKENS // 2,), 0.75))
    added, none = layer.served(stream, norm, torch.full((TOKENS,), 4), True)
    assert none.easy == 0
    torch.testing.assert_close(added, layer.deep(stream, norm)[-1])


@pytest.mark.parametrize("ragged", [True, False])
def test_flops_are_what_torch_counts(layer, stream, ragged):
    loops = torch.arange(TOKENS) % 3 + 1
    with FlopCounterMode(display=False) as counter:
        _, served = layer.served(stream, norm, layer.loops(stream) * 0 + loops, ragged)
    assert served.passes == (int(loops.sum()) if ragged else 3 * TOKENS)
    # the gate of the slices runs over the tokens of the wide path, here all; that of the depth ran before, in `loops`
    assert counter.get_total_flops() == layer.flops(served.passes, served.easy) + layer.gate_flops(TOKENS)
    assert layer.flops(1, 0) == 6 * 32 * 48 and layer.flops(0, 1) == 6 * 32 * 48 // 4


def test_a_layer_gains_twelve_parameters_for_each_hidden_element(model, layer):
    ffn = sum(weight.numel() for weight in model.model.layers[0].mlp.parameters())
    assert sum(weight.numel() for weight in layer.parameters()) == ffn + 12 * 32


def test_training_computes_what_is_served_later(model):
    """With the depths that are drawn, and as the temperature falls these are the likeliest."""
    torch.manual_seed(0)
    block = VersatileBlock(llama_layers(model, "versatile-ffn"))
    block.cool(1.0)
    assert block.layers[0].temperature == pytest.approx(0.1)
    for layer in block.layers:
        layer.depth_predictor.weight.data *= 1e4
    row = ids(20)
    with torch.no_grad(), attached(block.forwards(llama_layers(model, "versatile-ffn"))):
        trained = model(row).logits
        block.eval()
        served = model(row).logits
    torch.testing.assert_close(trained, served, atol=1e-5, rtol=1e-4)
