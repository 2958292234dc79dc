"""`kvtier demo` from start to end."""

import asyncio
import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.status import Status

from kvtier.cluster import launch
from kvtier.config import Config
from kvtier.demo import report, stage
from kvtier.demo.acts import Play
from kvtier.demo.engines import DemoEngine, demo_engine
from kvtier.demo.workload import Conversation, conversations, prompt
from kvtier.errors import ConfigError
from kvtier.router.text import Text


class Options(NamedTuple):
    """What the command line gave; empty text means the default."""

    engine: str
    model: str
    redis_url: str
    json_path: str


def main(options: Options) -> int:
    """Run the demo; 0 only if every promise of `report.verdict` held.

    Raises:
        ConfigError: A path or URL is wrong.
        KVTierError: A part did not start.
    """
    begin = time.monotonic()
    console = Console()
    json_path = Path(options.json_path) if options.json_path else None
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {json_path.absolute().parent}")
    warnings.simplefilter("ignore")  # of the libraries; ours are logged
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status(""))
        progress = teller(console, status)
        progress("loading the model")
        engine = demo_engine(options.engine, options.model, progress)
        text = Text(engine.tokenizer_files)
        talks = conversations(text, engine.max_tokens)
        say_model(console, engine)
        folder = stack.enter_context(stage.scratch())
        tokens = max(len(prompt(text, talk.ask())[1]) for talk in talks)
        progress("starting the shared store")
        conversation = -(-tokens // engine.block_tokens) * engine.block_nbytes
        url = stack.enter_context(stage.shared_store(options.redis_url, conversation * 12))
        settings = stage.config(folder, options.engine, options.model, conversation, url)
        progress("starting the router")
        router = stack.enter_context(stage.router_process(folder))
        progress("starting Ray with two nodes")
        stack.enter_context(stage.local_ray())
        stack.callback(stop, progress)
        progress("Ray places a daemon and a worker on each node; the workers load the model")
        acts = asyncio.run(play(settings, router, engine, talks, console, status.stop))
    records = acts.records
    console.print("computing every answer again, without kvtier, to compare (takes a while)")
    with console.status("computing every answer again, without kvtier") as status:
        tell = teller(console, status)
        compared = engine.check(
            settings.worker, records, lambda name: tell(f"  without kvtier: {name}")
        )
    rows = report.by_kind(records)
    verdicts = report.verdict(records, rows)
    seconds = time.monotonic() - begin
    report.show_table(console, rows)
    report.show_verdict(console, verdicts, compared, seconds)
    if json_path is not None:
        result = {
            **figures(engine, acts),
            "seconds": seconds,
            "by_kind": rows,
            "verdicts": verdicts,
            "compared": compared,
        }
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(verdicts.values()) else 1


def teller(console: Console, status: Status) -> Callable[[str], None]:
    """Says what is being started: at a terminal in place, in a file or a pipe a line each."""

    def tell(text: str) -> None:
        status.update(text)
        if not console.is_terminal:
            console.print(text, markup=False, highlight=False)

    return tell


def figures(engine: DemoEngine, acts: Play) -> dict[str, object]:
    """For the JSON file: what was served where, each request, and what was done between them."""
    return {
        "model": engine.line,
        "block_tokens": engine.block_tokens,
        "block_nbytes": engine.block_nbytes,
        "cores": os.cpu_count(),
        "requests": [record.public() for record in acts.records],
        "events": acts.events,
    }


def say_model(console: Console, engine: DemoEngine) -> None:
    """What is served."""
    console.print(
        f"{engine.line}: {engine.block_nbytes / engine.block_tokens / 1024:g} KiB of KV a token, "
        f"blocks of {engine.block_tokens} tokens = {engine.block_nbytes / 2**20:.2f} MiB",
        highlight=False,
    )


def stop(progress: Callable[[str], None]) -> None:
    """End what Ray runs for us."""
    progress("stopping")
    launch.down(say=logging.getLogger(__name__).info)


async def play(
    settings: Config,
    router: str,
    engine: DemoEngine,
    talks: list[Conversation],
    console: Console,
    started: Callable[[], None],
) -> Play:
    """Place everything, run the acts; what they did."""
    async with stage.staged(settings, router, lambda line: console.print(line, markup=False)) as on:
        started()
        acts = Play(
            on, Text(engine.tokenizer_files), talks, console.print,
            lambda r: report.show_request(console, r), logits=engine.gives_logits,
        )  # fmt: skip
        report.show_header(console)
        await acts.run()
        return acts
