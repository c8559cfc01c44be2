"""Gates of kv heads: the two-way forward between dense and streaming attention, and what training does to them."""

from __future__ import annotations

import itertools

import pytest
import torch

import workbench as wb
from workbench.engine import gates as training
from workbench.engine.cache import acting_layers
from workbench.engine.calibration import Document, Needle, shipped_file
from workbench.engine.gates import GatedLayer, hidden_states, loss, step, train
from workbench.experiments.calibrate import recall_documents
from workbench.testing import footprint, ids, random_gemma, random_llama, random_model

LENGTH, SINKS, RECENT = 44, 3, 6
ASKING = (39, 40, 41, 42)


def document(seed: int = 1) -> Document:
    prompt = ids(40, seed=seed)[0].tolist()
    return Document((*prompt, *prompt[5:9]), 40, (Needle(5, 9, ASKING),))


@pytest.fixture
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_open_gates_are_dense(tiny, family):
    """Sliding windows, soft caps, learned sinks and experts included."""
    lm = wb.load((random_model(family), tiny.tokenizer))
    attention = [lm.anatomy.layers[index].attention for index in acting_layers(lm.anatomy)]
    given = hidden_states(lm, document(), torch.ones(len(attention), attention[0].num_kv_heads))
    with torch.no_grad():
        dense = lm.model(torch.tensor([document().tokens]), output_hidden_states=True).hidden_states[-1][0, list(ASKING)]
    torch.testing.assert_close(given, dense, atol=1e-4, rtol=1e-4)


def test_closed_gates_stream(tiny):
    """As the model itself does under a mask of first and recent tokens."""
    lm = wb.load((random_llama(attn_implementation="eager"), tiny.tokenizer))
    given = hidden_states(lm, document(), torch.zeros(3, 2), SINKS, RECENT)
    mask = torch.full((1, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min)
    for query, key in itertools.product(range(LENGTH), range(LENGTH)):
        if key <= query and (key < SINKS or query - key < RECENT):
            mask[..., query, key] = 0
    with torch.no_grad():
        out = lm.model(torch.tensor([document().tokens]), attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(given, out.hidden_states[-1][0, list(ASKING)], atol=1e-5, rtol=1e-5)
    short = hidden_states(lm, document(), torch.zeros(3, 2), 10, LENGTH - 10)  # first and recent tokens are all there are
    torch.testing.assert_close(short, hidden_states(lm, document(), torch.ones(3, 2)))


def test_a_gate_mixes_both_ways_in_the_query_heads_of_its_kv_head(lm):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 9, 8, generator=generator)
    keys, values = torch.randn(2, 1, 2, 9, 8, generator=generator)
    layer = GatedLayer(0, lm.anatomy, torch.tensor([0.3, 1.0]), 1, 2)
    layer.update(keys, values)
    out, _ = layer.attend(lm.model, query, 0.5)
    for head, asking in itertools.product(range(4), range(9)):
        ways = []
        for seen in (list(range(asking + 1)), sorted({0, *range(max(asking - 1, 0), asking + 1)})):
            weights = (0.5 * keys[0, head // 2, seen] @ query[0, head, asking]).softmax(0)
            ways.append(weights @ values[0, head // 2, seen])
        share = (0.3, 1.0)[head // 2]
        torch.testing.assert_close(out[0, asking, head], share * ways[0] + (1 - share) * ways[1])


def test_steps_bring_the_loss_down_and_reach_the_gates_alone(lm):
    before, text = footprint(lm.model), document()
    gates = torch.ones(3, 2)
    with torch.no_grad():
        dense = hidden_states(lm, text, gates)
    gates.requires_grad_(True)
    optimizer = torch.optim.AdamW([gates], lr=0.05, weight_decay=0.0)
    losses = [step(lm, text, dense, gates, optimizer) for _ in range(30)]
    assert losses[0] == pytest.approx(6 * training.PENALTY) and losses[-1] < 0.7 * losses[0]
    assert gates.grad is not None and gates.grad.all() and gates.min() >= 0 and gates.max() <= 1
    assert all(weight.grad is None for weight in lm.model.parameters()) and footprint(lm.model) == before


def test_the_gradient_is_that_of_the_loss(lm):
    """One gate moved a little to either side."""
    gates = torch.tensor([[0.5, 0.8], [0.2, 0.9], [0.7, 0.4]])
    with torch.no_grad():
        dense = hidden_states(lm, document(), torch.ones(3, 2))

    def at(value: float) -> torch.Tensor:
        moved = gates.clone()
        moved[1, 0] = value
        return loss(hidden_states(lm, document(), moved), dense, moved)

    gates.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(hidden_states(lm, document(), gates), dense, gates), [gates])
    with torch.no_grad():
        slope = (at(0.25) - at(0.15)) / 0.1
    assert gradient[1, 0].item() == pytest.approx(slope.item(), rel=0.05) and gradient.all()


def test_training_tells_how_far_it_is_and_starts_open(lm, monkeypatch):
    monkeypatch.setattr(training, "PASSES", 2)
    done = []
    gates = train(lm, [document(1), document(2)], lambda *each: done.append(each))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert gates.shape == (3, 2) and gates.min() > 0.7 and gates.max() < 1 and not gates.requires_grad


def test_layers_that_slide_have_no_gates(tiny, monkeypatch):
    monkeypatch.setattr(training, "PASSES", 1)
    assert train(wb.load((random_gemma(), tiny.tokenizer)), [document()]).shape == (1, 1)


def test_what_cannot_be_trained_is_one_sentence(tiny, lm):
    prompt = ids(40)[0].tolist()
    for useless in (Document(tuple(prompt), 40), Document((*prompt[:30], 7), 30, (Needle(5, 6, (29,)),))):
        with pytest.raises(wb.UserError, match="texts of more than 36 tokens that repeat a passage"):
            train(lm, [useless])
    with pytest.raises(wb.UserError, match="does not go through transformers' attention interface"):
        train(wb.load((random_model("bloom"), tiny.tokenizer)), [document()])


def test_shipped_gates_do_better_than_open_closed_and_exchanged_ones(tiny):
    """On texts they were not trained on; each open gate is worth more than each closed one."""
    gates = wb.Calibration.load(shipped_file("tiny-dense", wb.DuoAttention(gates="trained"))).tables["gates"]
    (text,) = recall_documents(tiny, 1, context=256, seed=3)
    with torch.no_grad():
        dense = hidden_states(tiny, text, torch.ones_like(gates))
        lost = {
            name: loss(hidden_states(tiny, text, each), dense, each).item()
            for name, each in (
                ("trained", gates),
                ("open", torch.ones_like(gates)),
                ("closed", torch.zeros_like(gates)),
                ("exchanged", gates.flip(1)),
                ("of other layers", gates.roll(1, 0)),
            )
        }
    assert min(lost, key=lost.__getitem__) == "trained"
    assert gates.min() >= 0 and gates.max() <= 1
