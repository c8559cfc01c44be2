"""Runs to look at while they go on: what the dashboard and the notebook's lab play."""

from workbench.live.line import Line, line_of
from workbench.live.player import Player
from workbench.live.run import LiveRun

__all__ = ["Line", "LiveRun", "Player", "line_of"]
