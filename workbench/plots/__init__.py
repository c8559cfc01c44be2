"""Figures: functions of a value. None shows itself or writes a file."""

from workbench.plots.cache_map import cache_map
from workbench.plots.components import components
from workbench.plots.importance_map import importance_map
from workbench.plots.kv_bytes import kv_bytes
from workbench.plots.pareto import pareto
from workbench.plots.replay_curves import replay_curves
from workbench.plots.roofline import roofline

__all__ = ["cache_map", "components", "importance_map", "kv_bytes", "pareto", "replay_curves", "roofline"]
