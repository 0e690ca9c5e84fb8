"""What a person can do on the page or over the API, in plain arguments and plain results.

The id of a run is its only key: whoever has it may watch, cut, compare and download that run.
"""

from ...checkpoints.hub import offers_sign_in
from ...checkpoints.unused import in_words as left_out
from ...machine import megabytes, zerogpu
from ...runs.prompts import read as read_prompts
from ..worker import ACTIVE
from .drawing import (
    MAX_HEALING,
    MAX_PROMPTS,
    MAX_REPAIR,
    MAX_SIZES,
    compare,
    cut,
    defaults,
    draw_pictures,
    heal,
    means,
    picture,
    pictures,
    plan,
    sizes,
    suggestions,
    survey,
)
from .files import export, lora, lora_images, plan_file, push
from .learning import (
    EXPIRY_SECONDS,
    Seed,
    delete,
    disk_bytes,
    example,
    examples,
    fail,
    import_,
    learn,
    rename,
    resume,
    start,
    status,
    stop,
)
from .prediction import default_preset, find_models, formats, kinds_of, methods, predict

__all__ = [
    "ACTIVE",
    "EXPIRY_SECONDS",
    "MAX_HEALING",
    "MAX_PROMPTS",
    "MAX_REPAIR",
    "MAX_SIZES",
    "Seed",
    "compare",
    "cut",
    "default_preset",
    "defaults",
    "delete",
    "disk_bytes",
    "draw_pictures",
    "example",
    "examples",
    "export",
    "fail",
    "find_models",
    "formats",
    "heal",
    "import_",
    "kinds_of",
    "learn",
    "left_out",
    "lora",
    "lora_images",
    "means",
    "megabytes",
    "methods",
    "offers_sign_in",
    "picture",
    "pictures",
    "plan",
    "plan_file",
    "predict",
    "push",
    "read_prompts",
    "rename",
    "resume",
    "sizes",
    "start",
    "status",
    "stop",
    "suggestions",
    "survey",
    "zerogpu",
]
