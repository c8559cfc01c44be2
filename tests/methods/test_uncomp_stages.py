"""UNComp's stages: where they begin, how many tokens reach each, and that later layers really compute with those alone."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.engine.calibration import Calibration
from workbench.methods.cache.budgets import stage_size, stages
from workbench.models.anatomy import decoder_layers
from workbench.models.fingerprint import fingerprint
from workbench.probes.counting import FlopCount
from workbench.testing import footprint, ids, random_gemma, random_llama, random_model

PROMPT = 40
LLAMA_7B = (
    "71.09 70.85 67.41 69.05 69.22 69.52 71.96 73.15 72.40 73.33 73.35 73.32 73.69 73.94 74.62 73.31 73.60 73.91 73.91 74.63 "
    "74.46 74.77 74.94 75.72 74.84 77.00 75.60 76.24 76.62 75.76 75.28 73.45"
)
LLAMA_13B = (
    "88.56 83.19 84.38 83.22 86.92 87.54 89.18 89.19 89.95 90.97 91.86 92.52 92.04 92.47 93.21 91.42 92.64 93.01 92.98 93.16 "
    "93.38 93.12 94.17 93.09 92.58 92.88 93.11 94.19 94.16 94.64 96.27 94.77 95.59 95.22 95.32 94.19 95.29 92.51 92.20 92.14"
)


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(num_hidden_layers=4), tiny.tokenizer))


def staged(lm: wb.LM, entropy=(0.5, 0.4, 0.45, 0.3), **knobs) -> wb.UNComp:
    """The method with these entropies of the layers: by default layers 1 and 3 begin a stage."""
    method = wb.UNComp(**{"stages": True, "window": 4, **knobs})
    num_heads = lm.anatomy.layers[-1].attention.num_kv_heads
    acting = tuple(layer.index for layer in lm.anatomy.layers if layer.attention.window is None)
    tables = {
        "entropy": torch.tensor([[each] * num_heads for each in entropy]),
        "high": torch.tensor([[head % 2 == 0 for head in range(num_heads)]] * len(acting)),
    }
    return method.with_calibration(Calibration(method.name, method.calibration_knobs(), fingerprint(lm), acting, {}, tables))


def prefilled(lm, method, prompt=None) -> wb.Session:
    session = wb.Session(lm, method)
    session.prefill(ids(PROMPT) if prompt is None else prompt)
    return session


def gone_on(session) -> list[list[int]]:
    """The tokens of a prompt that reached each layer: those it did not evict and those it did, but had."""
    lengths = session.trace.table("attention").query("step == 0")["q_len"].tolist()
    evictions = session.trace.table("evictions").query("step == 0 and head == 0")
    absent = {layer: rows["position"].tolist()[: PROMPT - lengths[layer]] for layer, rows in evictions.groupby("layer")}
    return [sorted(set(range(PROMPT)) - set(absent.get(layer, ()))) for layer in range(len(lengths))]


def test_stages_are_those_of_the_papers_models():
    """The entropies its code lists, and the stages it uses."""
    for listed, sizes in ((LLAMA_7B, [2, 13, 11, 5, 1]), (LLAMA_13B, [1, 2, 12, 8, 8, 4, 2, 3])):
        labels = stages([float(each) for each in listed.split()], 1.0)
        assert [labels.count(stage) for stage in range(len(sizes))] == sizes and labels == sorted(labels)
    assert stages([0.3, 0.4, 0.4], 0.0) == [0, 0, 0]


def test_stage_sizes_fall_evenly():
    assert [stage_size(stage, 4, 1536, 3950) for stage in range(5)] == [3950, 1536 + 3 * 603, 1536 + 2 * 603, 1536 + 603, 1536]
    assert [stage_size(stage, 2, 5, 6) for stage in range(3)] == [6, 5, 5]
    assert stage_size(1, 1, 9, 9) == 9


def test_as_many_tokens_reach_a_layer_as_its_stage_has(lm):
    method = staged(lm, budget=0.2)
    assert method.stage_by_layer(4) == [0, 1, 1, 2] and method.thins_after(4) == (0, 2)
    assert method.reach(40, 4) == [40, 16 + 12, 16 + 12, 16]  # 0.39 of 40 tokens reach the last stage
    assert method.reach(3, 4) == [3, 3, 3, 3]  # no fewer than the window
    assert method.with_budget(0.6).reach(40, 4) == [40, 32 + 4, 32 + 4, 32]  # no fewer than the high heads keep
    assert method.with_budget(40).reach(40, 4) == [40] * 4
    for length in (100, 57, 40, 9, 1):
        reach, previous = method.reach(length, 4), length
        attention = prefilled(lm, method, ids(length)).trace.table("attention")
        for entering, size in zip(attention["q_len"].tolist(), reach, strict=True):
            assert entering == min(size, previous)
            previous = entering


def test_what_goes_on_is_what_the_last_queries_attend_to(lm):
    """A plain loop over the layers: the window, and by attention from it, summed over heads, the best before it."""
    seen = []
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["hidden_states"], kwargs["position_embeddings"])), with_kwargs=True
        )
        for block in decoder_layers(lm.model)
    ]
    session = wb.Session(lm, staged(lm))
    seen.clear()  # of the trial on a short prompt
    try:
        session.prefill(ids(PROMPT))
    finally:
        for hook in hooks:
            hook.remove()
    held = gone_on(session)
    assert [len(each) for each in held] == [hidden.shape[1] for hidden, _ in seen] == [40, 28, 28, 16]
    for hidden, rotary in seen:
        assert rotary[0].shape[1] == hidden.shape[1]
    for layer in (0, 2):
        attention, (hidden, (cos, sin)) = decoder_layers(lm.model)[layer].self_attn, seen[layer]
        assert torch.equal(cos[0], seen[0][1][0][0, held[layer]])

        def heads(projection, hidden=hidden, cos=cos, sin=sin):
            states = projection(hidden)[0].unflatten(-1, (-1, 8)).transpose(0, 1)
            half = torch.cat([-states[..., 4:], states[..., :4]], -1)
            return states * cos[0] + half * sin[0]

        with torch.no_grad():
            queries, keys = heads(attention.q_proj)[:, -4:], heads(attention.k_proj).repeat_interleave(2, 0)
            scores = queries @ keys.transpose(-1, -2) * 8**-0.5
            later = torch.arange(keys.shape[1]) > torch.arange(keys.shape[1] - 4, keys.shape[1])[:, None]
            votes = scores.masked_fill(later, -torch.inf).softmax(-1).sum((0, 1))
        best = votes[:-4].topk(len(held[layer + 1]) - 4).indices.tolist()
        assert held[layer + 1] == sorted(held[layer][index] for index in [*best, *range(len(votes) - 4, len(votes))])


def test_tokens_that_do_not_go_on_are_as_if_hidden(lm):
    """The logits are those of plain attention over everything, with what is gone masked in each layer."""
    session = prefilled(lm, staged(lm))
    hooks = []
    for block, held in zip(decoder_layers(lm.model), gone_on(session), strict=True):
        mask = torch.full((PROMPT, PROMPT), -torch.inf).triu(1)
        mask[:, [j for j in range(PROMPT) if j not in held]] = -torch.inf
        mask.fill_diagonal_(0.0)
        hooks.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask[None, None]}), with_kwargs=True
            )
        )
    try:
        with torch.no_grad():
            expected = lm.model(ids(PROMPT)).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(session.logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.2, 0.6])
def test_every_layer_still_holds_its_two_budgets(lm, budget):
    """As many as without stages, at the prompt and later; each layer lists what did not reach it as evicted."""
    session, whole = (prefilled(lm, staged(lm, budget=budget, stages=on)) for on in (True, False))
    assert torch.equal(whole.logits, prefilled(lm, None).logits) and not torch.equal(session.logits, whole.logits)
    gone = session.trace.table("evictions").groupby(["layer", "head"])["position"].agg(["count", "nunique"])
    for _ in range(3):
        held = [(each.store.positions[0] >= 0).sum(-1).tolist() for each in session._cache.layers]
        assert held == [(each.store.positions[0] >= 0).sum(-1).tolist() for each in whole._cache.layers]
        session.step([3]), whole.step([3])
    mean = round(budget * PROMPT)
    assert (gone["count"] == gone["nunique"]).all() and gone["count"].groupby("layer").sum().tolist() == [2 * (40 - mean)] * 4


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_prefill_flops_shrink_from_stage_to_stage_and_are_those_torch_counts(tiny, family):
    lm = wb.load((random_model(family, experts_implementation="eager", num_hidden_layers=4), tiny.tokenizer))
    session = wb.Session(lm, staged(lm))
    with FlopCount() as counter:
        session.prefill(ids(PROMPT))
        session.step()
    assert session.trace.flops() == counter.flops
    by = session.trace.flops(by=["step", "layer", "component"]).set_index(["step", "layer", "component"])["flops"]
    inner = "mlp" if family == "llama" else "experts"
    for component in (inner, "attention.qkv", "attention.out"):
        assert [by[0, layer, component] * PROMPT / by[0, 0, component] for layer in range(4)] == [40, 28, 28, 16]
    assert [by[0, layer, "attention.scores"] * 40**2 / by[0, 0, "attention.scores"] for layer in (1, 3)] == [28**2, 16**2]


def test_a_batch_is_thinned_like_each_prompt_alone(lm):
    prompts = [ids(length, seed=length)[0].tolist() for length in (40, 9, 23, 3)]
    method = staged(lm)
    together = prefilled(lm, method, prompts)
    for row, prompt in enumerate(prompts):
        alone = prefilled(lm, method, prompt)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(together._cache.layers, alone._cache.layers, strict=True):
            for head in range(2):
                assert set(ours.store.positions[row, head].tolist()) - {-1} == set(theirs.store.positions[0, head].tolist()) - {
                    -1
                }
    pairs = together.trace.table("attention")["pairs"].tolist()
    reach = [method.reach(len(prompt), 4) for prompt in prompts]
    assert pairs == [sum(row[layer] * (row[layer] + 1) // 2 for row in reach) for layer in range(4)]


def test_appended_turns_and_branches_go_on_whole(lm):
    before = footprint(lm.model)
    session = prefilled(lm, staged(lm))
    fork = session.branch()
    assert torch.equal(fork.append([5, 6, 7]), session.append([5, 6, 7]))
    assert session.trace.table("attention").query("step == 1")["q_len"].tolist() == [3] * 4 and footprint(lm.model) == before


def test_models_that_cannot_be_thinned_are_refused_in_one_sentence(tiny):
    falling = (0.5, 0.4, 0.3)
    gpt2 = wb.load((random_model("gpt2"), tiny.tokenizer))
    with pytest.raises(wb.UserError, match=r"GPT2.* cannot go on with some tokens only after layers 0, 1: it failed with"):
        wb.Session(gpt2, staged(gpt2, falling))
    types = ["full_attention", "full_attention", "sliding_attention"]
    gemma = wb.load((random_gemma(layer_types=types), tiny.tokenizer))
    session = wb.Session(gemma)
    with pytest.raises(wb.UserError, match=r"only after layer 0: layer 2 sees a sliding window.*choose another method"):
        session.swap(staged(gemma, falling[:2]))
    assert session.setup == wb.Setup()
    with pytest.raises(wb.UserError, match=r"No layer's entropy is 0.2 below the one before, so 'uncomp' has one stage"):
        wb.Session(gpt2, staged(gpt2, falling, fall=0.2))


def test_a_replay_is_refused_only_with_stages(lm):
    recording = wb.record(lm, ids(PROMPT), new_tokens=2)
    with pytest.raises(wb.UserError, match="changes what later layers compute"):
        wb.replay(recording, [staged(lm)])
    assert wb.replay(recording, [staged(lm, stages=False)], [0.5]).points


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_neox", "olmoe", "llama4_text", "opt"])
def test_other_families_can_be_thinned_twice(tiny, family):
    lm = wb.load((random_model(family, num_key_value_heads=4), tiny.tokenizer))
    session = prefilled(lm, staged(lm, (0.5, 0.4, 0.3)))
    assert session.trace.table("attention")["q_len"].tolist() == [40, 28, 16]


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_the_built_in_models_have_stages(name):
    lm = wb.load(name)
    session = prefilled(lm, wb.UNComp(stages=True), ids(200))
    assert session.trace.table("attention")["q_len"].tolist() == [200, 200, 78 + 61, 78]
