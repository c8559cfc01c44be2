"""Methods: one published technique a file, found by importing this folder. What a method of your own needs is here, too."""

from workbench.engine.experts import Routed, RouteState
from workbench.engine.policy import LayerState
from workbench.methods.base import METHODS, Budget, Method, budget_knob, describe, knob, parse_method, parse_setup, register
from workbench.methods.cache.base import CacheMethod, keep_top
from workbench.methods.routing.base import ExpertMethod, RoutingMethod, within
from workbench.registry import import_folder

import_folder(__name__, __path__)

__all__ = [
    "METHODS",
    "Budget",
    "CacheMethod",
    "ExpertMethod",
    "LayerState",
    "Method",
    "RouteState",
    "Routed",
    "RoutingMethod",
    "budget_knob",
    "describe",
    "keep_top",
    "knob",
    "parse_method",
    "parse_setup",
    "register",
    "within",
]
