"""Live: a run, token by token, that is changed while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

import workbench as wb
from workbench.live import Player, line_of
from workbench.trace.archive import zip_of
from workbench_dashboard import live_view, visitor
from workbench_dashboard.errors import errors_shown, show_error
from workbench_dashboard.forms import setup_inputs
from workbench_dashboard.models import choose_model
from workbench_dashboard.plain import visible
from workbench_dashboard.prompts import prompt_input


@dataclass
class Order:
    """What the forms say."""

    lm: wb.LM
    setup: wb.Setup
    tokens: int
    follow: bool
    prompt: list[int]


def order_inputs() -> Order:
    lm = choose_model()
    setup = setup_inputs("live", st.query_params.get("method", ""))
    tokens = st.number_input("Tokens to decode", value=64, min_value=1, step=16, key="live.tokens")
    follow = st.checkbox("Let a dense run follow", value=True, key="live.follow", help="For KL; it takes as long again.")
    return Order(lm, setup, int(tokens), follow, prompt_input(lm, "live.prompt"))


def buttons(player: Player, order: Order | None) -> None:
    """What may be done now. An order is None while the forms hold something wrong."""
    busy, there = player.busy, player.busy or bool(player.snapshots)
    runs = list(player.snapshots)
    run = st.selectbox("Run to change", runs, index=len(runs) - 1, key="live.which") if len(runs) > 1 else None
    if st.button("Run", type="primary", key="live.run", disabled=order is None):
        done(player.start(order.lm, order.setup, order.prompt, order.tokens, follow=order.follow))
    if st.button("Stop", key="live.stop", disabled=not busy):
        done(player.stop())
    if st.button("Continue", key="live.continue", disabled=busy or not there or order is None):
        done(player.play(order.tokens))
    if st.button("Change the method", key="live.swap", disabled=not there or order is None, help="From the next token on."):
        done(player.swap(order.setup, run))
    if st.button("Branch", key="live.branch", disabled=not there or order is None, help="A copy goes on under the method."):
        done(player.branch(order.setup, run))
    with st.form("live.asking", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        question = st.text_input("A further question", key="live.question", disabled=not there or order is None)
        if st.form_submit_button("Ask", key="live.ask", disabled=not there or order is None):
            done(player.ask(question, order.tokens))


def done(_: None) -> None:
    """Draws the page anew: what may be done has changed."""
    st.rerun()


@errors_shown()
def view(player: Player, form_lm: wb.LM | None, chosen: list[str], was_busy: bool) -> None:
    player.watch()
    if was_busy and not player.busy:
        st.rerun()
    lm = player.lm if player.busy else form_lm
    names = line_of(lm.model).names if lm is not None else ()
    others = f" In line for {lm.name}: {', '.join(names)}; you are {player.name}." if set(names) - {player.name} else ""
    st.text(visible(f"{player.status.capitalize()}.{others}"))
    if player.error is not None:
        show_error(player.error)
    live_view.draw(player.snapshots, chosen, player.busy)


def downloads(player: Player) -> None:
    for name in player.snapshots if not player.busy else ():
        st.download_button(
            f"Download the trace of {name}",
            lambda name=name: zip_of(player.trace(name)),
            file_name=f"{name.replace(' ', '-')}.trace.zip",
            mime="application/zip",
            key=f"live.download.{name}",
            on_click="ignore",
        )


player = visitor.player()
order = None
with st.sidebar, errors_shown():
    order = order_inputs()
with st.container(horizontal=True, vertical_alignment="bottom"):
    buttons(player, order)
chosen = live_view.choose_figures()
busy = player.busy
st.fragment(view, run_every=visitor.PERIOD_S if busy else None)(player, order and order.lm, chosen, busy)
downloads(player)
