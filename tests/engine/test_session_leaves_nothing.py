"""A session that is cut short leaves the model as it was, and a trace that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import workbench as wb
from workbench.engine.attention import engine_attention
from workbench.probes.attention import attention_configs
from workbench.testing import footprint, ids

ERRORS = [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit]
POINTS = {
    "model": lambda model: model,
    "layer": lambda model: model.model.layers[1],
    "attention": lambda model: model.model.layers[1].self_attn,
    "after attention": lambda model: model.model.layers[1].self_attn.o_proj,
    "mlp": lambda model: model.model.layers[1].mlp,
    "head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", POINTS)
def test_an_error_anywhere_leaves_nothing(random_lm, point, error):
    model, prompt = random_lm.model, ids(20)[0].tolist()
    expected = wb.Session(random_lm).prefill(prompt)
    session = wb.Session(random_lm, wb.H2O(budget=10), importance="decode")
    session.prefill(prompt)
    before, rows = footprint(model), {name: len(session.trace.table(name)) for name in ("steps", "attention", "cache")}

    def fail(*_):
        raise error("stop")

    handle = POINTS[point](model).register_forward_pre_hook(fail)
    with pytest.raises(error):
        session.generate(3)
    handle.remove()
    assert footprint(model) == before and torch.equal(wb.Session(random_lm).prefill(prompt), expected)
    with pytest.raises(wb.UserError, match="did not finish, so its cache is incomplete; start a new Session"):
        session.step()
    trace = session.trace
    assert {name: len(trace.table(name)) for name in rows} == rows and not trace.complete
    assert trace.meta["unfinished_steps"] == [{"step": 1, "phase": "decode", "batch": 1, "tokens": 1}]


def test_an_interrupt_between_tokens_leaves_a_session_that_goes_on(tiny, tmp_path):
    before = footprint(tiny.model)
    session = wb.Session(tiny, out=tmp_path / "run.trace")
    session.prefill("Return a string")
    seen = []

    def stop(tokens):
        seen.append(tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(8, on_token=stop)
    assert footprint(tiny.model) == before
    assert not wb.Trace.load(tmp_path / "run.trace").complete
    session.step()
    session.close()
    trace = wb.Trace.load(tmp_path / "run.trace")
    assert trace.complete and trace.table("steps")["phase"].tolist() == ["prefill", "decode", "decode", "decode"]


def test_a_killed_session_leaves_a_readable_trace(tmp_path):
    script = """
        import os, signal, sys
        import workbench as wb
        session = wb.Session(wb.load("tiny-dense"), wb.StreamingLLM(budget=8), out=sys.argv[1])
        session.prefill("The statement is executed")
        count = [0]
        def kill(tokens):
            count[0] += 1
            if count[0] == 100:
                os.kill(os.getpid(), signal.SIGKILL)
        session.generate(200, on_token=kill, stop_at_end=False)
    """
    path = tmp_path / "run.trace"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    trace = wb.Trace.load(path)
    assert not trace.complete and "incomplete" in repr(trace)
    assert 64 <= len(trace.table("steps")) <= 100 and trace.flops() > 0


def test_sessions_in_threads_take_turns(random_lm):
    prompts = [ids(20 + 5 * number)[0].tolist() for number in range(4)]
    before, answers = footprint(random_lm.model), {}

    def run(number, into):
        session = wb.Session(random_lm, wb.H2O(budget=0.5))
        session.prefill(prompts[number])
        into[number] = session.generate(8).ids, session.trace.flops()

    alone = {}
    for number in range(4):
        run(number, alone)
    threads = [threading.Thread(target=run, args=(number, answers)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone and footprint(random_lm.model) == before


def test_a_plain_call_in_the_middle_of_a_session_is_refused(random_lm):
    with (
        engine_attention(attention_configs(random_lm.model)),
        pytest.raises(wb.UserError, match="running a session in another thread"),
    ):
        random_lm.model(ids(5))
    with torch.no_grad():
        random_lm.model(ids(5))
