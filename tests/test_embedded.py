"""What ships: small enough files, SDXL's proportions, a model that draws what it is asked for."""

import json

import pytest
import torch

import ecodiff
from ecodiff import catalog
from ecodiff.learning import scoring
from ecodiff.metrics.fidelity import generate
from ecodiff.units import PRESET_KINDS, PUBLISHED_KINDS

EMBEDDED = [name for name, model in catalog.MODELS.items() if model.embedded]


@pytest.fixture(scope="module")
def emoji():
    built = ecodiff.load("emoji-sdxl")
    built.set_progress_bar_config(disable=True)
    return built


def test_every_file_is_small_and_none_is_a_pickle():
    files = [file for file in catalog.EMBEDDED.rglob("*") if file.is_file()]
    assert all(file.stat().st_size < 9_500_000 for file in files)
    assert not {file.suffix for file in files} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def test_most_parameters_can_be_pruned(emoji):
    for kinds, most in ((PUBLISHED_KINDS, 0.4), (PRESET_KINDS, 0.8)):
        groups = ecodiff.find_groups(emoji.unet, kinds)
        scores = ecodiff.Scores.of(emoji.unet, {g.name: torch.zeros(g.size) for g in groups})
        assert scores.ceiling >= most


@pytest.mark.parametrize("name", [*EMBEDDED, "sdxl"])
def test_prompts_to_judge_by_are_not_learned_on(name):
    model = catalog.find(name)
    learned, judged = set(model.prompts("calibration")), set(model.prompts("heldout"))
    assert len(learned) == 512 and len(judged) == 64 and not learned & judged


# emoji-flux draws the right emoji for 92 % of captions (its card), and mixes up the colours of circles.
@pytest.mark.parametrize("name", ["emoji-sdxl", "emoji-turbo"])
def test_it_draws_colours_it_is_asked_for(name):
    model, pipe = catalog.MODELS[name], ecodiff.load(name)
    pipe.set_progress_bar_config(disable=True)

    def mean_colour(prompt):
        image = generate(pipe, prompt, seed=0, **model.drawing()).image
        assert image.size == (64, 64)
        pixels = torch.tensor(list(image.getdata()), dtype=torch.float32).view(64, 64, 3)
        return pixels[16:48, 16:48].mean((0, 1))

    red, blue = mean_colour("large red circle"), mean_colour("large blue circle")
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_card_says_what_the_report_measured(name):
    folder = catalog.EMBEDDED / name
    report, card = json.loads((folder / "report.json").read_text()), (folder / "README.md").read_text()
    assert f"{report['top1']:.3f}" in card and f"{report['top5']:.3f}" in card
    assert (folder / "contact-sheet.png").is_file() and "Microsoft" in card
    told = [file.name for file in folder.rglob("*.json") if "_name_or_path" in file.read_text()]
    assert not told, "a folder of the machine that trained it"


def test_learned_masks_beat_random_and_magnitude(emoji):
    """A small version of benchmarks/fidelity: one size, few prompts, one step of warm start."""
    from ecodiff import catalog
    from ecodiff.metrics.fidelity import compare

    model = catalog.MODELS["emoji-sdxl"]
    config = ecodiff.LearnConfig(
        ratio=0.2, warm_steps=2, steps=1, inference_steps=8, guidance_scale=model.guidance_scale
    )
    scores = {
        "learned": ecodiff.learn_masks(emoji, model.prompts("calibration"), config),
        "magnitude": ecodiff.Scores.of(emoji.unet, scoring.magnitude(emoji)),
        "random": ecodiff.Scores.of(emoji.unet, scoring.random(emoji)),
    }
    error = {}
    for name, ranking in scores.items():
        small = ecodiff.variant(emoji, ranking.plan(ratio=0.2))
        prompts = model.prompts("heldout")[:4]
        report = compare(emoji, small, prompts, steps=8, guidance_scale=model.guidance_scale)
        error[name] = report["mean"]["latent_error"]
    assert error["learned"] < 0.5 * error["random"] and error["learned"] < 0.8 * error["magnitude"]
