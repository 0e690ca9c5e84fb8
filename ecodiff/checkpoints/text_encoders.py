"""Text encoders of a model without their weights: to check and to count what a plan cuts of them."""

from typing import Any

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .. import catalog
from ..architectures import find_groups, unit_parameters
from ..errors import PlanError
from ..pruning.plan import PrunePlan
from ..pruning.slicing import check
from .index import model_index
from .sign_in import NETWORK_ERRORS, hub_token, unreachable
from .single_file import base_of, is_single_file


def empty_text_encoders(model: str) -> dict[str, nn.Module]:
    """All text encoders of a model by component, on the meta device; none that is not transformers' own.

    Raises:
        ModelNotFoundError, CheckpointError: the model cannot be had.
    """
    known = catalog.find(model)
    source = catalog.find(known.lora_of or known).source
    source = base_of(source) if is_single_file(source) else source
    found: dict[str, nn.Module] = {}
    for name, entry in model_index(source).items():
        cls: Any = getattr(transformers, str(entry[1]), None) if isinstance(entry, list) else None
        if not name.startswith("text_encoder") or not isinstance(cls, type):
            continue
        if not issubclass(cls, PreTrainedModel):
            continue
        try:
            config = AutoConfig.from_pretrained(source, subfolder=name, token=hub_token())
        except (HfHubHTTPError, OSError, ValueError, *NETWORK_ERRORS):
            raise unreachable(source) from None
        with torch.device("meta"):
            found[name] = cls(config)
    return found


def counted(plan: PrunePlan, model: str) -> dict[str, int]:
    """Parameters of a model's text encoders, and what `plan` leaves of them.

    Raises:
        PlanError: the plan cuts text encoders that the model does not have, or of other sizes.
        ModelNotFoundError, CheckpointError: the model cannot be had.
    """
    encoders, gone = empty_text_encoders(model), 0
    for name in plan.text_encoders:
        if name not in encoders:
            raise PlanError(f"This plan cuts a {name}, which {model} does not have.")
        part = plan.part(name)
        check(part, encoders[name])
        groups = [group for group in find_groups(encoders[name]) if group.name in part]
        gone += sum(unit_parameters(encoders[name], g) * int((~part[g.name]).sum()) for g in groups)
    dense = sum(p.numel() for encoder in encoders.values() for p in encoder.parameters())
    return {"params_dense": dense, "params_pruned": dense - gone}
