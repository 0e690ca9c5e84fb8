"""Attention heads of text encoders: how transformers builds its attentions, by structure."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..units import Attribute, PruneGroup, Slot, units
from .registry import Layer, adapter


@adapter
def projected_attention(path: str, module: Layer) -> Iterator[PruneGroup]:
    """CLIP, Gemma, Llama, Mistral and Qwen: q_proj, k_proj, v_proj, and o_proj or out_proj.

    Their code counts heads by the width of a head, so only the weights shrink. With fewer key-value heads
    than queries, a unit is one of them with the query heads that read it.
    """
    names = ("q_proj", "k_proj", "v_proj")
    linears: list[Any] = [getattr(module, name, None) for name in names]
    out = next((n for n in ("o_proj", "out_proj") if isinstance(getattr(module, n, None), nn.Linear)), None)
    head = getattr(module, "head_dim", 0)
    if out is None or not all(isinstance(linear, nn.Linear) for linear in linears) or not head:
        return
    width, kv_width = linears[0].out_features, linears[1].out_features
    if kv_width % head or width % kv_width or getattr(module, out).in_features != width:
        return
    norms: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if any(norm is not None and norm.weight.numel() != head for norm in norms):
        return  # means across heads
    size, each = kv_width // head, width // kv_width
    index, kv_index = units(size, each * head), units(size, head)
    counts = {"num_heads": each, "num_key_value_heads": 1}
    yield PruneGroup(
        name=path,
        kind="heads",
        size=size,
        consumers=(Slot(f"{path}.{out}", "in", index),),
        producers=tuple(
            Slot(f"{path}.{n}", "out", i) for n, i in zip(names, (index, kv_index, kv_index), strict=True)
        ),
        attributes=tuple(
            Attribute(path, n, value) for n, value in counts.items() if getattr(module, n, 0) == size * value
        ),
        least=1,
    )


@adapter
def t5_attention(path: str, module: Layer) -> Iterator[PruneGroup]:
    """T5 and UMT5: a learned bias for each head and distance, which T5's layers share and UMT5's do not."""
    linears: list[Any] = [getattr(module, name, None) for name in "qkvo"]
    head = getattr(module, "key_value_proj_dim", 0)
    if not head or not all(isinstance(linear, nn.Linear) for linear in linears):
        return
    width = linears[3].in_features
    if width % head or any(linear.out_features != width for linear in linears[:3]):
        return
    size = width // head
    producers = [Slot(f"{path}.{name}", "out", units(size, head)) for name in "qkv"]
    shared = "position_bias" in inspect.signature(type(module).forward).parameters
    if not shared and hasattr(module, "relative_attention_bias"):
        bias = Slot(f"{path}.relative_attention_bias", "out", units(size), bare=("weight", 1))
        producers.append(bias)
    yield PruneGroup(
        name=path,
        kind="heads",
        size=size,
        consumers=(Slot(f"{path}.o", "in", units(size, head)),),
        producers=tuple(producers),
        attributes=(Attribute(path, "n_heads", 1), Attribute(path, "inner_dim", head)),
        least=1,
        bias_by_head=shared,
    )
