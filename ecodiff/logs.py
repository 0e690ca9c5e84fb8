"""Only ecodiff's own words on the terminal, for the command line and the page."""

import warnings

import diffusers
import huggingface_hub
import transformers


def be_quiet() -> None:
    """Silence the libraries' progress bars, retries and advice. Errors still reach the person."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(100)  # its retries; what failed is told once, at the end
    warnings.simplefilter("ignore")
