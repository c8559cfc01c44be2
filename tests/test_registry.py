"""The registry: one name, one home."""

from __future__ import annotations

import pytest

from workbench.errors import UserError
from workbench.registry import Registry


def test_duplicates_name_both_modules():
    registry = Registry("thing")

    def first(): ...
    def second(): ...

    first.__module__, second.__module__ = "here", "there"
    registry.register("a")(first)
    with pytest.raises(ValueError, match="one in here, one in there"):
        registry.register("a")(second)
    assert registry["a"] is first and list(registry) == ["a"] and len(registry) == 1


def test_the_same_definition_may_be_entered_again():
    """A notebook cell that is run twice defines the same class twice."""
    registry = Registry("thing")
    for _ in range(2):

        def entry(): ...

        registry.register("a")(entry)
    assert registry["a"] is entry


def test_unknown_names_are_told_what_is_there():
    registry = Registry("thing")
    registry.register("snapkv")(print)
    with pytest.raises(UserError, match=r"no thing named 'snapvk'. Did you mean 'snapkv'\? Known: snapkv"):
        registry["snapvk"]
