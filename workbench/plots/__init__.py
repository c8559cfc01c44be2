"""Figures: functions of a value. None shows itself; only `png` writes a file."""

from workbench.plots.attention_map import attention_map
from workbench.plots.cache_map import cache_map
from workbench.plots.co_activation import co_activation
from workbench.plots.components import components
from workbench.plots.cross_over import cross_over
from workbench.plots.expert_cache_hits import expert_cache_hits
from workbench.plots.expert_load import expert_load
from workbench.plots.held_map import held_map
from workbench.plots.importance_map import importance_map
from workbench.plots.kv_bytes import kv_bytes
from workbench.plots.live_curve import live_curve
from workbench.plots.pareto import pareto
from workbench.plots.png import png
from workbench.plots.predicted_time import predicted_time
from workbench.plots.quality_by_bytes import quality_by_bytes
from workbench.plots.replay_curves import replay_curves
from workbench.plots.replay_map import replay_map
from workbench.plots.replay_steps import replay_steps
from workbench.plots.roofline import roofline
from workbench.plots.router_confidence import router_confidence
from workbench.plots.routing_lanes import routing_lanes
from workbench.plots.score_map import score_map
from workbench.plots.theme import dark
from workbench.plots.turn_scores import turn_scores
from workbench.plots.unique_experts import unique_experts

__all__ = [
    "attention_map",
    "cache_map",
    "co_activation",
    "components",
    "cross_over",
    "dark",
    "expert_cache_hits",
    "expert_load",
    "held_map",
    "importance_map",
    "kv_bytes",
    "live_curve",
    "pareto",
    "png",
    "predicted_time",
    "quality_by_bytes",
    "replay_curves",
    "replay_map",
    "replay_steps",
    "roofline",
    "router_confidence",
    "routing_lanes",
    "score_map",
    "turn_scores",
    "unique_experts",
]
