"""Fused bytes: the arithmetic of each formula, and the experts that were hit."""

from __future__ import annotations

from dataclasses import replace

import torch

import workbench as wb
from workbench.cost.bytes import cache_append_bytes, embedding_bytes, fused_attention_bytes, linear_bytes
from workbench.testing import ids, random_qwen_moe
from workbench.trace.anatomy import Attention, Linear

HEADS = Attention(num_q_heads=4, num_kv_heads=2, head_dim=8, value_dim=8)


def test_linear():
    # (5 * 7 in + 7 * 3 weight + 3 bias + 5 * 3 out) * 4 bytes = 74 * 4
    assert linear_bytes(5, Linear("mlp", 7, 3, bias=True), 4) == 296


def test_embedding():
    # 6 tokens: a row of 32 in, a row out, 4 bytes each, and an 8-byte id: 6 * (256 + 8)
    assert embedding_bytes(6, 32, 4) == 1584


def test_cache_append():
    # K and V of 2 kv heads x 8, float32, one row of the batch
    assert cache_append_bytes(1, 1, HEADS, 4) == 2 * 4 * 1 * 2 * 16  # the new row in, the new row out


def test_fused_attention_reads_k_and_v_once_per_kv_head_in_decode():
    # q and out: 4 * 8 * 2; K and V: 2 kv heads * 100 * 16, one pass
    assert fused_attention_bytes(1, 1, 100, HEADS, 4) == 4 * (64 + 3200)


def test_fused_attention_passes():
    # 32 KiB on chip / 4 bytes = 8192 elements; block = 8192 / 16 = 512 rows; 2 heads a group * 1024 = 2048 rows: 4 passes,
    # causal share (1 + 1/4) / 2 = 0.625 of 4 passes * 2 heads * 1024 * 16
    expected = 4 * (4 * 1024 * 16 + int(4 * 0.625 * 2 * 1024 * 16))
    assert fused_attention_bytes(1, 1024, 1024, HEADS, 4, on_chip_bytes=32 * 1024) == expected


def test_fused_attention_under_a_window_reads_the_window_and_a_block_a_pass():
    # As above: 4 passes over 1024 queries of 2 heads a group, each over a window of 100 and its own 512 / 2 = 256 tokens.
    sliding = replace(HEADS, window=100)
    assert fused_attention_bytes(1, 1024, 1024, sliding, 4, on_chip_bytes=32 * 1024) == 4 * (4 * 1024 * 16 + 4 * 2 * 356 * 16)
    # A window wider than the prompt changes nothing.
    wide = replace(HEADS, window=5000)
    assert fused_attention_bytes(1, 1024, 1024, wide, 4) == fused_attention_bytes(1, 1024, 1024, HEADS, 4)


def test_experts_count_what_was_hit():
    model = random_qwen_moe()
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(1))
    hit = prof.trace.table("routing").query("tokens > 0")
    assert len(hit) == 3 * 2  # 3 layers, top 2, one token
    an_expert = 4 * (1 * (32 + 48) + 32 * 48 + 1 * (24 + 32) + 24 * 32)
    moved = prof.trace.bytes(by="component").set_index("component")["bytes"]
    assert moved["experts"] == 6 * an_expert
