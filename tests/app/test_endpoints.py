"""The page by its named endpoints, through gradio_client, on the real app.py."""

import ast
import hashlib
import time
import zipfile

import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import load_file, save_file

import ecodiff
from benchmarks.server import ROOT, serve
from ecodiff.app import limits
from tests.checkpoints.test_folders import some_plan

ENDPOINTS = {
    "/find_models",
    "/predict",
    "/default_preset",
    "/prune_start",
    "/prune_status",
    "/lora",
    "/lora_images",
    "/prune_step",
    "/prune_stop",
    "/prune_resume",
    "/cut",
    "/rename",
    "/delete",
    "/bring",
    "/heal",
    "/push",
    "/compare",
    "/sizes",
    "/download",
    "/plan_file",
    "/example",
    "/pictures",
    "/draw_pictures",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("store")) as url:
        yield Client(url, verbose=False)


def wait(client, run, *stages, steps=0, seconds=300):
    for _ in range(seconds * 2):
        status = client.predict(run, api_name="/prune_status")
        if status["stage"] in stages and status["step"] >= steps:
            return status
        assert status["stage"] != "failed", status["error"]
        time.sleep(0.5)
    raise TimeoutError(status)


def test_endpoints_are_named_and_described(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == ENDPOINTS
    assert all(about.get("description") for about in named.values())


def test_the_docs_have_an_example_of_each(client):
    """Every endpoint is in it, called by names that it has."""
    readme = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    block = next(part for part in readme.split("```") if "from gradio_client import" in part)
    calls = [node for node in ast.walk(ast.parse(block.removeprefix("python"))) if isinstance(node, ast.Call)]
    examples = [
        {word.arg: ast.unparse(word.value).strip("'") for word in call.keywords}
        for call in calls
        if getattr(call.func, "attr", "") == "predict"
    ]
    assert {example["api_name"] for example in examples} == ENDPOINTS
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    for example in examples:
        parameters = {p["parameter_name"]: p for p in named[example.pop("api_name")]["parameters"]}
        assert set(example) <= set(parameters)
        needed = {name for name, p in parameters.items() if not p["parameter_has_default"]}
        assert needed <= set(example), "an argument that has no default is missing"


def test_the_main_job(client, tmp_path):
    found = client.predict("SD 1.5", False, api_name="/find_models")
    assert [row["name"] for row in found["catalogue"]] == ["sd-1.5"] and found["hub"] == []
    predicted = client.predict("emoji-turbo", 0.2, api_name="/predict")
    smaller = client.predict("emoji-turbo", 0.2, text_encoders=0.3, api_name="/predict")
    saved = predicted["bytes_pruned"] - smaller["bytes_pruned"]
    assert saved == pytest.approx(0.3 * predicted["encoders"] * 2, rel=1e-3) and saved > 100_000
    assert client.predict("sdxl", 0.2, api_name="/predict")["encoders"] is None
    assert predicted["params_dense"] == 4_865_476
    assert client.predict("emoji-sdxl", api_name="/default_preset") == "surgeon"
    assert client.predict("emoji-flux", api_name="/default_preset") == "surgeon"
    assert client.predict("sdxl", api_name="/default_preset") == "surgeon"
    assert client.predict("flux2-dev", api_name="/default_preset") == "fast"  # surgeon would take 26 GB
    assert client.predict("flux-dev", api_name="/default_preset") == "surgeon"
    published = client.predict("emoji-turbo", 0.2, "ecodiff", api_name="/predict")
    assert published["ceiling"] < predicted["ceiling"]  # what the preset prunes, as `prune_start` does
    assert predicted["memory"]["draw"] <= predicted["memory"]["learn"] < predicted["memory"]["here"]

    run = client.predict("emoji-turbo", 0.2, "fast", 0, api_name="/prune_start")["run"]
    wait(client, run, "learning", steps=1)
    second = client.predict("emoji-turbo", 0.3, "fast", 1, api_name="/prune_start")
    assert second["stage"] == "queued" and second["ahead"] == 1, "one run at a time on the device"
    with pytest.raises(AppError, match="Stop it first"):
        client.predict(run, api_name="/delete")
    assert client.predict(second["run"], api_name="/prune_stop")["stage"] == "stopped"
    assert client.predict(second["run"], api_name="/delete") == {"deleted": second["run"]}
    with pytest.raises(AppError, match="no such run"):
        client.predict(second["run"], api_name="/prune_status")
    client.predict(run, api_name="/prune_stop")
    stopped = wait(client, run, "stopped")
    assert 0 < stopped["step"] < stopped["steps"]
    client.predict(run, api_name="/prune_resume")
    # the device is shared: an image can be had while the run learns
    _, _, while_learning = client.predict(run, 0.1, "cat", 0, 2, None, api_name="/compare")
    assert while_learning["ms_dense"] > 0
    done = wait(client, run, "finished")
    assert done["step"] == done["steps"] and done["history"][-1]["loss"] > 0

    drawn = client.predict(run, api_name="/pictures")  # while it learned, and repaired since
    assert len(drawn["prompts"]) == len(drawn["dense"]) == 4
    assert drawn["dense"][0].startswith("data:image/webp;base64,")
    for _ in range(240):
        if not client.predict(run, api_name="/prune_status")["drawing"]:
            break
        time.sleep(0.5)
    drawn = client.predict(run, 0.35, api_name="/draw_pictures")
    rows = {row["asked"]: row for row in drawn["sizes"]}
    assert rows[0.2]["repaired"] and rows[0.35]["repaired"]
    assert sum(rows[0.2]["latent_error"]) < sum(rows[0.35]["latent_error"])
    shown = client.predict("emoji-sdxl", api_name="/example")
    assert {row["asked"] for row in shown["pictures"]["sizes"]} == {0.1, 0.2, 0.3, 0.4, 0.5, 0.6}
    cut = client.predict(shown["run"], 0.4, api_name="/cut")
    assert abs(cut["ratio"] - 0.4) < 0.005
    for changed, *more in (("/delete",), ("/rename", "mine"), ("/draw_pictures", 0.33), ("/prune_stop",)):
        with pytest.raises(AppError, match="is the example"):
            client.predict(shown["run"], *more, api_name=changed)

    cuts = [client.predict(run, ratio, api_name="/cut") for ratio in (0.2, 0.4)]
    assert [round(c["ratio"], 2) for c in cuts] == [0.2, 0.4]
    assert cuts[0]["digest"] != cuts[1]["digest"]
    assert abs(cuts[0]["bytes_pruned"] - predicted["bytes_pruned"]) < 30_000
    assert set(cuts[0]["kinds"]) == set(cuts[0]["kept"]) and set(cuts[0]["kinds"].values()) == {
        "heads",
        "ffn",
        "resnet",
    }

    dense, pruned, facts = client.predict(run, 0.2, "red apple", 7, 4, None, api_name="/compare")
    assert Image.open(dense).size == Image.open(pruned).size == (64, 64)
    assert facts["latent_error"] > 0 and facts["digest"] == cuts[0]["digest"]
    assert 0 < facts["step_ms_pruned"] < facts["ms_pruned"]
    low, faster, high = facts["speedup"] or (0.1, 1.0, 9.0)  # None on a busy machine
    assert 0 < low <= faster <= high
    assert facts["peak_dense"] is None, "CUDA counts bytes, a CPU does not"

    job = client.submit(run, [0.4, 0.1], 2, api_name="/sizes")
    found = job.result()
    # What comes between tells Gradio whether the client is still there: without it the work would go on.
    assert [len(part["rows"]) for part in job.outputs()][:2] == [1, 2]
    assert [row["seed"] for row in found["rows"]] == [0, 1] and found["rows"][0]["prompt"]
    small, large = found["means"]
    assert (small["ratio"], large["ratio"]) == (0.1, 0.4)
    assert 0 < small["latent_error"] < large["latent_error"] and small["psnr"] > large["psnr"]
    with pytest.raises(AppError, match="1 to 4 sizes"):
        client.predict(run, [0.1, 0.2, 0.3, 0.4, 0.5], 2, api_name="/sizes")

    path, file = client.predict(run, 0.2, api_name="/download")
    assert file["left_out"] == {}, "only if it is asked for"
    with open(path, "rb") as data:  # noqa: PTH123
        assert hashlib.sha256(data.read()).hexdigest() == file["sha256"]
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    small = ecodiff.load(tmp_path / file["folder"])
    assert sum(p.numel() for p in small.unet.parameters()) == cuts[0]["params_pruned"]
    file = client.predict(run, 0.2, api_name="/plan_file")
    plan = ecodiff.PrunePlan.load(file)
    assert plan.digest == cuts[0]["digest"]
    for brought in (file, path):  # the plan, and the zip of the pruned model
        again = client.predict("emoji-turbo", [handle_file(brought)], api_name="/bring")
        assert again["stage"] == "finished" and again["preset"] == "imported"
        cut = client.predict(again["run"], again["size"], api_name="/cut")
        assert (cut["digest"], cut["ratio"]) == (plan.digest, cuts[0]["ratio"])
        with pytest.raises(AppError, match="one size"):
            client.predict(again["run"], 0.9, api_name="/cut")
    with pytest.raises(AppError, match="does not fit the model"):
        client.predict("emoji-flux", [handle_file(file)], api_name="/bring")
    assert client.predict(run, " my \n apple ", api_name="/rename")["name"] == "my apple"

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, 128), f"{layer}.lora_B.weight": torch.ones(128, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    given = handle_file(tmp_path / "lora.safetensors")
    fitting, made = client.predict(run, 0.2, given, api_name="/lora")
    kept = small.unet.get_submodule(layer.removeprefix("unet.")).out_features
    assert load_file(fitting)[f"{layer}.lora_B.weight"].shape == (kept, 2), made["report"]

    def drawn():
        return [Image.open(path).tobytes() for path in client.predict(*asked, api_name="/compare")[:2]]

    asked = (run, 0.2, "red apple", 3)
    before, with_lora = drawn(), client.predict(run, 0.2, given, *asked[2:], api_name="/lora_images")
    assert all(Image.open(path).tobytes() != plain for path, plain in zip(with_lora, before, strict=True))
    assert drawn() == before, "the LoRA stayed in the pipelines"


def test_text_encoders_are_cut_too(client, tmp_path):
    asked = {"model": "emoji-turbo", "ratio": 0.2, "preset": "magnitude-l2", "text_encoders": 0.3}
    run = client.predict(**asked, api_name="/prune_start")["run"]
    wait(client, run, "finished")
    cut = client.predict(run, 0.2, api_name="/cut")
    dense, pruned = (cut["text_encoders"][f"params_{which}"] for which in ("dense", "pruned"))
    assert abs(pruned / dense - 0.7) < 0.02
    first, again = (client.predict(run, 0.2, "red apple", 7, 4, None, api_name="/compare") for _ in range(2))
    assert first[2]["latent_error"] == again[2]["latent_error"] > 0
    path, file = client.predict(run, 0.2, api_name="/download")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    small = ecodiff.load(tmp_path / file["folder"])
    assert pruned == sum(
        p.numel() for e in (small.text_encoder, small.text_encoder_2) for p in e.parameters()
    )
    brought = client.predict("emoji-turbo", [handle_file(path)], api_name="/bring")
    found = client.predict(brought["run"], brought["size"], api_name="/cut")
    assert (found["digest"], found["text_encoders"]) == (cut["digest"], cut["text_encoders"])
    too_much = client.predict(**asked | {"text_encoders": 0.9}, api_name="/prune_start")["run"]
    for _ in range(240):
        status = client.predict(too_much, api_name="/prune_status")
        if status["stage"] == "failed":
            break
        time.sleep(0.5)
    assert status["error"].startswith("Text encoders: At most")


@pytest.mark.parametrize(
    ("arguments", "endpoint", "message"),
    [
        (("nothing", 0.2), "/predict", "no model 'nothing'"),
        (("somebody/something", 0.2), "/predict", "no network"),
        (("emoji-sdxl", 0.95), "/predict", "84.4%"),
        (("emoji-sdxl", 0.2, "magic", 0), "/prune_start", "preset"),
        (("emoji-sdxl", 0.95, "fast", 0), "/prune_start", "84.4%"),
        (("../../etc/passwd",), "/prune_status", "not the id of a run"),
        (("0" * 32,), "/prune_stop", "no such run"),
        (("0" * 32, 0.2), "/download", "no such run"),
    ],
)
def test_bad_requests_are_one_sentence(client, arguments, endpoint, message):
    with pytest.raises(Exception, match=message) as error:
        client.predict(*arguments, api_name=endpoint)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("wrong", [None, "x", [], {"a": 1}, 1e308])
def test_what_is_no_argument_is_refused_in_words(client, wrong):
    """Any JSON in the place of any argument: what was expected is said, not what Python stumbled over."""
    given = {"str": "x", "float": 0.2, "int": 1, "bool": True, "list[float]": [0.2]}
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    refused = set()
    for endpoint in ENDPOINTS - {"/bring", "/lora", "/lora_images"}:  # files have checks of their own
        parameters = endpoints[endpoint]["parameters"]
        for at, parameter in enumerate(parameters):
            types = [p["python_type"]["type"] for p in parameters]
            values = [given.get(kind) for kind in types]
            values[at] = wrong
            try:
                client.predict(*values, api_name=endpoint)
            except AppError as error:
                name, _, words = str(error).partition(" is ")
                if name == parameter["parameter_name"]:
                    refused.add(words)
                assert "not supported between" not in str(error) and "object" not in str(error), endpoint
    assert refused


def test_files_of_the_machine_are_not_served(client):
    for path in ("/etc/passwd", "app.py", "../app.py", "ecodiff/cli.py"):
        assert httpx.get(f"{client.src}gradio_api/file={path}").status_code in (403, 404)


def test_visitors_of_a_shared_server(tmp_path):
    """Each has a share of it, and none finds what is another's."""
    plan = ecodiff.PrunePlan(some_plan(ecodiff.load("emoji-turbo"))).save(tmp_path / "plan.safetensors")
    with serve(tmp_path, ECODIFF_SHARED="1") as url:
        ann, bob = (
            Client(url, verbose=False, headers={"x-forwarded-for": address, "x-ip-token": address})
            for address in ("192.0.2.1", "192.0.2.2")
        )

        def bring(client):
            return client.predict("emoji-turbo", [handle_file(plan)], api_name="/bring")["run"]

        hers = [bring(ann) for _ in range(limits.MAX_RUNS)]
        with pytest.raises(AppError, match="as many as one visitor may keep"):
            bring(ann)
        his = bring(bob)
        ann.predict(hers.pop(), api_name="/delete")
        hers.append(bring(ann))

        started = [bob.predict("emoji-turbo", 0.2, "fast", 0, api_name="/prune_start") for _ in range(2)]
        with pytest.raises(AppError, match="learning or waiting already"):
            bob.predict("emoji-turbo", 0.2, "fast", 0, api_name="/prune_start")
        for status in started:
            bob.predict(status["run"], api_name="/prune_stop")

        # No answer and no address tells of a run to whom its id was not given.
        known = {path.name for path in (tmp_path / "runs").iterdir()}
        assert {*hers, his} <= known
        pages = [f"{url}/", f"{url}/config", f"{url}/gradio_api/info"]
        places = (tmp_path / "runs", tmp_path, tmp_path / "salt", f"{tmp_path}/runs/../salt")
        pages += [f"{url}/gradio_api/file={place}" for place in places] + [f"{url}/gradio_api/queue/status"]
        for page in pages:
            answer = httpx.get(page)
            assert not any(run in answer.text for run in known), page
            assert "salt" not in page or answer.status_code in (403, 404), page
        near = his[:-1] + ("0" if his[-1] != "0" else "1")
        with pytest.raises(AppError, match="no such run"):
            ann.predict(near, api_name="/prune_status")
        assert "192.0.2" not in "".join(p.read_text() for p in (tmp_path / "runs").glob("*/run.json"))
