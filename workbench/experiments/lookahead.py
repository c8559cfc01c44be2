"""Trains lookahead tokens for a model: `python -m workbench.experiments.lookahead tiny-dense`.

Of prompts of prose and of recall documents, cut at random, the model's own greedy answers are decoded, and the attention they
give to each prompt token is what soft tokens after the prompt are trained to give: KL(s_GT || s), mean over layers and query
heads, both made to sum to one. Only soft tokens and adapters are trained; the prompt is computed once, without them.

Source: LookaheadKV (ICLR 2026), known from two reading notes; its data (ChatQA2 and others) are replaced by the built-in texts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from workbench.engine.cache import acting_layers
from workbench.models.load import BUILTIN, LM, builtin_names, load
from workbench.models.lookahead import Lookahead, lookahead_folder
from workbench.models.rows import Rows
from workbench.probes.attention import AttentionProbe
from workbench_kernels.attention_rows import attention_rows

LENGTHS = (96, 160, 256)
"""Tokens of a prompt."""
ANSWER = 24
"""Tokens of an answer whose attention is the target."""
BATCH, USES = 8, 4
"""Prompts at once, and training steps on each batch: decoding the answers costs more than a step."""
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Batch:
    """Prompts of one length, already read. Shapes: B prompts, Hq query heads, P prompt tokens."""

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    """Of each layer, of the prompt."""
    targets: list[torch.Tensor]
    """`[B, Hq, P]` of each layer: the share of the answer's attention each prompt token received."""

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return self.targets[0].shape[-1]


class _Rows:
    """Sums the attention every call's queries give to the first `length` keys, of some layers."""

    def __init__(self, layers: list[int], length: int):
        self.sums: dict[int, torch.Tensor] = {}
        self._layers, self._length = layers, length

    def before_attention(self, module: nn.Module) -> None:
        """Nothing to do."""

    def after_attention(self, layer: int, module: nn.Module, query, key, mask, options: dict[str, Any], kernel: str) -> None:
        """Adds the rows of one call; the prompt's own are left out."""
        if layer not in self._layers or key.shape[2] <= self._length:
            return
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        rows = attention_rows(query, key, scaling, softcap=options.get("softcap"), sinks=options.get("s_aux"))
        seen = rows[..., : self._length].sum(3).flatten(1, 2)
        self.sums[layer] = self.sums[layer] + seen if layer in self.sums else seen

    def shares(self) -> list[torch.Tensor]:
        """`[B, Hq, P]` of each layer, summing to one over the prompt."""
        return [self.sums[layer] / self.sums[layer].sum(-1, keepdim=True) for layer in self._layers]


@torch.no_grad()
def read(lm: LM, ids: torch.Tensor, answer: int = ANSWER) -> Batch:
    """Reads prompts `[B, P]`, decodes their greedy answers, and keeps what these looked at."""
    rows = _Rows(acting_layers(lm.anatomy), ids.shape[1])
    probe = AttentionProbe(lm.model, rows)
    cache = DynamicCache()
    probe.attach()
    try:
        out = lm.model(ids, past_key_values=cache, use_cache=True)
        read_layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        for _ in range(answer):
            out = lm.model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
    finally:
        probe.detach()
    return Batch(read_layers, rows.shares())


def shares(lm: LM, lookahead: Lookahead, batch: Batch) -> list[torch.Tensor]:
    """`[B, Hq, P]` of each layer: the share of the soft tokens' attention each prompt token receives."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(batch.keys_values):
        cache.update(keys, values, layer)
    rows = _Rows(acting_layers(lm.anatomy), batch.length)
    probe = AttentionProbe(lm.model, rows)
    probe.attach()
    prompts = len(batch.targets[0])
    positions = torch.arange(batch.length, batch.length + lookahead.count, device=lm.device).expand(prompts, -1)
    try:
        with lookahead.attached():
            soft = lookahead.embeddings(prompts).to(lm.model.dtype)
            lm.model(inputs_embeds=soft, position_ids=positions, past_key_values=cache, use_cache=True)
    finally:
        probe.detach()
    return rows.shares()


def divergence(targets: list[torch.Tensor], given: list[torch.Tensor]) -> torch.Tensor:
    """KL(target || given), mean over prompts, layers and query heads, nats."""
    each = [
        (t * (t.clamp(min=1e-12).log() - s.clamp(min=1e-12).log())).sum(-1).mean() for t, s in zip(targets, given, strict=True)
    ]
    return torch.stack(each).mean()


def recall(targets: list[torch.Tensor], given: list[torch.Tensor], num_kv_heads: int, share: float = 0.2) -> float:
    """Share of the best `share` of the prompt, by kv head, that the given scores find."""
    found = []
    for target, score in zip(targets, given, strict=True):
        count = max(1, round(share * target.shape[-1]))
        best, chosen = (s.unflatten(1, (num_kv_heads, -1)).mean(2).topk(count).indices for s in (target, score))
        found.append((best[..., None] == chosen[..., None, :]).any(-1).float().mean())
    return float(torch.stack(found).mean())


def step(lm: LM, lookahead: Lookahead, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One step on a batch. Returns its loss before the step. The model's weights get no gradient."""
    loss = divergence(batch.targets, shares(lm, lookahead, batch))
    optimizer.zero_grad()
    loss.backward(inputs=list(lookahead.parameters()))
    nn.utils.clip_grad_norm_(lookahead.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def prompts(lm: LM, rows: Rows, length: int, count: int = BATCH) -> torch.Tensor:
    """Token ids `[count, length]`: half prose, half recall documents cut at a random place, with prose in front."""
    made = []
    for number in range(count):
        row = rows.row("text" if number % 2 else "recall", length)
        ids = [token for token in row.ids if token is not None]
        asked = [place for place, task in enumerate(row.tasks) if task == "recall"]
        if asked:
            cut = rows.rng.choice(asked)
            filler = rows.row("text", length).ids[: length - cut]
            ids = [*filler, *ids[:cut]]
        made.append(ids[-length:])
    shortest = min(map(len, made))
    return torch.tensor([ids[-shortest:] for ids in made], device=lm.device)


def train(lm: LM, steps: int, seed: int = 0, tokens: int | None = None) -> Iterator[tuple[Lookahead, dict[str, float]]]:
    """Trains, and yields what is trained with a log line, first untrained, then every 50 steps.

    `held_out_kl` and `held_out_recall` (of the best fifth) are on prose that neither this nor a built-in model was trained on.
    """
    lookahead = Lookahead(lm.model, **({} if tokens is None else {"tokens": tokens}), seed=seed)
    optimizer = torch.optim.AdamW(lookahead.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows, held_out = Rows(lm.tokenizer, seed), Rows(lm.tokenizer, seed, held_out=True)
    tests = [read(lm, prompts(lm, held_out, length)) for length in LENGTHS]
    started, losses = time.monotonic(), []
    for number in range(steps + 1):
        if number % 50 == 0 or number == steps:
            yield (
                lookahead,
                {"step": number, "seconds": round(time.monotonic() - started, 1), **_measured(lm, lookahead, tests, losses)},
            )
            losses = []
        if number % USES == 0:
            batch = read(lm, prompts(lm, rows, rows.rng.choice(LENGTHS)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * number / max(1, steps))))
        if number < steps:
            losses.append(step(lm, lookahead, optimizer, batch))


@torch.no_grad()
def _measured(lm: LM, lookahead: Lookahead, tests: list[Batch], losses: list[float]) -> dict[str, float]:
    given = [shares(lm, lookahead, batch) for batch in tests]
    heads = lm.anatomy.layers[0].attention.num_kv_heads
    pairs = list(zip(tests, given, strict=True))
    kl = sum(float(divergence(batch.targets, each)) for batch, each in pairs) / len(pairs)
    found = sum(recall(batch.targets, each, heads) for batch, each in pairs) / len(pairs)
    train_kl = {"train_kl": round(sum(losses) / len(losses), 4)} if losses else {}
    return {**train_kl, "held_out_kl": round(kl, 4), "held_out_recall": round(found, 4)}


def where(lm: LM) -> Path:
    """The file that a model's trained tokens are looked for in: beside a built-in model, or in the user's folder."""
    if lm.name in builtin_names():
        return BUILTIN / lm.name / "lookahead.safetensors"
    return lookahead_folder() / f"{Path(lm.name).name}.safetensors"


def main() -> None:
    """Trains for the model named on the command line, prints the log, and saves to where sessions look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lm = load(options.model)
    lookahead, line = Lookahead(lm.model), {}
    for lookahead, line in train(lm, options.steps, options.seed):  # noqa: B007 (the last one is saved)
        print(json.dumps(line), flush=True)
    recipe = {"steps": options.steps, "seed": options.seed, "lengths": LENGTHS, "answer": ANSWER, "result": line}
    print(lookahead.save(where(lm), lm.model, recipe))


if __name__ == "__main__":
    main()
