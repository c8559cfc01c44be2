"""`%load_ext workbench`: the magic `%%profile`, which records what a cell makes of a model."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display
from torch import nn
from transformers import PreTrainedModel

from workbench.errors import UserError
from workbench.models.load import LM
from workbench.probes.importance import MODES
from workbench.probes.profiler import profile


@magics_class
class ProfileMagics(Magics):
    """The magic and its arguments."""

    @magic_arguments()
    @argument("-m", "--model", help="Name of the LM or model to observe; may be left out where there is only one.")
    @argument("-o", "--out", metavar="NAME", help="Variable that takes the trace.")
    @argument("-i", "--importance", choices=MODES, default="off", help="Which attention is recorded, as in wb.profile.")
    @argument("-s", "--spans", action="store_true", help="Time every layer and its parts.")
    @argument("code", nargs="*", help="The statement (%%profile: the model's name instead).")
    @line_cell_magic
    def profile(self, line: str, cell: str | None = None) -> None:
        """Records a trace of the statement or cell by `wb.profile` and shows its summary, a row a phase.

        Examples: `%profile -o trace lm.model.generate(**prompt, max_new_tokens=16)`, and `%%profile lm -o trace` above a cell.
        """
        __tracebackhide__ = True  # an error in the cell is the cell's
        given = parse_argstring(self.profile, line)
        if cell is not None and given.code:
            given.model = given.model or given.code[0]
            if len(given.code) > 1:
                raise UserError(f"%%profile takes the name of one model, and {' '.join(given.code)!r} was given.")
        # The parser splits at blanks; the statement is what stands at the end of the line as it was written.
        source = cell if cell is not None else line.split(None, len(line.split()) - len(given.code))[-1] if given.code else ""
        if not source.strip():
            raise UserError("There is nothing to profile: write a statement behind %profile, or a cell below %%profile.")
        namespace = self.shell.user_ns
        model, tokenizer = find_model(namespace, given.model)
        running = profile(model, given.importance, spans=given.spans, tokenizer=tokenizer)
        try:
            with running:
                run(self.shell, source)
        finally:
            if given.out:
                namespace[given.out] = running.trace
        display(running.trace.summary())


def find_model(namespace: Mapping[str, Any], name: str | None) -> tuple[nn.Module, Any]:
    """The model of a name, or the only one of a namespace, and its tokenizer. Raises UserError if there is none or several."""
    if name is not None:
        if name not in namespace:
            raise UserError(f"There is no variable {name!r}; give the name of an LM or a model, as in %%profile lm.")
        value = namespace[name]
        if not isinstance(value, LM | nn.Module):
            raise UserError(f"{name!r} is a {type(value).__name__}; give the name of an LM or a model, as in %%profile lm.")
        return (value.model, value.tokenizer) if isinstance(value, LM) else (value, None)
    named = {key: value for key, value in namespace.items() if not key.startswith("_")}
    models = {id(value): (key, value, None) for key, value in named.items() if isinstance(value, PreTrainedModel)}
    models |= {id(lm.model): (key, lm.model, lm.tokenizer) for key, lm in named.items() if isinstance(lm, LM)}
    if len(models) != 1:
        known = f"there are {', '.join(key for key, *_ in models.values())}" if models else "there is none yet"
        raise UserError(f"Say which model to observe, as in %%profile lm; {known}.")
    ((_, model, tokenizer),) = models.values()
    return model, tokenizer


def run(shell: InteractiveShell, source: str) -> None:
    """Runs code as a cell does: magics in it work, its last expression is shown, its error is raised."""
    __tracebackhide__ = True
    source = shell.transform_cell(source)
    name = shell.compile.cache(source, shell.execution_count, source)
    body = shell.transform_ast(shell.compile.ast_parse(source, filename=name)).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(shell.compile(ast.Module(body, []), name, "exec"), shell.user_ns)
    if last is not None:
        shown = eval(shell.compile(ast.Expression(last.value), name, "eval"), shell.user_ns)
        if not source.rstrip().endswith(";"):
            shell.displayhook(shown)
