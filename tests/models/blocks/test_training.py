"""Training of blocks: what counts of a text, and that the block learns while the model stays as it is."""

from __future__ import annotations

import pytest
import torch

from workbench.models.blocks import training
from workbench.models.blocks.attach import attached, llama_layers
from workbench.models.blocks.engram import EngramBlock
from workbench.models.blocks.recursions import RecursionBlock
from workbench.models.blocks.training import Text, batches, loss, train
from workbench.models.blocks.versatile_ffn import VersatileBlock
from workbench.testing import ids, random_llama

TEXT = Text(tuple(ids(24)[0].tolist()))


def test_of_a_text_with_marked_tokens_these_count_and_of_others_all():
    model, row = random_llama(), ids(24)
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")
        marked = Text(TEXT.ids, (5, 9))
        torch.testing.assert_close(loss(model, [TEXT]), each.mean())
        torch.testing.assert_close(loss(model, [marked]), each[[4, 8]].mean())
        torch.testing.assert_close(loss(model, [marked, TEXT]), each.mean() + each[[4, 8]].mean())
        shorter = Text(TEXT.ids[:10])
        torch.testing.assert_close(loss(model, [shorter, marked]), each[:9].mean() + each[[4, 8]].mean())


def test_batches_hold_as_many_tokens_as_asked_for_and_no_text_twice():
    texts = [Text((number,) * 10) for number in range(7)]
    made = batches(texts, 30)
    assert [len(each) for each in made] == [3, 3, 1] and [text for each in made for text in each] == texts
    assert batches([TEXT], 1) == [[TEXT]]


@pytest.mark.parametrize("name", ["engram", "versatile-ffn", "mixture-of-recursions"])
def test_a_block_learns_a_text_and_the_model_stays_as_it_is(name, monkeypatch):
    monkeypatch.setattr(training, "WARM_UP", 2)
    torch.manual_seed(0)
    model = random_llama(num_hidden_layers=4)
    layers, embedding = llama_layers(model, name), model.get_input_embeddings()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    options = {}
    if name == "engram":
        block = EngramBlock((1, 2), torch.arange(96), 1, 32, rows=20)
        forwards = block.forwards(embedding, layers)
    elif name == "versatile-ffn":
        block = VersatileBlock(layers)
        forwards, options = block.forwards(layers), {"before": block.cool}
    else:
        block = RecursionBlock(layers)
        forwards, options = block.forwards(layers), {"extra": block.auxiliary_loss}
    log = train(model, block, forwards, [TEXT], 30, **options)
    assert log["steps"] == 30 and log["last_loss"] < 0.95 * log["first_loss"]
    with torch.no_grad(), attached(forwards):
        assert loss(model, [TEXT]) < 0.95 * log["first_loss"]
    assert not block.training and all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(vars(module).get("forward") is None for module in model.modules())
