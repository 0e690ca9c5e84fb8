"""ZeroGPU as far as it can be had here: the real page and the real `spaces` package on the stand-in."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import ecodiff
from benchmarks.server import free_port, serve
from ecodiff import catalog, machine
from ecodiff.app import server, tasks
from ecodiff.pruning.plan import PrunePlan
from ecodiff.pruning.scores import Scores
from ecodiff.runs.folder import Run
from ecodiff.runs.loop import advance
from tests.checkpoints.test_folders import some_plan

SEVERAL = {"CHUNK_SECONDS": "1"}  # of learning a call: the tiny model takes several
ONE_STEP = {"CHUNK_SECONDS": "0"}  # a call makes one step at least: here just that, however fast it is


@contextmanager
def space(folder: Path, **settings: str):
    """The app and its scheduler; yields (address, what the scheduler was asked so far)."""
    port, log = free_port(), folder / "scheduler.jsonl"
    with log.open("w") as out:
        scheduler = subprocess.Popen(
            [sys.executable, "-m", "tests.zerogpu.scheduler", str(port)],
            stdout=out,
            env=os.environ | settings,
            start_new_session=True,
        )
    settings = SEVERAL | {"OMP_NUM_THREADS": "1"} | settings
    settings["SPACES_ZERO_DEVICE_API_URL"] = f"http://127.0.0.1:{port}"

    def asked(path: str) -> list[dict]:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in lines if line.get("path") == path]

    try:
        with serve(folder, module="tests.zerogpu.space", **settings) as address:
            yield Client(address, verbose=False), asked
    finally:
        os.killpg(scheduler.pid, signal.SIGKILL)


@pytest.fixture
def model(tiny_sdxl, tmp_path):
    tiny_sdxl.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def reference(tiny_sdxl, model, tmp_path):
    """Scores of the same run, learned in one go."""
    known = catalog.find(model)
    config = known.learn_config("fast", 0.2)
    run = Run.create(tmp_path / "alone", model, config, known.prompts("calibration"))
    torch.set_num_threads(1)
    assert advance(run, ecodiff.load(model))
    return run.scores()


def learn(client, run: str, between=lambda status: None) -> dict:
    """Call after call, as the page does; a call whose worker was killed is made again."""
    for _ in range(200):
        try:
            found = client.predict(run, api_name="/prune_step")
        except AppError as error:
            assert "aborted" in str(error)
            found = client.predict(run, api_name="/prune_status")
        if found["stage"] not in ("interrupted", "calibrating"):
            return found
        between(found)
    raise AssertionError(found)


def same(a: Scores, b: Scores) -> bool:
    return all(torch.equal(values, b.values[name]) for name, values in a.values.items())


def test_a_run_in_many_calls_whose_workers_are_killed(model, reference, tmp_path):
    with space(tmp_path) as (client, asked):
        run = client.predict(model, 0.2, "fast", api_name="/prune_start")["run"]

        def kill():
            with suppress(ProcessLookupError):
                os.kill(int(asked("/allow")[-1]["pid"]), signal.SIGKILL)

        def kill_soon(status):
            """Every third call: its worker, while it learns."""
            if len(asked("/schedule")) % 3 == 0:
                timers.append(threading.Timer(0.6, kill))
                timers[-1].start()

        timers: list[threading.Timer] = []
        assert learn(client, run, kill_soon)["stage"] == "finished"
        for timer in timers:
            timer.join()
        calls = len(asked("/schedule"))
        assert any((tmp_path / "runs" / "recordings").glob("*/36.safetensors")), "calls were not recorded"
        assert calls > 2 and len(asked("/allow")) > 1, "the run took one call, or no worker was lost"
        assert same(Run.open(tmp_path / "runs" / run).scores(), reference)

        # Hot swap: a warm worker draws at two sizes, a fresh one draws the same.
        options = (run, 0.2, "red apple", 0, 2, 3.0, True)
        first = client.predict(*options, api_name="/compare")[2]
        assert client.predict(run, 0.3, *options[2:], api_name="/compare")[2]["digest"] != first["digest"]
        kill()
        time.sleep(0.5)
        again = client.predict(*options, api_name="/compare")[2]
        assert again["latent_error"] == pytest.approx(first["latent_error"], rel=1e-3)
        assert client.predict(run, 0.2, True, api_name="/download")[1]["bytes"] > 10_000
        # What was brought needs no learning, and is not asked to.
        plan = client.predict(run, 0.2, api_name="/plan_file")
        brought = client.predict(model, [handle_file(plan)], api_name="/bring")
        assert brought["stage"] == "finished"
        assert client.predict(brought["run"], api_name="/prune_step")["stage"] == "finished"
        assert client.predict(brought["run"], brought["size"], api_name="/cut")["digest"] == first["digest"]
        # Measured by now, so less than a full call is asked for.
        assert float(asked("/schedule")[-1]["durationSeconds"]) < machine.UNKNOWN_SECONDS


def test_a_ranking_in_one_step_goes_on_call_after_call(model, tmp_path):
    """The default preset: statistics, orders and their errors, a few parts a call; one worker is lost."""
    with space(tmp_path, CHUNK_SECONDS="4") as (client, asked):
        preset = client.predict(model, api_name="/default_preset")
        run = client.predict(model, 0.2, preset, api_name="/prune_start")["run"]
        shares = []

        def lose_one(status):
            shares.append(status["share"] or 0.0)
            if len(shares) == 3:
                os.kill(int(asked("/allow")[-1]["pid"]), signal.SIGKILL)

        status = learn(client, run, lose_one)
        assert status["stage"] == "finished" and set(status["orders"]) == {"surgeon", "gauss-newton"}
        learning = [share for share in shares if share]
        assert learning == sorted(learning) and len(set(learning)) > 2, "nobody can see that it goes on"
    here = Run.open(tmp_path / "runs" / run)
    alone = Run.create(tmp_path / "alone", model, here.config, here.prompts)
    torch.set_num_threads(1)
    assert advance(alone, ecodiff.load(model))
    assert same(here.scores(), alone.scores())


def test_stop_resume_two_visitors_and_no_quota(model, reference, tmp_path):
    with space(tmp_path, REUSE="0", QUOTA="9", **ONE_STEP) as (client, asked):
        first, second = (client.predict(model, 0.2, "fast", api_name="/prune_start")["run"] for _ in range(2))
        jobs = [client.submit(run, api_name="/prune_step") for run in (first, second)]
        assert [job.result()["stage"] for job in jobs] == ["interrupted"] * 2
        assert client.predict(second, api_name="/prune_stop")["stage"] == "stopped"
        assert client.predict(second, api_name="/prune_step")["stage"] == "stopped"
        assert len(asked("/schedule")) == 2, "a stopped run asked for a GPU"
        with pytest.raises(AppError, match="GPU limit"):
            while True:
                client.predict(first, api_name="/prune_step")
        status = client.predict(first, api_name="/prune_status")
        assert status["step"] > 0 and status["stage"] in ("interrupted", "failed", "finished")
        assert client.predict(second, api_name="/prune_resume")["stage"] == "interrupted"
    with space(tmp_path) as (client, _):  # the next day
        assert learn(client, first)["stage"] == learn(client, second)["stage"] == "finished"
    for run in (first, second):
        assert same(Run.open(tmp_path / "runs" / run).scores(), reference)


def test_healing_goes_on_call_after_call(model, tiny_sdxl, tmp_path):
    plan = PrunePlan(some_plan(tiny_sdxl)).save(tmp_path / "plan.safetensors")
    with space(tmp_path, **ONE_STEP) as (client, asked):
        made = client.predict(model, [handle_file(plan)], api_name="/bring")
        run, size = made["run"], made["size"]
        found = [client.predict(run, size, 1, 8, api_name="/heal")]
        while found[-1]["stage"] == "interrupted" and len(found) < 60:
            found.append(client.predict(run, size, 1, 8, api_name="/heal"))
        steps = [f["step"] for f in found]  # two batches that are recorded, a check, a step, another check
        assert steps[:2] == [1, 2] and steps[-1] == 3 and steps == sorted(steps) and len(steps) > 4
        assert found[-1]["stage"] in ("healed", "unchanged") and found[-1]["before"] > 0
        assert len(asked("/schedule")) == len(found)


def test_what_a_call_asks_for(model, tmp_path):
    here = server.Server(tmp_path / "runs")
    server.use(here)
    run = Run.create(tmp_path / "run", model, catalog.find(model).learn_config("fast", 0.2), ["cat"])
    learning = tasks.LearnRun(str(run.folder))
    assert tasks.seconds_wanted(learning) == machine.UNKNOWN_SECONDS
    here.timings.note(model, load=4.0, step=1.0)
    expected = machine.START_SECONDS + 1.5 * (4.0 + run.config.total_steps)
    assert tasks.seconds_wanted(learning) == expected
    here.timings.note(model, step=100.0, draw=2.0)
    assert tasks.seconds_wanted(learning) == machine.CHUNK_SECONDS + machine.START_SECONDS
    drawing = tasks.DrawImages(str(run.folder), [None], [("cat", 0)])
    assert tasks.seconds_wanted(drawing) == machine.START_SECONDS + 1.5 * 8.0
