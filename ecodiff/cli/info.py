"""`info`: show what can be pruned, without downloading weights."""

import argparse
from pathlib import Path

from ._common import report

HELP = "show what can be pruned, without downloading weights"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="MODEL or a pruned folder")


def run(options: argparse.Namespace) -> int:
    """What a model is made of and what of it can be pruned, from its configuration alone."""
    from .. import catalog
    from ..architectures import find_groups, unit_parameters, unrecognised
    from ..checkpoints.loading import classes, empty_denoiser
    from ..checks import needs_an_image
    from ..metrics.cost import parameters
    from ..pruning.scores import Scores
    from ..pruning.slicing import plan_of
    from ..units import ALL_KINDS, KINDS

    denoiser = empty_denoiser(options.model)
    groups = find_groups(denoiser, ALL_KINDS)
    total = parameters(denoiser)
    plan = plan_of(denoiser)
    scores = Scores.unranked(denoiser)
    count = {kind: sum(g.size for g in groups if g.kind == kind) for kind in ALL_KINDS}
    held = {g.name: g.size * unit_parameters(denoiser, g) - g.setup for g in groups}
    share = {kind: sum(held[g.name] for g in groups if g.kind == kind) / total for kind in ALL_KINDS}
    facts = {
        "model": options.model,
        "denoiser": type(denoiser).__name__,
        "params": total,
        "heads": count["heads"],
        "neurons": count["ffn"],
        "resnet_groups": count["resnet"],
        "share_heads": share["heads"],
        "share_ffn": share["ffn"],
        "share_resnet": share["resnet"],
        "share_modulation": share["modulation"],
        "units": count,
        "shares": share,
        "ceiling": scores.ceiling,
        "left_alone": unrecognised(denoiser, groups),
        "pruned": plan is not None,
        "conformance": catalog.supported(type(denoiser).__name__),
    }
    words = {name: kind.word for name, kind in KINDS.items()}
    words |= {"resnet": "ResNet channel groups", "value_directions": "directions inside these heads"}
    rows = [
        ("denoiser", facts["denoiser"]),
        ("conformance suite", _conformance(facts["denoiser"])),
        ("parameters", f"{total:,}"),
        *((words[k], f"{count[k]:,} ({share[k]:.1%} of the parameters)") for k in ALL_KINDS if count[k]),
        ("can be removed", f"at most {scores.ceiling:.1%}"),
        ("left alone", ", ".join(f"{k} {v / total:.1%}" for k, v in facts["left_alone"].items())),
    ]
    if (known := catalog.find(options.model)).denoiser:
        more, lines = _of_the_catalogue(denoiser, known)
        facts, rows = facts | more, rows + lines
    if Path(known.source).is_dir() and needs_an_image(pipeline := classes(known)[0]):
        facts["needs_an_image"] = True
        rows.append(("note", f"{pipeline.__name__} needs an image besides a prompt: it cannot be learned on"))
    if plan is not None:
        rows.append(("pruned by plan", plan.digest))
    if scores.ceiling >= 0.2:
        more, lines = _at_twenty(denoiser, known, scores)
        facts, rows = facts | more, rows + lines
    report(options, rows, facts)
    return 0


def _at_twenty(denoiser, known, scores) -> tuple[dict, list[tuple[str, str]]]:
    """What a plan that removes 20 %, of units of equal worth, leaves: parameters, bytes, MACs of a call."""
    from ..architectures.inputs import meta_call
    from ..machine import megabytes
    from ..metrics.cost import macs_by_unit

    plan = scores.plan(ratio=0.2)
    left = scores.total - scores.removed(plan)
    size = left * known.footprint()["itemsize"]
    facts, words = {"params_at_20": left, "bytes_at_20": size}, f"{left:,} parameters, {megabytes(size)}"
    if known.denoiser and (call := meta_call(denoiser, known.size, 1)):
        by_unit, total = macs_by_unit(denoiser, (), call)
        gone = scores.removed(plan, by_unit)
        facts |= {"macs": total, "macs_at_20": total - gone}
        words += f", {1 - gone / total:.1%} of {total / 1e12:.3g} T MACs of a call at {known.size} pixels"
    return facts, [("after a 20 % plan", words)]


def _of_the_catalogue(denoiser, known) -> tuple[dict, list[tuple[str, str]]]:
    """Memory and licence of a model that is offered by name, as facts and as rows."""
    from ..learning.footprint import footprint
    from ..machine import megabytes

    need = footprint(denoiser, **known.footprint())
    facts = {"memory_draw": need.draw, "memory_offloaded": need.draw_offloaded, "memory_learn": need.learn}
    facts["memory_learn_streamed"] = need.learn_streamed
    memories = f"{megabytes(need.draw)} to draw, {megabytes(need.draw_offloaded)} with components offloaded, "
    memories += (
        f"{megabytes(need.learn)} to learn, {megabytes(need.learn_streamed)} with weights in main memory"
    )
    others = f", reads {', '.join(sorted(set(known.parts.values())))} too" if known.parts else ""
    gated = f"{others}, gated: accept its licence on the Hub, and sign in there" if known.gated else others
    rows = [("memory (estimate)", memories), ("licence", known.licence + gated)]
    if known.files:
        itemsize, held = {"float32": 4, "float16": 2, "bfloat16": 2}[known.files], need.denoiser
        facts["denoiser_files"] = held // known.footprint()["itemsize"] * itemsize
        words = f"{megabytes(facts['denoiser_files'])} for the denoiser: its files hold {known.files}"
        rows.append(("download", f"{words}; it is opened and saved in {known.dtype}, {megabytes(held)}"))
    return facts | {"licence": known.licence, "gated": known.gated}, rows


def _conformance(denoiser: str) -> str:
    """What the conformance suite passes of a class, in words."""
    from .. import catalog

    rows = catalog.supported(denoiser)
    if not rows:
        return "this class is not in it; what is found is found by structure"
    whole = "passed, whole pipeline" if any(row["pipeline"] for row in rows) else "passed, denoiser alone"
    return f"{whole} ({', '.join(row['name'] for row in rows)})"
