"""The device and what lives on it: one dense pipeline, its variants, one job at a time."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from . import catalog, checkpoint
from .compensate import Calibration, compensate_
from .plan import PrunePlan
from .slicing import variant

VARIANTS_KEPT = 4  # each costs the memory of its cut layers only


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


DEVICE = Turn()


class Pipelines:
    """The dense pipeline that was used last, and the variants of it that were used last.

    A variant is known by its plan's digest: swapping to one that is kept costs nothing, to a new
    one the slicing, some milliseconds to a second. Compensation needs statistics of the dense
    model's layers; they are gathered once and serve every variant of it.
    """

    def __init__(self):
        self._name: str | None = None
        self._dense = None
        self._variants: OrderedDict[tuple[str, bool], object] = OrderedDict()
        self._calibration: Calibration | None = None

    def dense(self, model: str):
        """The dense pipeline of a model, loaded if another one was in use."""
        with DEVICE:
            if model != self._name:
                self._name = self._dense = self._calibration = None  # free it before the new one loads
                self._variants.clear()
                self._dense = checkpoint.load(model)
                self._dense.set_progress_bar_config(disable=True)
                self._name = model
            return self._dense

    def calibration(self, model: str, on_step: Callable[[], None] | None = None) -> Calibration:
        """What compensation needs to know of a dense model, gathered on its calibration prompts."""
        with DEVICE:
            dense = self.dense(model)
            if self._calibration is None:
                known = catalog.find(model)
                prompts = known.prompts("calibration")
                self._calibration = Calibration(dense, prompts, known.compensation(), on_step)
            return self._calibration

    def pruned(self, model: str, plan: PrunePlan, compensate: bool = True):
        """The variant of a model that keeps what `plan` keeps."""
        with DEVICE:
            dense, key = self.dense(model), (plan.digest, compensate)
            if key not in self._variants:
                small = variant(dense, plan)
                if compensate:
                    compensate_(small, dense, calibration=self.calibration(model))
                self._variants[key] = small
            self._variants.move_to_end(key)
            while len(self._variants) > VARIANTS_KEPT:
                self._variants.popitem(last=False)
            return self._variants[key]


PIPELINES = Pipelines()
