"""`meso run`: launches a group, shows it while it lives, ends it on ctrl-C, and ends with its exit code.

What lives here: following one group, from its event lines and what its members write to the exit code. What must
not: how it looks (printers.py), what an event means for a state (progress.py).

Theory: the agent decides, this client follows. ctrl-C, SIGTERM, a closed terminal and a closed pipe all ask the agent to
end the group by its kill policy; the client leaves when the agent has said `end` and all output has been read. An agent
that is gone in between does not end the group: the client finds the next agent and goes on where it was (events by
number, output by offset).
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from mesocosm.kernel.cli import connection, document
from mesocosm.kernel.cli.multiplex import Item, Multiplexer, Signals, remaining
from mesocosm.kernel.cli.output import Console, OutputError
from mesocosm.kernel.cli.printers import JsonPrinter, LinePrinter, LivePrinter, Printer, RawPrinter
from mesocosm.kernel.cli.progress import Progress
from mesocosm.kernel.client import RECONNECT, Client, RemoteError
from mesocosm.kernel.core import names
from mesocosm.kernel.core.errors import EXIT_CODES, AgentGoneError, UnknownOutcomeError, from_object

STREAMS = ("stdout", "stderr")
DRAIN_SECONDS = 5.0  # after `end`: how long output that is still on its way may take
REATTACHMENTS = 5
REATTACH_PAUSE = 0.05
LOST_SECONDS = 2.0  # what an agent still has to say of a group that it does not know comes at once
Tag = tuple[str, str]  # (container id, stream); ("", "events") for the event lines
EVENTS: Tag = ("", "events")


class Request(NamedTuple):
    """What is asked of the agent: `method` with `params`. `nested` are the ids of tasks that start in the container `name`."""

    method: str
    params: dict[str, Any]
    name: str
    nested: tuple[str, ...] = ()

    @property
    def roots(self) -> tuple[str, ...]:
        """What to end to have nothing of it."""
        return self.nested or ((self.name,) if self.name else ())


def run(arguments: argparse.Namespace, console: Console) -> int:
    """The verb."""
    pod = document.group_document(arguments)
    asked = _request(arguments, pod)
    limit = _seconds(arguments.timeout)
    if arguments.detach:
        return _detached(arguments, pod, asked, limit, console)
    with Signals() as signals:
        client = connection.connect(arguments, timeout=None, reconnect=False)
        connection.check_set(client, arguments)
        follower = _Follower(arguments, pod, asked, limit, console, client, signals)
        try:
            # A signal while an agent was being started: nothing has been asked of it yet.
            return 128 + signals.received[0] if signals.received else follower.follow()
        finally:
            follower.close()


def _request(arguments: argparse.Namespace, pod: Mapping[str, Any]) -> Request:
    if arguments.inside is None:
        name = pod.get("name")
        return Request("LAUNCH_GROUP", {"group": pod}, name if isinstance(name, str) else "")
    from mesocosm.kernel.core.spec import parse_tasks

    names.parse_id(arguments.inside)
    tasks = document.nested_tasks(pod, arguments)
    parse_tasks(tasks, arguments.inside)
    nested = tuple(f"{arguments.inside}.{task['name']}" for task in tasks)
    return Request("LAUNCH_NESTED_GROUP", {"container_id": arguments.inside, "tasks": tasks}, arguments.inside, nested)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from mesocosm.kernel.core.resources import duration

    return duration(text, "--timeout") / 1000


def _detached(arguments: argparse.Namespace, pod: Mapping[str, Any], asked: Request, limit: float | None, console: Console) -> int:
    def undo() -> None:
        for container_id in asked.roots:
            with contextlib.suppress(RemoteError):
                connection.connect(arguments, start=False, reconnect=False).kill(container_id)

    try:
        with connection.connect(arguments, timeout=limit) as client:
            connection.check_set(client, arguments)
            launched = client.call(asked.method, **asked.params)
    except KeyboardInterrupt:
        undo()  # the launch goes on in the agent; whoever interrupts us wants none
        raise
    except RemoteError as error:
        if error.code == "too_large":
            raise document.explain_size(pod, from_object(error.error)) from None
        if error.code == "unknown_outcome" and limit is not None:
            undo()
            return EXIT_CODES["timeout"]
        raise
    if console.as_json:
        console.json(launched)
    else:
        for container_id in asked.nested or (launched["id"],):
            console.say(console.safe(container_id))
    return 0


class _Follower:
    """One run in the foreground."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        pod: Mapping[str, Any],
        asked: Request,
        limit: float | None,
        console: Console,
        client: Client,
        signals: Signals,
    ) -> None:
        self._arguments = arguments
        self._pod = pod
        self._single = document.is_single(pod)
        self._console = console
        self._signals = signals
        self._deadline = None if limit is None else time.monotonic() + limit
        self._limit = limit
        self._streams: Multiplexer[Tag] = Multiplexer(self._connect, client)
        self._asked = asked
        self._progress = Progress(asked.name, nested=asked.nested)
        self._printer = self._choose_printer()
        self._offsets: dict[Tag, int] = {}
        self._finished: set[Tag] = set()
        self._kills = 0  # how often the group has been asked to end
        self._kill_is_owed = False
        self._interrupted: int | None = None  # the signal that ended the run
        self._timed_out = False
        self._lost_stdout = False
        self._output_error: OutputError | None = None
        self._is_cut = False  # the event stream has ended, and the group has not
        self._cut_by: RemoteError | None = None
        self._tick: float | None = None
        self._reattached = 0
        self._given_up_by: float | None = None  # until then an agent that does not know the group may still tell how it ended

    def _connect(self) -> Client:
        return connection.connect(self._arguments, timeout=None, reconnect=False)

    def _choose_printer(self) -> Printer:
        if self._console.as_json:
            return JsonPrinter(self._console, self._progress)
        if self._single:
            return RawPrinter(self._console, self._progress)
        live = self._console.out_is_terminal and self._console.can_move
        return (LivePrinter if live else LinePrinter)(self._console, self._progress)

    def follow(self) -> int:
        """Until the group has ended and all has been shown; the exit code."""
        try:
            self._streams.open(EVENTS, self._asked.method, **self._asked.params, stream=True)
        except RemoteError as error:
            if error.code == "too_large":
                raise document.explain_size(self._pod, from_object(error.error)) from None
            raise
        drained_by: float | None = None
        while True:
            for item in self._streams.take():
                self._take(item)
            if self._is_cut:  # only now: what had come from the other streams before has been shown, and counted
                self._is_cut = False
                self._lost(self._cut_by)
            self._heed_signals()
            if self._progress.end is None and self._given_up_by is not None and time.monotonic() > self._given_up_by:
                self._show(self._flush)
                raise UnknownOutcomeError(
                    "the next agent knows nothing of it: its record was lost",
                    id=self._progress.name,
                    hint="the agent's log says what was set aside; meso ps -a shows what is known",
                )
            if self._progress.end is not None:
                drained_by = drained_by or time.monotonic() + DRAIN_SECONDS
                # Of a group that was found again the event stream has no end of its own.
                if len(self._streams) == (EVENTS in self._streams) or time.monotonic() > drained_by:
                    break
            self._show(self._printer_tick)
            self._streams.wait(self._pause(drained_by), self._signals.fd)
        self._show(self._printer.finish)
        return self._code()

    def close(self) -> None:
        """Closes the connections; containers go on."""
        self._streams.close()

    def _pause(self, drained_by: float | None) -> float | None:
        waits = [self._tick, remaining(drained_by), None if self._timed_out else remaining(self._deadline)]
        waits.append(None if self._progress.end else remaining(self._given_up_by))
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _printer_tick(self) -> None:
        self._tick = self._printer.tick()

    def _show(self, call: Any, *values: Any) -> None:
        """Calls the printer; when nobody reads us any more the group is ended, as SIGPIPE would end a program."""
        if self._lost_stdout:
            return
        try:
            call(*values)
        except (BrokenPipeError, OutputError) as error:
            self._lost_stdout = True
            self._output_error = error if isinstance(error, OutputError) else None
            self._interrupted = self._interrupted or signal.SIGPIPE
            self._end_group()

    # What the agent says

    def _take(self, item: Item[Tag]) -> None:
        if item.tag == EVENTS:
            self._take_event(item)
        elif not item.ended:
            offset, data, dropped = item.value["offset"], item.value["data"], item.value.get("dropped", 0)
            self._offsets[item.tag] = offset + len(data) + dropped
            if dropped:
                self._show(self._printer.dropped, *item.tag, offset, dropped)
            else:
                self._show(self._printer.output, *item.tag, offset, data)
        elif item.error is None:
            self._finished.add(item.tag)
        elif item.error.code == "agent_gone":
            pass  # the event stream of the same connection says so too, and everything is opened anew
        else:
            self._finished.add(item.tag)
            if item.error.code != "not_found":
                self._show(self._printer.say, f"{item.tag[0]}: its {item.tag[1]} cannot be read: {item.error.error.get('message')}")

    def _take_event(self, item: Item[Tag]) -> None:
        if item.ended:
            self._is_cut, self._cut_by = self._progress.end is None, item.error
            return
        event: Mapping[str, Any] = item.value
        if not self._progress.is_about(event):
            return
        if not self._progress.name and event.get("id"):
            self._progress.name = str(event["id"]).partition(".")[0]
        self._progress.feed(event)
        kind = event.get("type")
        if event is self._progress.end:
            return
        self._show(self._printer.event, event)
        if kind in ("started", "exited", "dead"):
            self._open_logs(str(event["id"]))
        if self._kill_is_owed:
            self._end_group()

    def _open_logs(self, container_id: str) -> None:
        if container_id == self._progress.name and not self._single:
            return  # the pod's own container only waits
        for stream in STREAMS:
            tag = (container_id, stream)
            if tag not in self._streams and tag not in self._finished:
                offset = self._offsets.get(tag, 0)
                try:
                    self._streams.open(tag, "READ_LOGS", container_id=container_id, stream=stream, offset=offset, follow=True)
                except RemoteError as error:
                    if error.code not in ("agent_gone", "not_found"):
                        raise

    def _lost(self, error: RemoteError | None) -> None:
        """The event stream ended before the group did: a refusal, or an agent that is gone."""
        if error is not None and error.code != "agent_gone":
            self._show(self._flush)
            raise error
        began = bool(self._progress.last_seq and self._progress.name)
        if not began or self._reattached >= REATTACHMENTS or self._arguments.socket:
            self._show(self._flush)
            told = {"code": "agent_gone", "message": "the agent ended before the group did", "id": self._progress.name}
            if not began:
                told["message"] = "the agent ended before it said a word of the launch: it may run all the same"
                told["hint"] = "meso ps -a shows it if it does; meso run launches it again if it does not"
            raise RemoteError(told) if error is None or not began else error
        self._reattached += 1
        self._show(self._printer.say, "the agent is gone; its containers go on. Looking for the next one")
        self._streams.close()
        self._attach_again()
        for container_id, member in self._progress.members.items():
            if member.started is not None or member.wait is not None:
                self._open_logs(container_id)
        self._show(self._printer.say, "the next agent is there: ctrl-C ends the group")
        if self._kills:
            self._end_group()

    def _attach_again(self) -> None:
        deadline = time.monotonic() + RECONNECT
        while True:
            try:
                client = self._connect()
                self._streams = Multiplexer(self._connect, client)
                try:
                    client.explain(self._progress.name)
                except RemoteError as error:
                    if error.code == "agent_gone":
                        raise
                    if error.code == "not_found":
                        self._given_up_by = time.monotonic() + LOST_SECONDS
                self._streams.open(EVENTS, "SUBSCRIBE_EVENTS", since=self._progress.last_seq, container_id=self._progress.name)
            except (RemoteError, AgentGoneError) as error:
                # A dying agent's socket takes connections until its last breath.
                if error.code != "agent_gone" or time.monotonic() > deadline:
                    raise
                self._streams.close()
                time.sleep(REATTACH_PAUSE)
            else:
                return

    def _flush(self) -> None:
        self._printer.finish()

    # What the user says

    def _heed_signals(self) -> None:
        self._signals.clear()
        while self._signals.received:
            number = self._signals.received.pop(0)
            self._interrupted = number
            self._end_group()
            self._show(self._printer.say, "ending; ctrl-C again ends it at once" if self._kills == 1 else "ending at once")
        if self._deadline is not None and not self._timed_out and time.monotonic() >= self._deadline and self._progress.end is None:
            self._timed_out = True
            self._end_group()
            self._show(self._printer.say, f"the deadline of {self._limit:g} s has passed: ending")

    def _end_group(self) -> None:
        """Asks the agent to end the group: the first time by its kill policy, then at once."""
        if not self._kill_is_owed:
            self._kills += 1
        self._kill_is_owed = False
        if not self._progress.name:
            self._kill_is_owed = True
            return
        for container_id in self._progress.roots:
            try:
                with self._connect() as client:
                    client.kill(container_id, int(signal.SIGKILL) if self._kills > 1 else None)
            except RemoteError as error:
                # Not known yet: said again with the next event. Already dead, or dying: that is what was wanted.
                self._kill_is_owed |= error.code == "not_found" and self._progress.last_seq == 0

    def _code(self) -> int:
        end = self._progress.end or {}
        if self._timed_out:
            return EXIT_CODES["timeout"]
        error = end.get("error")
        if error and not self._console.as_json:
            self._show(self._console.words, from_object(error).__str__())
        code = end.get("exit")
        if not isinstance(code, int):
            code = from_object(error).exit_code if error else 1
        if self._output_error is not None:
            raise self._output_error
        if self._lost_stdout:
            return 128 + signal.SIGPIPE
        if self._interrupted is not None and code == 0 and not self._single:
            code = 128 + self._interrupted  # a script must not go on as if the group had finished by itself
        return code
