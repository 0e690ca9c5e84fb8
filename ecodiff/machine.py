"""The machine that this runs on: its devices, their memory, and how long things take on it."""

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

from .errors import CheckpointError
from .storage import write_json

CHUNK_SECONDS = 60  # of learning in one ZeroGPU call; such a call may not last much longer

START_SECONDS = 15  # until a ZeroGPU worker is up

UNKNOWN_SECONDS = 60  # what is asked for before anything was measured


def zerogpu() -> bool:
    """True on a ZeroGPU Space: GPU work happens in forked workers, a minute at a time."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true", "t", "yes")


def devices() -> list[str]:
    """The devices that the app uses: those of $ECODIFF_DEVICE ("cuda:0,cuda:2"; see `together`), else
    every CUDA GPU, "mps" or "cpu". Of several processes (`accelerate launch`) each uses one."""
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


def together(name: str) -> list[torch.device]:
    """The devices of a name: "cuda:0+cuda:1" is a device that works, and one that lends it its memory."""
    return [torch.device(part.strip()) for part in name.split("+")]


def device_of(model: nn.Module) -> torch.device:
    """Where a model works. A layer's weights may wait elsewhere (`learning.streaming`)."""
    return next(model.parameters()).device


class Timings:
    """Seconds that things took here, by model: {model: {"load", "step", "record", "draw", "pack"}}.

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
        with suppress(CheckpointError):  # an estimate that is lost costs nothing else
            write_json(self.path, known)

    def last(self, model: str, name: str) -> float | None:
        """What it took last; None before it was measured."""
        return self._read().get(model, {}).get(name)

    def seconds(self, model: str, *names: str) -> float:
        """What a call of these parts will take, with the start of a worker; a guess before the first."""
        known = self._read().get(model, {})
        if any(name not in known for name in names):
            return UNKNOWN_SECONDS
        return START_SECONDS + 1.5 * sum(known[name] for name in names)


USABLE = 0.8  # of what is free: allocators waste some, and others may come

USABLE_CPU = 0.5  # glibc's allocator wastes up to half as much again (benchmarks/learning.py)

CONTAINER = Path("/sys/fs/cgroup/memory.max")  # bytes that a container may use, or "max"

ZEROGPU_BYTES = 48 * 10**9  # of the size "large", as Hugging Face documents it


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, less a margin."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(USABLE * (torch.cuda.mem_get_info(device)[0] + unused))
    if device.type == "mps":
        return int(USABLE * (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return int(USABLE_CPU * _main_memory()[1])


def room(device: torch.device, wanted: int) -> int:
    """As many bytes of a device as are wanted, or half of those that are free where that is less."""
    return min(wanted, free_bytes(device) // 2)


def release() -> None:
    """Give memory that torch keeps for itself back to the device."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache()


def capacity(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if zerogpu():
        return ZEROGPU_BYTES  # it cannot be asked: this process never sees it
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return _main_memory()[0]


def _main_memory() -> tuple[int, int]:
    """Bytes of the machine's memory, all and available; of a container's, where this runs in one."""
    found = psutil.virtual_memory()
    total, available = found.total, found.available
    with suppress(OSError, ValueError):  # there is no container, or no limit
        limit = int(CONTAINER.read_text())
        total, available = min(total, limit), min(available, limit - psutil.Process().memory_info().rss)
    return total, max(0, available)


def megabytes(count: float) -> str:
    """Bytes for people: "16.2 MB", "5.14 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def be_quiet() -> None:
    """Silence the libraries' progress bars, retries and advice. Errors still reach the person."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(100)  # its retries; what failed is told once, at the end
    warnings.simplefilter("ignore")
