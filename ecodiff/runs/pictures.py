"""Pictures of a run: prompts that nothing is learned on, dense and at several sizes, and what each costs.

pictures.json, in a run's folder:
{"prompts": [...], "dense": [image, ...], "sizes": [{"asked", "ratio", "step", "repaired",
"images", "latent_error", "psnr": each a list, one a prompt}, ...]}; an image is a data URI of a WebP file.
"""

import base64
import io
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from ..metrics.fidelity import Sample, fidelity, generate
from ..pruning.plan import PrunePlan
from ..storage import write_json
from .folder import Run

FILE = "pictures.json"
SIZES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # that a finished run is drawn at
COUNT = 4  # prompts; prompt i is drawn with seed i
SIDE = 256  # pixels of a picture at most
SHARE = 0.25  # of the time that was spent on learning, what pictures of it may take


def load(folder: Path) -> dict:
    """The pictures in a run's folder; {} if there are none."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("dense"):
            return found
    return {}


def encoded(image: Image.Image) -> str:
    """An image as a data URI, made smaller if it is large."""
    image = image.convert("RGB")
    exact = max(image.size) <= SIDE // 2
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=exact, quality=88)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


class Painter:
    """Draws the pictures of a run; the dense ones once.

    Args:
        dense: the dense pipeline.
        lock: held while an image is drawn.
        on_step: called after every time step with their number; raise in it to stop.
    """

    def __init__(
        self,
        run: Run,
        dense: DiffusionPipeline,
        lock: AbstractContextManager | None = None,
        on_step: Callable[[int], None] | None = None,
    ):
        self.run, self._dense, self._lock, self._on_step = run, dense, lock or nullcontext(), on_step
        self._asked = list(zip(run.judged_on[:COUNT], range(COUNT), strict=False))
        self._known: list[Sample] = []
        self._spent = self._last = 0.0

    def due(self, learned: float, step: float) -> bool:
        """True if pictures would take at most a quarter of the seconds that were learned.

        Args:
            step: seconds of a step of learning, which the first pictures are expected to take.
        """
        return SHARE * learned >= self._spent + (self._last or step)

    def begin(self) -> dict:
        """Draw the dense model alone, to see while nothing is ranked yet. Returns what is kept."""
        begun = time.monotonic()
        self._known = self._known or self._drawn(self._dense)
        self._spent += time.monotonic() - begun
        return self._keep(load(self.run.folder).get("sizes", []))

    def _keep(self, sizes: list[dict]) -> dict:
        found = {
            "prompts": [prompt for prompt, _ in self._asked],
            "dense": [encoded(sample.image) for sample in self._known],
            "sizes": sorted(sizes, key=lambda row: row["asked"]),
        }
        write_json(self.run.folder / FILE, found)
        return found

    def paint(self, small: DiffusionPipeline, plan: PrunePlan, asked: float, repaired: bool) -> dict:
        """Draw a pruned pipeline, and keep it in place of what was drawn for that size before.

        Args:
            asked: the ratio that was asked for; `plan` says what came of it.

        Returns:
            what is kept, as `load` reads it
        """
        begun = time.monotonic()
        self._known = self._known or self._drawn(self._dense)
        begun_here = time.monotonic()
        samples = self._drawn(small)
        measured = [fidelity(a, b) for a, b in zip(self._known, samples, strict=True)]
        state = self.run.state()
        dense, pruned = plan.metadata["params_dense"], plan.metadata["params_pruned"]
        made = {
            "asked": round(asked, 4),
            "ratio": 1 - pruned / dense,
            "step": state.step if state else 0,
            "repaired": repaired,
            "images": [encoded(sample.image) for sample in samples],
            "latent_error": [row.latent_error for row in measured],
            "psnr": [row.psnr for row in measured],
        }
        others = [row for row in load(self.run.folder).get("sizes", []) if row["asked"] != made["asked"]]
        found = self._keep([*others, made])
        self._spent += time.monotonic() - begun
        self._last = time.monotonic() - begun_here
        return found

    def _drawn(self, pipe: DiffusionPipeline) -> list[Sample]:
        made, options = [], self.run.known.drawing()
        for prompt, seed in self._asked:
            with self._lock:  # others draw in between
                made.append(generate(pipe, prompt, seed, **options, on_step=self._on_step))
        return made
