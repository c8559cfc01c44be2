"""What a trace says about expert routing: balance, experts hit, reuse, co-activation, confidence, an expert cache. Pure.

Words: a layer has E experts, of which a token is given K; a step has t tokens in flight. The functions that look at single
tokens need the table `choices`, which a run records with `routing="choices"`, and `confidence` needs `routing="logits"`.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.cost.ffn import read_bytes, weights_bytes
from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.trace.anatomy import Anatomy, Layer, Linear
    from workbench.trace.trace import Trace

POLICIES = ("lru", "lfu", "belady")


def expected_unique(tokens: Any, num_experts: Any, top_k: Any) -> Any:
    """Experts hit by t tokens that choose independently and uniformly: `E (1 - (1 - K/E)^t)` (MoESD, arXiv 2505.19645).

    Numbers or arrays. Real routers are correlated and hit fewer.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def layer_kinds(anatomy: Anatomy) -> pd.DataFrame:
    """One row a layer: `dense` or `moe`, its experts, how many a token is given, bytes of one and of what all tokens share.

    `shared_experts` is the size of what every token of a MoE layer goes through beside its experts, in experts: 0 where there
    is none. `shared_bytes` is its bytes, in a dense layer those of the MLP.
    """
    rows = []
    for layer in anatomy.layers:
        experts = layer.experts
        shared = anatomy.element_bytes * sum(map(_elements, mlp_linears(layer)))
        an_expert = 0 if experts is None else expert_bytes(anatomy, layer.index)
        rows.append(
            {
                "layer": layer.index,
                "kind": "dense" if experts is None else "moe",
                "experts": 0 if experts is None else experts.num_experts,
                "top_k": 0 if experts is None else experts.top_k,
                "shared_experts": 0.0 if experts is None else shared / an_expert,
                "expert_bytes": an_expert,
                "shared_bytes": shared,
            }
        )
    return pd.DataFrame(rows)


def mlp_linears(layer: Layer) -> list[Linear]:
    """The matrices of a layer's MLP, which in a MoE layer are those of its shared experts, without the gate before them."""
    return [linear for linear in layer.linears if linear.component == "mlp" and linear.out_features > 1]


def _elements(linear: Linear) -> int:
    return linear.in_features * linear.out_features


def expert_bytes(anatomy: Anatomy, layer: int) -> int:
    """Bytes of one routed expert's weight matrices."""
    return weights_bytes(anatomy.layers[layer].experts.linears, anatomy.element_bytes)


def load(trace: Trace) -> pd.DataFrame:
    """One row a layer and expert: tokens given to it over the trace, their share of the layer's, and the sum of their weights.

    Raises UserError if no expert was called.
    """
    routing = _routing(trace)
    table = routing.groupby(["layer", "expert"], as_index=False)[["tokens", "weight_sum"]].sum()
    return table.assign(share=table["tokens"] / table.groupby("layer")["tokens"].transform("sum").clip(lower=1))


def balance(trace: Trace) -> pd.DataFrame:
    """One row a layer: how evenly its tokens are spread over its experts.

    `cv`: standard deviation over mean, 0 if even. `max_over_mean`: 1 if even. `entropy`: that of the shares in units of
    `log E`, 1 if even. `gini`: 0 if even, (E - 1) / E if one expert has all. `dropped`: the share of the choices due that
    went to no expert (`unique_experts`), which the others leave out.
    """
    steps = unique_experts(trace)
    due = steps["tokens"] * steps["layer"].map(layer_kinds(trace.anatomy).set_index("layer")["top_k"])
    dropped = steps["dropped"].groupby(steps["layer"]).sum() / due.groupby(steps["layer"]).sum()
    rows = []
    for layer, of_layer in load(trace).groupby("layer"):
        tokens = of_layer["tokens"].to_numpy(float)
        rows.append({"layer": layer, **_balance(tokens), "dropped": dropped[layer]})
    return pd.DataFrame(rows)


def _balance(tokens: np.ndarray) -> dict[str, float]:
    if not tokens.any():
        return dict.fromkeys(("cv", "max_over_mean", "entropy", "gini"), float("nan"))
    mean, count = tokens.mean(), len(tokens)
    shares = tokens / tokens.sum()
    seen = shares[shares > 0]
    ranked = np.sort(tokens)
    gini = (2 * np.arange(1, count + 1) - count - 1) @ ranked / (count * tokens.sum())
    entropy = 1.0 if count == 1 else -(seen * np.log(seen)).sum() / np.log(count)
    return {"cv": tokens.std() / mean, "max_over_mean": tokens.max() / mean, "entropy": entropy, "gini": gini}


def unique_experts(trace: Trace) -> pd.DataFrame:
    """One row a step and layer: tokens in flight, experts hit, those expected of independent uniform choices, and bytes read.

    `given` counts the tokens of all experts, one that has two of them twice. `read_bytes` are the weights of the experts hit,
    each once, as a routing method says it read them where one rules. `dropped` counts the choices a token is due (its top-k)
    that went to no expert: a router or a method left them out, or gave them to what computes nothing.
    """
    routing = _routing(trace)
    routing = routing.assign(unique=routing["tokens"] > 0)
    table = routing.groupby(["step", "layer"], as_index=False).agg(unique=("unique", "sum"), given=("tokens", "sum"))
    table = table.merge(trace.table("steps")[["step", "phase", "tokens"]], on="step")
    entered = table[["step", "layer"]].merge(_entered(trace), how="left")["entered"]
    table["tokens"] = entered.fillna(table["tokens"]).astype(int)
    kinds = layer_kinds(trace.anatomy).set_index("layer")
    experts, top_k = (table["layer"].map(kinds[name]) for name in ("experts", "top_k"))
    table["expected"] = expected_unique(table["tokens"], experts, top_k)
    table["dropped"] = (table["tokens"] * top_k - table["given"]).clip(lower=0)  # a method may give a token more than its own
    read = read_bytes(trace).query("component == 'experts'")[["step", "layer", "read_bytes"]]
    table = table.merge(read, on=["step", "layer"], how="left").fillna({"read_bytes": 0}).astype({"read_bytes": "int64"})
    return table[["step", "phase", "layer", "tokens", "given", "unique", "expected", "dropped", "read_bytes"]]


def _entered(trace: Trace) -> pd.DataFrame:
    """Tokens that entered each layer at each step: fewer behind a layer that thins, more where it runs twice."""
    calls = trace.table("attention")
    calls["entered"] = calls["batch"] * calls["q_len"]
    return calls.groupby(["step", "layer"], as_index=False)["entered"].sum()


def reuse(trace: Trace) -> pd.DataFrame:
    """One row a layer: the share of a token's experts that the token before it was given too, beside K/E by chance.

    Neighbours are tokens of one row of the batch, also across steps. Raises UserError without the table `choices`.
    """
    rows = []
    kinds = layer_kinds(trace.anatomy).set_index("layer")
    for layer, texts in _by_layer(trace):
        neighbours = [pair for experts in texts for pair in itertools.pairwise(experts)]
        again = [len(now & before) / max(1, len(now)) for before, now in neighbours]
        chance = kinds.loc[layer, "top_k"] / kinds.loc[layer, "experts"]
        rows.append({"layer": layer, "reuse": float(np.mean(again)) if again else float("nan"), "by_chance": chance})
    return pd.DataFrame(rows)


def co_activation(trace: Trace, layer: int) -> np.ndarray:
    """`[E, E]` tokens that were given both experts; the diagonal is the tokens an expert was given.

    Raises UserError without the table `choices`, or for a layer without experts.
    """
    experts = trace.anatomy.layers[layer].experts if 0 <= layer < trace.anatomy.num_layers else None
    if experts is None:
        raise UserError(f"Layer {layer} has no experts; those that have are {_expert_layers(trace.anatomy)}.")
    counts = np.zeros((experts.num_experts,) * 2, dtype=int)
    for chosen in _choices(trace).query("layer == @layer")["experts"]:
        given = [expert for expert in chosen if expert >= 0]
        counts[np.ix_(given, given)] += 1
    return counts


def confidence(trace: Trace) -> pd.DataFrame:
    """One row a token and layer: how sure the router was.

    `top_weight`: the largest weight given. `margin`: the logit of the last expert chosen less that of the best one left out.
    `entropy`: of the softmax over all logits, in units of `log E`. The last two are null without `routing="logits"`.
    """
    table = _choices(trace)
    rows = []
    for experts, weights, logits in zip(table["experts"], table["weights"], table["logits"], strict=True):
        row = {"top_weight": float(max(weights)), "margin": float("nan"), "entropy": float("nan")}
        if logits is not None:
            given = np.asarray(logits, dtype=float)
            chosen = np.zeros(len(given), dtype=bool)
            chosen[[expert for expert in experts if expert >= 0]] = True
            odds = np.exp(given - given.max())
            odds /= odds.sum()
            row["entropy"] = -(odds * np.log(odds.clip(1e-30))).sum() / np.log(len(given))
            if chosen.any() and not chosen.all():
                row["margin"] = given[chosen].min() - given[~chosen].max()
        rows.append(row)
    return pd.concat([table[["step", "layer", "row", "position"]], pd.DataFrame(rows, index=table.index)], axis=1)


def token_class(text: str) -> str:
    """What kind of token a text is: `space`, `word`, `number`, `punctuation` or `other`."""
    if not text.strip():
        return "space"
    kinds = Counter(unicodedata.category(character)[0] for character in text.strip())
    names = {"L": "word", "N": "number", "P": "punctuation", "S": "punctuation"}
    return names.get(kinds.most_common(1)[0][0], "other")


def specialisation(trace: Trace, classify: Callable[[str], str] = token_class) -> pd.DataFrame:
    """One row a layer: what knowing a token's class tells about its experts, and the other way round.

    `information` is the mutual information of class and expert as a share of the entropy of the classes: 0 where experts do not
    care, 1 where the expert gives the class away. Raises UserError without the table `choices`.
    """
    tokens = trace.table("tokens")
    tokens["class"] = [classify(text if isinstance(text, str) else "") for text in tokens["text"]]
    known = _choices(trace).merge(tokens[["step", "row", "position", "class"]], on=["step", "row", "position"])
    pairs = known[["layer", "class", "experts"]].explode("experts").query("experts >= 0")
    rows = []
    for layer, of_layer in pairs.groupby("layer"):
        joint = pd.crosstab(of_layer["class"], of_layer["experts"]).to_numpy(float)
        joint = joint / joint.sum()
        classes, experts = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
        there = joint > 0
        information = (joint[there] * np.log((joint / (classes @ experts))[there])).sum()
        entropy = -(classes[classes > 0] * np.log(classes[classes > 0])).sum()
        rows.append({"layer": layer, "information": information / entropy if entropy > 0 else 0.0})
    return pd.DataFrame(rows, columns=["layer", "information"])


def expert_cache(
    trace: Trace, slots: Sequence[int], policies: Sequence[str] = POLICIES, phase: str | None = None
) -> pd.DataFrame:
    """What a server that keeps `slots` experts a layer in fast memory, and the rest elsewhere, would have seen of this trace.

    The experts a step hits are asked for in the order of their numbers, once each. `belady` throws out what is needed last,
    which no policy can beat (Belady 1966). One row a policy and number of slots: requests, hits, hit rate, bytes loaded.

    Raises UserError for an unknown policy, or fewer than one slot.
    """
    unknown = [policy for policy in policies if policy not in _CACHES]
    if unknown:
        raise UserError(f"There is no cache policy {unknown[0]!r}; the policies are {', '.join(POLICIES)}.")
    if min(slots, default=1) < 1:
        raise UserError(f"A cache of {min(slots)} slots holds nothing; give 1 or more.")
    routing = _routing(trace.select(phase=phase) if phase else trace).query("tokens > 0")
    asked = {layer: of_layer.sort_values(["step", "expert"])["expert"].tolist() for layer, of_layer in routing.groupby("layer")}
    rows = []
    for policy in policies:
        for count in slots:
            hits = {layer: _CACHES[policy](experts, count) for layer, experts in asked.items()}
            missed = sum((len(asked[layer]) - hits[layer]) * expert_bytes(trace.anatomy, layer) for layer in asked)
            requests = sum(map(len, asked.values()))
            found = {"policy": policy, "slots": count, "requests": requests, "hits": sum(hits.values())}
            rows.append({**found, "hit_rate": found["hits"] / max(1, requests), "loaded_bytes": missed})
    return pd.DataFrame(rows)


def _lru(asked: list[int], slots: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in asked:
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > slots:
            held.popitem(last=False)
    return hits


def _lfu(asked: list[int], slots: int) -> int:
    """Throws out what was asked for least often so far, the one longest unused among equals."""
    held: dict[int, int] = {}
    counts: Counter[int] = Counter()
    hits = 0
    for time, expert in enumerate(asked):
        hits += expert in held
        if expert not in held and len(held) == slots:
            del held[min(held, key=lambda each: (counts[each], held[each]))]
        counts[expert] += 1
        held[expert] = time
    return hits


def _belady(asked: list[int], slots: int) -> int:
    never = len(asked)
    following = [never] * len(asked)
    latest: dict[int, int] = {}
    for time in range(len(asked) - 1, -1, -1):
        following[time] = latest.get(asked[time], never)
        latest[asked[time]] = time
    held: dict[int, int] = {}
    hits = 0
    for expert, needed_again in zip(asked, following, strict=True):
        hits += expert in held
        if expert not in held and len(held) == slots:
            del held[max(held, key=held.__getitem__)]
        held[expert] = needed_again
    return hits


_CACHES = {"lru": _lru, "lfu": _lfu, "belady": _belady}


def _routing(trace: Trace) -> pd.DataFrame:
    routing = trace.table("routing")
    if routing.empty:
        raise UserError(
            "No expert was called in this trace: the model has none, none could be seen (see its notes), or other parts ran."
        )
    return routing


def _choices(trace: Trace) -> pd.DataFrame:
    choices = trace.table("choices")
    if choices.empty:
        raise UserError('This trace has no choices by token; record it with routing="choices".')
    return choices


def _expert_layers(anatomy: Anatomy) -> str:
    return ", ".join(str(layer.index) for layer in anatomy.layers if layer.experts is not None) or "none"


def _by_layer(trace: Trace) -> Iterator[tuple[int, list[list[set[int]]]]]:
    """For each layer the experts of each token in order, by row of the batch; choices that were dropped are no expert's."""
    choices = _choices(trace).sort_values(["step", "position"])
    for layer, of_layer in choices.groupby("layer"):
        yield layer, [[set(chosen) - {-1} for chosen in of_row["experts"]] for _, of_row in of_layer.groupby("row")]
