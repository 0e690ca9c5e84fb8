"""The page: a thin layer over `ecodiff.service`."""

from importlib.util import find_spec

import gradio as gr

from ..server import server
from . import about, api, compare, library, prune, sizes
from .theme import CSS, theme

SECRET = "ecodiff"  # BrowserState needs a constant one to survive a restart of the server


def build_demo() -> gr.Blocks:
    """The whole page. Nothing is loaded before somebody asks for it."""
    gr.set_static_paths([server().store.root])
    with gr.Blocks(title="ecodiff", analytics_enabled=False, delete_cache=(3600, 21600)) as demo:
        api.build()  # first, so that its endpoints get the plain names
        runs = gr.BrowserState([], storage_key="ecodiff-runs", secret=SECRET)
        current = gr.BrowserState("", storage_key="ecodiff-run", secret=SECRET)
        gr.Markdown(
            "# ecodiff\nMake a diffusion model smaller, see what it costs, take it with you.",
            elem_id="title",
        )
        private = {"api_visibility": "private", "show_progress": "hidden"}
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Prune", id="prune"):
                p = prune.build(runs, current)
            with gr.Tab("Compare", id="compare") as compare_tab:
                c = compare.build(runs, current)
            with gr.Tab("Sizes", id="sizes") as sizes_tab:
                z = sizes.build(runs, current)
            with gr.Tab("Library", id="library") as library_tab:
                shelf = library.build(runs, current)
            with gr.Tab("About", id="about"):
                about.build()
        arrived = [tabs, c["ratio"], c["compensate"], *c["outputs"]]
        p["see"].click(c["come"], [runs, current, p["size"], p["compensate"]], arrived, **private)
        compare_tab.select(c["refresh"], c["inputs"], c["outputs"], **private)
        sizes_tab.select(z["refresh"], z["inputs"], z["outputs"], **private)
        library_tab.select(shelf["refresh"], shelf["inputs"], shelf["outputs"], **private)
        demo.load(p["predict"], [p["model"], p["ratio"]], p["predicted"], **private)
        demo.load(c["follow"], runs, [tabs, runs, *c["settings"]], **private)
        seen = demo.load(p["watch"], current, p["watched"], concurrency_limit=None, **private)
        seen.then(p["recut"], [current, p["size"]], p["cut_out"], **private)
    return demo


def launch(demo: gr.Blocks, **options):
    """Queue and launch with ecodiff's settings; `options` go to `Blocks.launch`."""
    demo.queue(max_size=32, default_concurrency_limit=4)
    settings = {"theme": theme(), "css": CSS, "show_error": True, "ssr_mode": False}
    settings |= {"max_file_size": "500mb", "footer_links": ["api", "settings"]}
    settings["mcp_server"] = find_spec("mcp") is not None  # pip install "gradio[mcp]"
    return demo.launch(**(settings | options))
