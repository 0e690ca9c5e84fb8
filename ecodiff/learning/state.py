"""Where a run of learning is: small, on disk, and enough to continue from."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..storage import read_tensors, write_tensors

STATE_FORMAT = "ecodiff.state.1"


@dataclass
class LearnState:
    """Where a run is. `vectors` are float32 (units,) in network order."""

    step: int
    vectors: dict[str, Tensor]  # saliency, log_alpha, and Adam's moments
    multiplier: float = 0.0  # price of the expected size, in loss per parameter share
    history: list[dict] = field(default_factory=list)  # one row of plain numbers a step

    @classmethod
    def start(cls, units: int) -> "LearnState":
        names = ("saliency", "log_alpha", "mean", "square")
        return cls(0, {name: torch.zeros(units) for name in names})

    def copy(self) -> "LearnState":
        """One that can be changed without changing this."""
        vectors = {name: vector.clone() for name, vector in self.vectors.items()}
        return LearnState(self.step, vectors, self.multiplier, list(self.history))

    def save(self, path: str | Path) -> None:
        """Write the state atomically: a reader finds the old file or the new one, whole."""
        about = {"step": self.step, "multiplier": self.multiplier, "history": self.history}
        write_tensors(path, self.vectors, {"format": STATE_FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "LearnState":
        """Read a state. Raises CheckpointError if the file is not one."""
        header, vectors = read_tensors(path, STATE_FORMAT, torch.float32)
        try:
            about = json.loads(header["about"])
            return cls(about["step"], vectors, about["multiplier"], about["history"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a saved state of a run: {error}.") from None
