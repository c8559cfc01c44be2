"""FLOPs: the arithmetic of each formula, and exact agreement with torch's counter on eager attention."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.cost.flops import attention_flops, linear_flops
from workbench.testing import FAMILIES, ids, random_llama, random_model
from workbench.trace.anatomy import Attention, Linear


def test_linear():
    # 5 tokens x 7 in x 3 out, a multiply-add is 2: 2 * 5 * 7 * 3 = 210
    assert linear_flops(5, Linear("mlp", 7, 3, bias=True)) == 210


def test_attention():
    # scores: 2 * 10 pairs * 4 heads * 8 = 640; values: 2 * 10 * 4 * 6 = 480
    assert attention_flops(10, Attention(num_q_heads=4, num_kv_heads=2, head_dim=8, value_dim=6)) == 1120


def test_whole_llama_by_hand():
    """3 layers, d=32, 4 query and 2 kv heads of 8, f=48, V=96; a prompt of 10, all logits."""
    model = random_llama()
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(10))
    flops = prof.trace.flops(by="component").set_index("component")["flops"]
    assert flops["attention.qkv"] == 3 * 2 * 10 * 32 * (32 + 16 + 16)
    assert flops["attention.out"] == 3 * 2 * 10 * 32 * 32
    assert flops["attention.scores"] == 3 * 2 * (10 * 10) * 4 * (8 + 8)
    assert flops["mlp"] == 3 * 2 * 10 * 3 * 32 * 48
    assert flops["lm_head"] == 2 * 10 * 32 * 96
    causal = prof.trace.flops(by="component", convention="causal").set_index("component")["flops"]
    assert causal["attention.scores"] == 3 * 2 * (10 * 11 // 2) * 4 * (8 + 8)


def counted_flops(counter: FlopCounterMode) -> int:
    """What torch counted. Older transformers make rotary angles by a matrix product, which is left out on both sides."""
    by_module = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for module, ops in by_module.items() if module.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.fixture(scope="module", params=FAMILIES)
def eager_model(request):
    """A model of every family, in the implementations torch's counter sees into."""
    return random_model(request.param, attn_implementation="eager", experts_implementation="eager")


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_flop_counter(eager_model, batch):
    """Prefill, decode with a cache and a multi-token append, each on its own, difference 0."""
    model = eager_model
    counted = []
    with wb.profile(model) as prof, torch.no_grad():
        cache = None
        for length in (37, 1, 1, 5):
            counter = FlopCounterMode(display=False)
            with counter:
                out = model(ids(length, batch), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            counted.append(counted_flops(counter))
    by_step = prof.trace.flops(by="step").set_index("step")["flops"]
    assert by_step.tolist() == counted
    assert list(prof.trace.table("steps")["phase"]) == ["prefill", "decode", "decode", "append"]


def test_equals_flop_counter_for_all_logits_and_for_some(eager_model):
    for logits_to_keep in (0, 3):
        counter = FlopCounterMode(display=False)
        with wb.profile(eager_model) as prof, counter, torch.no_grad():
            eager_model(ids(9, 2), logits_to_keep=logits_to_keep)
        assert prof.trace.flops() == counted_flops(counter)
        assert prof.trace.table("steps")["logits"].item() == 2 * (logits_to_keep or 9)


def test_nothing_is_unattributed_but_what_the_anatomy_does_not_know(eager_model):
    with wb.profile(eager_model) as prof, torch.no_grad():
        eager_model(ids(9))
    share = prof.trace.flops(by="component").set_index("component")["flops"].get("unattributed", 0)
    unknown = eager_model.config.model_type in {"llama4_text", "jetmoe"}
    assert (share > 0) == unknown
    assert ("unattributed" in repr(prof.trace)) == unknown


def test_equals_flop_counter_through_generate_with_padding(eager_model):
    model = eager_model
    prompts = ids(20, 2)
    mask = torch.ones_like(prompts)
    mask[0, :7] = 0
    counter = FlopCounterMode(display=False)
    with wb.profile(model) as prof, counter:
        model.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert prof.trace.flops() == counted_flops(counter)


def test_causal_pairs_of_a_padded_batch():
    model = random_llama(attn_implementation="eager")
    prompts = ids(20, 2)
    mask = torch.ones_like(prompts)
    mask[0, :7] = 0
    with wb.profile(model) as prof, torch.no_grad():
        model(prompts, attention_mask=mask)
    attention = prof.trace.table("attention").query("layer == 0")
    # Row 0 sees 13 tokens causally, and its 7 padding rows see what eager's mask leaves them; row 1 sees all 20.
    assert 13 * 14 // 2 + 20 * 21 // 2 <= attention["pairs"].item() <= 20 * 21


def test_unknown_group_and_convention():
    model = random_llama()
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(4))
    with pytest.raises(wb.UserError, match=r"'colour'.*phase, component"):
        prof.trace.flops(by="colour")
    with pytest.raises(wb.UserError, match=r"'half'.*full and causal"):
        prof.trace.flops(convention="half")
