"""How long a visitor waits for the page: first paint, what it loads, and from a click to the first answer.

    python -m benchmarks.page                 the real app.py in headless Chromium, on this machine, idle

Medians of fresh browsers on a server that has answered once. A click is timed inside the page, from the event
to the first change of what is shown.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

from benchmarks.common import device_name
from benchmarks.server import serve

OUT = Path(__file__).with_suffix(".json")
LOADED = """() => {
    const loaded = ['resource', 'navigation'].flatMap((kind) => performance.getEntriesByType(kind));
    return {
        paint: performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000,
        bytes: loaded.reduce((sum, entry) => sum + entry.transferSize, 0),
    };
}"""
# From a click to the first frame in which the text of the page has changed.
CLICK = """(name) => new Promise((answer) => {
    const named = [...document.querySelectorAll('button:not([role=tab])')];
    const button = named.find((b) => b.innerText.trim() === name);
    const before = document.body.innerText, begun = performance.now();
    const look = () => document.body.innerText === before
        ? requestAnimationFrame(look) : answer((performance.now() - begun) / 1000);
    button.click();
    requestAnimationFrame(look);
})"""


def visit(driver, url: str) -> dict:
    """One new visitor: opens the page, waits for its first figures, clicks Prune."""
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(url)
    page.get_by_role("img", name="−40%").first.wait_for()
    seen = page.evaluate("performance.now() / 1000")
    page.get_by_text("Can be removed at most").wait_for()
    found = {**page.evaluate(LOADED), "pictures": seen}
    page.wait_for_timeout(1000)
    found["click"] = page.evaluate(CLICK, "Prune")
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Nothing is lost").wait_for(timeout=60_000)
    browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--visitors", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, serve(Path(home)) as url, sync_playwright() as driver:
        visit(driver, url)
        visits = [visit(driver, url) for _ in range(options.visitors)]
    found = {name: round(median(row[name] for row in visits), 3) for name in visits[0]}
    report = {
        "command": "python -m benchmarks.page",
        "machine": f"{os.cpu_count()} cores, {device_name()}",
        **found,
        "visits": visits,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
