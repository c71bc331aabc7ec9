"""Verbs that ask the agent once: ps, tree, kill, wait, rm.

What lives here: one function for each. What must not: layout (tables.py).
"""

from __future__ import annotations

import argparse
import time

from mesocosm.kernel.cli import connection, tables
from mesocosm.kernel.cli.output import Console
from mesocosm.kernel.client import RemoteError
from mesocosm.kernel.core.errors import NotFoundError, describe, from_object
from mesocosm.kernel.core.names import is_within


def ps(arguments: argparse.Namespace, console: Console) -> int:
    """`meso ps`: a line for each container."""
    with connection.connect(arguments) as client:
        containers = client.containers(all=arguments.all)
    if console.as_json:
        for line in containers:
            console.json(line)
        return 0
    for text in tables.ps_lines(containers, time.time(), console.columns, console.safe, console.paint):
        console.say(text)
    return 0


def tree(arguments: argparse.Namespace, console: Console) -> int:
    """`meso tree`: the same as trees; with --json one line for each root, with `children`."""
    with connection.connect(arguments) as client:
        containers = client.containers(all=arguments.all)
    if arguments.id is not None:
        containers = [line for line in containers if is_within(str(line["id"]), arguments.id)]
        if not containers:
            hint = None if arguments.all else "the dead ones are not shown: meso tree -a"
            raise NotFoundError(f"there is no container {arguments.id}", id=arguments.id, hint=hint)
    if console.as_json:
        for root in tables.nest(containers):
            console.json(root)
        return 0
    for text in tables.tree_lines(containers, time.time(), console.columns, console.safe, console.paint):
        console.say(text)
    return 0


def kill(arguments: argparse.Namespace, console: Console) -> int:
    """`meso kill`: asks for the end of each; returns when it has begun (`wait` waits for it)."""
    number = None
    if arguments.signal is not None:
        from mesocosm.kernel.core.containers import signal_number

        number = signal_number(arguments.signal, "--signal")
    with connection.connect(arguments) as client:
        return _for_each(arguments.ids, lambda container_id: client.kill(container_id, number), console)


def rm(arguments: argparse.Namespace, console: Console) -> int:
    """`meso rm`: forgets each."""
    with connection.connect(arguments) as client:
        return _for_each(arguments.ids, client.remove, console)


def wait(arguments: argparse.Namespace, console: Console) -> int:
    """`meso wait`: says how it ended, and ends with its code."""
    seconds = None
    if arguments.timeout is not None:
        from mesocosm.kernel.core.resources import duration

        seconds = duration(arguments.timeout, "--timeout") / 1000
    with connection.connect(arguments) as client:
        ended = client.wait(arguments.id, timeout=seconds)
    if console.as_json:
        console.json(ended)
    else:
        console.say(console.safe(tables.how_it_ended(tables.group_wait(ended))))
    return tables.code_of(tables.group_wait(ended))


def _for_each(ids: list[str], act: object, console: Console) -> int:
    """Does it to all, whatever happens to one; the exit code is that of the first that failed."""
    code = 0
    for container_id in ids:
        try:
            act(container_id)  # type: ignore[operator]
        except RemoteError as error:
            if error.code == "agent_gone":
                raise
            told = from_object(error.error).with_fields(id=container_id)
            code = code or told.exit_code
            if console.as_json:
                console.json({"error": told.as_object()})
            console.words(describe(told.as_object()))
        else:
            if console.as_json:
                console.json({"id": container_id})
    return code
