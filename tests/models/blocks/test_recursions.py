"""Mixture-of-Recursions' parts: how many tokens a recursion keeps, which, and what happens to the others."""

from __future__ import annotations

import itertools

import pytest
import torch

from workbench.models.blocks.attach import attached, llama_layers
from workbench.models.blocks.recursions import RecursionBlock, chosen, num_kept, recursed, shares
from workbench.testing import ids, random_llama

TOKENS = 30


@pytest.fixture(scope="module")
def model():
    return random_llama(num_hidden_layers=5)


@pytest.fixture(scope="module")
def block(model) -> RecursionBlock:
    torch.manual_seed(0)
    made = RecursionBlock(llama_layers(model, "mixture-of-recursions")).eval().requires_grad_(False)
    for router in made.routers:
        router.mul_(20)
    return made


def run(model, block, row: torch.Tensor, watched: list | None = None) -> torch.Tensor:
    layers = llama_layers(model, "mixture-of-recursions")
    hooks = [
        layer.register_forward_hook(lambda _, args, out: watched.append((args[0], out)))
        for layer in (layers if watched is not None else ())
    ]
    try:
        with torch.no_grad(), attached(block.forwards(layers)):
            return model(row, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def test_shares_fall_evenly_from_all_tokens():
    assert shares(3) == pytest.approx([1, 2 / 3, 1 / 3]) and shares(2) == [1, 0.5]
    for recursions in (1, 2, 3, 4, 7):
        for tokens in (1, 2, 10, 31):
            counts = [num_kept(share, tokens) for share in shares(recursions)]
            assert counts == sorted(counts, reverse=True) and counts[0] == tokens and counts[-1] >= 1
    assert [num_kept(share, 30) for share in shares(3)] == [30, 20, 10] and num_kept(0.5, 0) == 0


def test_the_best_are_chosen_among_those_that_are_there():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    among = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert chosen(scores, among, [2, 1]).tolist() == [[False, True, True, False], [False, True, False, False]]
    assert chosen(scores, among, [4, 0]).tolist() == [[False, True, True, True], [False] * 4]


def test_kept_tokens_gain_and_the_others_stay():
    stream, out = torch.randn(1, 5, 3), torch.randn(1, 3, 3)
    index, weights = torch.tensor([[1, 2, 4]]), torch.tensor([[0.5, 0.0, 2.0]])
    out[0, 1] = torch.nan  # what fills up a row
    after = recursed(stream, index, weights, out)
    assert torch.equal(after[0, [0, 2, 3]], stream[0, [0, 2, 3]])
    torch.testing.assert_close(after[0, [1, 4]], stream[0, [1, 4]] + torch.stack([0.5 * out[0, 0], 2 * out[0, 2]]))


def test_kept_sets_are_nested_and_the_others_leave_a_recursion_as_they_came(model, block):
    watched = []
    run(model, block, ids(TOKENS), watched)
    assert len(watched) == 5
    changed = [(before != after).any(-1)[0] for before, after in watched[1:-1]]
    assert [int(each.sum()) for each in changed] == [30, 20, 10]
    for earlier, later in itertools.pairwise(changed):
        assert (earlier | ~later).all()
    logits = watched[2][0][0] @ block.routers[1]
    assert changed[1].nonzero().flatten().tolist() == sorted(logits.argsort(descending=True)[:20].tolist())


def test_the_kept_tokens_attend_among_themselves_at_their_own_positions(model, block):
    watched = []
    run(model, block, ids(TOKENS), watched)
    before, after = watched[2]
    kept = (before != after).any(-1)[0].nonzero().flatten()
    rotary = model.model.rotary_emb(before, torch.arange(TOKENS)[None])
    with torch.no_grad():
        out = block.shared(before[:, kept], position_embeddings=tuple(each[:, kept] for each in rotary))
    weights = 0.1 * (before[:, kept] @ block.routers[1]).sigmoid()
    torch.testing.assert_close(after[:, kept], before[:, kept] + weights[..., None] * out, atol=1e-5, rtol=1e-4)


def test_all_tokens_and_a_weight_of_one_are_the_plain_recursion(model):
    torch.manual_seed(0)
    block = RecursionBlock(llama_layers(model, "mixture-of-recursions"), alpha=2.0).eval().requires_grad_(False)
    block.shares = [1.0] * 3
    for router in block.routers:
        router.zero_()  # 2 x sigmoid(0) = 1
    row, watched = ids(TOKENS), []
    run(model, block, row, watched)
    rotary = model.model.rotary_emb(watched[0][0], torch.arange(TOKENS)[None])
    stream = watched[1][0]
    with torch.no_grad():
        for _, after in watched[1:-1]:
            stream = stream + block.shared(stream, position_embeddings=rotary)
            torch.testing.assert_close(after, stream, atol=1e-5, rtol=1e-4)


def test_first_and_last_layer_start_as_the_models_own_and_the_shared_one_as_its_second(model, block):
    layers = llama_layers(model, "mixture-of-recursions")
    watched = []
    run(model, block, ids(TOKENS), watched)
    with torch.no_grad():
        hidden = model(ids(TOKENS), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(watched[0][1], hidden)
    assert torch.equal(block.shared.self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)
    assert torch.equal(block.last.mlp.up_proj.weight, layers[-1].mlp.up_proj.weight)
    unique = sum(weight.numel() for part in (block.first, block.shared, block.last) for weight in part.parameters())
    stack = sum(weight.numel() for layer in layers for weight in layer.parameters())
    assert unique / stack == pytest.approx((2 + 3 / 3) / 5)


def test_routers_learn_whom_they_would_choose(model):
    """The auxiliary loss alone brings the sign of a router's score to what the ranking chooses."""
    torch.manual_seed(0)
    layers = llama_layers(model, "mixture-of-recursions")
    block = RecursionBlock(layers).train()
    optimizer = torch.optim.Adam(block.routers.parameters(), lr=0.05)
    row, losses = ids(TOKENS), []
    with attached(block.forwards(layers)):
        for _ in range(40):
            model(row, use_cache=False)
            loss = block.auxiliary_loss()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward(inputs=list(block.routers.parameters()))
            optimizer.step()
    assert len(block.auxiliary) == 3 and losses[-1] < 0.8 * losses[0]
