"""The devices of this machine: the lock of each, and the pipelines that are on it."""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import machine
from ..checkpoints import loading
from ..config import CompensateConfig
from ..learning import calibration
from ..learning.calibration import Calibration
from ..learning.compensate import compensate_
from ..pipelines import denoiser_of
from ..pruning.components import weights_of
from ..pruning.plan import PrunePlan, named_in
from ..pruning.slicing import variant
from ..runs.folder import Run
from ..storage import write_tensors

VARIANTS_KEPT = 4  # each costs the memory of its cut layers only


class DeviceLock:
    """A lock whose holder lets others in: learning takes it for each step, images in between."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> "DeviceLock":
        self._lock.acquire()
        return self

    def __exit__(self, *error) -> None:
        self._lock.release()
        time.sleep(0.005)  # a plain lock would mostly be won by the thread that just had it


class Device:
    """A device, its lock, and the pipelines on it: the dense one that was used last, and variants of it.

    A variant is known by its plan's digest: swapping to one that is kept costs nothing, to a new
    one the slicing, some milliseconds to a second. Compensation needs statistics of the dense
    model's layers; they are gathered once and serve every variant of it, and the weights that come
    of it are kept on disk.
    """

    def __init__(self, device: str, timings: machine.Timings, recordings: Callable[[Run], Path | None]):
        self.device, self.lock = device, DeviceLock()
        self.timings, self.recordings = timings, recordings
        self._name: str | None = None
        self._dense: DiffusionPipeline | None = None
        self._variants: OrderedDict[tuple, tuple[DiffusionPipeline, int]] = OrderedDict()
        self._calibration: Calibration | None = None
        # By plan and options: how much faster a call is than the dense one's, once that was measured.
        self.speedups: dict[tuple[str, str], tuple[float, float, float] | None] = {}
        self._calibrated_by: tuple[list[str], CompensateConfig] | None = None

    def dense(self, model: str):
        """The dense pipeline of a model, loaded if another one was in use."""
        with self.lock:
            if model != self._name:
                started = time.monotonic()
                self._name = self._dense = self._calibration = None  # free it before the new one loads
                self._variants.clear()
                self.speedups.clear()
                self._dense = loading.load(model, device=self.device)
                self._dense.set_progress_bar_config(disable=True)
                self._name = model
                self.timings.note(model, load=time.monotonic() - started)
            return self._dense

    def calibration(self, run: Run) -> Calibration:
        """What compensation needs to know of a run's dense model, gathered on the run's prompts."""
        with self.lock:
            dense, asked = self.dense(run.model), (run.learned_on, run.compensation)
            if self._calibration is None or asked != self._calibrated_by:
                self._calibration = None  # free it before the new one is gathered
                config = calibration.fewer_passes(run.compensation, denoiser_of(dense).device)
                self._calibration = Calibration(dense, run.learned_on, config, self.recordings(run))
                self._calibrated_by = asked
            return self._calibration

    def pruned(
        self,
        run: Run,
        plan: PrunePlan,
        compensate: bool = True,
        keep: bool = True,
        healed: bool = True,
    ) -> DiffusionPipeline:
        """The variant of a run's model that keeps what `plan` keeps.

        Args:
            keep: write compensated weights to the run's folder, so that no other process computes them again.
            healed: take the healed weights, if there are any.
        """
        with self.lock:
            dense = self.dense(run.model)
            file = run.folder / "variants" / f"{plan.digest}.safetensors" if keep else None
            if healed and file and (better := file.with_suffix(".healed.safetensors")).is_file():
                file = better
            key = (plan.digest, compensate, healed, hash((*run.learned_on, repr(run.compensation))))
            small, stamp = self._variants.pop(key, (None, None))
            if small is None or (compensate and stamp != _stamp(file)):  # healed since, maybe elsewhere
                small = variant(dense, plan)
                if compensate:
                    self._compensate(small, dense, run, file)
            self._variants[key] = small, _stamp(file)
            while len(self._variants) > VARIANTS_KEPT:
                self._variants.popitem(last=False)
            return small

    def forget(self) -> None:
        """Free what can be made again."""
        with self.lock:
            self._variants.clear()
            self._calibration = None
            machine.release()

    def _compensate(
        self, small: DiffusionPipeline, dense: DiffusionPipeline, run: Run, file: Path | None
    ) -> None:
        if file is not None and file.is_file():
            with suppress(OSError, SafetensorError):  # a damaged file is written again
                _replace(small, load_file(file))
                return
        updated = compensate_(small, dense, calibration=self.calibration(run))
        if file is not None:
            layers = tuple(f"{name}." for name, better in updated.items() if better)
            weights = weights_of(small).items()
            write_tensors(file, {n: w for n, w in weights if n.startswith(layers)}, {})


def _stamp(file: Path | None) -> int:
    """When a file was last written, 0 if it is not there."""
    with suppress(OSError):
        return file.stat().st_mtime_ns if file else 0
    return 0


def _replace(small: DiffusionPipeline, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        component, path = named_in(name)
        module: Any = getattr(small, component) if component else denoiser_of(small)
        like = next(module.parameters())
        path, _, leaf = path.rpartition(".")
        # A new parameter: a bias may be the dense model's own.
        parameter = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
        setattr(module.get_submodule(path), leaf, parameter)


class Devices:
    """All devices: on a machine with several, images are drawn on the first and each other learns a run.

    Args:
        root: the folder of the runs; recorded calls are kept in it where other devices, or ZeroGPU's workers
            (which come and go), need them.
        names: of the devices; None: `machine.devices()`.
    """

    def __init__(self, root: Path, timings: machine.Timings, names: Sequence[str] | None = None):
        self.root = root
        self.all = [Device(name, timings, self.recordings) for name in names or machine.devices()]

    @property
    def drawing(self) -> Device:
        """The device that images are drawn on."""
        return self.all[0]

    @property
    def learning(self) -> list[Device]:
        """The devices that runs are learned on."""
        return self.all[1:] or self.all

    def recordings(self, run: Run) -> Path | None:
        """Where recorded calls of a run's dense model on its prompts are kept, if anybody else needs them."""
        if not machine.zerogpu() and len(self.all) == 1:
            return None
        key = repr((run.known.name, run.compensation, run.learned_on))
        return self.root / "recordings" / hashlib.sha256(key.encode()).hexdigest()[:16]

    def calibrated(self, run: Run) -> bool:
        """False if calls are still to be recorded, in a call of ZeroGPU of its own."""
        if not machine.zerogpu():
            return True
        return not calibration.missing(run.compensation, self.recordings(run))

    def forget(self) -> None:
        """Free everywhere what can be made again."""
        for device in self.all:
            device.forget()
