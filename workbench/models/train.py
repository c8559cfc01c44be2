"""The recipe of the built-in models: `python -m workbench.models.train tiny-dense --out DIR`.

A tiny model learns to look things up only after it has learned to copy, and it learns to copy only if the distance
varies. So the curriculum is: copy short segments by content (growing the induction heads), then recall facts from
prose at growing lengths, with next-token prediction on prose all along. Each task has its own mean loss, and the
losses are added, so no task drowns another. Earlier tasks stay in the mix, and the learning rate falls at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from workbench.models.card import write_card
from workbench.models.rows import Row, Rows, training_documents
from workbench.texts import recall

VOCAB_SIZE = 1536
MAX_POSITIONS = 8192
BOS, PAD = "<|bos|>", "<|pad|>"
TOKENS_A_STEP = 4096
PEAK_LEARNING_RATE = 2e-3
TASKS = ("copy", "recall", "text")

SHAPE = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=MAX_POSITIONS,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=1,
)


@dataclass(frozen=True)
class Stage:
    """One stretch of the curriculum: row lengths, the mix of tasks, and when to move on."""

    lengths: tuple[int, ...]
    mix: dict[str, float]
    goal: tuple[str, float] | None = None
    """The task and the accuracy that end the stage; None: run for `steps`."""
    steps: int = 4000
    """The most steps the stage may take."""


CURRICULUM = (
    Stage((48,), {"copy": 0.8, "text": 0.2}, ("copy", 0.90), 2500),
    Stage((96, 192), {"copy": 0.7, "text": 0.3}, ("copy", 0.90), 2500),
    Stage((128,), {"recall": 0.6, "copy": 0.2, "text": 0.2}, ("recall", 0.95), 3000),
    Stage((192, 256), {"recall": 0.6, "copy": 0.1, "text": 0.3}, ("recall", 0.96), 1500),
    Stage((384, 512), {"recall": 0.6, "copy": 0.1, "text": 0.3}, ("recall", 0.97), 1500),
    Stage((128, 256, 512, 768, 1024), {"recall": 0.45, "copy": 0.05, "text": 0.5}, None, 4000),
)
WARM_UP_STEPS = 100


def build_model(name: str) -> LlamaForCausalLM | MixtralForCausalLM:
    """The untrained model of a name."""
    if name == "tiny-dense":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=352))
    if name == "tiny-moe":
        experts = dict(num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02)
        return MixtralForCausalLM(MixtralConfig(**SHAPE, **experts, intermediate_size=144, sliding_window=None))
    raise ValueError(f"No recipe for {name!r}; there are recipes for tiny-dense and tiny-moe.")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training prose, with the recall words repeated until each is one token."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frequent = " ".join(("", *recall.WORDS, "Remember", "Recall")) + "\nRemember:\nRecall:"
    bpe.train_from_iterator([*training_documents(), *[frequent] * 3000], trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, pad_token=PAD, padding_side="left", model_max_length=MAX_POSITIONS
    )


def losses(model, rows: list[Row]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per task: the mean loss and the accuracy of the predictions that count. `aux` is the router's balance loss."""
    ids = torch.tensor([row.ids for row in rows])
    routed = {"output_router_logits": True} if "Mixtral" in type(model).__name__ else {}
    out = model.model(ids, use_cache=False, **routed)
    result = {}
    for task in TASKS:
        counts = torch.tensor([[t == task for t in row.tasks[1:]] for row in rows])
        if counts.any():
            logits = model.lm_head(out.last_hidden_state[:, :-1][counts])
            targets = ids[:, 1:][counts]
            accuracy = (logits.argmax(-1) == targets).float().mean()
            result[task] = (F.cross_entropy(logits, targets), accuracy)
    if routed:
        result["aux"] = (balance_loss(out.router_logits, model.config), torch.tensor(0.0))
    return result


def balance_loss(router_logits, config) -> torch.Tensor:
    """Switch-style load balance: experts x sum of (share of choices x mean probability), averaged over layers."""
    total = torch.tensor(0.0)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(config.num_experts_per_tok, -1).indices
        share = F.one_hot(chosen, config.num_local_experts).float().mean((0, 1))
        total = total + config.num_local_experts * (share * probabilities.mean(0)).sum()
    return config.router_aux_loss_coef * total / len(router_logits)


def learning_rate(stage: Stage, step: int, step_in_stage: int) -> float:
    """Warm-up, a plateau, and a cosine fall over the last (open-ended) stage."""
    if stage.goal:
        return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS)
    share = step_in_stage / stage.steps
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def batch(rows: Rows, stage: Stage) -> list[Row]:
    """Rows of one length, their tasks drawn from the stage's mix, each task present at least once."""
    length = rows.rng.choice(stage.lengths)
    size = max(len(stage.mix), TOKENS_A_STEP // length)
    tasks = list(stage.mix) + rows.rng.choices(list(stage.mix), list(stage.mix.values()), k=size - len(stage.mix))
    return [rows.row(task, length) for task in tasks]


def train(name: str, out: Path, tokenizer: PreTrainedTokenizerFast, seed: int, final_steps: int | None) -> Iterator[dict]:
    """Trains a model, yields a log line every 100 steps, and saves model, tokenizer and log to `out`."""
    torch.manual_seed(seed)
    model = build_model(name)
    rows = Rows(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    started, step, log = time.monotonic(), 0, []
    for number, stage in enumerate(CURRICULUM):
        if stage.goal is None and final_steps:
            stage = Stage(stage.lengths, stage.mix, None, final_steps)
        smooth = dict.fromkeys(TASKS, 0.0)
        for step_in_stage in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step, step_in_stage)
            model.train()
            by_task = losses(model, batch(rows, stage))
            loss = sum(value for value, _ in by_task.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            for task in TASKS:
                if task in by_task:
                    smooth[task] = 0.95 * smooth[task] + 0.05 * by_task[task][1].item()
            reached = stage.goal and smooth[stage.goal[0]] >= stage.goal[1]
            if step % 100 == 0 or reached:
                line = {
                    "step": step,
                    "stage": number,
                    "seconds": round(time.monotonic() - started, 1),
                    **{f"{task}_loss": round(value.item(), 4) for task, (value, _) in by_task.items()},
                    **{f"{task}_accuracy": round(smooth[task], 4) for task in TASKS if task in by_task},
                }
                log.append(line)
                yield line
            if step % 500 == 0:
                save(model, tokenizer, out, log, name, seed)
            if reached:
                break
    save(model, tokenizer, out, log, name, seed)


def save(model, tokenizer, out: Path, log: list[dict], name: str, seed: int) -> None:
    """Writes the model, its tokenizer and what the card needs."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    recipe = {"model": name, "seed": seed, "tokens_a_step": TOKENS_A_STEP, "curriculum": [asdict(s) for s in CURRICULUM]}
    (out / "training_log.json").write_text(json.dumps({**recipe, "log": log}))


def main() -> None:
    """Trains the model named on the command line and prints its log and evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["tiny-dense", "tiny-moe"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--final-steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer()
    for line in train(options.name, options.out, tokenizer, options.seed, options.final_steps):
        print(json.dumps(line), flush=True)
    print(write_card(options.out))


if __name__ == "__main__":
    main()
