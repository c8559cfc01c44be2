"""Engram's parts: token compression, hashes of n-grams, the gate, the convolution, and what is remembered between calls."""

from __future__ import annotations

import pytest
import torch

from workbench.models.blocks.attach import attached, llama_layers
from workbench.models.blocks.engram import EngramBlock, compressed, gate, hashes, multipliers, primes
from workbench.models.blocks.past import Past
from workbench.testing import ids, random_llama

LAYER = 1
MULTIPLIED = multipliers(LAYER, 3, 96)
MODULI = torch.tensor(primes(50, 4)).view(2, 2)


def hashed(row: list[int]) -> torch.Tensor:
    """`[T, 2, 2]` of a row that pads of 0 stand before."""
    return hashes(torch.tensor([[0, 0, *row]]), MULTIPLIED, MODULI)[0]


def test_texts_that_differ_in_case_accents_and_white_space_are_one_token():
    numbers = compressed(["Cafe", " café", "CAFÉ\n", "tea", "\t", "  ", "ﬁ", "fi", "\ufffd", "\ufffd", ""]).tolist()
    assert numbers == [0, 0, 0, 1, 2, 2, 3, 3, 4, 5, 6]


def test_primes_are_the_next_ones():
    assert primes(10, 4) == [11, 13, 17, 19] and primes(11, 2) == [11, 13]


def test_multipliers_are_odd_and_no_product_overflows():
    for layer in range(8):
        drawn = multipliers(layer, 3, 1536)
        assert (drawn % 2 == 1).all() and all(0 < int(each) * 1535 < 2**63 for each in drawn)
    assert not torch.equal(multipliers(0, 3, 1536), multipliers(1, 3, 1536))


def test_rows_are_below_the_prime_and_equal_a_loop_over_python_integers():
    row = ids(30)[0].tolist()
    found = hashed(row)
    assert (found >= 0).all() and (found < MODULI).all()
    padded, m = [0, 0, *row], MULTIPLIED.tolist()
    for place in range(30):
        two = padded[place + 2] * m[0] ^ padded[place + 1] * m[1]
        three = two ^ padded[place] * m[2]
        expected = [[mix % prime for prime in of_order] for mix, of_order in zip((two, three), MODULI.tolist(), strict=True)]
        assert found[place].tolist() == expected


def test_the_same_n_gram_has_the_same_rows_wherever_it_stands():
    found = hashed([5, 6, 7, 40, 41, 5, 6, 7])
    assert torch.equal(found[2], found[7])
    assert torch.equal(found[1, 0], found[6, 0]) and not torch.equal(found[1, 1], found[6, 1])  # 5 6, after a pad and after 41


def test_a_token_older_than_the_n_gram_and_a_later_one_change_nothing():
    row = ids(12)[0].tolist()
    before = hashed(row)
    older, later = list(row), list(row)
    older[3] = later[9] = 95 if row[3] != 95 else 94
    assert torch.equal(hashed(older)[6:], before[6:]) and not torch.equal(hashed(older)[5], before[5])
    assert torch.equal(hashed(older)[5, 0], before[5, 0])  # the pair no longer reaches back to it
    assert torch.equal(hashed(later)[:9], before[:9]) and not torch.equal(hashed(later)[9], before[9])


def test_the_gate_is_half_for_a_key_that_says_nothing_and_opens_with_agreement():
    key = torch.tensor([[[2.0, 0.0]], [[-2.0, 0.0]], [[0.0, 0.0]]])
    hidden = torch.tensor([[[1.0, 5.0]]]).expand(3, 1, 2)
    opened = gate(key, hidden).flatten()
    root = (2 / 2**0.5) ** 0.5
    expected = torch.tensor([root, -root, 0.0]).sigmoid()
    torch.testing.assert_close(opened, expected)


@pytest.fixture(scope="module")
def block() -> EngramBlock:
    torch.manual_seed(0)
    made = EngramBlock((0, 2), torch.arange(96), pad=1, hidden=32, rows=20)
    for memory in made.by_layer.values():
        torch.nn.init.normal_(memory.value.weight, std=0.1)
        torch.nn.init.normal_(memory.taps, std=0.1)
    return made.requires_grad_(False)


def test_no_two_heads_of_any_layer_share_a_prime(block):
    every = torch.cat([memory.moduli.flatten() for memory in block.by_layer.values()]).tolist()
    assert len(every) == len(set(every)) == 2 * 2 * 8
    for memory in block.by_layer.values():
        assert len(memory.table) == memory.moduli.sum()


def logits(model, block, row: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), attached(block.forwards(model.get_input_embeddings(), llama_layers(model, "engram"))):
        return model(row).logits[0]


def test_later_tokens_change_nothing_before_them(block):
    model, row = random_llama(), ids(20)
    other = row.clone()
    other[0, 12:] = ids(8, seed=1)
    changed, before = logits(model, block, other), logits(model, block, row)
    torch.testing.assert_close(changed[:12], before[:12])
    assert not torch.allclose(changed[12], before[12])


def test_a_value_projection_of_zero_leaves_the_model_as_it_was(block):
    model, row = random_llama(), ids(20)
    untrained = EngramBlock((0, 2), torch.arange(96), pad=1, hidden=32, rows=20)
    with torch.no_grad():
        dense = model(row).logits[0]
    assert torch.equal(logits(model, untrained, row), dense) and not torch.allclose(logits(model, block, row), dense)


def test_flops_are_those_of_its_products(block):
    memory = block.by_layer["0"]
    # 2 projections of 2 x 8 x 16 = 256 to 32, a product of 32 for the gate, 4 taps of 32
    assert memory.flops(3) == 3 * 2 * (2 * 256 * 32 + 32 + 4 * 32)
    assert memory.gathered_bytes(3) == 3 * 16 * 16 * 4


def test_the_past_is_found_by_position_and_forgets_what_was_taken_back():
    def at(*positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([positions], dtype=torch.int32), torch.tensor([[float(each) for each in positions]])

    past = Past.empty(torch.zeros(1, 4)).followed(*at(-1, 0, 1, 2), count=3)
    assert past.up_to(torch.tensor([3]), 4, -9).tolist() == [[-9, 0, 1, 2]]
    positions, states = at(3, 4)
    rehearsed = past.followed(positions, states + 100, count=5)
    assert rehearsed.up_to(torch.tensor([5]), 3).tolist() == [[2, 103, 104]]
    real = rehearsed.followed(*at(3), count=3)
    assert real.up_to(torch.tensor([4]), 3).tolist() == [[1, 2, 3]] and real.positions.tolist() == [[1, 2, 3]]
    assert real.up_to(torch.tensor([9]), 3, -9).tolist() == [[-9, -9, -9]]
