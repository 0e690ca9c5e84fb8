"""The model card of a pruned pipeline."""

import json
from importlib.metadata import version

from diffusers import DiffusionPipeline

from .. import catalog
from ..pipelines import denoiser_name
from ..pruning import ecodiff_sliced_v1
from ..pruning.plan import PrunePlan
from ..pruning.slicing import plan_of


def model_card(pipe: DiffusionPipeline, facts: dict | None = None) -> str:
    """README.md of a pruned folder: what was removed, how to load it, the base model's licence."""
    name = denoiser_name(pipe)
    plan = plan_of(getattr(pipe, name)) or PrunePlan({})
    about = plan.metadata | (facts or {})
    base = about.get("model", "unknown")
    known = catalog.find(base)
    head = {"library_name": "diffusers", "license": known.licence, "tags": ["ecodiff", "pruned"]}
    if "/" in known.source and not known.embedded:
        head["base_model"] = known.source
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    dense, pruned = about.get("params_dense"), about.get("params_pruned")
    size = f"{dense:,} → {pruned:,} ({1 - pruned / dense:.1%} removed)" if dense else "see config"
    measured = "".join(f"| {key} | {value} |\n" for key, value in (facts or {}).items())
    return f"""---
{front}
---

# {base}, pruned with ecodiff

| | |
|---|---|
| parameters of the {name} | {size} |
| method | {about.get("method", "unknown")} |
| plan | `{plan.digest}` |
{measured}
```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)
image = pipe("a prompt").images[0]
```

It opens in float32; on a GPU give `torch_dtype=torch.float16` (or `bfloat16`) as well.
`trust_remote_code` runs `{name}/{ecodiff_sliced_v1.NAME}.py`, which only gives the layers their
smaller shapes. With ecodiff {version("ecodiff") if _installed() else ""} installed,
`ecodiff.load("THIS FOLDER")` needs no remote code. The licence is the base model's.
"""


def _installed() -> bool:
    try:
        return bool(version("ecodiff"))
    except ModuleNotFoundError:
        return False
