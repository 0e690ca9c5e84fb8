"""Which machine this is - ZeroGPU, a GPU of one's own, a CPU - and how long things take on it."""

import json
import os
from contextlib import suppress
from pathlib import Path

import torch

CHUNK_SECONDS = 60  # of learning in one ZeroGPU call; such a call may not last much longer
START_SECONDS = 15  # until a ZeroGPU worker is up
UNKNOWN_SECONDS = 60  # what is asked for before anything was measured


def zerogpu() -> bool:
    """True on a ZeroGPU Space: GPU work happens in forked workers, a minute at a time."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true", "t", "yes")


def devices() -> list[str]:
    """The devices that the app uses: those of $ECODIFF_DEVICE ("cuda:0,cuda:2"), else every CUDA GPU,
    "mps" or "cpu". Of several processes (`accelerate launch`) each uses one."""
    if chosen := os.environ.get("ECODIFF_DEVICE"):
        return [name.strip() for name in chosen.split(",")]
    if zerogpu():
        return ["cuda"]  # it is there in workers only
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return [f"cuda:{os.environ['LOCAL_RANK']}"]
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]


def device() -> str:
    """The device that a pipeline is put on if nobody says where: the first one."""
    return devices()[0]


class Pace:
    """Seconds that things took here, by model: {model: {"load", "step", "draw", "pack"}}.

    A file, because ZeroGPU's workers share nothing else with the process that plans their time.
    """

    def __init__(self, path: Path):
        self.path = path

    def _read(self) -> dict:
        with suppress(OSError, ValueError):
            return json.loads(self.path.read_text(encoding="utf-8"))
        return {}

    def note(self, model: str, **seconds: float) -> None:
        """Remember the last measurement of each."""
        known = self._read()
        known[model] = known.get(model, {}) | {name: round(value, 3) for name, value in seconds.items()}
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with suppress(OSError):  # an estimate that is lost costs nothing else
            partial.write_text(json.dumps(known), encoding="utf-8")
            partial.replace(self.path)

    def seconds(self, model: str, *names: str) -> float:
        """What a call of these parts will take, with the start of a worker; a guess before the first."""
        known = self._read().get(model, {})
        if any(name not in known for name in names):
            return UNKNOWN_SECONDS
        return START_SECONDS + 1.5 * sum(known[name] for name in names)
