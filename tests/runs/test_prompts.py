"""A person's own prompts: read, divided, learned on, judged by, and named on the card."""

import pytest

from ecodiff import LearnConfig
from ecodiff.checkpoints import card
from ecodiff.errors import BudgetError
from ecodiff.pruning.scores import Scores
from ecodiff.runs import Run
from ecodiff.runs.prompts import LONGEST, MOST, parse, read, set_aside


def test_one_a_line_each_once():
    assert parse(" a cat \n\na dog\na cat\n") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("  \n", "no prompts"),
        ("\n".join(map(str, range(MOST + 1))), "too many"),
        ("x" * (LONGEST + 1), "characters"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(BudgetError, match=says):
        parse(text)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BudgetError, match="cannot be read"):
        read(tmp_path / "p.txt")


@pytest.mark.parametrize("count", [1, 9, 10, 11, 256])
def test_no_prompt_both_teaches_and_judges(count):
    prompts = [f"prompt {index}" for index in range(count)]
    learn, held = set_aside(prompts)
    assert set(learn) | set(held) == set(prompts) and not set(learn) & set(held)
    assert len(held) == (count // 5 if count >= 10 else 0)


def test_a_run_keeps_them_apart(tmp_path):
    learn, held = set_aside([f"prompt {index}" for index in range(20)])
    config = LearnConfig(warm_steps=1, steps=0)
    Run.create(tmp_path / "own", "emoji-sdxl", config, learn, "fast", held)
    run = Run.open(tmp_path / "own")
    assert run.learned_on == learn and run.judged_on == held
    other = Run.create(tmp_path / "other", "emoji-sdxl", config, [], "fast")
    assert len(other.learned_on) >= 256 and not set(other.learned_on) & set(other.judged_on)


def test_the_plan_says_whose_they_were(tmp_path, tiny_sdxl):
    config = LearnConfig(warm_steps=1, steps=0)
    for prompts, whose in ((["a cat"], "1 of the person who pruned it"), ([], None)):
        run = Run.create(tmp_path / str(len(prompts)), "emoji-sdxl", config, prompts)
        Scores.unranked(tiny_sdxl.unet).save(run.folder / "scores.safetensors")
        assert run.plan(0.1).metadata.get("prompts") == whose
    assert "about.get" not in card.model_card(tiny_sdxl)
