"""Files that leave: pruned pipelines, plans, LoRAs cut to fit."""

import hashlib
import json
import zipfile
from pathlib import Path

from ...checkpoints import hub, loading
from ...checkpoints.card import snippet
from ...checkpoints.formats import find_format
from ...checkpoints.lora import translate
from ...checkpoints.lora_saving import save_lora
from ...errors import BudgetError, CheckpointError
from ...metrics.fidelity import Sample
from ...runs.healing import healed as healed_variant
from ...storage import write_json
from .. import limits
from ..server import server
from ..tasks import DrawLoras, SavePruned, results
from .drawing import plan
from .prediction import empty_denoiser


def export(
    run: str, ratio: float, compensate: bool = True, format: str = "diffusers", lean: bool = False
) -> dict:
    """Write the pruned pipeline of a run at a size, as one zip file.

    Args:
        compensate: repair the weights that stay (closed form).
        format: one of `checkpoints.formats.FORMATS`.
        lean: leave out what the pipeline never reads of its text encoders; images are the same.

    Returns:
        {"path", "name", "bytes", "sha256", "folder", "code": Python that opens it and draws ("" if
        diffusers does not), "left_out": {text encoder: parameters that are never read, and are not in it}}
    """
    find_format(format)
    made, opened = plan(run, ratio), server().store.open(run)
    model = made.metadata["model"]
    name = f"{model.rpartition('/')[2]}-eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}"
    healed = healed_variant(opened.folder, made) if compensate else None
    name += f"-healed{healed['steps'] or ''}" if healed else "" if compensate else "-uncompensated"
    name += "" if format == "diffusers" else f"-{format}"
    name += "-lean" if lean else ""
    path = opened.folder / "models" / f"{name}.zip"
    if not path.exists():
        limits.require_bytes()
        task = SavePruned(str(opened.folder), made, compensate, str(path.with_suffix("")), format, lean)
        folder, left_out = results(task)
        write_json(path.with_suffix(".left-out.json"), left_out)
        _zip(Path(folder), path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {
        "path": str(path),
        "name": path.name,
        "folder": name,
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
        "code": snippet(opened.known, name) if _is_pipeline(path) else "",
        "left_out": _left_out(path),
    }


def _is_pipeline(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return f"{path.stem}/model_index.json" in archive.namelist()


def _left_out(path: Path) -> dict[str, int]:
    note = path.with_suffix(".left-out.json")  # not there of what an earlier version wrote
    return json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}


def _zip(folder: Path, path: Path) -> None:
    partial = path.with_suffix(".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder.parent))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"Could not pack the checkpoint: {error}. Is the disk full?") from None


def lora(run: str, ratio: float, file: str, naming: str = "diffusers") -> dict:
    """Cut a LoRA of the dense model to fit the pruned model of a run at a size.

    Args:
        file: path of a .safetensors file, in any common naming (docs/checkpoints.md).
        naming: of the result, "diffusers" or "kohya" (for ComfyUI).

    Returns:
        {"path", "name", "report": what was done, in words, "dropped": {layer: why}}
    """
    made, opened = plan(run, ratio), server().store.open(run)
    folder = opened.folder / "loras"
    limits.require_bytes()
    known = opened.known
    pipeline, component = loading.classes(known)
    dense = empty_denoiser(known.name)
    tensors, report = translate(file, pipeline, component, made, dense)
    name = f"{Path(file).stem[:60]}-eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}"
    name += f"{'' if naming == 'diffusers' else '-' + naming}.safetensors"
    path = save_lora(tensors, folder / name, made, naming, dense)
    return {"path": str(path), "name": name, "report": report.words(), "dropped": report.dropped}


def lora_images(run: str, ratio: float, file: str, prompt: str, seed: int = 0) -> tuple[Sample, Sample]:
    """See what a LoRA became: one prompt, from the same noise, as in `compare`.

    Args:
        file: as in `lora`.

    Returns:
        dense model with the LoRA as it is, pruned model with the LoRA cut to fit
    """
    if not prompt.strip():
        raise BudgetError("Write a prompt first: what should be drawn?")
    fitting, made = lora(run, ratio, file), plan(run, ratio)
    opened = server().store.open(run)
    files, options = (file, fitting["path"]), opened.known.drawing()
    task = DrawLoras(str(opened.folder), made, files, prompt, int(seed), options)
    return tuple(results(task))


def plan_file(run: str, ratio: float) -> str:
    """Write the plan file of a run at a size; returns its path."""
    made = plan(run, ratio)
    name = f"eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}.safetensors"
    return str(made.save(server().store.open(run).folder / "plans" / name))


def push(
    run: str, ratio: float, repo: str, token: str, plan_only: bool = False, private: bool = True
) -> dict:
    """Upload the pruned pipeline of a run at a size, or its plan alone, to the Hugging Face Hub.

    Args:
        repo: "name" or "user/name"; made if it is not there.
        token: of the person who asks; needs the right to write to `repo`.

    Returns:
        {"url"}
    """
    if not token:
        raise CheckpointError("Sign in with Hugging Face first.")
    if plan_only:
        return {"url": hub.push_plan(plan(run, ratio), repo, token, private)}
    folder = Path(export(run, ratio)["path"]).with_suffix("")
    return {"url": hub.push(folder, repo, token, private)}
