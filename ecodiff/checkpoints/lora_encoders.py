"""A LoRA's matrices for the layers of pruned text encoders, cut like them by names and shapes alone."""

from collections.abc import Mapping

from torch import Tensor

from ..errors import PlanError
from ..pruning.plan import PrunePlan, named_in

# By the last name of a layer: those that give units' features, and those that read them.
GIVE = ("q_proj", "k_proj", "v_proj", "q", "k", "v", "fc1", "wi", "wi_0", "wi_1", "gate_proj", "up_proj")
READ = ("out_proj", "o_proj", "o", "fc2", "wo", "down_proj")
DOWN, UP = (".lora_A.weight", ".down.weight"), (".lora_B.weight", ".up.weight")


def cut_encoders(tensors: Mapping[str, Tensor], plan: PrunePlan) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of text encoders' LoRAs, cut to fit, and the layers that were.

    Rows of B go from a layer that gives units' features, columns of A from one that reads them: each unit has
    as many as there are, divided by the number of units, side by side.

    Raises:
        PlanError: the LoRA is for another model.
    """
    # CLIP is wrapped in a `text_model`, or not, as versions of transformers have it.
    cut = {_plain(name): keep for name, keep in plan.items() if named_in(name)[0] and not keep.all()}
    found, layers = {}, []
    for key, tensor in tensors.items():
        down, up = key.endswith(DOWN), key.endswith(UP)
        path = _layer(key) if down or up else key
        group, _, last = _plain(path).rpartition(".")
        keep = cut.get(group)
        if keep is not None and (last in GIVE or last in READ):
            layers.append(path)
            dim = 1 if down and last in READ else 0 if up and last in GIVE else None
            if dim is not None and tensor.shape[dim] % len(keep):
                raise PlanError(f"The LoRA is for another model: {path} has {len(keep)} units here.")
            if dim is not None:
                features = keep.repeat_interleave(tensor.shape[dim] // len(keep))
                tensor = tensor.index_select(dim, features.nonzero().flatten()).contiguous()
        found[key] = tensor
    return found, list(dict.fromkeys(layers))


def _plain(path: str) -> str:
    return path.replace(".text_model.", ".")


def _layer(key: str) -> str:
    """The layer that a tensor is for."""
    path = key.removesuffix(".weight").rpartition(".")[0]
    return path.removesuffix(".lora_linear_layer").removesuffix(".lora")
