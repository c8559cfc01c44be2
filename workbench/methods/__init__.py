"""Methods: one published technique a file, found by importing this folder. What a method of your own needs is here, too."""

from workbench.engine.policy import LayerState
from workbench.methods.base import METHODS, Budget, Method, budget_knob, describe, knob, parse_method, register
from workbench.methods.cache.base import CacheMethod, keep_top
from workbench.registry import import_folder

import_folder(__name__, __path__)

__all__ = [
    "METHODS",
    "Budget",
    "CacheMethod",
    "LayerState",
    "Method",
    "budget_knob",
    "describe",
    "keep_top",
    "knob",
    "parse_method",
    "register",
]
