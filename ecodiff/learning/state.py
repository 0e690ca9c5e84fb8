"""Where a run of learning is: small, on disk, and enough to continue from."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError

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

    def save(self, path: str | Path) -> None:
        """Write the state atomically: a reader finds the old file or the new one, whole."""
        about = {"step": self.step, "multiplier": self.multiplier, "history": self.history}
        header = {"format": STATE_FORMAT, "about": json.dumps(about)}
        path = Path(path)
        partial = path.with_suffix(".partial")
        try:
            save_file(self.vectors, partial, metadata=header)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Could not save the run to {path}: {error}. Make room on the disk and resume; "
                "the last saved step is kept."
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> "LearnState":
        """Read a state. Raises CheckpointError if the file is not one."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != STATE_FORMAT:
                    raise ValueError(f"its format is {header.get('format')!r}")
                about = json.loads(header["about"])
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(about["step"], vectors, about["multiplier"], about["history"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a saved state of a run: {error}.") from None
