"""FLOPs or bytes by component and phase."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.cost.flops import COMPONENTS
from workbench.errors import UserError
from workbench.plots.theme import PALETTE, style
from workbench.trace.schema import PHASES
from workbench.trace.trace import Trace


def components(trace: Trace, of: str = "flops") -> go.Figure:
    """Stacked bars: a bar a phase, per token, a colour a component. `of` is `flops` or `bytes` (fused model)."""
    if of not in ("flops", "bytes"):
        raise UserError(f"Cannot draw {of!r} by component; choose 'flops' or 'bytes'.")
    by = ["phase", "component"]
    rows = trace.flops(by=by) if of == "flops" else trace.bytes(by=by, model="fused")
    tokens = trace.table("steps").groupby("phase")["tokens"].sum()
    phases = [phase for phase in PHASES if phase in tokens.index]
    figure = go.Figure()
    for number, component in enumerate(COMPONENTS):
        of_component = rows[rows["component"] == component].set_index("phase")[of]
        if not of_component.sum():
            continue
        figure.add_bar(
            x=phases,
            y=[of_component.get(phase, 0) / tokens[phase] for phase in phases],
            name=component,
            marker={"color": PALETTE[number % len(PALETTE)], "pattern": {"shape": "/" if number >= len(PALETTE) else ""}},
            hovertemplate=f"{component}, %{{x}}<br>%{{y:,.0f}} {of} a token<extra></extra>",
        )
    figure.update_layout(barmode="stack")
    kind = "FLOPs (full convention)" if of == "flops" else "Bytes moved (modelled, fused)"
    return style(figure, f"{kind} a token, by component", "phase", f"{'FLOPs' if of == 'flops' else 'bytes'} a token")
