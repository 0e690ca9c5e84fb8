"""What pruning a model will leave, and where that fits, as HTML."""

from html import escape
from math import ceil

from ..service import megabytes
from .show import figures, millions


def prediction(facts: dict, encoders: float = 0.0) -> str:
    """What a size will leave, before anything is started; `encoders`: the share of the text encoders."""
    removed = 1 - facts["params_pruned"] / facts["params_dense"]
    passed = facts["supported"]
    whole = (
        "with its whole pipeline"
        if any(row["pipeline"] for row in passed)
        else "its denoiser in a loop of its own"
    )
    notes = [f"Licence: {escape(facts['licence'])}"]
    if facts["reads"]:
        notes.append(f"Reads {', '.join(escape(repository) for repository in facts['reads'])} too")
    notes[-1] += ", gated: accept it on the Hub, and sign in" if facts["gated"] else ""
    notes.append(
        f"This architecture passed the conformance suite, {whole}"
        if passed
        else "This architecture is not in the conformance suite: its layers are known by their structure"
    )
    alone = {kind: count / facts["params_dense"] for kind, count in facts["left_alone"].items()}
    largest = [f"{escape(kind)} {share:.1%}" for kind, share in alone.items() if share >= 0.001]
    notes.append(f"Left alone: {', '.join(largest) or 'next to nothing'} of the parameters")
    if encoders and facts["encoders"] is None:
        notes.append("Text encoders are counted once the model is on this machine: the download is less")
    return f'{_figures_of(facts, removed)}<p>{fits(facts)}</p><p class="eco-notes">{" · ".join(notes)}</p>'


# How a model is drawn with, by what `learning.footprint.fits` says.
DRAWN = {
    "whole": "draws with everything in memory",
    "offloaded": "draws with one component in memory at a time (<code>enable_model_cpu_offload</code>)",
    "groups": "draws a few layers at a time, slowly (<code>enable_group_offload</code>)",
    "no": "is too large to draw with",
}


def fits(facts: dict) -> str:
    """What a device can do with the model, in a few sentences: estimates."""
    found, need, ratio = facts["fits"], facts["memory"], 1 - facts["params_pruned"] / facts["params_dense"]
    room = f"{found['gpu']} GB" if found["gpu"] else f"This machine's {megabytes(need['here'])}"
    words = f"<b>{room}</b> (estimate): at −{ratio:.0%} it {DRAWN[found['draw']]}"
    words += f" ({megabytes(need['draw'])})" * (found["draw"] == "whole") + ". "
    if found["dense"] != found["draw"]:
        words += f"The dense model {DRAWN[found['dense']]}. "
    elif found["draw"] != "whole" and found["cut"]:
        words += f"From −{ceil(100 * found['cut'])} % on it is drawn with everything in memory. "
    where = "there" if found["gpu"] else "here"
    if found["learn"] == "no":
        words += f"Learning takes {megabytes(need['learn'])}: too much to learn it {where}. "
    elif found["learn"] == "streamed":
        words += (
            f"It can be learned {where} with its weights in main memory ({megabytes(need['streamed'])} on "
        )
        words += f"the GPU, in place of {megabytes(need['learn'])}): slower, how much is not measured. "
    elif need["learn"] > 1e9:
        words += f"It can be learned {where} ({megabytes(need['learn'])})."
    return words


def _figures_of(facts: dict, removed: float) -> str:
    return figures(
        [
            (
                "Parameters of the denoiser",
                millions(facts["params_pruned"]),
                f"of {millions(facts['params_dense'])}, −{removed:.0%}",
            ),
            (
                "Download" if facts["bytes_of"] == "pipeline" else "Download of the denoiser",
                megabytes(facts["bytes_pruned"]),
                f"predicted; dense {megabytes(facts['bytes_dense'])}",
            ),
            (
                "Can be removed at most",
                f"{facts['ceiling']:.0%}",
                f"what its {facts['units']} hold",
            ),
        ]
    )
