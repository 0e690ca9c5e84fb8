"""A run's pictures: dense ones drawn once, sizes replaced, never longer than their share; the examples."""

import base64
import io
import json

import pytest
from PIL import Image

import ecodiff
from ecodiff import LearnConfig
from ecodiff.app.ui import strip
from ecodiff.pruning.scores import Scores
from ecodiff.runs import Run, RunStore
from ecodiff.runs.examples import EXAMPLES, example_of
from ecodiff.runs.pictures import COUNT, FILE, Painter, encoded, load


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


def test_small_images_are_kept_exactly_and_large_ones_made_small():
    small = Image.effect_noise((64, 64), 90).convert("RGB")
    assert decoded(encoded(small)).convert("RGB").tobytes() == small.tobytes()
    assert max(decoded(encoded(Image.effect_noise((1024, 512), 90))).size) == 256


def test_sizes_are_drawn_from_the_same_noise_and_kept(tmp_path):
    pipe = ecodiff.load("emoji-turbo")
    pipe.set_progress_bar_config(disable=True)
    run = Run.create(tmp_path / "run", "emoji-turbo", LearnConfig(warm_steps=1, steps=0), [])
    assert load(run.folder) == {}
    scores, painter = Scores.unranked(pipe.unet), Painter(run, pipe)
    begun = painter.begin()
    assert load(run.folder) == begun and begun["sizes"] == [] and len(begun["dense"]) == COUNT
    assert strip.strip(begun, [0.3], steps=1).count("<img") == COUNT
    assert strip.strip(begun, [0.3]) == "" == strip.curve(begun) and "Nothing was" in strip.missing(
        begun, 0.3
    )
    for ratio in (0.3, 0.1, 0.3):
        plan = scores.plan(ratio=ratio)
        found = painter.paint(ecodiff.variant(pipe, plan), plan, ratio, repaired=ratio == 0.1)
    assert found["dense"] == begun["dense"]
    assert load(run.folder) == found and [row["asked"] for row in found["sizes"]] == [0.1, 0.3]
    assert found["prompts"] == run.judged_on[:COUNT] and len(found["dense"]) == COUNT
    small, large = found["sizes"]
    assert abs(small["ratio"] - 0.1) < 0.01 and small["repaired"] and not large["repaired"]
    assert sum(small["latent_error"]) < sum(large["latent_error"])

    html = strip.strip(found, [0.3], steps=16)
    assert html.count("<img") == 2 * COUNT and "weights not repaired yet" in html and "−10%" not in html
    assert " of 16 steps" in html and " of 0 " not in strip.strip(found, [0.3])
    assert strip.curve(found) == "", "one repaired size is no curve"
    assert strip.drawn(found, 0.1) and not strip.drawn(found, 0.2)
    assert "−10%" in strip.missing(found, 0.2)
    (run.folder / FILE).write_text("[]")
    assert load(run.folder) == {}


def test_pictures_take_a_quarter_of_the_time(tmp_path):
    run = Run.create(tmp_path / "run", "emoji-turbo", LearnConfig(warm_steps=1, steps=0), [])
    painter = Painter(run, None)
    assert not painter.due(30.0, 10.0) and painter.due(40.0, 10.0)
    painter._spent, painter._last = 12.0, 6.0
    assert not painter.due(71.0, 10.0) and painter.due(72.0, 10.0)


@pytest.mark.parametrize("model", ["emoji-sdxl", "emoji-turbo", "emoji-flux"])
def test_an_example_is_a_finished_run(tmp_path, model):
    store = RunStore(tmp_path / "runs")
    run = store.open(example_of(model))
    assert run.finished and run.model == model and run.id in EXAMPLES
    assert json.loads((run.folder / FILE).read_text())["prompts"] == run.judged_on[:COUNT]
    assert {row["repaired"] for row in load(run.folder)["sizes"]} == {True}
    points = [f'data-percent="{percent}"' for percent in (10, 20, 30, 40, 50, 60)]
    curve = strip.curve(load(run.folder))
    assert all(point in curve for point in points), (
        "a point asks for the size that was drawn, not what came of it"
    )
    for row in load(run.folder)["sizes"]:  # what was drawn is what the ranking cuts today
        facts = run.plan(row["asked"]).metadata
        assert row["ratio"] == 1 - facts["params_pruned"] / facts["params_dense"]
    assert store.open(run.id).folder == run.folder and list(store.root.iterdir()) == [run.folder]


def test_there_is_no_example_of_others():
    assert example_of("sdxl") is None
