"""Which text a run reads: standard-library prose, a recall task, or one's own."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

import workbench as wb
from workbench.errors import UserError
from workbench.texts.recall import MAX_FACTS
from workbench.workloads.base import encode
from workbench.workloads.plain_text import prompt_tokens
from workbench_dashboard.plain import visible

_PREVIEW = 400


def prompt_input(lm: wb.LM, key: str) -> list[int]:
    """The token ids of the text that was chosen. Raises UserError if there is none."""
    kind = st.selectbox("Prompt", list(_KINDS), key=f"{key}.kind")
    tokens = list(_KINDS[kind](lm, key))
    text = lm.tokenizer.decode(tokens)
    with st.expander(f"The text: {len(tokens)} tokens"):
        st.code(visible(_shortened(text)), language=None, wrap_lines=True)
    return tokens


def _prose(lm: wb.LM, key: str) -> tuple[int, ...]:
    length = _length(lm, key, 512)
    seed = st.number_input("Which text", value=0, min_value=0, step=1, key=f"{key}.seed", help="Each number begins elsewhere.")
    return prompt_tokens(lm, length, int(seed))


def _recall(lm: wb.LM, key: str) -> tuple[int, ...]:
    length = _length(lm, key, 384)
    facts = st.number_input("Facts", value=4, min_value=1, max_value=MAX_FACTS, step=1, key=f"{key}.facts")
    seed = st.number_input("Which facts", value=0, min_value=0, step=1, key=f"{key}.seed", help="Each number draws others.")
    episode = wb.workloads.WORKLOADS["recall"](context=length, samples=1, facts=int(facts), seed=int(seed)).episodes(lm)[0]
    turn = episode.turns[0]
    st.caption("The text ends with a question; the answer hoped for is:")
    st.code(visible(lm.tokenizer.decode(turn.answer)), language=None)
    return (*episode.context, *turn.prompt)


def _own(lm: wb.LM, key: str) -> tuple[int, ...]:
    text = st.text_area("Text", key=f"{key}.text", height=160, placeholder="Once upon a time", max_chars=1_000_000)
    if not text.strip():
        raise UserError("There is no text yet; write one, or choose another kind of prompt.")
    return encode(lm, text, special_tokens=True)


_KINDS: dict[str, Callable[[wb.LM, str], tuple[int, ...]]] = {
    "Standard-library text": _prose,
    "Recall task": _recall,
    "Own text": _own,
}


def _length(lm: wb.LM, key: str, default: int) -> int:
    """Tokens wished for; half the model's context at most by default."""
    most = lm.anatomy.max_positions
    default = default if most is None else min(default, most // 2)
    return int(st.number_input("Tokens", value=default, min_value=16, max_value=most, step=64, key=f"{key}.length"))


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * _PREVIEW else f"{text[:_PREVIEW]} […] {text[-_PREVIEW:]}"
