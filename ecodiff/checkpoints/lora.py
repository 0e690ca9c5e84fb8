"""LoRAs of the dense model, cut to fit a pruned one.

A LoRA adds B A to a weight. Slicing takes rows and columns of the weight away, so the same rows of B and
columns of A go: the translated LoRA on the pruned model is the LoRA on the dense one, fused and pruned.
"""

import inspect
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor, nn

from ..architectures import find_groups
from ..errors import CheckpointError, PlanError
from ..pipelines import DENOISERS, denoiser_name, denoiser_of
from ..pruning.components import plan_of_pipeline
from ..pruning.heads import parts, turned
from ..pruning.plan import PrunePlan
from ..pruning.slicing import kept_features
from ..storage import check_header, reading
from ..units import ALL_KINDS, PruneGroup
from .dora import SUFFIX, is_dora, magnitudes, norms, taken_out
from .loading import empty_denoiser, load
from .lora_encoders import cut_encoders
from .lora_names import Names, translated

MAX_FILE_BYTES = 4 << 30

DIGEST = "ecodiff.plan"  # in a file's header: the plan of the model that the LoRA fits


@dataclass
class LoraReport:
    """What became of a LoRA. Names are of the denoiser's modules."""

    cut: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # name: why
    others: int = 0  # tensors of text encoders, cut where those are pruned

    def words(self) -> str:
        """One line for people."""
        parts = [f"{len(self.cut)} layers cut to fit", f"{len(self.unchanged)} as they were"]
        if self.dropped:
            reasons = sorted(set(self.dropped.values()))
            parts.append(f"{len(self.dropped)} dropped ({'; '.join(reasons)})")
        if self.others:
            parts.append(f"{self.others} tensors of text encoders taken over")
        return ", ".join(parts)


def translate_lora(
    lora: str | Path, pipe: DiffusionPipeline, plan: PrunePlan | None = None, dense=None
) -> tuple[dict[str, Tensor], LoraReport]:
    """A LoRA for the dense model as one for the pruned model.

    Args:
        lora: a safetensors file in diffusers', PEFT's or kohya's naming.
        pipe: the pruned pipeline, or the dense one if `plan` is given.
        plan: what is kept; None: as `pipe` was cut.
        dense: the dense denoiser (on the meta device will do); None: that of the model that the plan
            names, or of `pipe` if it is dense.

    Returns:
        tensors in PEFT's naming, for `pipe.load_lora_weights`, scales folded in; and what was done.

    Raises:
        CheckpointError: not a LoRA in safetensors.
        PlanError: the LoRA is for another model.

    Example:
        >>> tensors, report = ecodiff.translate_lora("pixel-art.safetensors", small)
        >>> small.load_lora_weights(tensors)
    """
    cut_by = plan_of_pipeline(pipe)
    plan = plan or cut_by
    if plan is None:
        raise PlanError("This pipeline is not pruned: it takes the LoRA as it is.")
    named = plan.metadata.get("model", "")
    if dense is None:
        dense = empty_denoiser(named) if cut_by else denoiser_of(pipe)
    small = denoiser_of(pipe) if cut_by else None
    if small is not None and is_dora(lora) and next(dense.parameters()).is_meta:
        dense = denoiser_of(load(named))  # norms of its weights are needed
    return translate(lora, type(pipe), denoiser_name(pipe), plan, dense, small)


def translate(
    lora: str | Path,
    pipeline: type,
    name: str,
    plan: PrunePlan,
    dense: nn.Module,
    small: nn.Module | None = None,
) -> tuple[dict[str, Tensor], LoraReport]:
    """`translate_lora` without a pipeline: of its class, whose component `name` is like `dense`.

    Args:
        small: the pruned denoiser with its weights, which a DoRA needs, and those of `dense`.
    """
    name = name if name in DENOISERS else "transformer"  # files call a second one like the first
    tensors, lost, lengths = _read(Path(lora), pipeline, name, plan, dense)
    if lengths and small is None:
        raise CheckpointError(
            f"{Path(lora).name} is a DoRA: cutting it takes the weights of both models. Do it with "
            "`python -m ecodiff lora`, on the pruned model's folder."
        )
    cut, modules = _Cut(dense, plan), dict(dense.named_modules())
    flux = hasattr(pipeline, "_maybe_expand_transformer_param_shape_or_error_")
    found, report = {}, LoraReport(dropped=lost)
    for path in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors if key.startswith(name + ".")):
        down, up = (tensors.get(f"{path}.lora_{side}.weight") for side in "AB")
        layer = path.removeprefix(name + ".")
        weight = _checked(layer, modules.get(layer), down, up)
        assert down is not None and up is not None
        if layer in cut.scattered and flux:
            report.dropped[layer] = "FLUX takes none on rows of modulation"
        elif cut.emptied(layer):
            report.dropped[layer] = "nothing of the layer is left"
        elif lengths and (layer in cut.scattered or cut.rows_turned(layer)):
            report.dropped[layer] = "a DoRA's rows are no rows of this pruned layer any more"
        else:
            (report.cut if cut.changes(layer) else report.unchanged).append(layer)
            a, b = cut.pair(layer, down, up)
            found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = a.contiguous(), b.contiguous()
            if lengths and small is not None:
                gains = torch.ones(len(weight))
                if layer in lengths:
                    gains = lengths[layer] / norms(weight, down, up)
                gains = gains[cut.rows(layer, "out", len(gains))]
                found[f"{path}{SUFFIX}"] = magnitudes(small.get_submodule(layer), gains, a, b)
    others = {key: value for key, value in tensors.items() if not key.startswith(name + ".")}
    others, also = cut_encoders(others, plan)
    report.cut += also
    report.others = len(others)
    if not found:
        raise CheckpointError("There is nothing in this LoRA for the part of the model that was pruned.")
    return found | others, report


def _checked(layer: str, module: nn.Module | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """The weight of the layer that a pair changes. Raises PlanError if the pair is of another model."""
    if down is None or up is None or module is None:
        raise PlanError(f"The LoRA changes {layer!r}, which this model does not have, or only half of it.")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise PlanError(f"The LoRA changes {layer!r}, which is no layer with a matrix.")
    if down.shape[1] != weight.shape[1] or up.shape[0] != weight.shape[0]:
        raise PlanError(
            f"The LoRA is for another model: {layer} is {tuple(weight.shape)} here, and the LoRA's "
            f"{up.shape[0]} x {down.shape[1]}."
        )
    return weight


class _Cut:
    """How a plan cuts the layers of a denoiser: rows, columns, and other bases of what they read and give.

    Attributes:
        scattered: layers whose output keeps its width, zeros in place of rows that are gone.
    """

    def __init__(self, dense: nn.Module, plan: PrunePlan):
        groups = cut_groups(dense, plan)
        self._kept = kept_features(dense, plan)
        self.scattered = {slot.module for group in groups for slot in group.slots if slot.scattered}
        directed = [group for group in groups if group.activations]
        self._lifts = {slot.module: plan.basis(g.name)[1] for g in directed for slot in g.consumers}
        self._turns: dict[str, list] = {}
        for group in (g for g in groups if g.inside):
            z, y = parts(group, plan)
            for slot in group.slots:
                turn = (slot.axis, slot.index, z if slot in group.producers else y)
                self._turns.setdefault(slot.module, []).append(turn)

    def rows(self, layer: str, axis: str, size: int) -> Tensor:
        """Features that stay, (size,) bool."""
        kept = self._kept.get((layer, axis))
        return torch.ones(size, dtype=torch.bool) if kept is None else kept

    def emptied(self, layer: str) -> bool:
        return any(
            (layer, axis) in self._kept and not self._kept[layer, axis].any() for axis in ("in", "out")
        )

    def rows_turned(self, layer: str) -> bool:
        return any(axis == "out" for axis, *_ in self._turns.get(layer, ()))

    def changes(self, layer: str) -> bool:
        sides = [self._kept[layer, axis] for axis in ("in", "out") if (layer, axis) in self._kept]
        return layer in self._lifts or not all(bool(kept.all()) for kept in sides)

    def pair(self, layer: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the pruned layer."""
        for axis, index, part in self._turns.get(layer, ()):
            if axis == "in":
                down = turned(down.T, index, part).T
            else:
                up = turned(up, index, part)
        down = down[:, self.rows(layer, "in", down.shape[1])]
        if layer in self._lifts:  # B A s, s = Y z
            down = down @ self._lifts[layer].to(down)
        outputs = self.rows(layer, "out", len(up))
        if layer in self.scattered:
            return down, up * outputs.to(up)[:, None]
        return down, up[outputs]


def _read(
    path: Path, pipeline: type, name: str, plan: PrunePlan, dense: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """A LoRA's tensors in float32 under the names that diffusers gives them, scales folded into B; layers
    that diffusers does not take, with the reason; and a DoRA's magnitudes by layer."""
    if path.suffix != ".safetensors" or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path.name} is not a LoRA in a .safetensors file of at most 4 GiB.")
    loader = getattr(pipeline, "lora_state_dict", None)
    if loader is None:
        raise PlanError(f"{pipeline.__name__} does not load LoRAs.")
    check_header(path, most_bytes=16 << 20)
    with reading(path.name):
        stored, header = _stored(path, name)
        if (made_for := header.get(DIGEST)) is not None:
            fits = "It fits this model as it is." if made_for == plan.digest else "It fits no other size."
            raise PlanError(f"{path.name} was made on a pruned model already. {fits}")
        lengths, stored, dropped = taken_out(stored, Names(name, dense))
        pairs, rest = translated(stored, Names(name, dense))
        third = {key for key in rest if key.startswith(("lora_te3_", "text_encoder_3."))}
        lost = dropped | dict.fromkeys(map(_layer, third), "diffusers loads none on the third text encoder")
        rest = {key: tensor for key, tensor in rest.items() if key not in third}
        known = inspect.signature(loader).parameters
        options = {"return_alphas": True} if "return_alphas" in known else {}
        read = loader(rest, unet_config=dense.config, **options) if rest else ({}, None)
        read = read if isinstance(read, tuple) else (read, None)
        tensors, alphas = read[0] | pairs, _alphas(read[1] or {})
        settings = _settings(header)
        own = {key.removeprefix(name + "."): v for key, v in tensors.items() if key.startswith(name + ".")}
        own = {f"{name}.{key}": v for key, v in _peft_names(own).items()}
        others = {key: v for key, v in tensors.items() if not key.startswith(name + ".")}
        for key in own:
            if not isinstance(own[key], Tensor) or own[key].ndim < 2:
                raise CheckpointError(f"{path.name} holds something else than pairs of matrices.")
        for found in (own, others):
            for key in found:
                if key.endswith((".lora_B.weight", ".up.weight")):
                    found[key] = found[key] * scale(_layer(key), found[key].shape[1], alphas, settings)
        return own | others, lost, lengths


def _stored(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32, and the header; names as diffusers' reader knows them."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        stored = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    if wrong := [key for key, tensor in stored.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path.name} holds values that are not numbers, in {wrong[0]!r:.100}.")
    peft = "base_model.model."  # of PEFT's own save_pretrained
    return {
        f"{name}.{key.removeprefix(peft)}" if key.startswith(peft) else key: tensor
        for key, tensor in stored.items()
    }, header


def _layer(key: str) -> str:
    """The layer that a name of a LoRA's tensor or alpha is about, with its component."""
    return re.split(r"\.lora|\.alpha$", key)[0]


def _alphas(found: dict) -> dict[str, float]:
    names = dict(zip(_peft_names(found), found.values(), strict=True))
    return {_layer(key): float(value) for key, value in names.items()}


def _settings(header: dict[str, str]) -> dict:
    """What PEFT's settings in a file's header say, {component.setting: value}."""
    text = header.get("lora_adapter_metadata")
    found = json.loads(text) if text else {}
    if not isinstance(found, dict):
        raise CheckpointError("The settings in its header are no settings.")
    return found


def _peft_names(tensors: dict) -> dict:
    old = any("lora_A" not in key and "lora_B" not in key for key in tensors)
    return convert_unet_state_dict_to_peft(tensors) if old else tensors


def scale(layer: str, rank: int, alphas: dict[str, float], settings: dict) -> float:
    """alpha / rank, from wherever the file says it; 1 if it does not."""
    if layer in alphas:
        return alphas[layer] / rank
    component, _, path = layer.partition(".")
    own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
    if "lora_alpha" not in own:
        return 1.0
    alpha = (own.get("alpha_pattern") or {}).get(path, own["lora_alpha"])
    return float(alpha) / (rank**0.5 if own.get("use_rslora") else rank)


def cut_groups(dense: nn.Module, plan: PrunePlan) -> list[PruneGroup]:
    """Groups that lose units."""
    return [g for g in find_groups(dense, ALL_KINDS) if g.name in plan and not plan[g.name].all()]
