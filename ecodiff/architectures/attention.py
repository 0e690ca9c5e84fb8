"""Attention heads: how diffusers builds its attentions, by structure and not by the model's name."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..units import Attribute, PruneGroup, Slot, units
from .registry import Layer, adapter

# Attention by the names of its Linears, of image and of text: those that give queries (and gates on
# the output, as wide), keys and values; those that give several of them at once, stacked; and those
# that read the heads' outputs.
QUERIES = ("to_q", "add_q_proj", "to_q_t", "to_query", "to_gate", "q_img")

KEYS_AND_VALUES = (
    *("to_k", "to_v", "add_k_proj", "add_v_proj", "to_k_t", "to_v_t", "to_key", "to_value"),
    *("k_img", "v_img"),
)

STACKED = {"img_qkv_proj": 3, "txt_kv_proj": 2, "img_attn_qkv": 3, "txt_attn_qkv": 3}  # PRX, JoyImage

VALUES = ("to_v", "add_v_proj", "to_v_t", "to_value", "v_img")

# Processors that compare queries and keys as they are, without rotary positions, and the Linears of both.
UNROTATED = {
    *("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"),
    *("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "JointAttnProcessor2_0", "SanaAttnProcessor2_0"),
}

COMPARED_QUERIES, COMPARED_KEYS = ("to_q", "add_q_proj"), ("to_k", "add_k_proj")

OUTPUTS = ("to_out", "to_add_out", "to_out_t", "out_layer", "img_attn_proj", "txt_attn_proj")

QUERY_NORMS = ("norm_q", "norm_added_q", "q_norm", "q_rms_norm", "q_rms_norm_t")

KEY_NORMS = ("norm_k", "norm_added_k", "k_norm", "k_rms_norm", "k_rms_norm_t")

HEAD_COUNTS = ("heads", "num_heads")

# Heads that are left alone: AnyFlow's cache of frames has as many of them as its config says.
NOT_HEADS = ("AnyFlowCausal",)


@adapter
def attention(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Heads of an attention with output Linears of its own."""
    outputs = linears(module, OUTPUTS)
    if outputs and not _processor(module).startswith("LuminaAttn"):  # two share one: summed_attentions
        consumers = [f"{path}.{name}" for name in outputs]
        yield from _with_directions(module, _heads(path, module, consumers, min(outputs.values())))


def linears(module: Layer, names: Iterable[str]) -> dict[str, int]:
    """Those of `names` that are Linears (or lists that begin with one), and what they read."""
    found = {}
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.ModuleList) and len(child):
            name, child = f"{name}.0", child[0]
        if isinstance(child, nn.Linear):
            found[name] = child.in_features
    return found


def _with_directions(module: Layer, heads: Iterable[PruneGroup]) -> Iterator[PruneGroup]:
    """The heads of an attention, and directions inside them."""
    for group in heads:
        yield group
        if "__class__" not in type(module).forward.__code__.co_freevars:  # `Through` has no super()
            yield from _values(module, group)
            yield from _queries(module, group)


def _values(module: Layer, heads: PruneGroup) -> Iterator[PruneGroup]:
    """Directions of what each head gives.

    Attention is linear in its values, and no norm or rotation touches them: it gives the same in any basis
    of a head's values that the columns which read them are turned back from. A direction that is gone is a
    row of the value Linears and a column of the output Linears; what is between sees a zero in its place
    (`ecodiff_sliced_v1.Through`).
    """
    producers = _named(heads, VALUES)
    if not producers or isinstance(getattr(module, "to_gate", None), nn.Linear):  # by feature
        return
    width = producers[0].index.shape[1]
    shared = heads.consumers[0].index.view(heads.size, -1, width).transpose(1, 2).flatten(0, 1)
    yield PruneGroup(
        name=f"{heads.name}.values",
        kind="value_directions",
        size=heads.size * width,
        consumers=tuple(Slot(slot.module, "in", shared) for slot in heads.consumers),
        producers=tuple(Slot(slot.module, "out", units(heads.size * width)) for slot in producers),
        inside=heads.name,
        width=width,
    )


def _queries(module: Layer, heads: PruneGroup) -> Iterator[PruneGroup]:
    """Directions of what each head compares.

    Of queries and keys only products are read, q . k = (Z q) . (Y^T k) if Z^T Y^T = 1: a direction that is
    gone is a row of both. Not where a norm or a rotation stands between.
    """
    queries, keys = _named(heads, COMPARED_QUERIES), _named(heads, COMPARED_KEYS)
    norms = [getattr(module, name, None) for name in (*QUERY_NORMS, *KEY_NORMS)]
    if _processor(module) not in UNROTATED or not queries or not keys or any(norms):
        return
    width = keys[0].index.shape[1]
    if any(slot.index.shape[1] != width for slot in queries):
        return
    own = units(heads.size * width)
    yield PruneGroup(
        name=f"{heads.name}.queries",
        kind="query_directions",
        size=heads.size * width,
        consumers=tuple(Slot(slot.module, "out", own) for slot in keys),
        producers=tuple(Slot(slot.module, "out", own) for slot in queries),
        inside=heads.name,
        width=width,
    )


def _named(group: PruneGroup, names: Iterable[str]) -> list[Slot]:
    """Producers whose modules have one of `names`."""
    return [slot for slot in group.producers if slot.module.rpartition(".")[2] in names]


def _heads(path: str, module: Layer, consumers: list[str], width: int) -> Iterator[PruneGroup]:
    """Heads of an attention whose output is the first `width` columns that `consumers` read."""
    heads = next((getattr(module, name) for name in HEAD_COUNTS if hasattr(module, name)), 0)
    if not isinstance(heads, int) or heads < 1 or width % heads or _fused(module):
        return
    if hasattr(module, "partly"):  # cut inside its heads, each to a width of its own
        return
    if _processor(module).startswith(NOT_HEADS):
        return
    stacked = linears(module, STACKED)
    queries, keys = linears(module, QUERIES), linears(module, KEYS_AND_VALUES)
    rows = {name: getattr(module, name).out_features for name in (*queries, *keys, *stacked)}
    kv_width = min((rows[name] for name in keys), default=width)
    if not (stacked or (queries and keys)) or width % kv_width or kv_width % (width // heads):
        return
    if any(rows[n] != width for n in queries) or any(rows[n] != kv_width for n in keys):
        return
    if any(rows[name] != STACKED[name] * width for name in stacked):
        return
    # Grouped-query attention: a unit is a key-value head with the query heads that read it.
    head, size = width // heads, kv_width * heads // width
    each = heads // size
    q_index, kv_index = units(size, each * head), units(size, head)
    norms: list[Any] = [*_norms(path, module, QUERY_NORMS, head, q_index)]
    norms += _norms(path, module, KEY_NORMS, head, kv_index)
    if None in norms:
        return
    producers = [Slot(f"{path}.{name}", "out", q_index) for name in queries]
    producers += [Slot(f"{path}.{name}", "out", kv_index) for name in keys]
    producers += [Slot(f"{path}.{n}", "out", units(heads, head, STACKED[n])) for n in stacked]
    if isinstance(getattr(module, "to_gate_logits", None), nn.Linear):  # LTX-2: a gate a head
        producers.append(Slot(f"{path}.to_gate_logits", "out", units(heads)))
    if getattr(module, "history_scale_mode", "") == "per_head":  # Helios
        producers.append(Slot(path, "out", units(heads), bare=("history_key_scale", 0)))
    per_unit = {
        "heads": each,
        "num_heads": each,
        "sliceable_head_dim": each,
        "num_kv_heads": 1,
        "kv_heads": 1,
    }
    per_unit |= {"inner_dim": each * head, "inner_kv_dim": head, "kv_inner_dim": head}
    if _processor(module).startswith(("OmniGen", "CosmosAttnProcessor2_5")):
        per_unit["out_dim"] = each * head
    yield PruneGroup(
        name=path,
        kind="heads",
        size=size,
        consumers=tuple(Slot(name, "in", q_index) for name in consumers),
        producers=tuple(producers),
        attributes=tuple(
            Attribute(path, n, value)
            for n, value in per_unit.items()
            if getattr(module, n, 0) == size * value
        ),
        norms=tuple(norms),
        rope_by_head=type(module).__name__.startswith(("LTXAttention", "LTX2Attention", "MochiAttention")),
    )


def _processor(module: Layer) -> str:
    return type(getattr(module, "processor", None)).__name__


def _fused(module: Layer) -> bool:
    return bool(getattr(module, "fused_projections", False))


def _norms(path: str, module: Layer, names: Iterable[str], head: int, index) -> Iterator[Slot | None]:
    """Norms of queries or keys that run across heads; None for one that ecodiff cannot follow."""
    for name in names:
        norm = getattr(module, name, None)
        weight = getattr(norm, "weight", None)
        shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))  # diffusers' RMSNorm: dim
        wide = shape[-1] if isinstance(shape, tuple) and shape else head
        if norm is None or (wide if weight is None else weight.numel()) == head:
            continue  # a head at a time: the same weights for all
        follows = type(norm) is nn.LayerNorm or (
            "RMS" in type(norm).__name__ and getattr(norm, "bias", None) is None
        )
        fits = weight is not None and weight.numel() == index.numel()
        yield Slot(f"{path}.{name}", "out", index) if follows and fits else None


@adapter
def summed_attentions(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Lumina-Next: one Linear reads the sum of two attentions' heads, of which one is scaled by head."""
    first: Any
    second: Any
    first, second, scale = (getattr(module, name, None) for name in ("attn1", "attn2", "gate"))
    if not _processor(first).startswith("LuminaAttn") or not isinstance(scale, nn.Parameter):
        return
    width = second.to_out[0].in_features
    out = [f"{path}.attn2.to_out.0"]
    pair = [g for n, m in (("attn1", first), ("attn2", second)) for g in _heads(f"{path}.{n}", m, out, width)]
    if len(pair) != 2 or pair[0].size != pair[1].size:
        return
    gate = Slot(path, "out", units(pair[0].size, len(scale) // pair[0].size), bare=("gate", 0))
    yield replace(
        pair[1],
        producers=(*pair[0].producers, *pair[1].producers, gate),
        norms=pair[0].norms + pair[1].norms,
        attributes=pair[0].attributes + pair[1].attributes,
        least=1,
    )


@adapter
def parallel_attention(path: str, module: Layer) -> Iterator[PruneGroup]:
    """FLUX.2's single blocks: one Linear gives q, k, v and the gated MLP, another reads both."""
    fused, out = getattr(module, "to_qkv_mlp_proj", None), getattr(module, "to_out", None)
    if not isinstance(fused, nn.Linear) or not isinstance(out, nn.Linear):
        return
    heads, inner, hidden = module.heads, module.inner_dim, module.mlp_hidden_dim
    copies = module.mlp_mult_factor
    if not heads or fused.out_features != 3 * inner + copies * hidden or out.in_features != inner + hidden:
        return
    yield PruneGroup(
        name=path,
        kind="heads",
        size=heads,
        consumers=(Slot(f"{path}.to_out", "in", units(heads, inner // heads)),),
        producers=(Slot(f"{path}.to_qkv_mlp_proj", "out", units(heads, inner // heads, copies=3)),),
        attributes=(Attribute(path, "heads", 1), Attribute(path, "inner_dim", inner // heads)),
    )
    yield PruneGroup(
        name=f"{path}.mlp",
        kind="ffn",
        size=hidden,
        consumers=(Slot(f"{path}.to_out", "in", units(hidden) + inner),),
        producers=(Slot(f"{path}.to_qkv_mlp_proj", "out", units(hidden, copies=copies) + 3 * inner),),
        attributes=(Attribute(path, "mlp_hidden_dim", 1),),
    )


@adapter
def single_stream(path: str, module: Layer) -> Iterator[PruneGroup]:
    """FLUX's single blocks: proj_out reads the attention and the MLP (gated, in Ovis) side by side."""
    attn, mlp, out = (getattr(module, name, None) for name in ("attn", "proj_mlp", "proj_out"))
    if attn is None or not isinstance(mlp, nn.Linear) or not isinstance(out, nn.Linear):
        return
    inner = getattr(getattr(attn, "to_v" if hasattr(attn, "partly") else "to_q", None), "out_features", 0)
    hidden = out.in_features - inner
    if not inner or mlp.out_features not in (hidden, 2 * hidden):
        return
    yield from _with_directions(attn, _heads(f"{path}.attn", attn, [f"{path}.proj_out"], inner))
    if not hidden:  # it was emptied
        return
    yield PruneGroup(
        name=f"{path}.proj_mlp",
        kind="ffn",
        size=hidden,
        consumers=(Slot(f"{path}.proj_out", "in", units(hidden) + inner),),
        producers=(Slot(f"{path}.proj_mlp", "out", units(hidden, copies=mlp.out_features // hidden)),),
        attributes=(Attribute(path, "mlp_hidden_dim", 1),) if hasattr(module, "mlp_hidden_dim") else (),
    )
