"""Loading and anatomy, and what the built-in models were trained to do."""

from __future__ import annotations

import json
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import workbench as wb
from workbench.models import card
from workbench.models.anatomy import anatomy_of
from workbench.models.load import BUILTIN, builtin_names
from workbench.models.rows import Rows
from workbench.models.train import CURRICULUM, batch, build_model, losses
from workbench.testing import random_gemma, random_llama, random_qwen_moe
from workbench.texts import recall

FLOORS = {"tiny-dense": 0.95, "tiny-moe": 0.90}
LARGEST_MB = {"tiny-dense": 4, "tiny-moe": 10}


@pytest.mark.parametrize("name", FLOORS)
def test_builtin_model_recalls(name):
    lm = wb.load(name)
    row = wb.compare(lm, wb.workloads.recall(context=512, facts=4, samples=20, seed=7), []).rows[0]
    assert row.score >= FLOORS[name]


@pytest.mark.parametrize("name", FLOORS)
def test_builtin_model_reads_prose_better_than_a_unigram_model(name):
    lm = wb.load(name)
    row = wb.compare(lm, wb.workloads.text(context=256, samples=8, seed=3), []).rows[0]
    text = (BUILTIN / name / "MODEL_CARD.md").read_text()
    unigram_nats = float(text.partition("a unigram model of the training text:")[2].split()[0].rstrip("."))
    assert row.nll < 0.75 * unigram_nats


@pytest.mark.parametrize("name", FLOORS)
def test_builtin_model_is_small_and_quick_to_load(name):
    wb.load(name)
    started = time.perf_counter()
    wb.load(name)
    assert time.perf_counter() - started < 2  # under 1 s on an idle machine; a busy one gets some room
    size = (BUILTIN / name / "model.safetensors").stat().st_size
    assert size <= LARGEST_MB[name] * 1e6


def test_builtin_models_share_a_tokenizer():
    tokenizers = {(BUILTIN / name / "tokenizer.json").read_bytes() for name in builtin_names()}
    assert builtin_names() == ["tiny-dense", "tiny-moe"] and len(tokenizers) == 1


def test_recall_words_are_single_tokens(tiny):
    assert all(len(tiny.tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1 for word in recall.WORDS)


def test_the_card_says_what_the_training_of_each_block_reached():
    folder = BUILTIN / "tiny-dense"
    text, trained = (folder / "MODEL_CARD.md").read_text(), card.blocks(folder)
    assert [facts["method"] for facts in trained] == ["engram", "mixture-of-recursions", "versatile-ffn"]
    for facts in trained:
        path = folder / "calibrations" / f"{facts['method']}-steps={facts['knobs']['steps']}.safetensors"
        assert path.stat().st_size < 3e6
        reached = facts["about"]["reached"]
        assert f"Next-token loss on held-out documentation: {reached['before']['held_out_nats']} nats" in text
        for way, found in reached["after"].items():
            figures = [facts["knobs"]["steps"], reached["seconds"], *found["recall_by_length"].values(), found["held_out_nats"]]
            assert " | ".join(map(str, [way, *figures])) in text
    assert card.blocks(BUILTIN / "tiny-moe") == [] and "## Blocks" not in (BUILTIN / "tiny-moe" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("name", FLOORS)
def test_the_recipe_runs(name, tiny):
    rows = Rows(tiny.tokenizer, seed=1)
    for stage in CURRICULUM:
        made = batch(rows, stage)
        assert len({len(row.ids) for row in made}) == 1 and all(len(row.ids) == len(row.tasks) for row in made)
    by_task = losses(build_model(name), batch(rows, CURRICULUM[2]))
    assert {"copy", "recall", "text"} <= set(by_task) and all(torch.isfinite(loss) for loss, _ in by_task.values())


def test_anatomy_of_llama():
    anatomy = anatomy_of(random_llama())
    layer = anatomy.layers[1]
    assert (layer.attention.num_q_heads, layer.attention.num_kv_heads, layer.attention.head_dim) == (4, 2, 8)
    assert [linear.component for linear in layer.linears] == ["attention.qkv"] * 3 + ["attention.out"] + ["mlp"] * 3
    assert layer.norms == (32, 32) and anatomy.final_norms == (32,) and layer.experts is None
    # K and V: 3 layers x 2 heads x (8 + 8) x 4 bytes
    assert anatomy.kv_bytes_per_token == 384


def test_anatomy_from_a_config_alone(tmp_path):
    """The same as a real model's, whatever says which: a name, a directory without weights, the file, the config."""
    for name in builtin_names():
        assert wb.anatomy(name) == wb.load(name).anatomy
    config = random_gemma().config
    expected = anatomy_of(random_gemma())
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", config):
        assert wb.anatomy(source) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "t5"}', "describes no causal language model: Unrecognized configuration class"),
        ('{"model_type": "nothing"}', "is no model config"),
        ("not json", "is no model config: .* not a valid JSON file"),
        ("{}", "is no model config"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is no model config: .*'wide'"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "is no model config"),
    ],
)
def test_a_config_of_nothing(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(wb.UserError, match=message) as caught:
            wb.anatomy(source)
        assert "\n" not in str(caught.value)


def test_anatomy_of_experts_and_windows():
    experts = anatomy_of(random_qwen_moe()).layers[0].experts
    assert (experts.num_experts, experts.top_k) == (6, 2)
    assert [(linear.in_features, linear.out_features) for linear in experts.linears] == [(32, 48), (24, 32)]
    assert [layer.attention.window for layer in anatomy_of(random_gemma()).layers] == [16, None, 16]


def test_parameters_are_counted_once(tiny):
    assert tiny.anatomy.num_parameters == sum(p.numel() for p in tiny.model.parameters())


def test_load_from_a_directory_and_a_pair(tiny, tmp_path):
    model = random_llama(vocab_size=1536)
    model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    lm = wb.load(tmp_path)
    torch.testing.assert_close(lm.model.lm_head.weight, model.lm_head.weight)
    assert wb.load((model, tiny.tokenizer)).model is model
    assert wb.load(str(tmp_path), dtype=torch.bfloat16).anatomy.element_bytes == 2


@pytest.mark.parametrize("name", ["no-such-model", "org/no-such-model", "", " ", "./missing"])
def test_unknown_models_are_one_sentence(name):
    with pytest.raises(wb.UserError) as caught:
        wb.load(name)
    assert "tiny-dense" in str(caught.value) and "\n" not in str(caught.value)


def test_broken_directories(tmp_path, tiny):
    with pytest.raises(wb.UserError, match=r"holds no config\.json"):
        wb.load(tmp_path)
    random_llama(vocab_size=1536).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(wb.UserError, match="does not load"):
        wb.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(wb.UserError, match="does not load"):
        wb.load(tmp_path)


def test_bfloat16_runs(tiny):
    lm = wb.load("tiny-dense", dtype=torch.bfloat16)
    for method in (None, wb.SnapKV(budget=0.3), wb.H2O(budget=0.3)):
        session = wb.Session(lm, method)
        session.prefill(list(range(2, 60)))
        session.generate(3)
        assert torch.isfinite(session.logits).all()


def test_recipes_are_what_was_built():
    for name in FLOORS:
        stored = AutoConfig.from_pretrained(BUILTIN / name)
        assert build_model(name).config.hidden_size == stored.hidden_size
        built = sum(p.numel() for p in build_model(name).parameters())
        loaded = AutoModelForCausalLM.from_pretrained(BUILTIN / name)
        assert built == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize("asked", [wb.load, wb.anatomy])
def test_a_name_no_file_can_have(asked):
    with pytest.raises(wb.UserError, match="cannot be the name of a model"):
        asked("x" * 5000)
