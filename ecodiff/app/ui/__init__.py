"""The page: a thin layer over `ecodiff.app.service`."""

from importlib.util import find_spec

import gradio as gr

from ..server import Server, server, use
from . import about, api, compare, library, prune, sizes
from .common import Browser, Tab, placed
from .theme import CSS, JS, theme

SECRET = "ecodiff"  # BrowserState needs a constant one to survive a restart of the server
# What is on the page: (id, title, module with `build(browser) -> Tab`).
TABS = (
    ("prune", "Prune", prune),
    ("compare", "Compare", compare),
    ("sizes", "Sizes", sizes),
    ("library", "Library", library),
    ("about", "About", about),
)
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


def build_demo(own: Server | None = None) -> gr.Blocks:
    """The whole page. Nothing is loaded before somebody asks for it.

    Args:
        own: runs, devices and worker; None: those of this process.
    """
    if own is not None:
        use(own)
    gr.set_static_paths([server().store.root])
    with gr.Blocks(title="ecodiff", analytics_enabled=False, delete_cache=(3600, 21600)) as demo:
        api.build()  # first, so that its endpoints get the plain names
        browser = Browser(
            gr.BrowserState([], storage_key="ecodiff-runs", secret=SECRET),
            gr.BrowserState("", storage_key="ecodiff-run", secret=SECRET),
        )
        gr.Markdown(
            "# ecodiff\nMake a diffusion model smaller, see what it costs, take it with you.",
            elem_id="title",
        )
        built: dict[str, Tab] = {}
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            for name, title, module in TABS:
                with gr.Tab(title, id=name) as place:
                    tab = built[name] = module.build(browser)
                if tab.refresh is not None:
                    place.select(tab.refresh, tab.inputs, tab.outputs, **PRIVATE)
        _wire(demo, tabs, browser, built)
    return demo


def _wire(demo: gr.Blocks, tabs: gr.Tabs, browser: Browser, built: dict[str, Tab]) -> None:
    """From the Prune tab to its images and from the Library to it; what happens when the page is opened."""
    p, c, runs, current = built["prune"].parts, built["compare"].parts, browser.runs, browser.current
    named = c["named"] | {"tabs": tabs}
    arrived = [tabs, named["ratio"], named["compensate"], *built["compare"].outputs]
    asked = [runs, current, p["size"], p["compensate"]]
    p["see"].click(placed(compare.come, named), asked, arrived, **PRIVATE)
    demo.load(prune.predict, p["what"], p["predicted"], **PRIVATE)
    demo.load(prune.shown_of, p["what"][0], p["shown"], **PRIVATE)
    demo.load(
        placed(compare.follow, named),
        runs,
        [tabs, runs, named["draw"], *c["settings"], c["linked"]],
        **PRIVATE,
    )
    opened = built["library"].parts["opened"]
    p["look"].click(prune.example_run, p["what"][0], opened, **PRIVATE)
    turned = opened.change(prune.turn_to, opened, [tabs, current, p["size"]], **PRIVATE)
    for event in (demo.load, turned.success):
        seen = event(p["watch"], current, p["watched"], concurrency_limit=None, **PRIVATE)
        cut = seen.then(p["recut"], [current, p["size"]], p["cut_out"], **PRIVATE)
        done = cut.then(p["painted"], [current, p["size"]], p["drawn"], concurrency_limit=None, **PRIVATE)
        done.then(p["redrawn"], [current, p["size"]], p["drawn"], **PRIVATE)


def launch(demo: gr.Blocks, **options):
    """Queue and launch with ecodiff's settings; `options` go to `Blocks.launch`."""
    demo.queue(max_size=32, default_concurrency_limit=4)
    settings = {"theme": theme(), "css": CSS, "js": JS, "show_error": True, "ssr_mode": False}
    settings |= {"max_file_size": "500mb", "footer_links": ["api", "settings"]}
    settings["mcp_server"] = find_spec("mcp") is not None  # pip install "gradio[mcp]"
    return demo.launch(**(settings | options))
