"""Where healing is, on disk: LoRA weights, Adam's moments and the best weights so far."""

import json
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..storage import write_tensors

STATE_FORMAT = "ecodiff.heal.1"


@dataclass
class Best:
    """The weights that came closest so far on trajectories that are not trained on.

    Attributes:
        loss: of those trajectories.
        weights: of LoRA, by name.
        losses: of the check that is going on, a number a batch.
    """

    loss: float = inf
    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def save(file: Path, key: str, step: int, parameters: dict[str, nn.Parameter], optimizer, best: Best) -> None:
    """LoRA weights, Adam's moments and the best weights so far, replaced atomically."""
    tensors = {f"weight|{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{what}|{name}": value for what, value in moments.items()}
    tensors |= {f"best|{name}": weight for name, weight in best.weights.items()}
    about = {"step": str(step), "losses": json.dumps(best.losses)}
    about |= {"best": repr(best.loss)} if best.weights else {}
    write_tensors(file, tensors, {"format": STATE_FORMAT, "key": key} | about)


def load(file: Path, key: str, parameters: dict[str, nn.Parameter], optimizer, best: Best) -> int:
    """Put the state back; returns the steps that are done."""
    header, stored = read(file, key)
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(stored[f"weight|{name}"])
            if f"step|{name}" not in stored:  # it never had a gradient
                continue
            optimizer.state[parameter] = {"step": stored[f"step|{name}"]} | {
                what: stored[f"{what}|{name}"].to(parameter.device) for what in ("exp_avg", "exp_avg_sq")
            }
        for name, parameter in parameters.items() if "best" in header else ():  # older states have none
            best.weights[name] = stored[f"best|{name}"].to(parameter.device)
        best.loss = float(header.get("best", inf))
        best.losses = [float(loss) for loss in json.loads(header.get("losses", "[]"))]
        return int(header["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The healing state in {file} cannot be read: {error}") from None


def read(file: Path, key: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file of this healing; CheckpointError if it is another's."""
    try:
        with safe_open(file, "pt") as stored:
            header, names = stored.metadata() or {}, list(stored.keys())
            if (header.get("format"), header.get("key")) != (STATE_FORMAT, key):
                raise CheckpointError(
                    f"{file} is of another model or other settings. Give another folder, or the same "
                    "settings."
                )
            return header, {name: stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The healing state in {file} cannot be read: {error}") from None
