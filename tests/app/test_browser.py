"""The page as a person uses it: headless Chromium on the real app.py."""

import contextlib
import io
import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from PIL import Image

import ecodiff
from benchmarks.server import serve
from ecodiff.pruning.plan import PLAN_FILE
from ecodiff.runs.folder import Run
from tests import hub
from tests.app.test_sign_in import GATED, offer
from tests.app.test_zerogpu import ONE_STEP, space
from tests.checkpoints.test_folders import some_plan

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
Axe = axe.Axe
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("needs chromium (apt-get install chromium)", allow_module_level=True)

LEARNED = 240_000  # ms; the fast preset takes a minute on two idle cores


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
        yield driver.chromium.launch(executable_path=CHROMIUM, args=arguments)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("store")) as address:
        yield address


@pytest.fixture(scope="module")
def page(browser, url):
    page = browser.new_page(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page.foreign = []
    own = url.removeprefix("http://")
    page.on("request", lambda r: page.foreign.append(r.url) if own not in r.url else None)
    page.goto(url)
    return page


def shot(page, name):
    folder = os.environ.get("ECODIFF_SHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


# Gradio's own: a link's icon says what its text says; its empty image has a label and no role.
KNOWN = {"image-redundant-alt", "aria-prohibited-attr"}


def accessible(page, where):
    """axe finds nothing (WCAG, contrast included) that is ours."""
    found = {v["id"]: v["nodes"][0]["html"][:200] for v in Axe().run(page).response["violations"]}
    assert set(found) <= KNOWN, f"{where}: {found}"


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def answer(page, name, yes):
    """Press a button that asks, and answer. The page asks some time after the click: wait for it."""
    page.once("dialog", lambda dialog: dialog.accept() if yes else dialog.dismiss())
    with page.expect_event("dialog"):
        button(page, name).click()


def number(page, name, value):
    """Type a number. Gradio forgets what is typed in the instant in which a component appears."""
    field = page.get_by_role("spinbutton", name=name)
    for _ in range(20):
        field.fill(value)
        field.press("Tab")
        page.wait_for_timeout(200)
        if field.input_value() == value:
            return
    raise AssertionError(f"{name} is {field.input_value()}, not {value}")


def again(page, name, text):
    """Press a button until `text`, of its last event, goes. Gradio ignores it until that event has ended."""
    for _ in range(10):
        button(page, name).click()
        with contextlib.suppress(playwright.TimeoutError):
            return page.get_by_text(text).wait_for(state="hidden", timeout=3000)
    raise AssertionError(f"{name} does nothing")


def test_the_main_job(page, url, tmp_path):
    page.get_by_text("Can be removed at most").wait_for()
    page.get_by_role("img", name="auto rickshaw, −40%").wait_for()
    shot(page, "1-first")
    other = page.context.browser.new_page(viewport={"width": 1200, "height": 900})  # who only looks
    other.goto(url)
    button(other, "Open this result: move its size, draw your own prompts").click()
    other.get_by_role("button", name="Show −50%").click()
    other.get_by_role("img", name="auto rickshaw, −50%").wait_for()
    button(other, "Compare with my prompt").click()
    other.get_by_role("textbox", name="Prompt").fill("cat face")
    button(other, "Draw both").click()
    other.get_by_text("Latent error", exact=True).wait_for(timeout=LEARNED)
    shot(other, "1-example")
    other.close()
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="Fast").click()
    button(page, "Prune").click()
    page.wait_for_timeout(700)
    button(page, "Prune").click()  # an impatient visitor
    page.get_by_text("finding a start").wait_for(timeout=LEARNED)
    page.get_by_text(" left").first.wait_for(timeout=LEARNED)
    shot(page, "2-learning")
    button(page, "Stop").click()
    page.get_by_text("Nothing is lost").wait_for(timeout=30_000)
    shot(page, "3-stopped")

    page.reload()  # the page finds its run again
    page.get_by_text("Nothing is lost").wait_for(timeout=30_000)
    button(page, "Resume").click()
    page.get_by_text("Finished").first.wait_for(timeout=LEARNED)
    page.get_by_role("heading", name="The result").wait_for()
    page.get_by_role("img", name="auto rickshaw, −20%").wait_for(timeout=60_000)
    page.get_by_text(re.compile(r"3\.8[89] M")).nth(1).wait_for()
    shot(page, "4-finished")
    accessible(page, "a finished run")
    page.locator(".eco-layers").get_by_text("ResNet channels").wait_for()
    point = page.get_by_role("button", name="Show −40%")  # of the curve, once it is drawn
    point.wait_for(timeout=120_000)
    point.focus()
    page.keyboard.press("Enter")
    page.get_by_role("img", name="auto rickshaw, −40%").wait_for()
    playwright.expect(page.get_by_role("spinbutton", name="Remove").nth(1)).to_have_value("40")
    page.get_by_role("button", name="Show −20%").click()
    page.get_by_role("img", name="auto rickshaw, −20%").wait_for()
    shot(page, "4-curve")

    size = page.get_by_role("spinbutton", name="Remove").nth(1)
    size.fill("40")
    size.press("Tab")
    page.get_by_text(re.compile(r"2\.9[123] M")).first.wait_for()

    button(page, "Build checkpoint").click()
    page.get_by_text("SHA-256").first.wait_for(timeout=60_000)
    shot(page, "5-download")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download emoji-sdxl-eco40").click()
    with zipfile.ZipFile(waiting.value.path()) as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    small = ecodiff.load(folder)
    assert abs(sum(p.numel() for p in small.unet.parameters()) / 4_865_476 - 0.6) < 3e-3
    assert small("red apple", num_inference_steps=2).images[0].size == (64, 64)

    button(page, "Compare with my prompt").click()  # this run, at this size
    playwright.expect(page.get_by_role("combobox", name="Pruned model")).not_to_have_value("")
    playwright.expect(page.get_by_role("spinbutton", name="Remove")).to_have_value("40")
    page.get_by_role("textbox", name="Prompt").fill("cat face")
    button(page, "Draw both").click()
    page.get_by_text("Latent error", exact=True).wait_for(timeout=LEARNED)
    page.get_by_text("Speed of a step").wait_for()
    slider = page.get_by_role("slider", name="Dense or pruned")
    page.wait_for_timeout(1000)  # both images are laid out
    before = int(slider.get_attribute("aria-valuenow"))
    slider.focus()
    for moved in (5, 10):
        page.keyboard.press("ArrowLeft")
        playwright.expect(slider).to_have_attribute("aria-valuenow", str(before - moved))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button(page, "Copy the link").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text.includes('prompt=cat+face'))")
    page.wait_for_timeout(1500)
    shot(page, "6-compare")
    accessible(page, "a comparison")
    link = page.get_by_role("link", name="Link to this comparison").get_attribute("href")
    settings_come_back(page)
    page.get_by_role("tab", name="Sizes").click()
    playwright.expect(page.get_by_role("combobox", name="Pruned model")).not_to_have_value("")
    number(page, "Prompts", "2")
    button(page, "Draw them").click()
    page.get_by_text("Averages over 2 prompts").wait_for(timeout=120_000)
    page.wait_for_timeout(1500)
    shot(page, "6-sizes")
    accessible(page, "sizes")
    page.get_by_role("tab", name="Library").click()
    row = page.locator(".eco-shelf-row", has_text="Finished")
    row.wait_for()
    assert row.count() == 1, "two clicks on Prune are one run"
    page.wait_for_timeout(500)
    shot(page, "7-library")
    accessible(page, "the library")
    search = page.get_by_role("textbox", name="Search")
    search.fill("flux")
    page.get_by_text("No run matches these words").wait_for()
    search.fill("FAST finished")
    row.wait_for()
    page.get_by_role("textbox", name="New name").fill(" ")
    button(page, "Rename").click()
    page.get_by_text("write its new name").wait_for()
    page.get_by_role("textbox", name="New name").fill("my <run>")
    button(page, "Rename").click()
    search.fill("<run>")
    page.locator(".eco-shelf b", has_text="my <run>").wait_for()
    page.locator(".eco-shelf-row").get_by_role("button", name="Download").click()
    page.get_by_text("SHA-256").last.wait_for(timeout=60_000)
    built = page.get_by_role("button", name=re.compile("emoji-sdxl-eco20")).last
    built.wait_for()
    number(page, "Remove", "30")
    built.wait_for(state="hidden")  # it is of another size
    page.locator(".eco-shelf-row").get_by_role("button", name="Open").click()
    page.get_by_role("heading", name="The result").wait_for()
    page.get_by_text("my <run>").first.wait_for()
    assert not page.foreign, "requests to another host"

    # Somebody who was sent the link, on another machine.
    other = page.context.browser.new_page(viewport={"width": 1200, "height": 900})
    other.goto(
        url
        + "/"
        + link.replace("seed=0", "seed=nonsense").replace("steps=20", "steps=7").replace("size=40", "size=35")
    )
    other.get_by_role("textbox", name="Prompt").wait_for()
    expect = playwright.expect
    expect(other.get_by_role("textbox", name="Prompt")).to_have_value("cat face")
    expect(other.get_by_role("spinbutton", name="Remove")).to_have_value("35")
    button(other, "Draw both").click()
    other.get_by_text("Latent error").wait_for(timeout=60_000)
    assert "steps=7" in other.get_by_role("link", name="Link to this comparison").get_attribute("href")
    shot(other, "6-link")
    other.close()


def settings_come_back(page):
    """Enter draws; images carry their settings in their names and inside, and give them back."""
    prompt = page.get_by_role("textbox", name="Prompt")
    prompt.fill("qqq www")
    prompt.press("Enter")
    page.get_by_text("knows emoji by their names only").wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    thumbnails = page.locator("#history img")
    assert thumbnails.count() == 4
    source = thumbnails.nth(3).get_attribute("src")
    assert source.endswith("cat-face-seed0-minus40.png")
    image = Image.open(io.BytesIO(page.request.get(source).body()))
    assert image.info["parameters"].startswith("cat face\nSteps: 20, CFG scale: 3")
    assert "40 % of the denoiser removed" in image.info["parameters"]
    thumbnails.nth(3).click()
    button(page, "Use this image's settings").click()
    playwright.expect(prompt).to_have_value("cat face")


def test_a_wrong_model_is_told(page):
    page.get_by_role("tab", name="Prune").click()
    model = page.get_by_role("listbox", name="Model").or_(page.get_by_label("Model")).first
    model.fill("no-such-model")
    model.press("Enter")
    told = page.get_by_text("There is no model 'no-such-model'").first
    told.wait_for(timeout=30_000)
    assert told.is_visible() and "Traceback" not in page.content()
    shot(page, "8-wrong-model")


def test_a_model_is_found_by_words(page):
    page.get_by_role("tab", name="Prune").click()
    page.get_by_text("Find a model").click()
    page.get_by_role("textbox", name="Words").fill("sd 3.5 medium")
    page.keyboard.press("Enter")
    page.get_by_role("radio", name="Stable Diffusion 3.5 Medium · 2.2 B").check()
    playwright.expect(page.get_by_label("Model").first).to_have_value(re.compile("sd-3.5-medium"))
    page.get_by_text("of 2.2").first.wait_for(timeout=60_000)
    page.get_by_label("To fit").click()
    page.get_by_role("option", name="A GPU of 8 GB").click()
    page.get_by_text("8 GB (estimate): at −").wait_for(timeout=60_000)
    page.get_by_text("with its weights in main memory").wait_for()
    shot(page, "9-found")
    page.get_by_role("textbox", name="Words").fill("no such thing")
    button(page, "Search").click()
    page.get_by_text("No model that ecodiff can prune matches").wait_for(timeout=60_000)
    accessible(page, "a search")


def test_a_number_is_no_error_while_it_is_typed(page):
    page.get_by_role("tab", name="Prune").click()
    field = page.get_by_role("spinbutton", name="Remove").first
    for typed, becomes in (("", "1"), ("0", "1"), ("100", "90"), ("30", "30")):
        field.click()
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        page.keyboard.type(typed, delay=200)  # ms: each is sent on its own
        page.wait_for_timeout(500)
        field.press("Tab")
        playwright.expect(field).to_have_value(becomes)
        page.wait_for_timeout(500)
        assert page.locator(".toast-body").all_inner_texts() == []


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_every_tab_fits(browser, url, look, width):
    """Somebody else's page: no sideways scrolling, and none of the runs above."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(f"{url}/?__theme={look}")
    page.get_by_text("Can be removed at most").wait_for()
    for tab in ("Prune", "Compare", "Sizes", "Library", "About"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(700)
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"{tab} is {overflow} px too wide"
        assert not page.get_by_text("16/16").count()
        accessible(page, f"{tab}, {look}, {width}")
        shot(page, f"{look}-{width}-{tab.lower()}")
    page.close()


def test_the_page_sees_a_run_through_on_zerogpu(browser, tiny_sdxl, tmp_path):
    tiny_sdxl.save_pretrained(tmp_path / "tiny")
    visitor = browser.new_context(viewport={"width": 1200, "height": 900})
    with space(tmp_path, QUOTA="4", **ONE_STEP) as (client, asked):
        page = visitor.new_page()
        page.goto(client.src)
        page.get_by_text("Can be removed at most").wait_for()
        page.get_by_label("Model").first.fill(str(tmp_path / "tiny"))
        page.keyboard.press("Enter")
        playwright.expect(page.get_by_role("listbox")).to_have_count(0)  # it lies over what is below it
        page.get_by_label("Preset").click()  # one of many short steps, so that calls can be counted
        page.get_by_role("option", name="Fast").click()
        page.wait_for_timeout(4000)
        assert page.get_by_label("Preset").input_value() == "Fast", (
            "the model's own came late, and took it back"
        )
        button(page, "Prune").click()
        # Calls follow each other without a click, until there is no more quota: that is said, the run kept.
        page.get_by_text("reached its GPU limit").first.wait_for(timeout=LEARNED)
        shot(page, "zerogpu-quota")
        assert len(asked("/schedule")) == 5, "four calls and the one that was refused"
        assert button(page, "Resume").is_enabled()
    port = client.src.rstrip("/").rpartition(":")[2]
    with space(tmp_path, port=port, **ONE_STEP) as (_, asked):  # the next day
        page.goto(client.src)
        button(page, "Resume").click()
        page.locator(".eco-status").get_by_text("step 5 of 16").wait_for(timeout=LEARNED)
        page.close()  # the visitor leaves while it learns
        (folder,) = (tmp_path / "runs").glob("*/run.json")
        run, begun = Run.open(folder.parent), time.monotonic()
        while run.busy:
            assert time.monotonic() - begun < 30, "whoever left has left a lock"
            time.sleep(0.1)
        assert not run.finished and run.state().step >= 5
        calls = len(asked("/schedule"))
        time.sleep(3)
        assert len(asked("/schedule")) == calls, "it learns on for nobody, on somebody's quota"
        page = visitor.new_page()
        page.goto(client.src)
        button(page, "Resume").click()
        page.locator(".eco-status").get_by_text("Finished").wait_for(timeout=LEARNED)
        assert len(asked("/schedule")) >= 1
        page.get_by_role("tab", name="Compare").click()
        button(page, "Draw both").click()
        page.get_by_text("Latent error").wait_for(timeout=LEARNED)
        shot(page, "zerogpu-compare")


def test_a_run_is_healed_goes_to_the_hub_and_is_deleted(browser, tmp_path):
    pipe = ecodiff.load("emoji-turbo")
    plan = ecodiff.PrunePlan(some_plan(pipe), {"model": "emoji-turbo"}).save(tmp_path / "p.safetensors")
    with hub.running() as stand_in:
        signed = {"HF_TOKEN": "hf_ann", "OAUTH_CLIENT_ID": "outside of a Space Gradio makes one up"}
        settings = hub.settings(stand_in.address, tmp_path) | signed
        with serve(tmp_path, **settings) as url:
            run = Client(url, verbose=False).predict("emoji-turbo", [handle_file(plan)], api_name="/bring")
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(url)
            page.get_by_role("tab", name="Library").click()
            page.get_by_text("Open a run by its id").click()
            known = page.get_by_role("textbox", name="Id", exact=True)
            known.fill(run["run"])
            known.press("Enter")
            page.locator(".eco-shelf-row").get_by_role("button", name="Open").click()
            page.get_by_role("heading", name="The result").wait_for()
            playwright.expect(page.get_by_role("spinbutton", name="Remove").nth(1)).to_be_disabled()
            page.get_by_role("tab", name="Library").click()

            page.get_by_text("Heal it").click()
            number(page, "Trajectories to repair by", "32")
            number(page, "Steps of training", "10")
            button(page, "Heal").click()
            page.get_by_text("of 18 · loss").wait_for(timeout=60_000)
            shot(page, "healing")
            button(page, "Stop healing").click()
            page.get_by_text("Nothing is lost").wait_for()
            again(page, "Heal", "Nothing is lost")
            page.get_by_text(re.compile("Closer|did not get closer")).wait_for(timeout=120_000)
            accessible(page, "a healed run")

            page.get_by_text("Upload to the Hugging Face Hub").click()
            page.get_by_role("textbox", name="Repository").fill("little")
            page.get_by_role("radio", name="Plan alone").check()
            button(page, "Upload").click()
            page.get_by_text("Sign in with Hugging Face first").wait_for()
            page.locator("button", has_text="Sign in with Hugging Face").click()
            page.get_by_text("Can be removed at most").wait_for()
            page.get_by_role("tab", name="Library").click()
            page.get_by_text("Upload to the Hugging Face Hub").click()
            page.get_by_text("Logout (ann)").wait_for()
            page.get_by_role("textbox", name="Repository").fill("little")
            page.get_by_role("radio", name="Plan alone").check()
            accessible(page, "the Hub")
            shot(page, "hub")
            button(page, "Upload").click()
            page.get_by_role("link", name=f"{stand_in.address}/ann/little").wait_for(timeout=60_000)

            answer(page, "Delete", yes=False)
            assert (tmp_path / "runs" / run["run"]).is_dir(), "no was the answer"
            answer(page, "Delete", yes=True)
            page.get_by_text("No runs yet").wait_for()
            assert not (tmp_path / "runs" / run["run"]).exists()
        assert PLAN_FILE in stand_in.repos["ann/little"]


def test_a_gated_model_is_opened_by_whoever_signs_in(browser, tmp_path):
    with hub.running() as stand_in:
        offer(stand_in)
        machine = {"HF_TOKEN": "hf_bob", "OAUTH_CLIENT_ID": "outside of a Space Gradio makes one up"}
        with serve(tmp_path, **hub.settings(stand_in.address, tmp_path) | machine) as url:
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(url)

            def ask():
                model = page.get_by_label("Model").first
                model.fill(GATED)
                model.press("Enter")

            page.get_by_text("Can be removed at most").wait_for()
            ask()
            page.get_by_text("a gated model needs its licence accepted").wait_for()
            page.get_by_text("Find a model").click()
            page.get_by_text("opened with your own rights").wait_for()
            shot(page, "gated")
            page.locator("button", has_text="Sign in with Hugging Face").first.click()
            page.get_by_text("Can be removed at most").wait_for()
            page.get_by_text("Find a model").click()
            page.get_by_text("Logout").first.wait_for()
            ask()
            page.set_viewport_size({"width": 390, "height": 800})
            page.get_by_role("button", name="Advanced").click()
            own = [f"a red apple, number {number}" for number in range(10)]
            page.get_by_role("textbox", name="Your prompts").fill("\n".join(own))
            page.get_by_text("conformance suite").wait_for()
            button(page, "Prune").click()
            title = page.get_by_text(f"{GATED} · ").first
            title.wait_for(timeout=60_000)
            page.wait_for_timeout(2000)
            assert 0 <= title.bounding_box()["y"] < 800, "a phone scrolls to what happens"
            shot(page, "phone-run")
        (file,) = (tmp_path / "runs").glob("*/run.json")
        run = Run.open(file.parent)
        learned, held = run.learned_on, run.heldout
        assert sorted([*learned, *held]) == own and len(held) == 2


WHERE = """() => {
    const at = document.activeElement, said = at.getAttribute('aria-label') || at.innerText
        || (at.labels && at.labels[0] && at.labels[0].innerText) || '';
    return [at.tagName, said.trim(), getComputedStyle(at).outlineStyle];
}"""


def test_the_page_by_keyboard(browser, url):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(url)
    page.get_by_text("Can be removed at most").wait_for()

    def go(*name):
        """Tab until it is reached; wherever the focus is on the way, it can be seen."""
        for _ in range(60):
            page.keyboard.press("Tab")
            tag, said, outline = page.evaluate(WHERE)
            assert tag == "BODY" or outline != "none", f"nobody sees that the focus is on {said or tag}"
            if said.startswith(name):
                return
        raise AssertionError(f"the keyboard does not reach {name}")

    go("number input for Remove")
    page.keyboard.press("Control+A")
    page.keyboard.type("15")
    go("Prune")
    page.keyboard.press("Enter")
    button(page, "Stop").wait_for(timeout=60_000)
    go("Stop")
    page.keyboard.press("Enter")
    page.get_by_text("Nothing is lost").wait_for(timeout=60_000)
    for tab, first in (("Compare", "Pruned model"), ("Sizes", "Pruned model"), ("Library", "Import a plan")):
        go(tab)
        page.keyboard.press("Enter")
        go(first)
    page.keyboard.press("Enter")  # opens what is folded
    go("Open it")
    go("Open a run by its id")
    page.keyboard.press("Enter")
    go("Id")
    for _ in range(20):  # as in `number`: what is typed while a component appears can be forgotten
        page.keyboard.press("Control+A")
        page.keyboard.type("0" * 32)
        page.wait_for_timeout(200)
        if page.get_by_label("Id", exact=True).input_value() == "0" * 32:
            break
    go("Open")
    page.keyboard.press("Enter")
    page.get_by_text("There is no such run any more").wait_for()
    go("About")
    page.keyboard.press("Enter")
    page.get_by_text("What it does not do").wait_for()
