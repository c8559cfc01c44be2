"""`%load_ext workbench` and `%%profile`: the cell runs as always, its trace has a name, nothing stays on the model."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.testing import footprint

pytest.importorskip("IPython", reason="needs the extra `notebook`")
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

CELL = "out = lm.model.generate(**prompt, max_new_tokens=4)\nout.shape"


@pytest.fixture
def shell(tiny):
    opened = InteractiveShell()
    opened.extension_manager.load_extension("workbench")
    opened.user_ns |= {"lm": tiny, "prompt": tiny.encode("The statement is executed")}
    yield opened
    opened.history_manager.end_session()


def test_a_cell_is_profiled_and_its_trace_named(shell, tiny):
    before = footprint(tiny.model)
    with capture_output() as captured:
        result = shell.run_cell(f"%%profile lm -o trace\n{CELL}")
    assert result.success
    trace = shell.user_ns["trace"]
    assert isinstance(trace, wb.Trace) and len(trace.table("steps")) == 4
    assert trace.table("tokens")["text"].str.len().gt(0).all(), "an LM brings its tokenizer"
    assert "out" in shell.user_ns, "the cell runs in the notebook's namespace"
    assert "torch.Size" in captured.stdout, "its last expression is shown"
    shown = captured.stdout + "".join(str(output) for output in captured.outputs)
    assert "prefill" in shown and "joules_reason" in shown, "the summary is shown"
    assert footprint(tiny.model) == before


def test_a_statement_is_profiled(shell):
    with capture_output():
        result = shell.run_cell("%profile -o trace --importance window out = lm.model.generate(**prompt,  max_new_tokens=2)")
    assert result.success and shell.user_ns["out"].shape[1] > 2
    assert shell.user_ns["trace"].arrow("importance").num_rows


def test_an_error_in_the_cell_is_the_cells(shell, tiny):
    before = footprint(tiny.model)
    with capture_output() as captured:
        result = shell.run_cell("%%profile -o trace\nlm.model(**prompt)\nnothing_of_that_name")
    assert isinstance(result.error_in_exec, NameError)
    assert "nothing_of_that_name" in captured.stdout and "magics.py" not in captured.stdout
    assert footprint(tiny.model) == before
    assert len(shell.user_ns["trace"].table("steps")) == 1, "what was recorded until then is kept"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%%profile nope\n1", "no variable 'nope'"),
        ("%%profile prompt\n1", "'prompt' is a dict"),
        ("%%profile lm lm\n1", "takes the name of one model"),
        ("%profile", "nothing to profile"),
        ("%%profile\n \n", "nothing to profile"),
    ],
)
def test_a_mistake_is_one_sentence(shell, line, said):
    with capture_output():
        result = shell.run_cell(line)
    assert isinstance(result.error_in_exec, wb.UserError) and said in str(result.error_in_exec)


def test_several_models_have_to_be_told_apart(shell, tiny):
    shell.user_ns["model"] = tiny.model
    with capture_output():
        assert shell.run_cell("%%profile\n1").success, "an LM and its own model are one"
        shell.user_ns["moe"] = wb.load("tiny-moe")
        result = shell.run_cell("%%profile\n1")
    assert "Say which model" in str(result.error_in_exec) and "lm, moe" in str(result.error_in_exec)
    del shell.user_ns["moe"], shell.user_ns["lm"], shell.user_ns["model"]
    with capture_output():
        result = shell.run_cell("%%profile\n1")
    assert "there is none yet" in str(result.error_in_exec)
