"""Writing LoRAs that fit a pruned model: translated ones, and those that were trained on it."""

from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import CheckpointError
from ..pipelines import denoiser_name, denoiser_of
from ..pruning.plan import PrunePlan
from ..pruning.slicing import kept_features
from ..storage import write_tensors
from .dora import SUFFIX
from .lora import DIGEST, cut_groups, scale
from .lora_names import in_whole_heads, kohya

NAMINGS = {
    "diffusers": "for diffusers: pipe.load_lora_weights",
    "kohya": "for ComfyUI, with ecodiff's node, and other tools that read kohya's names",
}


def save_lora(
    tensors: dict[str, Tensor],
    path: str | Path,
    plan: PrunePlan,
    naming: str = "diffusers",
    dense: nn.Module | None = None,
) -> Path:
    """Write a LoRA that fits the model that `plan` cut: safetensors, with the plan's digest in its header.

    Args:
        tensors: of `translate_lora`, or of a LoRA that was trained on the pruned model.
        naming: one of `NAMINGS`; of text encoders kohya's are written for CLIP only.
        dense: the dense denoiser (on the meta device will do), for other namings than diffusers'.

    Raises:
        CheckpointError: it cannot be written, or there is no such naming.
    """
    if naming not in NAMINGS:
        raise CheckpointError(f"There is no naming {naming!r}. Namings: {', '.join(NAMINGS)}.")
    if naming == "kohya" and any(key.endswith(SUFFIX) for key in tensors):
        raise CheckpointError(
            "Tools that read kohya's names do not agree on how a DoRA is computed. Write it for diffusers."
        )
    if naming == "kohya":
        assert dense is not None, "kohya's names need the dense model"
        component = "unet" if hasattr(dense, "down_blocks") else "transformer"
        outer = kept_features(dense, {g.name: plan[g.name] for g in cut_groups(dense, plan) if not g.inside})
        widths = {}
        for name, layer in dense.named_modules():
            if isinstance(weight := getattr(layer, "weight", None), Tensor):
                rows = outer.get((name, "out"))
                widths[name] = len(weight) if rows is None else int(rows.sum())
        tensors = in_whole_heads(tensors, component, kept_features(dense, plan), outer)
        tensors = kohya(tensors, component, dense, widths)
    return write_tensors(path, tensors, {"format": "pt", DIGEST: plan.digest})


def trained_lora(pipe: DiffusionPipeline, adapter: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter that was trained on a pruned pipeline's denoiser, for `save_lora`."""
    from peft import get_peft_model_state_dict

    denoiser, prefix = denoiser_of(pipe), denoiser_name(pipe)
    settings = vars(denoiser.peft_config[adapter])
    found = {}
    for key, value in get_peft_model_state_dict(denoiser, adapter_name=adapter).items():
        if key.endswith(".lora_B.weight"):
            layer = key.removesuffix(".lora_B.weight")
            value = value * scale(f"{prefix}.{layer}", value.shape[1], {}, settings)
        found[f"{prefix}.{key}"] = value.detach().float().cpu().contiguous()
    return found
