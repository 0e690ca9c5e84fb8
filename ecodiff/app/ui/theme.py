"""Looks: Gradio's Base theme with the contrast mended, system fonts, no request to another host."""

import gradio as gr

FONTS = ("ui-sans-serif", "system-ui", "sans-serif")

MONO = ("ui-monospace", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Emerald on slate; text and buttons pass WCAG AA in light and dark."""
    base = gr.themes.Base(primary_hue="emerald", neutral_hue="slate", font=list(FONTS), font_mono=list(MONO))
    return base.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover_dark="#991b1b",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        block_radius="10px",
        button_large_radius="8px",
        block_border_width="1px",
    )


CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; width: 100%; }
.gradio-container main { width: 100%; }
#title h1 { margin-bottom: 0; }
.gradio-container .label-wrap { text-align: left; }
.gradio-container .prose code { overflow-wrap: anywhere; white-space: normal; }
/* Where the keyboard is: Gradio hides it on most of its inputs. */
.gradio-container :is(button, input, textarea, a, [role="region"]):focus-visible {
  outline: 2px solid var(--primary-600) !important; outline-offset: 2px !important; }
/* A name that is longer than its box ends before the arrow. */
.gradio-container .secondary-wrap input { padding-right: 32px; text-overflow: ellipsis; }
#history, #history .grid-wrap { height: auto !important; min-height: 0 !important; }
#history .grid-container { grid-template-columns: repeat(auto-fill, 104px) !important; }
#history .thumbnail-item { aspect-ratio: 1; }
.eco-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; }
.eco-figures > div { border: 1px solid var(--border-color-primary); border-radius: 10px;
  padding: 8px 12px; background: var(--background-fill-primary); }
.eco-figures dt { font-size: 12px; color: var(--body-text-color-subdued); }
.eco-figures dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.eco-figures dd small { display: block; line-height: 1.4;
  font-size: 12px; font-weight: 400; color: var(--body-text-color-subdued); }
.eco-progress { height: 10px; border-radius: 5px; background: var(--border-color-primary);
  overflow: hidden; margin: 8px 0 4px; }
.eco-progress > div { height: 100%; background: var(--primary-600); transition: width .5s; }
.eco-notes { font-size: 13px; color: var(--body-text-color-subdued); margin: 10px 2px 0; }
.eco-table { overflow-x: auto; }
.eco-table tr { border: 0 !important; }
.eco-table table { width: 100%; border: 0 !important; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.eco-table :is(th, td) { text-align: left; white-space: nowrap; padding: 6px 12px 6px 0; font-size: 14px;
  border: 0; border-bottom: 1px solid var(--border-color-primary); }
.eco-table th { font-weight: 400; font-size: 12px; color: var(--body-text-color-subdued); }
.eco-table td:first-child { font-weight: 600; }
#strips, #strips .grid-wrap { height: auto !important; max-height: none !important;
  min-height: 0 !important; }
#strips .grid-container { grid-template-columns: 1fr !important; gap: 12px; }
#strips .thumbnail-item { aspect-ratio: auto; height: auto; }
#strips .thumbnail-item img { width: 100%; height: auto; object-fit: contain; }
.eco-strip { display: grid; gap: 4px; margin-top: 10px; }
.eco-strip .head { font-size: 14px; font-variant-numeric: tabular-nums; margin-top: 4px; }
.eco-strip .head small { color: var(--body-text-color-subdued); }
.eco-strip .images { display: grid; grid-template-columns: repeat(4, minmax(0, 128px)); gap: 8px; }
.eco-strip figure { margin: 0; }
.eco-strip img { width: 100%; border-radius: 8px; display: block; background: white; }
.eco-strip figcaption { font-size: 12px; color: var(--body-text-color-subdued); line-height: 1.3;
  overflow-wrap: anywhere; }
.eco-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; }
.eco-card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 8px; }
.eco-card .head { font-size: 14px; margin: 0 2px 6px; }
.eco-card .images { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.eco-card img { width: 100%; border-radius: 6px; background: white; display: block; }
.eco-lead { margin: 0 0 8px; }
@media (max-width: 600px) { .eco-cards { grid-template-columns: 1fr 1fr; gap: 8px; } }
.eco-shelf { display: grid; grid-template-columns: 64px 1fr; gap: 12px; align-items: center;
  font-size: 14px; }
.eco-shelf img, .eco-shelf .none { width: 64px; height: 64px; border-radius: 8px; background: white;
  display: block; object-fit: contain; }
.eco-shelf .none { background: var(--border-color-primary); }
.eco-shelf small { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.eco-shelf-row { align-items: center; border-bottom: 1px solid var(--border-color-primary);
  padding-bottom: 10px; }
.eco-shelf-row > .block { flex: 1 1 260px; }
/* What failed is told by a toast: Gradio would cover what was there with the word "Error". */
[data-testid="status-tracker"]:has(.error) { display: none !important; }
.eco-curve { margin: 0; }
.eco-curve figcaption { font-size: 12px; color: var(--body-text-color-subdued); }
.eco-curve polyline { fill: none; stroke: var(--primary-600); stroke-width: 2; }
.eco-curve circle { fill: var(--background-fill-primary); stroke: var(--primary-600); stroke-width: 2; }
.eco-curve circle.here { fill: var(--primary-600); }
.eco-curve circle.touch { fill: transparent; stroke: none; }
.eco-curve g { cursor: pointer; }
.eco-curve g:hover circle:not(.touch) { fill: var(--primary-300); }
.eco-curve text { font-size: 11px; text-anchor: middle; fill: var(--body-text-color-subdued); }
.eco-run { margin: 0 0 4px; }
.eco-status { font-variant-numeric: tabular-nums; }
.eco-error { border-left: 4px solid #dc2626; padding: 6px 12px; }
.eco-layers { display: grid; gap: 4px; }
.eco-layers .row { display: grid; grid-template-columns: 86px 1fr; align-items: center; gap: 8px; }
.eco-layers .cells { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 2px; }
.eco-layers .cell { height: 34px; border-radius: 3px; background: var(--border-color-primary);
  position: relative; overflow: hidden; }
.eco-layers .cell > div { position: absolute; bottom: 0; width: 100%;
  background: var(--primary-600); }
.eco-layers span { font-size: 12px; color: var(--body-text-color-subdued); }
"""

# Gradio's image slider has neither a role nor keys: it is given both, whenever one appears. And a point of
# the curve that is pressed sets the size of the run that is shown.
JS = """() => {
  const fit = (bar) => {
    if (bar.tabIndex === 0) return;
    const facts = { role: 'slider', tabindex: 0, 'aria-label': 'Dense or pruned', 'aria-valuemin': 0,
                    'aria-valuemax': 100 };
    for (const [name, value] of Object.entries(facts)) bar.setAttribute(name, value);
    const where = () => {
      const own = bar.getBoundingClientRect();
      return [own.left + own.width / 2, bar.parentElement.getBoundingClientRect()];
    };
    const tell = () => {
      const [x, all] = where();
      bar.setAttribute('aria-valuenow', Math.round(100 * (x - all.left) / all.width));
    };
    bar.addEventListener('keydown', (event) => {
      const step = { ArrowLeft: -0.05, ArrowRight: 0.05, Home: -1, End: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const [x, all] = where();
      const to = Math.min(Math.max(x + step * all.width, all.left), all.right);
      const at = (x) => ({ clientX: x, clientY: all.top + all.height / 2, bubbles: true, view: window });
      bar.dispatchEvent(new MouseEvent('mousedown', at(x)));
      window.dispatchEvent(new MouseEvent('mousemove', at(to)));
      window.dispatchEvent(new MouseEvent('mouseup', at(to)));
      setTimeout(tell, 50);
    });
    tell();
  };
  const all = () => document.querySelectorAll('[data-testid="slider"]').forEach(fit);
  new MutationObserver(all).observe(document.body, { childList: true, subtree: true });
  const pick = (event) => {
    const point = event.target.closest?.('[data-percent]');
    const box = document.querySelector('#size input[type=number]');
    if (!point || !box || box.disabled || !['click', 'Enter', ' '].includes(event.key ?? event.type)) return;
    event.preventDefault();
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, point.dataset.percent);
    for (const name of ['input', 'change', 'blur']) box.dispatchEvent(new Event(name, { bubbles: true }));
  };
  for (const name of ['click', 'keydown']) document.addEventListener(name, pick);
}"""


def scroll_to(element: str) -> str:
    """JavaScript that brings an element into view where the page is one column: on a phone."""
    find = f"document.getElementById('{element}')?.scrollIntoView({{ behavior: 'smooth' }})"
    return f"() => {{ if (innerWidth < 700) setTimeout(() => {find}, 600); return []; }}"
