"""What others made: plan files, pruned folders in a zip, and the masks that EcoDiff's authors publish.

All of it is a stranger's: sizes are checked before anything is read, names before they are used, and of
a zip nothing but the plan is read. Masks come as `.pt` files, which are pickles; torch's reader for
weights, which knows tensors and containers and nothing else, is the only one that sees them.
"""

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..architectures import find_groups
from ..errors import CheckpointError, PlanError
from ..pruning.plan import PLAN_FILE, PrunePlan
from ..pruning.scores import Scores
from ..pruning.slicing import check, shared_copy, slice_
from ..storage import MAX_FILE_BYTES, check_zip, reading
from ..units import KINDS, PUBLISHED_KINDS, PruneGroup

MAX_MEMBERS = 10_000  # of a zip

MAX_TENSORS = 10_000  # of a mask file

# The order in which a UNet runs; diffusers registers the middle last.
_FORWARD = ("down_blocks.", "mid_block.", "up_blocks.")


def import_files(files: Sequence[str | Path], denoiser: nn.Module) -> PrunePlan | Scores:
    """What `files` hold for a denoiser (on any device, "meta" too): one plan, or masks.

    Of what a plan says about itself nothing is believed; its size is counted.

    Raises:
        CheckpointError, PlanError: nothing that fits.
    """
    if not files:
        raise CheckpointError("Give a plan file, the zip of a pruned model, or EcoDiff's .pt masks.")
    if all(Path(file).suffix == ".pt" for file in files):
        return read_masks(files, denoiser)
    if len(files) > 1:
        raise CheckpointError("Give one plan file (or zip), or mask files only.")
    plan = read_plan(files[0])
    check(plan.part(), denoiser)  # what is text encoders': `text_encoders.counted`
    total = sum(p.numel() for p in denoiser.parameters())
    sliced = slice_(shared_copy(denoiser), plan.part())
    pruned = sum(p.numel() for p in sliced.parameters())
    facts = {"ratio": round(1 - pruned / total, 6), "params_dense": total}
    return PrunePlan(plan, facts | {"params_pruned": pruned, "method": "imported plan"})


def read_plan(path: str | Path) -> PrunePlan:
    """The plan in a plan file, or in the zip of a pruned folder.

    Raises:
        CheckpointError: it holds no plan, or a damaged one.
    """
    path = Path(path)
    if path.suffix != ".zip":
        return PrunePlan.load(path)
    check_zip(path, MAX_MEMBERS)
    with reading(path.name), zipfile.ZipFile(path) as archive:
        found = [m for m in archive.infolist() if m.filename.rpartition("/")[2] == PLAN_FILE]
        if len(found) != 1:
            raise CheckpointError(f"{path.name} is not the zip of a pruned model: no {PLAN_FILE} in it.")
        if found[0].file_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{PLAN_FILE} in {path.name} is too large for a plan.")
        with archive.open(found[0]) as file, tempfile.TemporaryDirectory() as folder:
            data = file.read(MAX_FILE_BYTES + 1)  # what the zip says of its size may be a lie
            if len(data) > MAX_FILE_BYTES:
                raise CheckpointError(f"{PLAN_FILE} in {path.name} is too large for a plan.")
            plan = Path(folder) / PLAN_FILE
            plan.write_bytes(data)
            return PrunePlan.load(plan)


def read_masks(paths: Sequence[str | Path], denoiser: nn.Module) -> Scores:
    """Scores from EcoDiff's published masks: log-alphas of heads, of FFN neurons and, of FLUX, of the rows of
    its modulation ("norm"), in `.pt` files.

    A file holds one tensor a layer, in the order in which the layers run. Which kind a file is of is
    told by its numbers of units.

    Args:
        denoiser: of the model that the masks were learned on, on any device, "meta" too.

    Raises:
        CheckpointError: not a file of tensors.
        PlanError: the tensors are not those of this denoiser's layers.
    """
    kinds = (*PUBLISHED_KINDS, "modulation")
    groups = [g for g in _in_order(find_groups(denoiser, kinds)) if not g.name.startswith("norm_out")]
    layers = {kind: [group for group in groups if group.kind == kind] for kind in kinds}
    values: dict[str, Tensor] = {}
    for path in paths:
        masks = _tensors(Path(path))
        kind = next((kind for kind, groups in layers.items() if groups and _fits(masks, groups)), None)
        if kind is None:
            expected = ", or ".join(f"{len(g)} of {KINDS[k].word}" for k, g in layers.items() if g)
            sizes = sorted({mask.numel() for mask in masks})[:4]
            raise PlanError(
                f"{Path(path).name} has {len(masks)} layers of {sizes} units; this "
                f"{type(denoiser).__name__} has {expected}. Was it learned on another model?"
            )
        # Log-alphas order units; the exponential makes worths of them and keeps the order.
        values |= {g.name: m.flatten().clamp(-80, 80).exp() for g, m in zip(layers[kind], masks, strict=True)}
    return Scores.of(denoiser, values, method="imported masks")


def _in_order(groups: list[PruneGroup]) -> list[PruneGroup]:
    def place(group: PruneGroup) -> int:
        return next((i for i, part in enumerate(_FORWARD) if group.name.startswith(part)), len(_FORWARD))

    return sorted(groups, key=place)


def _fits(masks: list[Tensor], groups: list[PruneGroup]) -> bool:
    return [mask.numel() for mask in masks] == [group.size for group in groups]


def _tensors(path: Path) -> list[Tensor]:
    """The tensors of a `.pt` file, one a layer, as float32."""
    if path.suffix != ".pt" or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path.name} is not a mask file: a .pt of at most {MAX_FILE_BYTES >> 20} MiB.")
    check_zip(path, MAX_MEMBERS)
    with reading(path.name):
        _check_archive(path)
        masks = _list(torch.load(path, map_location="cpu", weights_only=True))
    if not all(mask.isfinite().all() for mask in masks):
        raise CheckpointError(f"{path.name} holds values that are not numbers.")
    return masks


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless it is a zip that torch wrote, stored as it is (so not a bomb)."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    stored = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or stored > MAX_FILE_BYTES:
        raise CheckpointError(f"{path.name} is too large for a mask file.")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path.name} is compressed; torch.save writes no such files.")


def _plain(mask) -> bool:
    """True for a dense tensor of floats in memory."""
    return (
        type(mask) in (Tensor, nn.Parameter)
        and mask.is_floating_point()
        and mask.layout is torch.strided
        and mask.device.type == "cpu"
        and not mask.is_nested
    )


def _list(loaded) -> list[Tensor]:
    masks = list(loaded.values()) if isinstance(loaded, dict) else loaded
    if not isinstance(masks, (list, tuple)) or not 0 < len(masks) <= MAX_TENSORS:
        raise CheckpointError("A mask file holds a list of tensors, one a layer.")
    if not all(_plain(m) for m in masks):
        raise CheckpointError("A mask file holds a list of tensors, one a layer, and nothing else.")
    if sum(mask.numel() for mask in masks) > MAX_FILE_BYTES:  # one number, expanded to terabytes
        raise CheckpointError("A mask file claims more numbers than it can hold.")
    return [mask.detach().float() for mask in masks]
