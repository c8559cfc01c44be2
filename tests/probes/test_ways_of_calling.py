"""However a model is called, what is recorded equals torch's counter and the cache; or the call is refused in a sentence."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CompileConfig,
    GenerationConfig,
    StaticCache,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import workbench as wb
from workbench.engine.check import check_engine
from workbench.testing import SMALL, footprint, ids, random_llama, random_model

FAMILIES = ("llama", "gemma3_text", "deepseek_v3", "qwen3_moe", "falcon")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return random_model(request.param, attn_implementation="eager", experts_implementation="batched_mm")


@pytest.fixture(scope="module")
def llama():
    return random_llama(attn_implementation="eager")


def observed(model: nn.Module, call: Callable, **options) -> wb.Trace:
    """The trace of a call, whose FLOPs torch counted as well."""
    counter = FlopCounterMode(display=False)
    with wb.profile(model, **options) as prof, counter:
        call()
    assert prof.trace.flops() == counter.get_total_flops()
    return prof.trace


def generate(model: nn.Module, **options) -> Callable:
    torch.manual_seed(0)
    return lambda: model.generate(ids(12), **{"max_new_tokens": 4, "do_sample": False, **options})


def column(trace: wb.Trace, table: str, name: str) -> list:
    """A column of the steps, or of the first full-attention layer in another table."""
    frame = trace.table(table)
    layer = next(each.index for each in trace.anatomy.layers if each.attention.window is None)
    return (frame if "layer" not in frame else frame[frame["layer"] == layer])[name].tolist()


ROWS = {
    "beam search": ({"num_beams": 3}, 3),
    "sampling": ({"do_sample": True, "num_return_sequences": 3}, 3),
    "beam sampling": ({"do_sample": True, "num_beams": 2}, 2),
}


@pytest.mark.parametrize("way", ROWS)
def test_every_beam_and_sample_is_a_row(model, way):
    options, batch = ROWS[way]
    trace = observed(model, generate(model, **options))
    assert column(trace, "steps", "phase") == ["prefill", "decode", "decode", "decode"]
    assert column(trace, "steps", "tokens") == [12 * batch, batch, batch, batch]
    assert column(trace, "attention", "kv_read") == column(trace, "steps", "context") == [12, 13, 14, 15]
    held = column(trace, "cache", "held_tokens")
    assert [each / held[0] for each in held] == [length / 12 for length in (12, 13, 14, 15)]
    assert len(trace.table("tokens")) == 15 * batch and set(trace.table("tokens")["row"]) == set(range(batch))
    assert trace.notes == []


def test_a_static_cache_reads_its_buffer_and_holds_its_tokens(model):
    growing = observed(model, generate(model))
    trace = observed(model, generate(model, cache_implementation="static"))
    assert column(trace, "attention", "kv_read") == [15] * 4
    assert column(trace, "attention", "pairs") == column(growing, "attention", "pairs") == [78, 13, 14, 15]
    assert column(trace, "attention", "kv_held") == [12, 13, 14, 15]
    assert column(trace, "cache", "held_tokens") == column(growing, "cache", "held_tokens")
    assert column(trace, "cache", "physical_bytes") == [column(growing, "cache", "physical_bytes")[-1]] * 4
    assert column(trace, "steps", "phase") == ["prefill", "decode", "decode", "decode"]


def test_a_static_sliding_window_is_measured():
    model = random_model("gemma3_text", attn_implementation="eager")
    trace = observed(model, lambda: model.generate(ids(30), max_new_tokens=4, do_sample=False, cache_implementation="static"))
    sliding = trace.table("cache").query("layer == 0")
    assert sliding["held_tokens"].tolist() == [2 * 16] * 4  # two kv heads, a window of 16
    assert sliding["physical_bytes"].tolist() == [2 * 2 * 16 * 8 * 4] * 4  # K and V, heads, slots, sizes, float32


def test_a_quantised_cache_is_measured(llama):
    trace = observed(llama, generate(llama, cache_implementation="quantized", cache_config={"backend": "fp8"}))
    assert column(trace, "cache", "held_tokens") == [2 * length for length in (12, 13, 14, 15)]
    assert column(trace, "cache", "physical_bytes") == [2 * 2 * 8 * length for length in (12, 13, 14, 15)]  # a byte each


def test_without_a_cache_every_step_is_a_prefill(model):
    trace = observed(model, generate(model, use_cache=False))
    assert column(trace, "steps", "phase") == ["prefill"] * 4
    assert column(trace, "steps", "tokens") == column(trace, "attention", "kv_read") == [12, 13, 14, 15]
    assert column(trace, "attention", "kv_held") == [0] * 4 and trace.table("cache").empty


@pytest.mark.parametrize("implementation", ["eager", None])
def test_attentions_that_are_asked_for_are_those_of_an_unprofiled_run(model, implementation):
    model = random_model(model.config.model_type, attn_implementation=implementation)
    with torch.no_grad():
        expected = model(ids(20), output_attentions=True)
        with wb.profile(model) as prof:
            given = model(ids(20), output_attentions=True)
    assert torch.equal(given.logits, expected.logits)
    for one, other in zip(given.attentions or (), expected.attentions or (), strict=True):
        assert torch.equal(one, other)
    assert set(prof.trace.table("attention")["layer"]) == set(range(3))


def test_a_model_that_asks_for_its_attention_by_name_computes_what_it_always_does():
    model = random_model("falcon")  # with sdpa it asks `config._attn_implementation == "sdpa"`
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = [model(ids(30, 2)).logits, model(ids(30, 2), attention_mask=mask).logits]
        with wb.profile(model):
            given = [model(ids(30, 2)).logits, model(ids(30, 2), attention_mask=mask).logits]
    assert all(map(torch.equal, given, expected))


def test_code_that_looks_its_attention_up_by_indexing_is_seen(monkeypatch):
    model = random_llama()
    forward = type(model.model.layers[0].self_attn).forward
    table = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]

    class Indexing:
        def get_interface(self, name, default):
            return table[name]

    monkeypatch.setitem(forward.__globals__, "ALL_ATTENTION_FUNCTIONS", Indexing())
    with wb.profile(model, importance="full") as prof, torch.no_grad():
        model(ids(9))
    assert set(prof.trace.table("attention")["kernel"]) == {"sdpa"} and len(prof.trace.table("importance")) == 3 * 4


def test_a_prompt_in_chunks_is_a_prefill_and_appends(model):
    trace = observed(model, generate(model, prefill_chunk_size=5))
    assert column(trace, "steps", "phase") == ["prefill", "append", "append", "decode", "decode", "decode"]
    assert column(trace, "steps", "tokens") == [5, 5, 2, 1, 1, 1]


def test_assisted_generation_checks_several_tokens_at_once(model):
    assistant = copy.deepcopy(model)
    with wb.profile(model) as prof:
        answer = model.generate(ids(12), assistant_model=assistant, max_new_tokens=6, do_sample=False)
    steps = prof.trace.table("steps")
    assert steps["phase"].tolist() == ["prefill", *["append"] * (len(steps) - 1)]
    assert torch.equal(answer, model.generate(ids(12), max_new_tokens=6, do_sample=False))
    assert column(prof.trace, "attention", "kv_read") == steps["context"].tolist()
    assert max(prof.trace.table("tokens")["position"]) < 12 + 6


def test_prompt_lookup_mixes_decode_and_append(model):
    trace = observed(model, generate(model, prompt_lookup_num_tokens=3, max_new_tokens=6))
    steps = trace.table("steps").iloc[1:]
    assert all((steps["phase"] == "decode") == (steps["tokens"] == 1))


def test_layers_that_did_not_run_are_not_counted():
    model = random_llama(attn_implementation="eager")
    trace = observed(model, generate(model, assistant_early_exit=1, max_new_tokens=6))
    layers = trace.table("attention").groupby("step")["layer"].nunique()
    assert set(layers) == {1, 3}


@pytest.mark.parametrize("twice", [1, 2])
def test_a_layer_that_runs_twice_counts_twice(twice):
    model = random_llama(attn_implementation="eager")
    model.model.layers.append(model.model.layers[0]) if twice == 2 else None
    model.config.num_hidden_layers = 2 + twice
    with torch.no_grad():
        observed(model, lambda: model(ids(9), use_cache=False))


def test_embeddings_instead_of_ids(model):
    embedded = model.get_input_embeddings()(ids(12)).detach()
    trace = observed(model, lambda: model.generate(inputs_embeds=embedded, max_new_tokens=4, do_sample=False))
    assert column(trace, "steps", "context") == [12, 13, 14, 15]
    assert trace.table("tokens")["position"].tolist() == [12, 13, 14]


def test_a_cache_given_by_position(llama):
    def call():
        with torch.no_grad():
            cache = llama(ids(12)).past_key_values
            llama(ids(1), None, None, cache)

    trace = observed(llama, call)
    assert column(trace, "steps", "phase") == ["prefill", "decode"] and column(trace, "steps", "context") == [12, 13]


def test_plain_tuples_instead_of_an_output(llama):
    def call():
        with torch.no_grad():
            cache = llama(ids(12), return_dict=False)[1]
            llama(ids(1), past_key_values=cache, return_dict=False)

    trace = observed(llama, call)
    assert column(trace, "cache", "held_tokens") == [24, 26]


def test_ids_that_the_caller_writes_over(llama):
    token, cache = ids(1), StaticCache(llama.config, max_cache_len=8)
    with wb.profile(llama) as prof, torch.no_grad():
        for value in (5, 6, 7):
            token.fill_(value)
            llama(token, past_key_values=cache)
    assert prof.trace.table("tokens")["id"].tolist() == [5, 6, 7]
    assert prof.trace.table("tokens")["position"].tolist() == [0, 1, 2]


MASKS = {
    "4-D, everything": ({"attention_mask": torch.zeros(1, 1, 12, 12)}, 12 * 12),
    "packed sequences": ({"position_ids": torch.arange(12)[None] % 6, "use_cache": False}, 2 * 6 * 7 // 2),
    "causal": ({}, 12 * 13 // 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_pairs_are_those_the_mask_lets_through(llama, name):
    options, pairs = MASKS[name]
    with torch.no_grad():
        trace = observed(llama, lambda: llama(ids(12), **options))
    assert column(trace, "attention", "pairs") == [pairs]


def test_inference_mode_and_training_mode(model):
    with torch.inference_mode():
        observed(model, lambda: model(ids(12)))
    try:
        model.train()
        observed(model, lambda: model(ids(12)))  # with gradients, too
    finally:
        model.eval()


def test_the_forward_of_a_training_step_is_measured(model):
    with torch.no_grad():
        alone = observed(model, lambda: model(ids(12)))
    with wb.profile(model) as prof:
        model(ids(12), labels=ids(12)).loss.backward()
    model.zero_grad()
    assert prof.trace.flops() == alone.flops() and prof.trace.notes == []


def test_attention_that_a_backward_pass_computes_again_is_noted():
    model = random_llama()
    model.gradient_checkpointing_enable()
    model.train()
    with wb.profile(model) as prof:
        model(ids(12), labels=ids(12), use_cache=False).loss.backward()
    assert "3 attention calls ran outside any forward call" in prof.trace.notes[0]
    assert len(prof.trace.table("attention")) == 3


def test_half_precision(llama):
    half = copy.deepcopy(llama).to(torch.bfloat16)
    trace = observed(half, generate(half))
    assert column(trace, "cache", "physical_bytes") == [2 * 2 * 2 * 8 * length for length in (12, 13, 14, 15)]


def test_the_decoder_alone_has_no_head(model):
    with torch.no_grad():
        trace = observed(model, lambda: model.base_model(ids(12)))
    assert column(trace, "steps", "logits") == [0]
    assert "lm_head" not in trace.flops(by="component").query("flops > 0")["component"].tolist()


def test_forward_without_the_call_is_seen(model):
    with torch.no_grad():
        trace = observed(model, lambda: (model.forward(ids(12)), model(ids(12))))
    first, second = trace.flops(by="step")["flops"]
    assert first == second and column(trace, "steps", "logits") == [12, 12]


def test_a_head_of_its_own_is_noted(llama):
    with wb.profile(llama) as prof, torch.no_grad():
        llama.lm_head(torch.zeros(1, 3, 32))
    assert "output head was called outside any forward call" in prof.trace.notes[0]


def test_a_block_without_a_call_says_so(llama):
    with wb.profile(llama) as prof:
        pass
    assert "No forward call was seen" in prof.trace.notes[0] and "1 notes" in repr(prof.trace)


def test_a_check_of_our_own_is_not_taken_for_the_run(llama):
    model = copy.deepcopy(llama)
    with wb.profile(model) as prof:
        check_engine(model, prof.anatomy)
    assert prof.trace.table("steps").empty and "No forward call" in prof.trace.notes[0]


class Wrapper(nn.Module):
    """Holds a model and passes its attributes on, as adapters do."""

    def __init__(self, model: nn.Module, by_forward: bool = False):
        super().__init__()
        self.inner, self.by_forward = model, by_forward

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs) if self.by_forward else self.inner(*args, **kwargs)

    def __getattr__(self, name):
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["inner"], name)


@pytest.mark.parametrize("by_forward", [False, True])
def test_a_wrapper_is_refused_and_the_model_inside_is_measured(llama, by_forward):
    wrapper = Wrapper(llama, by_forward)
    with pytest.raises(wb.UserError, match=r"^Wrapper wraps a LlamaForCausalLM; profile that one"):
        wb.profile(wrapper)
    with pytest.raises(wb.UserError, match=r"^DataParallel wraps a LlamaForCausalLM"):
        wb.profile(nn.DataParallel(llama))
    with torch.no_grad():
        observed(llama, lambda: wrapper(ids(9)))


class Adapter(nn.Module):
    """A low-rank addition to a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_adapters_are_counted_where_they_are(llama):
    model = copy.deepcopy(llama)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj)
    with torch.no_grad():
        trace = observed(model, lambda: model(ids(9)))
    out = trace.flops(by="component").set_index("component")["flops"]["attention.out"]
    assert out == 3 * 2 * 9 * (32 * 32 + 2 * 32 * 4)


class Switch(nn.Module):
    """Experts in a list, each called with its tokens only, as older code has them."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(4))

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


def test_matrices_that_do_not_run_for_every_token_are_taken_off_and_noted(llama):
    model = copy.deepcopy(llama)
    for layer in model.model.layers:
        layer.mlp = Switch(layer.mlp)
    trace = observed(model, generate(model))
    assert len(trace.notes) == 1 and "did less than their sizes make" in trace.notes[0]
    assert (trace.table("unattributed")["flops"] < 0).all()


HYBRIDS = {
    "minimax": {"num_local_experts": 6, "num_experts_per_tok": 2},  # layers of linear attention
    "olmo_hybrid": {},  # gated delta nets
    "diffllama": {},  # asks for its attention twice a layer
    "doge": {},  # a matrix product over the cached values
    "rwkv": {},  # no attention at all
    "modernbert-decoder": {},  # a matrix between the layers and the head
    "xlm": {"emb_dim": 32, "n_layers": 3, "n_heads": 4},  # matrices beside the list of attentions
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_the_anatomy_does_not_know_is_counted(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **HYBRIDS[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if name == "minimax":
        model.set_experts_implementation("eager")

    def call():
        cache = None
        with torch.no_grad():
            for length in (23, 1, 1, 5):
                cache = getattr(model(ids(length), past_key_values=cache, use_cache=True), "past_key_values", None)

    counter = FlopCounterMode(display=False)
    with wb.profile(model) as prof, counter:
        call()
    rotary = sum(sum(ops.values()) for part, ops in counter.get_flop_counts().items() if part.endswith("rotary_emb"))
    assert prof.trace.flops() == counter.get_total_flops() - rotary


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_vision_tower_is_counted_when_it_runs(kind):
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 28}
    text = SMALL | {"head_dim": 8, "model_type": "gemma3_text" if kind == "gemma3" else "llama"}
    vision = tower | {"patch_size": 14} | ({"vision_use_head": False} if kind == "gemma3" else {})
    vision |= {"model_type": "siglip_vision_model" if kind == "gemma3" else "clip_vision_model"}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 90} if kind == "gemma3" else {"image_token_index": 90}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        words = observed(model, lambda: model(ids(12).clamp(max=80)))
        assert words.anatomy.num_layers == 3 and words.table("unattributed").empty
        prompt = ids(12).clamp(max=80)
        prompt[0, 2:6] = 90
        types = {"token_type_ids": (prompt == 90).long()} if kind == "gemma3" else {}
        picture = observed(model, lambda: model(prompt, pixel_values=torch.zeros(1, 3, 28, 28), **types))
    assert picture.table("unattributed")["flops"].sum() > 0


REFUSED = {
    "t5": dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=96),
    "bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=96),
}


@pytest.mark.parametrize("name", REFUSED)
def test_encoder_decoder_models_are_refused(name):
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **REFUSED[name]))
    with pytest.raises(wb.UserError, match=r"attends to an encoder .* is not measured; pass a decoder-only model"):
        wb.profile(model)


def test_cross_attention_and_a_missing_head_are_refused(llama):
    with pytest.raises(wb.UserError, match=r"GPT2LMHeadModel attends to an encoder \(crossattention in its layers\)"):
        wb.profile(random_model("gpt2", add_cross_attention=True))
    with pytest.raises(wb.UserError, match="LlamaModel is not a causal language model with an output head"):
        wb.profile(llama.model)


COMPILED = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
    "model.forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")) or model,
    "a layer": lambda model: model.model.layers[1].compile(backend="eager") or model,
    "a part": lambda model: setattr(model, "model", torch.compile(model.model, backend="eager")) or model,
}


@pytest.mark.parametrize("way", COMPILED)
def test_compiled_models_are_refused(way):
    with pytest.raises(wb.UserError, match=r"is compiled, .*profile the model without torch.compile"):
        wb.profile(COMPILED[way](random_llama()))


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_call_that_would_be_compiled_is_refused(compiled_before):
    torch._dynamo.reset()
    model = random_llama()
    compiled = torch.compile(model, backend="eager")
    before = footprint(model)
    with torch.no_grad():
        expected = compiled(ids(5)).logits if compiled_before else model(ids(5)).logits
        with pytest.raises(wb.UserError, match="is being compiled"), wb.profile(model):
            compiled(ids(5))
        assert torch.equal(compiled(ids(5)).logits, expected)
    assert footprint(model) == before


def test_generate_that_compiles_its_decode_is_refused():
    torch._dynamo.reset()
    model = random_llama()
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True  # on a GPU, a static cache is enough
    options = {"cache_implementation": "static", "compile_config": compile_config}
    with pytest.raises(wb.UserError, match=r"pass disable_compile=True to generate\(\)"), wb.profile(model) as prof:
        generate(model, **options)()
    assert prof.trace.table("steps")["phase"].tolist() == ["prefill"]
    answer = generate(model, **options)()
    with wb.profile(model) as prof:
        assert torch.equal(generate(model, **options, disable_compile=True)(), answer)
    assert len(prof.trace.table("steps")) == 4 and prof.trace.notes == []


def test_another_model_may_be_compiled():
    torch._dynamo.reset()
    model, other = random_llama(), random_llama()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(ids(5)).logits
        with wb.profile(model) as prof:
            assert torch.equal(compiled(ids(5)).logits, expected)
            model(ids(5))
        assert torch.equal(compiled(ids(5)).logits, expected)
    assert len(prof.trace.table("steps")) == 1


def test_continuous_batching_is_refused():
    model = random_llama(eos_token_id=2)
    options = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2)
    batching = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    with wb.profile(model) as prof:
        answers = model.generate_batch([[5, 6, 7]], generation_config=options, continuous_batching_config=batching)
    assert "paged cache, which is not measured; use generate()" in next(iter(answers.values())).error
    assert prof.trace.table("steps").empty and "paged cache" in prof.trace.notes[0]


DEVICE_MAPS = {
    "one device": {"": "cpu"},
    "disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("where", DEVICE_MAPS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_model_split_by_a_device_map_is_observed(where, family, tmp_path):
    whole = random_model(family, attn_implementation="eager", experts_implementation="eager")
    whole.save_pretrained(tmp_path / "model")
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=DEVICE_MAPS[where], offload_folder=tmp_path / "weights", attn_implementation="eager"
    )
    if family == "qwen3_moe":
        split.set_experts_implementation("eager")
    with torch.no_grad():
        expected = whole(ids(9)).logits
        with wb.profile(whole, importance="full") as reference:
            whole(ids(9))
        with wb.profile(split, importance="full") as prof:
            assert torch.equal(split(ids(9)).logits, expected)
        assert torch.equal(split(ids(9)).logits, expected)
    assert prof.trace.flops() == reference.trace.flops() and prof.trace.notes == []
    assert prof.trace.table("routing").equals(reference.trace.table("routing"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in split.modules())
