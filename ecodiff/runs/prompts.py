"""A person's own prompts: read, and divided into those to learn on and those to judge by."""

from pathlib import Path

from ..errors import BudgetError

MOST, LONGEST = 4096, 2000  # prompts, characters of one
EVERY = 5  # of so many prompts one is set aside


def parse(text: str) -> list[str]:
    """The prompts in a text, one a line, each once.

    Raises:
        BudgetError: there are none, too many, or one is too long.
    """
    prompts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not prompts:
        raise BudgetError("There are no prompts; write one a line.")
    if len(prompts) > MOST:
        raise BudgetError(f"{len(prompts)} prompts are too many; give at most {MOST}.")
    if len(longest := max(prompts, key=len)) > LONGEST:
        raise BudgetError(f"A prompt has {len(longest)} characters; give at most {LONGEST} a line.")
    return prompts


def read(path: str | Path) -> list[str]:
    """The prompts in a text file. Raises BudgetError if it cannot be read, and as `parse` does."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BudgetError(f"The prompts in {path} cannot be read: {error}.") from None
    return parse(text)


def set_aside(prompts: list[str]) -> tuple[list[str], list[str]]:
    """(prompts to learn on, prompts to judge by): every fifth is never learned on.

    Of fewer than ten, none is set aside: what is learned is then judged by ecodiff's prompts.
    """
    if len(prompts) < 2 * EVERY:
        return prompts, []
    held = prompts[EVERY - 1 :: EVERY]
    return [prompt for prompt in prompts if prompt not in held], held
