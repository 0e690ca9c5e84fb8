"""What a person can do on the page or over the API, in plain arguments and plain results.

The id of a run is its only key: whoever has it may watch, cut, compare and download that run.
"""

from .drawing import MAX_HEALING, MAX_PROMPTS, MAX_SIZES, compare, cut, heal, means, plan, sizes
from .files import export, lora, lora_images, plan_file, push
from .learning import (
    EXPIRY_SECONDS,
    bring,
    delete,
    fail,
    learn,
    predict,
    rename,
    resume,
    start,
    status,
    stop,
)

__all__ = [
    "EXPIRY_SECONDS",
    "MAX_HEALING",
    "MAX_PROMPTS",
    "MAX_SIZES",
    "bring",
    "compare",
    "cut",
    "delete",
    "export",
    "fail",
    "heal",
    "learn",
    "lora",
    "lora_images",
    "means",
    "plan",
    "plan_file",
    "predict",
    "push",
    "rename",
    "resume",
    "sizes",
    "start",
    "status",
    "stop",
]
