"""The rotation found by trying is the model's own."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.probes.attention import AttentionProbe
from workbench.probes.rotation import _Queries, rotations
from workbench.testing import FAMILIES, ids, random_model

REFUSED = {
    "falcon bloom gptj mpt": "attention does not go through the interface, so no session runs them",
    "gpt2 opt": "positions are part of the embedding",
    "deepseek_v2 deepseek_v3": "latent attention, which no session runs",
    "gpt_oss": "attention sinks take a share that falls with the position, so later layers' queries differ",
}
FOUND = [family for family in FAMILIES if not any(family in names.split() for names in REFUSED)]


@pytest.mark.parametrize("family", FOUND)
def test_queries_with_their_rotation_undone_are_those_before_it(family):
    """Moving a prompt by 100 positions changes the rotated queries of the first layer, and nothing once it is undone."""
    model = random_model(family)
    prompt = ids(12)
    before, rotated = [], []
    rotation = rotations(model, [0])[0]
    for start in (0, 100):
        held = _Queries()
        probe = AttentionProbe(model, held)
        positions = torch.arange(start, start + 12)[None]
        probe.attach()
        try:
            with torch.no_grad():
                model(prompt, position_ids=positions, use_cache=False)
        finally:
            probe.detach()
        rotated.append(held.by_layer[0])
        before.append(rotation.undone(held.by_layer[0], positions))
    assert (rotated[0] - rotated[1]).abs().max() > 0.05 * rotated[0].abs().max()
    torch.testing.assert_close(before[0], before[1], atol=1e-4 * float(rotated[0].abs().max()), rtol=1e-4)


def test_queries_before_rotation_are_the_projections(random_lm):
    model = random_lm.model
    attention = model.model.layers[1].self_attn
    projected, held = [], _Queries()
    last = getattr(attention, "q_norm", attention.q_proj)
    handle = last.register_forward_hook(lambda module, args, out: projected.append(out))
    probe = AttentionProbe(model, held)
    probe.attach()
    try:
        with torch.no_grad():
            model(ids(20), use_cache=False)
    finally:
        probe.detach()
        handle.remove()
    rotation = rotations(model, [1])[1]
    heads = projected[0].view(1, 20, -1, held.by_layer[1].shape[-1]) if projected[0].ndim == 3 else projected[0]
    expected = heads if heads.shape[1] == held.by_layer[1].shape[1] else heads.transpose(1, 2)
    torch.testing.assert_close(rotation.undone(held.by_layer[1], torch.arange(20)[None]), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_without_rotation_is_found():
    found = rotations(random_model("smollm3"), [0, 1, 2])
    assert [len(found[layer].frequencies) for layer in (0, 1, 2)] == [4, 0, 4]


def test_neighbours_are_paired_where_the_model_pairs_them():
    assert rotations(random_model("cohere2"), [1])[1].interleaved and not rotations(random_model("llama"), [1])[1].interleaved


def test_a_mean_over_positions_is_that_of_each_rotated_by_itself():
    rotation = rotations(random_model("gpt_neox"), [0])[0]  # a quarter of each head rotates
    states = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([7, 40])
    each = [rotation.undone(states, -(first + step).view(2, 1).expand(2, 5)) for step in range(9)]
    torch.testing.assert_close(rotation.averaged(states, first, 9), torch.stack(each).mean(0))


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_a_rotation_that_is_not_found_is_refused(tiny, family):
    lm = wb.load((random_model(family), tiny.tokenizer))
    with pytest.raises(wb.UserError, match=r"unknown how layer . of .* rotates its queries") as caught:
        wb.Session(lm, wb.ExpectedAttention(budget=0.5))
    assert "\n" not in str(caught.value)
