"""The devices of this machine: whose turn it is on each, and the pipelines that are there."""

import hashlib
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import backends, catalog, checkpoint, memory, recording
from .compensate import Calibration, compensate_
from .groups import denoiser_of
from .plan import PrunePlan, write_small
from .runs import STORE
from .slicing import variant

VARIANTS_KEPT = 4  # each costs the memory of its cut layers only
PACE = backends.Pace(STORE.root / "pace.json")


class Turn:
    """A lock whose holder lets others in: learning takes it for each step, images in between."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> "Turn":
        self._lock.acquire()
        return self

    def __exit__(self, *error) -> None:
        self._lock.release()
        time.sleep(0.005)  # a plain lock would mostly be won by the thread that just had it


class Place:
    """A device, whose turn it is there, and the pipelines on it: the dense one that was used last, and
    variants of it.

    A variant is known by its plan's digest: swapping to one that is kept costs nothing, to a new
    one the slicing, some milliseconds to a second. Compensation needs statistics of the dense
    model's layers; they are gathered once and serve every variant of it, and the weights that come
    of it are kept on disk.
    """

    def __init__(self, device: str):
        self.device, self.turn = device, Turn()
        self._name: str | None = None
        self._dense = None
        self._variants: OrderedDict[tuple[str, bool], tuple[object, int]] = OrderedDict()
        self._calibration: Calibration | None = None

    def dense(self, model: str):
        """The dense pipeline of a model, loaded if another one was in use."""
        with self.turn:
            if model != self._name:
                started = time.monotonic()
                self._name = self._dense = self._calibration = None  # free it before the new one loads
                self._variants.clear()
                self._dense = checkpoint.load(model, device=self.device)
                self._dense.set_progress_bar_config(disable=True)
                self._name = model
                PACE.note(model, load=time.monotonic() - started)
            return self._dense

    def calibration(self, model: str) -> Calibration:
        """What compensation needs to know of a dense model, gathered on its calibration prompts."""
        with self.turn:
            dense = self.dense(model)
            if self._calibration is None:
                known = catalog.find(model)
                prompts, config = known.prompts("calibration"), known.compensation()
                device = denoiser_of(dense).device
                if device.type == "cuda":  # fewer passes over the calls
                    config = replace(config, memory=max(config.memory, memory.free_bytes(device) // 2))
                self._calibration = Calibration(dense, prompts, config, recordings(model))
            return self._calibration

    def pruned(self, model: str, plan: PrunePlan, compensate: bool = True, kept: Path | None = None):
        """The variant of a model that keeps what `plan` keeps.

        Args:
            kept: a folder for compensated or healed weights, so that no other process computes them again.
        """
        with self.turn:
            dense, file = self.dense(model), kept and kept / f"{plan.digest}.safetensors"
            key = (plan.digest, compensate)
            small, stamp = self._variants.pop(key, (None, None))
            if small is None or (compensate and stamp != _stamp(file)):  # healed since, maybe elsewhere
                small = variant(dense, plan)
                if compensate:
                    self._compensate(small, dense, model, file)
            self._variants[key] = small, _stamp(file)
            while len(self._variants) > VARIANTS_KEPT:
                self._variants.popitem(last=False)
            return small

    def forget(self) -> None:
        """Free what can be made again."""
        with self.turn:
            self._variants.clear()
            self._calibration = None
            memory.release()

    def _compensate(self, small, dense, model: str, file: Path | None) -> None:
        denoiser = denoiser_of(small)
        if file is not None and file.is_file():
            with suppress(OSError, SafetensorError):  # a damaged file is written again
                _replace(denoiser, load_file(file))
                return
        updated = compensate_(small, dense, calibration=self.calibration(model))
        if file is not None:
            layers = tuple(f"{name}." for name, better in updated.items() if better)
            weights = denoiser.state_dict().items()
            write_small(file, {n: w.contiguous().cpu() for n, w in weights if n.startswith(layers)}, {})


def _stamp(file: Path | None) -> int:
    """When a file was last written, 0 if it is not there."""
    with suppress(OSError):
        return file.stat().st_mtime_ns if file else 0
    return 0


def recordings(model: str) -> Path | None:
    """Where a model's recorded calls are kept, if anybody else needs them: other places, or ZeroGPU's
    workers, who come and go."""
    if not backends.zerogpu() and len(PLACES) == 1:
        return None
    known = catalog.find(model)
    key = repr((known.name, known.compensation(), known.prompts("calibration")))
    return STORE.root / "recordings" / hashlib.sha256(key.encode()).hexdigest()[:16]


def calibrated(model: str) -> bool:
    """False if calls are still to be recorded, in a call of ZeroGPU of its own."""
    if not backends.zerogpu():
        return True
    return not recording.missing(catalog.find(model).compensation(), recordings(model))


def _replace(denoiser: nn.Module, weights: dict[str, Tensor]) -> None:
    like = next(denoiser.parameters())
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        # A new parameter: a bias may be the dense model's own.
        parameter = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
        setattr(denoiser.get_submodule(path), leaf, parameter)


# On a machine with several devices images are drawn on the first, and each of the others learns a run.
PLACES = [Place(device) for device in backends.devices()]
DRAWING, LEARNING = PLACES[0], PLACES[1:] or PLACES
