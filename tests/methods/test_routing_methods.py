"""What every method of the routing slot promises, over the registry: on the built-in models, which come calibrated."""

from __future__ import annotations

import functools

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.cost.ffn import COMPONENTS, read_bytes, resident_bytes, weights_bytes
from workbench.engine.banks import banks_of
from workbench.engine.calibration import Document
from workbench.methods import METHODS, ExpertMethod
from workbench.methods.routing.trained import TrainedBlock
from workbench.testing import footprint, ids, random_model

ROUTING = [cls for cls in METHODS.values() if cls.slot == "routing" and not issubclass(cls, TrainedBlock)]
"""All but blocks that are trained, which `test_trained_blocks.py` tries."""
OF_EXPERTS = [cls for cls in ROUTING if issubclass(cls, ExpertMethod)]
FAMILIES = ["qwen3_moe", "gpt_oss"]
TEXT = "The keeper of the lighthouse counts the ships that pass, and writes down their names. "


def named(cls) -> str:
    return cls.name


@functools.cache
def built_in(name: str) -> wb.LM:
    """With experts in a loop, into which torch's counter sees."""
    lm = wb.load(name, device="cpu")
    lm.model.set_experts_implementation("eager")
    return lm


def model_for(cls) -> wb.LM:
    """The built-in model a method takes."""
    try:
        cls().check(built_in("tiny-moe").anatomy)
    except wb.UserError:
        return built_in("tiny-dense")
    return built_in("tiny-moe")


@functools.cache
def of_family(family: str) -> wb.LM:
    return wb.load((random_model(family, experts_implementation="eager"), built_in("tiny-dense").tokenizer))


def calibrated(cls, family: str) -> wb.LM:
    lm = of_family(family)
    if cls.calibrated_by is not None:
        wb.calibrate(lm, cls(), documents=[Document(tuple(ids(30, seed=3)[0].tolist()), 30)])
    return lm


def run(session: wb.Session, steps: int = 2) -> torch.Tensor:
    """Logits of some greedy steps."""
    return torch.stack([session.step() for _ in range(steps)])


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_knobs_that_change_nothing_leave_the_model_as_it_is_bit_for_bit(cls):
    lm = model_for(cls)
    method = cls.identity(lm.anatomy)
    if method is None:
        pytest.skip(f"{cls.name} has no knobs that change nothing")
    given, dense = wb.Session(lm, method), wb.Session(lm)
    assert torch.equal(given.prefill(TEXT), dense.prefill(TEXT)) and torch.equal(run(given), run(dense))
    work = given.trace.table("work")
    assert (work["changed"] == 0).all() and work.loc[work["component"] != "method", "flops"].isna().all()
    assert given.setup.routing.resident_bytes(lm) == resident_bytes(lm.anatomy)


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_something_else_is_computed_and_the_trace_says_where(cls):
    lm = model_for(cls)
    session, dense = wb.Session(lm, cls()), wb.Session(lm)
    assert not torch.equal(session.prefill(TEXT), dense.prefill(TEXT))
    session.generate(2, stop_at_end=False)
    work = session.trace.table("work")
    assert work["changed"].sum() > 0 and set(work["step"]) == {0, 1, 2}
    assert (session.trace.table("steps")["setup"] == session.setup.label).all()


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_sessions_take_turns_and_plain_generate_is_left_alone(cls):
    lm = model_for(cls)
    prompt = lm.encode(TEXT)
    before, plain = footprint(lm.model), lm.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    alone, dense_alone = wb.Session(lm, cls()), wb.Session(lm)
    expected = [torch.cat([session.prefill(TEXT)[None], run(session)]) for session in (alone, dense_alone)]
    sessions = wb.Session(lm, cls()), wb.Session(lm)
    found = [[session.prefill(TEXT)] for session in sessions]
    for _ in range(2):
        for session, logits in zip(sessions, found, strict=True):
            logits.append(session.step())
        lm.model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert all(torch.equal(torch.stack(logits), each) for logits, each in zip(found, expected, strict=True))
    assert torch.equal(lm.model.generate(**prompt, max_new_tokens=5, do_sample=False), plain)
    assert footprint(lm.model) == before


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_a_branch_goes_on_as_the_session_would(cls):
    session = wb.Session(model_for(cls), cls())
    session.prefill(TEXT)
    session.step()
    branch = session.branch()
    other = run(branch)
    assert torch.equal(run(session), other)
    steps = branch.trace.table("steps")["step"]
    work = session.trace.table("work")
    mine = work[work["step"].isin(steps)].reset_index(drop=True)
    assert_frame_equal(branch.trace.table("work"), mine, check_dtype=False)  # in one of them all numbers may be there
    assert len(mine)


@pytest.mark.parametrize("cls", [cls for cls in ROUTING if cls.tokenwise], ids=named)
def test_rows_of_a_padded_batch_are_what_each_is_alone(cls):
    lm = model_for(cls)
    prompts = [TEXT, "A short text."]
    together = wb.Session(lm, cls())
    found = [together.prefill(prompts)]
    singles = [wb.Session(lm, cls()) for _ in prompts]
    expected = [torch.cat([single.prefill(prompt) for single, prompt in zip(singles, prompts, strict=True)])]
    for _ in range(2):
        tokens = found[-1].argmax(-1).tolist()
        found.append(together.step(tokens))
        expected.append(torch.cat([single.step([token]) for single, token in zip(singles, tokens, strict=True)]))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_swapped_in_and_out_it_rules_its_own_steps_alone(cls):
    lm = model_for(cls)
    session, dense = wb.Session(lm), wb.Session(lm)
    assert torch.equal(session.prefill(TEXT), dense.prefill(TEXT))
    session.swap(cls())
    turn = "It does so at night, too."  # of several tokens: some methods look at tokens side by side
    assert not torch.equal(session.append(turn), dense.append(turn))
    session.swap(None)
    session.step()
    trace = session.trace
    assert set(trace.table("work")["step"]) == {1} and [swap["step"] for swap in trace.meta["swaps"]] == [1, 2]


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_it_goes_with_a_cache_method_and_each_has_its_own_cost(cls):
    session = wb.Session(model_for(cls), [wb.SnapKV(budget=12, window=4), cls()])
    session.prefill(TEXT)
    session.generate(2, stop_at_end=False)
    trace = session.trace
    assert (trace.table("cache")["op"] == "evict").any() and not trace.table("work").empty
    flops = trace.flops(by="slot").set_index("slot")["flops"]
    assert flops["cache"] == trace.table("cache")["extra_flops"].sum() > 0
    assert flops.get("routing", 0) == trace.table("work")["flops"].sum() and flops.sum() == trace.flops()
    moved = trace.bytes(by="slot").set_index("slot")["bytes"]
    assert moved.get("routing", 0) == trace.table("work")["bytes"].sum() and moved.sum() == trace.bytes()


@pytest.mark.parametrize("cls", ROUTING, ids=named)
def test_flops_are_those_of_torchs_counter(cls):
    session = wb.Session(model_for(cls), cls())
    with FlopCounterMode(display=False) as counter:
        session.prefill(TEXT)
        session.step()
    assert counter.get_total_flops() == pytest.approx(seen_by_the_counter(session.trace), abs=by_other_means(session.trace))


def by_other_means(trace: wb.Trace) -> int:
    """What decisions cost beside the router's logits: declared as products, and some sum in other ways."""
    flops = trace.flops(by=["slot", "component"]).set_index(["slot", "component"])["flops"]
    logits = flops.get(("model", "router"), 0) if ("model", "experts") in flops or ("routing", "experts") in flops else 0
    return max(0, int(flops.get(("routing", "method"), 0) - logits))


def seen_by_the_counter(trace: wb.Trace) -> int:
    """All but attention, which is a kernel it does not know; with learned sinks, as in GPT-OSS, it is plain products."""
    kernel = trace.flops(by="component").set_index("component")["flops"]["attention.scores"]
    return trace.flops() - (0 if trace.anatomy.model_type == "gpt_oss" else kernel)


def recounted(lm: wb.LM, method: ExpertMethod, trace: wb.Trace) -> dict[tuple[int, int], int]:
    """Expert weights read by step and layer, from who was given tokens and what stands in the experts' place.

    Of experts that are read in part, from the table of parts.
    """
    planes = trace.table("planes")
    if len(planes):
        return planes.groupby(["step", "layer"])["plane_bytes"].sum().to_dict()
    banks, anatomy = banks_of(method, lm), trace.anatomy
    own = {layer.index: weights_bytes(layer.experts.linears, 4) for layer in anatomy.layers if layer.experts is not None}
    read: dict[tuple[int, int], int] = {}
    for row in trace.table("routing").query("tokens > 0").itertuples():
        size = banks[row.layer].weight_bytes[row.expert] if row.layer in banks else own[row.layer]
        read[row.step, row.layer] = read.get((row.step, row.layer), 0) + size
    return read


def by_step_and_layer(trace: wb.Trace) -> dict[tuple[int, int], int]:
    rows = read_bytes(trace).query("component == 'experts'")
    return {(row.step, row.layer): row.read_bytes for row in rows.itertuples()}


@pytest.mark.parametrize("cls", OF_EXPERTS, ids=named)
def test_weights_read_are_those_of_the_experts_hit(cls):
    lm = model_for(cls)
    session = wb.Session(lm, cls())
    session.prefill(TEXT)
    session.generate(3, stop_at_end=False)
    assert by_step_and_layer(session.trace) == recounted(lm, session.setup.routing, session.trace)
    work = session.trace.table("work")
    said = work[work["component"].isin(COMPONENTS) & work["weight_bytes"].notna()]
    assert (said["weight_bytes"] <= said["bytes"]).all()


@pytest.mark.parametrize("cls", OF_EXPERTS, ids=named)
def test_a_model_without_experts_is_refused_in_a_sentence(cls):
    with pytest.raises(
        wb.UserError, match=rf"^'{cls.name}' routes tokens to experts, and LlamaForCausalLM has none .*; choose .*\.$"
    ):
        wb.Session(built_in("tiny-dense"), cls())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", OF_EXPERTS, ids=named)
def test_experts_of_any_family_are_served(cls, family):
    lm = calibrated(cls, family)
    prompt = ids(20)[0].tolist()
    session = wb.Session(lm, cls())
    with FlopCounterMode(display=False) as counter:
        logits = session.prefill(prompt)
    assert logits.isfinite().all()
    assert counter.get_total_flops() == pytest.approx(seen_by_the_counter(session.trace), abs=by_other_means(session.trace))
    session.step()
    assert by_step_and_layer(session.trace) == recounted(lm, session.setup.routing, session.trace)
    same = cls.identity(lm.anatomy)
    if same is not None:
        assert torch.equal(wb.Session(lm, same).prefill(prompt), wb.Session(lm).prefill(prompt))
