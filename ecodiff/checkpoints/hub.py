"""The Hugging Face Hub: pruned pipelines and plans go there, plans come from there."""

import inspect
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import get_args

import diffusers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata

from .. import catalog
from ..checks import needs_an_image
from ..errors import CheckpointError
from ..pipelines import DENOISERS
from ..pruning.plan import PLAN_FILE, PrunePlan
from ..storage import MAX_FILE_BYTES, in_short
from .card import front_matter
from .sign_in import NETWORK_ERRORS


def is_repo(name: str) -> bool:
    """True for `user/name`, where there is no such file."""
    return bool(re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name)) and not Path(name).exists()


def offers_sign_in() -> bool:
    """True where a person can sign in on the page: on a Space with OAuth."""
    return bool(os.environ.get("OAUTH_CLIENT_ID"))


def require_access(repo_id: str, token: str = "") -> None:
    """Raise CheckpointError if a person may not read a repository, gated or private, though it may be here.

    Also where the Hub does not answer: whether somebody has a right is not guessed.

    Args:
        token: of the person; empty: what this machine may read, everybody may who uses it.
    """
    api = HfApi(token=token or None, library_name="ecodiff")
    try:
        api.auth_check(repo_id)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        url, sign = f"{api.endpoint}/{repo_id}", 'sign in with Hugging Face, under "Find a model"'
        how = sign if offers_sign_in() else "give this machine a token (`hf auth login`, or HF_TOKEN)"
        if isinstance(error, GatedRepoError):
            why = f"{repo_id} is gated. Accept its licence on {url}, {how}, and try again."
        else:
            why = f"There is no {repo_id} that you may read. Is it private? Then {how}, and try again."
        raise CheckpointError(why) from None
    except (HfHubHTTPError, HFValidationError, *NETWORK_ERRORS, OSError) as error:
        raise CheckpointError(_words(error, repo_id, "read")) from None


FOUND = 20  # models of one search
_ASKED = 60  # of which so many are asked for, as some cannot be pruned


def search(words: str, token: str | bool | None = None) -> list[dict]:
    """Models on the Hub that match words and that ecodiff can prune, those that are downloaded most first.

    Returns:
        [{"id", "pipeline": its class, "downloads": of 30 days, "licence", "gated": True if its licence must
        be accepted first, "url"}]

    Raises:
        CheckpointError: the Hub cannot be reached.
    """
    api = HfApi(token=token, library_name="ecodiff")
    try:
        asked = {"search": words, "filter": "diffusers", "sort": "downloads", "limit": _ASKED}
        found = list(api.list_models(**asked, expand=["config", "downloads", "gated", "tags"]))
    except (HfHubHTTPError, *NETWORK_ERRORS, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"it answered {status}" if status else "there is no connection to it"
        raise CheckpointError(f"The Hub was not searched: {why}.") from None
    rows = []
    for model in found:
        name = str(((model.config or {}).get("diffusers") or {}).get("_class_name"))
        if not prunable(name):
            continue
        licence = next((t.partition(":")[2] for t in model.tags or [] if t.startswith("license:")), "unknown")
        about = {"id": model.id, "pipeline": name, "downloads": model.downloads or 0, "licence": licence}
        rows.append(about | {"gated": bool(model.gated), "url": f"{api.endpoint}/{model.id}"})
    return rows[:FOUND]


def find_models(words: str, token: str | bool | None = None, hub_too: bool = True) -> dict:
    """Models that match words, of the catalogue and of the Hub.

    Returns:
        {"catalogue": [{"name", "title", "id", "licence"}], "hub": [what `search` returns], "error": why the
        Hub was not searched, or ""}; best matches and most downloads first
    """
    known = catalog.search(words)
    found: dict = {"error": "", "hub": []}
    found["catalogue"] = [
        {"name": m.name, "title": m.title, "id": "" if m.embedded else m.source, "licence": m.licence}
        for m in known
    ]
    if hub_too and words.strip():
        try:
            sources = {model.repository for model in known}
            found["hub"] = [row for row in search(words.strip()[:96], token) if row["id"] not in sources]
        except CheckpointError as error:
            found["error"] = str(error)
    return found


@cache
def prunable(pipeline: str) -> bool:
    """True if a class of pipelines draws from prompts alone with a denoiser that the suite has pruned."""
    cls = getattr(diffusers, pipeline, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)) or needs_an_image(cls):
        return False
    parts = inspect.signature(cls).parameters
    kinds = [parts[name].annotation for name in DENOISERS if name in parts]
    return any(catalog.supported(one.__name__) for kind in kinds for one in get_args(kind) or (kind,))


def push(folder: str | Path, repo_id: str, token: str | None = None, private: bool = True) -> str:
    """Upload a pruned pipeline folder, with its card. Returns the address.

    Args:
        repo_id: "user/name", or "name" for the token's owner. It is made if it is not there.
        token: None: the one of this machine (`hf auth login`).
        private: of a new repository.

    Raises:
        CheckpointError: not a pruned folder, or the Hub refused it, or the repository holds something else.
    """
    folder = Path(folder)
    if not (folder / PLAN_FILE).is_file():
        raise CheckpointError(f"{folder} is not a pruned pipeline: it has no {PLAN_FILE}.")
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    card = (folder / "README.md").read_text(encoding="utf-8") if "README.md" in files else ""
    return _upload(files, card, repo_id, token, private)


def push_plan(plan: PrunePlan, repo_id: str, token: str | None = None, private: bool = True) -> str:
    """Upload a plan alone, with a card that says how to use it. Returns the address.

    Args, Raises: as `push`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = plan.save(Path(folder) / PLAN_FILE)
        return _upload({PLAN_FILE: file}, _plan_card(plan), repo_id, token, private)


def pull_plan(repo_id: str, token: str | bool | None = None) -> Path:
    """Download the plan of a repository, and nothing else; returns where it lies in the Hub's cache.

    Args:
        token: None: the one of this machine; False: none.

    Raises:
        CheckpointError: no such repository, no plan in it, too large, or no connection.
    """
    try:
        size = get_hf_file_metadata(hf_hub_url(repo_id, PLAN_FILE), token=token, timeout=20).size
        if size is None or size > MAX_FILE_BYTES:
            raise CheckpointError(f"{PLAN_FILE} in {repo_id} is too large for a plan.")
        return Path(hf_hub_download(repo_id, PLAN_FILE, token=token, etag_timeout=20))
    except EntryNotFoundError:
        raise CheckpointError(f"{repo_id} has no {PLAN_FILE}: it was not pruned with ecodiff.") from None
    except (HfHubHTTPError, HFValidationError, *NETWORK_ERRORS, OSError) as error:
        raise CheckpointError(_words(error, repo_id, "read")) from None


def _upload(files: dict[str, Path], card: str, repo_id: str, token: str | None, private: bool) -> str:
    """One commit with these files and the card, and without what an earlier push left there."""
    api = HfApi(token=token, library_name="ecodiff")
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        there = set(api.list_repo_files(made.repo_id)) - {".gitattributes"}
        if PLAN_FILE not in there and there - {"README.md"}:
            raise CheckpointError(f"{made.repo_id} holds something else. Name a new repository.")
        contents = files | {"README.md": card.replace("THIS FOLDER", made.repo_id).encode()}
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        stale = [path for path in sorted(there - set(contents)) if _of_a_pipeline(path)]
        operations += [CommitOperationDelete(path) for path in stale]
        api.create_commit(made.repo_id, operations, commit_message="Pruned with ecodiff")
        return str(made)
    except LocalTokenNotFoundError:
        raise CheckpointError(
            "There is no Hugging Face token on this machine. Run `hf auth login`, or give --token."
        ) from None
    except (HfHubHTTPError, HFValidationError, *NETWORK_ERRORS, OSError, RuntimeError) as error:
        raise CheckpointError(_words(error, repo_id, "write to")) from None
    except ValueError as error:  # the Hub read the card's metadata and refused it
        raise CheckpointError(f"The Hub refused the model card of {repo_id}: {in_short(error)}") from None


def _of_a_pipeline(path: str) -> bool:
    """True for files that `checkpoint.save` may have written; pictures and licences are their owner's."""
    inside = "/" in path and Path(path).suffix in (".safetensors", ".json", ".py", ".txt", ".model")
    return inside or path == "model_index.json"


def _words(error: Exception, repo_id: str, what: str) -> str:
    """What went wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not the name of a repository. Give user/name."
    if status == 401 or (isinstance(error, RepositoryNotFoundError) and what == "read"):
        return (
            f"The Hub has no {repo_id} that this token may {what}: the name is wrong, or the token is "
            "missing, expired or without that right."
        )
    if isinstance(error, GatedRepoError) or status == 403:
        return f"The Hub does not let this token {what} {repo_id}. It needs that right, or another name."
    if status:
        return f"The Hub answered {status} for {repo_id}. Nothing is lost here; try again later."
    return f"The connection to the Hub failed ({type(error).__name__}). Nothing is lost here; try again."


def _plan_card(plan: PrunePlan) -> str:
    about = plan.metadata
    model = str(about.get("model", "MODEL"))
    known = catalog.find(model)
    front = front_matter(known, "ecodiff", ["ecodiff", "pruning-plan"])
    removed = f", {about['ratio']:.1%} of the denoiser removed" if "ratio" in about else ""
    return f"""{front}
# A plan to prune {model}

Which units of {model} stay{removed} (`{plan.digest}`). No weights are in it.

```bash
python -m ecodiff import {model} "THIS FOLDER" --run run
python -m ecodiff prune run --out small
```
"""
