"""Gated models are opened with the visitor's own rights, on a stand-in of the Hub."""

import time
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from benchmarks.server import serve
from ecodiff import catalog
from ecodiff.app.tasks import LearnRun
from ecodiff.app.worker import Job
from tests import hub

GATED = "ann/gated"


@pytest.fixture
def stand_in():
    with hub.running() as served:
        offer(served)
        yield served


def offer(stand_in) -> None:
    """A model that only ann may read."""
    folder = Path(catalog.MODELS["emoji-turbo"].source)
    files = (file for file in folder.rglob("*") if file.is_file() and file.parent.name != "example")
    stand_in.repos[GATED] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    stand_in.private[GATED], stand_in.gated[GATED] = False, {"ann"}


def finished(client, run) -> dict:
    for _ in range(240):
        found = client.predict(run, api_name="/prune_status")
        if found["stage"] not in ("queued", "loading", "learning", "calibrating"):
            return found
        time.sleep(0.5)
    raise TimeoutError(found)


def test_on_a_space_everybody_needs_rights_of_his_own(stand_in, tmp_path):
    settings = hub.settings(stand_in.address, tmp_path) | {"SPACE_ID": "ann/ecodiff"}
    with serve(tmp_path, **settings) as url:
        client = Client(url, verbose=False)

        def begin(token):
            return client.predict(GATED, 0.2, "magnitude-l2", token=token, api_name="/prune_start")["run"]

        for token in ("", "hf_bob"):
            with pytest.raises(AppError, match=f"{GATED} is gated. Accept its licence on {stand_in.address}"):
                begin(token)
        found = finished(client, begin("hf_ann"))
        assert found["stage"] == "finished", found["error"]
        with pytest.raises(AppError, match="is gated"):  # its weights are here now
            begin("hf_bob")
        with pytest.raises(AppError, match="is gated"):  # and its shapes
            client.predict(GATED, 0.2, token="hf_bob", api_name="/predict")
        llama = catalog.MODELS["hidream-i1"].parts["text_encoder_4"]  # its own repository is everybody's
        for repository in (catalog.MODELS["hidream-i1"].source, llama):
            stand_in.repos[repository], stand_in.private[repository] = {"README.md": b""}, False
        stand_in.gated[llama] = {"ann"}
        with pytest.raises(AppError, match=f"{llama} is gated"):
            client.predict("hidream-i1", 0.2, "fast", token="hf_bob", api_name="/prune_start")
        with pytest.raises(AppError, match="Could not get HiDream-ai"):
            client.predict("hidream-i1", 0.2, "fast", token="hf_ann", api_name="/prune_start")
        stand_in.gone = True
        with pytest.raises(AppError, match="The connection to the Hub failed"):
            begin("hf_bob")
        stand_in.gone, stand_in.private[GATED] = False, True
        with pytest.raises(AppError, match=f"There is no {GATED} that you may read"):
            begin("hf_bob")
    with serve(tmp_path, **settings) as url:  # another process, which nobody has given a token
        asked = (found["run"], 0.2, "a red apple", 0, 1, -1, False)
        dense, pruned, _ = Client(url, verbose=False).predict(*asked, api_name="/compare")
        assert dense and pruned, "what was downloaded is enough"
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and b"hf_ann" in file.read_bytes()]
    assert not kept, "the token is in memory only"


def test_a_model_that_is_fetched_without_rights(stand_in, tmp_path):
    """At home the machine's own token counts."""
    home = tmp_path / "home"
    home.mkdir()
    for token, right in (("hf_bob", False), ("hf_ann", True)):
        with serve(home, **hub.settings(stand_in.address, home), HF_TOKEN=token) as url:
            client = Client(url, verbose=False)
            if right:
                assert client.predict(GATED, 0.2, api_name="/predict")["params_dense"] > 0
                continue
            with pytest.raises(AppError, match="its licence accepted and a token"):
                client.predict(GATED, 0.2, api_name="/predict")
            assert client.predict(GATED, 0.2, token="hf_ann", api_name="/predict")["params_dense"] > 0


def test_a_token_is_not_printed():
    assert "hf_secret" not in repr(Job(None, token="hf_secret")) + repr(LearnRun("folder", "hf_secret"))
