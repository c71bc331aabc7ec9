"""Verbs that listen: events, logs.

What lives here: the two functions and what they choose to listen to. What must not: how lines look.
"""

from __future__ import annotations

import argparse
from typing import Any

from mesocosm.kernel.cli import connection, tables
from mesocosm.kernel.cli.multiplex import Multiplexer
from mesocosm.kernel.cli.output import Console
from mesocosm.kernel.cli.printers import JsonPrinter, LinePrinter, Printer, RawPrinter
from mesocosm.kernel.cli.progress import Member, Progress
from mesocosm.kernel.core.errors import SpecError

STREAMS = ("stdout", "stderr")


def events(arguments: argparse.Namespace, console: Console) -> int:
    """`meso events`: until it is interrupted."""
    if arguments.since < 0:
        raise SpecError("out of range", path="--since", have=str(arguments.since), need="0 or more")
    with connection.connect(arguments) as client:
        for event in client.events(arguments.since, arguments.id):
            if console.as_json:
                console.json(event)
            else:
                console.say(tables.event_line(event, console.safe, console.paint))
    return 0


def logs(arguments: argparse.Namespace, console: Console) -> int:
    """`meso logs`: one container's bytes as they are, or a whole group's lines with names in front."""
    client = connection.connect(arguments, timeout=None)
    within = [line["id"] for line in client.containers(all=True) if line["id"].startswith(arguments.id + ".")]
    progress = Progress(arguments.id, {container_id: Member(container_id) for container_id in within or [arguments.id]})
    printer: Printer
    if console.as_json:
        printer = JsonPrinter(console, progress)
    elif within:
        printer = LinePrinter(console, progress, quiet=True, unfiltered=arguments.raw)
    else:
        printer = RawPrinter(console, progress, unfiltered=arguments.raw)
    streams: Multiplexer[tuple[str, str]] = Multiplexer(lambda: connection.connect(arguments, timeout=None), client)
    for container_id in progress.members:
        for stream in STREAMS if arguments.stream is None else (arguments.stream,):
            asked: dict[str, Any] = {"container_id": container_id, "stream": stream, "offset": 0, "follow": arguments.follow}
            if arguments.previous:
                asked["previous"] = True
            streams.open((container_id, stream), "READ_LOGS", **asked)
    try:
        while len(streams):
            for item in streams.take():
                if not item.ended and item.value.get("dropped"):
                    printer.dropped(*item.tag, item.value["offset"], item.value["dropped"])
                elif not item.ended:
                    printer.output(*item.tag, item.value["offset"], item.value["data"])
                elif item.error is not None and not (within and item.error.code == "not_found"):
                    raise item.error
            if len(streams):
                streams.wait(None)
        printer.finish()
    finally:
        streams.close()
    return 0
