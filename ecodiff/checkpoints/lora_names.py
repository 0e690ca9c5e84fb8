"""The namings that LoRAs come in, and their other factorisations, as pairs of matrices of diffusers' layers.

kohya (`lora_unet_...`), the original authors' layers (`double_blocks.0.img_attn.qkv`, `input_blocks.1.1...`),
PEFT's and ComfyUI's prefixes (`base_model.model.`, `diffusion_model.`), OneTrainer's (`lora_transformer_...`)
and LyCORIS' (`lycoris_...`, LoHa, LoKr). What is not known here is left as it is, for diffusers' own readers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, PlanError
from .comfyui.layouts import layout_of

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
PARTS = {
    "lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b", "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b",
    "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b",
}  # fmt: skip
ENDINGS = (".weight", ".default.weight", "")


class Names:
    """Finds a denoiser's layer by any of its names."""

    def __init__(self, component: str, denoiser: nn.Module):
        self.component, self.modules = component, dict(denoiser.named_modules())
        layout = layout_of(denoiser)
        original = layout.layers(denoiser) if layout else {}
        swapped = layout.swapped(denoiser) if layout else ()
        self._swapped = {name.replace(".", "_") for name in swapped}
        own = {path: [path] for path in self.modules if path}
        self._known = original | own
        # Underscored names are unambiguous in all of diffusers' denoisers.
        self._known |= {name.replace(".", "_"): layers for name, layers in self._known.items()}

    def layers(self, name: str) -> list[str] | None:
        """diffusers' layers that a name in a LoRA means; None: it is not known."""
        name = self._plain(name)
        return self._known.get(name) or self._known.get(f"{name}.0" if name.endswith("to_out") else "")

    def swapped(self, name: str) -> bool:
        """Whether shift and scale of a layer change places on the way to diffusers."""
        return self._plain(name).replace(".", "_") in self._swapped

    def _plain(self, name: str) -> str:
        for prefix in (*PREFIXES, f"{self.component}."):
            name = name.removeprefix(prefix)
        return name.removesuffix(".lora")


def split(key: str) -> tuple[str, str] | None:
    """(name of a layer, part) of a LoRA's tensor; None: it is none that is known here."""
    for ending in ENDINGS:
        name, _, part = key.removesuffix(ending).rpartition(".") if key.endswith(ending) else ("", "", "")
        if part in PARTS and name:
            return name, PARTS[part]
    return None


def translated(stored: Mapping[str, Tensor], names: Names) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(pairs of known layers under PEFT's names, scales that the file gives folded in; the rest).

    Raises:
        CheckpointError: a factorisation that is not whole, or of a kind that is not known.
        PlanError: a layer has no weight, or another size.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in stored.items():
        found = split(key)
        if found is None or names.layers(found[0]) is None:
            rest[key] = tensor
        else:
            layers.setdefault(found[0], {})[found[1]] = tensor
    pairs = {}
    for name, parts in layers.items():
        targets = names.layers(name) or []
        if any(getattr(names.modules[layer], "weight", None) is None for layer in targets):
            raise PlanError(f"The LoRA changes {name!r:.80}, which is no layer with a matrix.")
        widths = [len(names.modules[layer].weight) for layer in targets]
        down, up = _pair(name, parts, names.modules[targets[0]])
        if len(targets) > 1 and sum(widths) != len(up):
            raise CheckpointError(f"{name!r:.80} has {len(up)} rows, and {sum(widths)} in this model.")
        if names.swapped(name):
            up = torch.cat(up.chunk(2)[::-1])
        each = up.split(widths) if len(targets) > 1 else [up]
        for layer, rows in zip(targets, each, strict=True):
            pairs[f"{names.component}.{layer}.lora_A.weight"] = down
            pairs[f"{names.component}.{layer}.lora_B.weight"] = rows
    return pairs, rest


def _pair(name: str, parts: dict[str, Tensor], module: nn.Module) -> tuple[Tensor, Tensor]:
    """Down and up of a layer, alpha / rank folded into up."""
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    kinds = {part.partition("_")[0] for part in parts if part != "alpha"}
    rank: float
    try:
        if kinds == {"hada"}:
            down, up, rank = _loha(parts)
        elif kinds == {"lokr"}:
            down, up, rank = _lokr(parts)
        elif kinds == {"A", "B"}:
            down, up, rank = parts["A"], parts["B"], len(parts["A"])
        else:
            raise KeyError("a pair")
        weight: Tensor = module.weight  # type: ignore[assignment]
        if kinds != {"A", "B"} and weight.ndim > 2:  # of a convolution, flattened
            down = down.reshape(len(down), *weight.shape[1:])
            up = up.reshape(*up.shape, *(1 for _ in weight.shape[2:]))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"The LoRA's layer {name!r:.80} is not whole ({error}).") from None
    return down, up if alpha is None else up * (alpha / rank)


def _loha(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """(A1 B1) * (A2 B2), element by element, as one product: of rank r1 r2, and exact.

    Hyeon-Woo et al. 2022 (FedPara, arXiv 2108.06098); LyCORIS calls it LoHa.
    """
    a1, b1, a2, b2 = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    up = torch.einsum("or,os->ors", a1, a2).flatten(1)
    down = torch.einsum("ri,si->rsi", b1.flatten(1), b2.flatten(1)).flatten(0, 1)
    return down, up, len(b1)


def _lokr(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """kron(w1, w2) as one product, exact (LyCORIS' LoKr, arXiv 2309.14859).

    kron(w1, a b) = kron(w1, a) kron(1, b). A second factor that is whole gives a pair of full rank.
    """

    # Where neither factor is decomposed, LyCORIS takes no scale.
    rank = float(parts["alpha"]) if "alpha" in parts else 1.0
    if "lokr_w1" in parts:
        first = parts["lokr_w1"]
    else:
        first, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], len(parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        whole = torch.kron(first, parts["lokr_w2"].flatten(1))
        return torch.eye(whole.shape[1]), whole, rank
    a, b = parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1)
    return torch.kron(torch.eye(first.shape[1]), b), torch.kron(first, a), len(b)


def in_whole_heads(
    tensors: Mapping[str, Tensor],
    component: str,
    kept: Mapping[tuple[str, str], Tensor],
    outer: Mapping[tuple[str, str], Tensor],
) -> dict[str, Tensor]:
    """A LoRA with zeros for directions that are gone inside heads, as the weights of `fill_heads_` have.

    Args:
        kept: `kept_features` of all of a plan; outer: of all but directions inside heads.
    """
    found = dict(tensors)
    for (layer, axis), both in kept.items():
        others = outer.get((layer, axis), torch.ones_like(both))
        key = f"{component}.{layer}.lora_{'A' if axis == 'in' else 'B'}.weight"
        if key in found and int(both.sum()) < int(others.sum()):
            dim, place = int(axis == "in"), (others.cumsum(0) - 1)[both]
            shape = list(found[key].shape)
            shape[dim] = int(others.sum())
            found[key] = found[key].new_zeros(shape).index_copy(dim, place, found[key])
    return found


def kohya(
    tensors: Mapping[str, Tensor], component: str, denoiser: nn.Module, widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """A LoRA in PEFT's naming as one in kohya's, which ComfyUI, A1111, Forge and diffusers read.

    A FLUX.1 layer that holds several of diffusers' gets them as one pair, their ups on its diagonal. Layers
    of CLIP text encoders are named as kohya does; what else is not of the denoiser keeps its names.

    Args:
        widths: output features of each of the pruned denoiser's layers.
    """
    layout = layout_of(denoiser) if component == "transformer" else None
    original = layout.layers(denoiser) if layout else {}
    swapped = layout.swapped(denoiser) if layout else ()
    fused = {layer: (name, olds) for name, olds in original.items() for layer in olds}
    found: dict[str, Tensor] = {}

    def put(name: str, down: Tensor, up: Tensor) -> None:
        if 0 in (len(up), *down.shape):  # of a layer that lost all its units
            return
        flat = name.replace(".", "_")
        found[f"{flat}.lora_down.weight"], found[f"{flat}.lora_up.weight"] = down, up
        found[f"{flat}.alpha"] = torch.tensor(float(len(down)))

    for key, tensor in tensors.items():
        if key.partition(".")[0] != component:
            flat, other = _of_encoder(key, denoiser)
            if not flat:
                found[key] = tensor
            elif other in tensors:
                put(flat, tensor, tensors[other])
    done = set()
    for key in tensors:
        path, _, side = key.rpartition(".lora_A")
        owner, _, layer = path.partition(".")
        if not side or owner != component:
            continue
        if layer not in fused:
            put(f"lora_unet_{layer}", tensors[key], tensors[f"{path}.lora_B.weight"])
            continue
        name, olds = fused[layer]
        if name in done:
            continue
        done.add(name)
        downs, ups = [], []
        for old in olds:
            at = f"{component}.{old}"
            down = tensors.get(f"{at}.lora_A.weight")
            ups.append(tensors[f"{at}.lora_B.weight"] if down is not None else torch.zeros(widths[old], 0))
            downs += [down] if down is not None else []
        up = torch.block_diag(*ups) if len(ups) > 1 else ups[0]
        if name in swapped:
            up = torch.cat(up.chunk(2)[::-1])
        put(f"lora_unet_{name}", torch.cat(downs), up)
    return found


_PAIR = re.compile(
    r"text_encoder(_2)?\.(?:text_model\.)?(encoder\.layers\..+?)\.(?:(?:lora|lora_linear_layer)\.)?"
    r"(lora_A|lora_B|down|up)\.weight"
)


def _of_encoder(key: str, denoiser: nn.Module) -> tuple[str, str]:
    """kohya's name of a CLIP text encoder's layer, and the key of its up, if `key` is that of its down; of
    the up only the name; ("", "") of anything else."""
    match = _PAIR.fullmatch(key)
    if match is None:
        return "", ""
    second, layer, side = match.groups()
    config: Any = getattr(denoiser, "config", None)
    alone = hasattr(denoiser, "down_blocks") and not getattr(config, "addition_embed_type", None)
    prefix = "lora_te" if alone else "lora_te2" if second else "lora_te1"
    ups = {"lora_A": "lora_B", "down": "up"}
    up = key.removesuffix(f"{side}.weight") + f"{ups[side]}.weight" if side in ups else ""
    return f"{prefix}_text_model_{layer}", up
