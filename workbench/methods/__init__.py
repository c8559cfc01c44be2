"""Methods: one published technique a file, found by importing this folder."""

from workbench.methods.base import METHODS, Method, describe, knob, parse_method, register
from workbench.registry import import_folder

import_folder(__name__, __path__)

__all__ = ["METHODS", "Method", "describe", "knob", "parse_method", "register"]
