"""A page in the browser to try a model on: `make play`, or

    encore play [--model DIR] [--port N]

It is served on 127.0.0.1 by gradio, and needs and uses no network.
"""

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken
import torch

from encore.errors import EncoreError
from encore.evaluation.generate import encode_prompt, generate_with_scores, note_of_cut, open_model
from encore.models.architectures import Model
from encore.playground.local_only import HOSTS, LocalOnly
from encore.playground.token_html import CSS, TEXT, TOOLTIP, TokenSpans, describe, legend
from encore.pretrained.init_from import read_record
from encore.pretrained.markup import as_html, as_markdown_code

UPDATE_SECONDS = 0.05  # between two looks of the growing text: a browser need not draw each of 500 tokens a second
LARGEST_SEED = 2**53 - 1  # whole numbers up to here are exact in a browser


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="encore-play-") as scratch:
        gradio = import_gradio(scratch)
        model, tokenizer = open_model(arguments.model)
        page = build_page(gradio, model, tokenizer, model_facts(arguments.model, model))
        serve(gradio, page, arguments.port)


def import_gradio(scratch: str) -> Any:
    """gradio, told to keep to this machine and to a folder. It looks at these variables when it is imported.

    Raises EncoreError where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = scratch  # else a folder in /tmp that belongs to the first who played here
    os.environ["no_proxy"] = "*"  # it asks itself whether it is there, which is no proxy's affair
    try:
        import gradio
    except ModuleNotFoundError:
        raise EncoreError(
            "gradio is not installed; `make play` installs it, and so does "
            "`pip install -c requirements.lock -c requirements-dev.lock gradio`"
        ) from None
    return gradio


def model_facts(folder: Path, model: Model) -> str:
    """A line of Markdown about a model."""
    config = model.config
    facts = [
        f"{model.count_parameters():,} parameters",
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}",
        f"{config.block_size:,} tokens of context",
        f"{config.vocab_size:,} ids",
    ]
    record = read_record(folder)
    if record and (data := record.get("data")):
        # A record from before there were several sources has the one's keys itself.
        pairs = [[source[key] for key in ("dataset", "dataset_revision")] for source in data.get("sources", [data])]
        described = (" at ".join(as_markdown_code(str(value)) for value in pair) for pair in pairs)
        facts.append(f"trained on {', '.join(described)}")
    return f"{as_markdown_code(str(folder))}: " + " · ".join(facts)


def build_page(gradio: Any, model: Model, tokenizer: tiktoken.Encoding, facts: str) -> Any:
    """The page: a prompt, what the model makes of it, and how to sample."""
    with gradio.Blocks(title="Encore playground", analytics_enabled=False) as page:
        gradio.Markdown(f"# Encore playground\n{facts}")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                prompt = gradio.Textbox(
                    label="Prompt",
                    lines=3,
                    info="Shift+Enter generates. Empty: a document from its beginning",
                    autofocus=True,
                )
                with gradio.Row():
                    go = gradio.Button("Generate", variant="primary", min_width=120)
                    stop = gradio.Button("Stop", min_width=120)
                written = gradio.HTML(html_template=TEXT, container=True, padding=True, js_on_load=TOOLTIP)
                note = gradio.Markdown()
                gradio.HTML(legend(), elem_classes="legend")
            with gradio.Column(scale=1, min_width=280):
                controls = [
                    gradio.Slider(1, 1000, 200, step=1, label="Max new tokens"),
                    gradio.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"),
                    gradio.Slider(0, model.config.vocab_size, 0, step=1, label="Top-k", info="0: among all"),
                    gradio.Slider(0.01, 1, 1, step=0.01, label="Top-p", info="1: among all"),
                    gradio.Number(1337, precision=0, label="Seed", info="The same gives the same text"),
                ]
        write_here = partial(write, model, tokenizer)
        writing = gradio.on(
            [go.click, prompt.submit],
            write_here,
            [prompt, *controls],
            [written, note],
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=writing)
    return page


def write(
    model: Model,
    tokenizer: tiktoken.Encoding,
    text: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
) -> Iterator[tuple[str, str]]:
    """The growing text as HTML, and a note. The text is that of `encore generate` with the same values."""
    if seed is None or not 0 <= seed <= LARGEST_SEED:
        yield "", f"Seed: a whole number from 0 to {LARGEST_SEED:,}, please."
        return
    prompt = encode_prompt(tokenizer, text)
    cut = note_of_cut(prompt, model.config.block_size)
    note = f"Note: {cut}. " if cut else ""
    generator = torch.Generator().manual_seed(seed)
    spans = TokenSpans()
    html = f'<span class="prompt">{as_html(text)}</span>'
    count, shown = 0, 0.0
    for token, scores in generate_with_scores(
        model, prompt, max_new_tokens, temperature, top_k or None, top_p, tokenizer.eot_token, generator
    ):
        html += spans.add(describe(tokenizer, token, scores))
        count += 1
        if time.monotonic() >= shown + UPDATE_SECONDS:
            yield html, f"{note}{count:,} of {max_new_tokens:,} tokens"
            shown = time.monotonic()
    end = "" if count == max_new_tokens else ", then the end-of-text token"
    yield html + spans.finish(), f"{note}{count:,} of {max_new_tokens:,} tokens{end}."


def serve(gradio: Any, page: Any, port: int) -> None:
    """Serves the page until Ctrl-C."""
    from starlette.middleware import Middleware

    # The default's hints are too pale to be read; its fonts come with gradio.
    theme = gradio.themes.Default().set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
    try:
        page.launch(
            server_name=HOSTS[0],
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            theme=theme,
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(LocalOnly)]},
        )
    except OSError as error:
        if "Cannot find empty port" not in str(error):
            raise
        raise EncoreError(f"port {port} is in use; end what serves there, or take another with --port") from None
    print(f"http://{HOSTS[0]}:{port} serves the playground; Ctrl-C ends it", flush=True)
    # As a shell starts a command in the background, it ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("encore play", description="A page in the browser to try a model on.")
    parser.add_argument("--model", type=Path, default=Path("model"), metavar="DIR", help="default: model")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="on 127.0.0.1; default: 7860")
    arguments = parser.parse_args()
    if not 0 < arguments.port < 2**16:
        raise EncoreError(f"--port {arguments.port}: ports are numbers from 1 to 65535; take one of them")
    return arguments
