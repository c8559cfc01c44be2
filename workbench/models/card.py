"""A built-in model's card, from its training log and fresh measurements: `python -m workbench.models.card DIR`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.models.rows import Rows
from workbench.texts import recall

LENGTHS = (128, 256, 512, 768, 1024, 2048)
NUM_FACTS = 4
_SAMPLES = 64
SEED = 1_000_003


def write_card(directory: Path) -> Path:
    """Evaluates the model in a directory and writes its MODEL_CARD.md beside it."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    recipe = json.loads((directory / "training_log.json").read_text())
    path = directory / "MODEL_CARD.md"
    path.write_text(card(model, recipe, evaluate(model, tokenizer), blocks(directory)))
    return path


def blocks(directory: Path) -> list[dict]:
    """What the files of the blocks trained for the model in a directory say about their training, in the order of names."""
    found = []
    for path in sorted((directory / "calibrations").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["calibration"])
        if "reached" in facts["about"]:
            found.append(facts)
    return found


def card(model, recipe: dict, measured: dict, trained: Sequence[dict] = ()) -> str:
    """The card's text. `trained` is what `blocks` finds."""
    log = recipe["log"]
    shown = [line for number, line in enumerate(log) if number % max(1, len(log) // 14) == 0 or number == len(log) - 1]
    tasks = [task for task in ("copy", "recall", "text") if any(f"{task}_loss" in line for line in log)]
    curve = [[line["step"], *(line.get(f"{task}_loss", "") for task in tasks)] for line in shown]
    stages = [
        [
            number,
            ", ".join(map(str, stage["lengths"])),
            ", ".join(f"{task} {share:g}" for task, share in stage["mix"].items()),
            f"{stage['goal'][0]} accuracy {stage['goal'][1]:g}" if stage["goal"] else f"{stage['steps']} steps",
        ]
        for number, stage in enumerate(recipe["curriculum"])
    ]
    config = model.config
    experts = getattr(config, "num_local_experts", None)
    routed = f", {experts} experts of which {config.num_experts_per_tok} serve a token" if experts else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""# {recipe["model"]}

A {type(model).__name__} of {parameters:,} parameters, trained to be small and to recall: {config.num_hidden_layers} layers,
hidden size {config.hidden_size}, {config.num_attention_heads} query and {config.num_key_value_heads} kv heads{routed}, rotary
positions, tied embeddings, vocabulary {config.vocab_size} (byte-level BPE), float32 weights.

## Data

English prose of the Python standard library (`pydoc_data.topics` and docstrings of 300 characters or more), a tenth of the
documents held out by a hash of their text; facts made of {len(recall.WORDS)} words, woven into that prose and asked for at the
end (`workbench/texts/recall.py`); random token segments repeated among prose (copying).

## Recipe

`python -m workbench.models.train {recipe["model"]} --out DIR`, seed {recipe["seed"]}, about {log[-1]["step"]} steps of some
{recipe["tokens_a_step"]:,} tokens, {log[-1]["seconds"] / 60:.0f} minutes on two busy CPU cores. AdamW, peak learning rate 2e-3
after 100 warm-up steps,
cosine decay over the last stage, weight decay 0.05, betas 0.9 and 0.98, gradient norm clipped at 1. Each task has its own
mean loss; the losses are added. A stage ends at its goal:

{_table(["stage", "row lengths (tokens)", "mix of rows", "until"], stages)}

Loss by task (nats a token, one batch each):

{_table(["step", *tasks], curve)}

## Measured

Recall: share of answers with all {recall.VALUE_WORDS} words right, {NUM_FACTS} facts in a context of held-out prose, all
asked for at its end, {_SAMPLES * NUM_FACTS} answers a length (`python -m workbench.models.card DIR`).

{_table(["context (tokens)", *measured["recall_by_length"]], [["recall", *measured["recall_by_length"].values()]])}

Next-token loss on held-out documentation: {measured["held_out_nats"]} nats a token; a unigram model of the training text:
{measured["unigram_nats"]}.
{_blocks(recipe["model"], trained)}
## Limits

It knows nothing of the world and writes documentation-like text at best. It was trained on contexts of up to
{max(recipe["curriculum"][-1]["lengths"])} tokens; beyond them recall falls to nothing, though the model runs up to
{config.max_position_embeddings}. Facts are recalled in the wording it was trained on. Use it to see what methods do to a cache,
not to judge a method for a real model.
"""


def _blocks(name: str, trained: Sequence[dict]) -> str:
    """The section about blocks, or nothing if none was trained."""
    if not trained:
        return ""
    rows = []
    for facts in trained:
        reached = facts["about"]["reached"]
        ways = {"as it is": reached["before"]} if not rows else {}
        ways[f"{facts['method']}, untrained"] = reached["untrained"]
        for way, found in (ways | reached["after"]).items():
            ran = ["", ""] if way in ways else [facts["knobs"]["steps"], reached["seconds"]]
            rows.append([way, *ran, *found["recall_by_length"].values(), found["held_out_nats"]])
    lengths = trained[0]["about"]["reached"]["before"]["recall_by_length"]
    return f"""
## Blocks

Methods that put a trained block in place of parts of this model, trained on half prose and half recall documents of its
training text by `workbench calibrate --model {name} --method NAME` (the weights that come with the package: `make
calibrations`), one run each on one busy CPU core. The rest of the model stays as it is. What each reached, measured as above;
the weights' files hold these figures:

{_table(["model with", "steps", "seconds", *(f"recall, {length}" for length in lengths), "held-out nats a token"], rows)}

A few minutes show that a block works, not what it is worth: the papers train whole models with it from the start. A lower
loss than the model's own is also that of weights trained further.
"""


def _table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@torch.no_grad()
def evaluate(model, tokenizer) -> dict:
    """Recall by context length (4 facts, all answer words right) and held-out loss beside a unigram model's."""
    rows = Rows(tokenizer, SEED, held_out=True)
    recalled = recall_by_length(model, rows, LENGTHS, _SAMPLES)
    training = torch.tensor(Rows(tokenizer, SEED).stream)
    frequency = torch.bincount(training, minlength=len(tokenizer)).float() + 1
    unigram = -(frequency / frequency.sum()).log()[torch.tensor(rows.stream)].mean().item()
    return {
        "recall_by_length": recalled,
        "held_out_nats": held_out_nats(model, rows),
        "unigram_nats": round(unigram, 3),
    }


@torch.no_grad()
def recall_by_length(model, rows: Rows, lengths: Sequence[int], samples: int) -> dict[int, float]:
    """Share of the answers that are right in every word, over texts of each length, each with 4 facts."""
    found = {}
    for length in lengths:
        right = total = 0
        for _ in range(samples):
            row = rows.row("recall", length, NUM_FACTS)
            predicted = model(torch.tensor([row.ids], device=model.device)).logits[0, :-1].argmax(-1).tolist()
            answers = [i for i, task in enumerate(row.tasks) if task == "recall"]
            size = recall.VALUE_WORDS + 1
            for start in range(0, len(answers), size):
                value = answers[start : start + recall.VALUE_WORDS]
                right += all(predicted[i - 1] == row.ids[i] for i in value)
                total += 1
        found[length] = round(right / total, 4)
    return found


@torch.no_grad()
def held_out_nats(model, rows: Rows) -> float:
    """Mean loss of the next token over windows of 512 tokens of the rows' prose."""
    held_out = torch.tensor(rows.stream)
    cut = held_out[: len(held_out) // 511 * 511].view(-1, 511)
    cut = torch.cat([torch.full((len(cut), 1), rows.bos), cut], 1)
    logits = torch.cat([model(chunk.to(model.device)).logits[:, :-1].cpu() for chunk in cut.split(8)])
    return round(F.cross_entropy(logits.flatten(0, 1).float(), cut[:, 1:].flatten()).item(), 3)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write_card(Path(name)))
