"""The model card of a pruned pipeline."""

import json
from importlib.metadata import version
from pathlib import Path

from diffusers import DiffusionPipeline

from .. import catalog
from ..pipelines import denoiser_name
from ..pruning import ecodiff_sliced_v1
from ..pruning.components import plan_of_pipeline
from ..pruning.plan import PrunePlan


def snippet(known: catalog.Model, folder: str, dtype: str = "") -> str:
    """Python that opens a pruned folder without ecodiff and draws with its model's own settings.

    Args:
        dtype: the one that it has to be opened in; empty: the model's own, float32 on a CPU.
    """
    asked = {"num_inference_steps": known.steps, "guidance_scale": known.guidance_scale}
    asked |= {"height": known.size, "width": known.size} | known.extra
    options = "".join(f", {name}={value!r}" for name, value in asked.items() if value is not None)
    draws_clips = {"num_frames", "video_length"} & known.extra.keys()
    image = ', output_type="pil").frames[0][0]' if draws_clips else ").images[0]"
    chosen = f'torch.{known.dtype} if device == "cuda" else torch.float32'
    return f"""import torch
from diffusers import DiffusionPipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {f"torch.{dtype}" if dtype else chosen}
pipe = DiffusionPipeline.from_pretrained("{folder}", torch_dtype=dtype, trust_remote_code=True)
pipe.to(device)
image = pipe("a red apple"{options}{image}
image.save("image.png")"""


# Of models in the catalogue or their folders, what the Hub knows; it refuses a card with any other word.
# https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENCES = frozenset(
    [
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-4.0",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
        "openrail",
        "openrail++",
        "deepfloyd-if-license",
        "gemma",
        "llama2",
        "llama3",
        "llama3.1",
        "mit",
        "mpl-2.0",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "unknown",
        "other",
    ]
)


def front_matter(known: catalog.Model, library: str, tags: list[str]) -> str:
    """The metadata at the top of a card, YAML: a licence that the Hub has no word for is named and linked."""
    head: dict = {"library_name": library, "license": known.licence, "tags": tags}
    on_hub = "/" in known.source and not known.embedded and not Path(known.source).exists()
    if known.licence not in HUB_LICENCES:
        head |= {"license": "other", "license_name": known.licence}
        if on_hub:
            head["license_link"] = f"https://huggingface.co/{known.repository}"
    if on_hub:
        head["base_model"] = known.repository
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---\n"


def model_card(pipe: DiffusionPipeline, facts: dict | None = None, dtype: str = "") -> str:
    """README.md of a pruned folder: what was removed, how to load it, the base model's licence."""
    name = denoiser_name(pipe)
    plan = plan_of_pipeline(pipe) or PrunePlan({})
    about = plan.metadata | (facts or {})
    base = about.get("model", "unknown")
    known = catalog.find(base)
    front = front_matter(known, "diffusers", ["ecodiff", "pruned"])
    dense, pruned = about.get("params_dense"), about.get("params_pruned")
    encoders = about.get("text_encoders", {}) if plan.text_encoders else {}
    also = "\n| parameters of the text encoders | {params_dense:,} → {params_pruned:,} |"
    files = ", ".join(f"`{part}/{ecodiff_sliced_v1.NAME}.py`" for part in (name, *plan.text_encoders))
    size = f"{dense:,} → {pruned:,} ({1 - pruned / dense:.1%} removed)" if dense else "see config"
    measured = "".join(f"| {key} | {value} |\n" for key, value in (facts or {}).items())
    tried = compared(about.get("orders", {}))
    orders = (
        f"\n| orders measured at the run's size | {tried} (typical latent error, held out) |" if tried else ""
    )
    rounded = f", on weights in {about['weights']}" if about.get("weights") else ""
    return f"""{front}
# {base}, pruned with ecodiff

| | |
|---|---|
| parameters of the {name} | {size} |{also.format(**encoders) if encoders else ""}
| method | {about.get("method", "unknown")}{rounded} |{orders}
| prompts | {about.get("prompts", "ecodiff's")} |
| plan | `{plan.digest}` |
{measured}
```python
{snippet(known, "THIS FOLDER", dtype)}
```

`trust_remote_code` runs {files}, which only gives the layers their
smaller shapes. With ecodiff {version("ecodiff") if _installed() else ""} installed,
`ecodiff.load("THIS FOLDER")` needs no remote code. The licence is the base model's.
"""


def compared(orders: dict[str, float]) -> str:
    """Of a run that measured several orders at its size: the best and the others, in words."""
    return ", ".join(f"{name} {orders[name]:.2g}" for name in sorted(orders, key=orders.__getitem__))


def _installed() -> bool:
    try:
        return bool(version("ecodiff"))
    except ModuleNotFoundError:
        return False
