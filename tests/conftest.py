"""Shared models and the guard that nothing is left behind in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import workbench as wb
from workbench.testing import RANDOM_MODELS, calibrate_all

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other slow them down on a busy machine


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """The tests find nothing that was made outside them, and leave nothing there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> wb.LM:
    return wb.load("tiny-dense")


@pytest.fixture(params=RANDOM_MODELS)
def random_lm(request, tiny) -> wb.LM:
    return calibrate_all(wb.load((RANDOM_MODELS[request.param](), tiny.tokenizer)))


@pytest.fixture(autouse=True)
def nothing_left_behind(tiny):
    """No test may leave a registered function, a changed implementation or a hook."""
    importlib_ready = wb.Session  # the engine registers its one attention function on import
    functions = set(AttentionInterface._global_mapping)
    masks = set(AttentionMaskInterface._global_mapping)
    lookup = dict(vars(AttentionInterface))
    implementation = tiny.model.config._attn_implementation
    yield importlib_ready
    assert set(AttentionInterface._global_mapping) == functions
    assert set(AttentionMaskInterface._global_mapping) == masks
    assert dict(vars(AttentionInterface)) == lookup
    assert tiny.model.config._attn_implementation == implementation
    assert not [module for module in tiny.model.modules() if module._forward_hooks or module._forward_pre_hooks]
