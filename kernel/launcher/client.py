"""The agent's end of the launcher: requests out, answers and notices in, errors put into words.

A failed row comes back as a number and an errno. Here, where the plan is known, it becomes a LaunchError that names
the plug-in, the step, the system call and what it was done to.
"""

from __future__ import annotations

import errno as _errno
import os
import socket
import struct
import traceback
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgpack
import trio

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.plan import Step
from mesocosm.kernel.launcher.build import build_id
from mesocosm.kernel.launcher.compile import Compiled, compile_steps
from mesocosm.kernel.launcher.connecting import START_DEADLINE, Renewing, ended_of, too_slow
from mesocosm.kernel.launcher.contract import (
    ExecFailed,
    Launched,
    LauncherGone,
    Notice,
    NotReleased,
    Orphan,
    Staged,
    StageRequest,
    Started,
)
from mesocosm.kernel.launcher.diagnosis import explain_row
from mesocosm.kernel.launcher.passing import receive, send
from mesocosm.kernel.launcher.pending import Answer, Pending
from mesocosm.kernel.launcher.protocol import MAX_MESSAGE, SOCKET
from mesocosm.kernel.launcher.staging import packed
from mesocosm.kernel.launcher.starting import command_line, open_program
from mesocosm.kernel.launcher.viewing import is_confined, open_entries

_DISCARD_DEADLINE = 10.0
_ORPHANS = 100  # in a message


class LauncherClient:
    """A connected launcher. Made by `open_launcher`; all methods as in contract.Launcher."""

    def __init__(self, connection: socket.socket, run_dir: str, *, renewing: Renewing | None = None) -> None:
        self._run_dir = run_dir
        self._renewing = renewing
        self._quiet = False
        self._changing: trio.Event | None = None
        self._walker = renewing.walker if renewing is not None else None
        self._build = ""
        self._number = 0
        self._waiting: dict[int, Pending] = {}
        self._plans: dict[str, tuple[tuple[Step, ...], Compiled]] = {}  # released, execve not seen yet
        self._publish, self.notices = trio.open_memory_channel[Notice](float("inf"))
        self._use(connection)
        self._sending = trio.Lock()  # one task may wait for a socket; a large group's stages all want to
        self._confined = is_confined()

    @property
    def pid(self) -> int | None:
        """The launcher's process, as this one counts; None when it is gone."""
        with suppress(OSError):  # closed
            found = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return None if self._gone else struct.unpack("3i", found)[0] or None
        return None

    # --- transport ----------------------------------------------------------------------------------------------

    def _use(self, connection: socket.socket) -> None:
        connection.setblocking(False)  # noqa: FBT003 - the library's own signature
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._socket = connection
        self._gone = False
        self._views: set[str] = set()  # that this launcher is known to have

    async def renew(self) -> None:
        """Another connection, to whoever serves now. See contract.Launcher."""
        if self._renewing is None or not self._gone:
            return
        self._quiet = True  # whoever asked for this learns what becomes of it, and needs no notice
        served = False
        try:
            with trio.fail_after(START_DEADLINE):
                while not served:
                    self.close()
                    self._use(await self._renewing.connection())
                    self._renewing.nursery.start_soon(self.listen)
                    with suppress(LaunchError):  # it was the old one, about to be gone
                        await self.hello()
                        served = True
        except trio.TooSlowError:
            raise too_slow(self._run_dir) from None
        finally:
            self._quiet = False
            self._gone = self._gone or not served  # one that is there and does not answer is asked anew by who comes next

    async def listen(self) -> None:
        """Reads until the launcher is gone. Runs as one task beside everything else."""
        buffer = bytearray(MAX_MESSAGE * 4)
        connection = self._socket
        while True:
            try:
                data, fds, _ = receive(connection, buffer)
            except BlockingIOError:
                with suppress(trio.ClosedResourceError):  # by us; then the next look at it is an OSError
                    await trio.lowlevel.wait_readable(connection)
                continue
            except OSError:
                break
            if not data:
                break
            try:
                self._hear(data, fds)
            except Exception as error:  # not what our launcher says: nothing more can be made of it
                traceback.print_exception(error)
                _close_all(fds)
                break
        if connection is not self._socket:
            return  # there is another one by now
        self._gone = True
        for pending in self._waiting.values():
            pending.put(None)
        if not self._quiet:
            self._publish.send_nowait(LauncherGone())

    def _hear(self, data: bytes | memoryview, fds: list[int]) -> None:
        number, kind, body = msgpack.unpackb(data)
        if number == 0:
            for what, about in body:
                self._notice(what, about)
        elif number in self._waiting:
            self._waiting[number].put(Answer(kind, {**body}, fds))
        else:
            _close_all(fds)

    def _notice(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "not_released":
            self._publish.send_nowait(NotReleased(body["barrier"], body["message"]))
            return
        container_id = body["id"]
        if kind == "started":
            self._plans.pop(container_id, None)
            self._publish.send_nowait(Started(container_id, body["time"]))
        elif kind == "ended":
            self._plans.pop(container_id, None)
            self._publish.send_nowait(ended_of(body))
        elif kind == "exec_failed":
            steps, compiled = self._plans.pop(container_id, ((), None))
            error = explain_row(body, steps, compiled, container_id, after_barrier=body["released"])
            self._publish.send_nowait(ExecFailed(container_id, error.as_object(), None if compiled else body))

    async def _ask(self, verb: str, body: Mapping[str, Any], fds: Sequence[int] = ()) -> Answer:
        """The answer to a request, in one piece: "more" and its descriptors are put before what follows."""
        while self._changing is not None and verb not in ("hello", "upgrade"):
            await self._changing.wait()
        if self._gone:
            raise self._no_launcher()
        self._number += 1
        number = self._number
        pending = self._waiting[number] = Pending()
        lines: list[Any] = []
        received: list[int] = []
        try:
            await self._send(msgpack.packb([number, verb, body]), fds)
            while True:
                answer = await pending.next()
                if answer is None:
                    raise self._no_launcher()
                received += answer.fds
                if answer.kind != "more":
                    answer.body["lines"] = [*lines, *answer.body.get("lines", ())]
                    return Answer(answer.kind, answer.body, received)
                lines += answer.body["lines"]
        except BaseException:
            # Answers that came and were not looked at have descriptors, too.
            for unseen in pending.answers:
                received += unseen.fds
            _close_all(received)
            raise
        finally:
            del self._waiting[number]

    async def _tell(self, verb: str, body: Mapping[str, Any]) -> None:
        """A request that wants no answer."""
        while self._changing is not None:
            await self._changing.wait()
        if self._gone:
            raise self._no_launcher()
        await self._send(msgpack.packb([0, verb, body]), ())

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if not self._sending.locked() and self._sent(data, fds):
            return
        async with self._sending:
            while not self._sent(data, fds):
                await trio.lowlevel.wait_writable(self._socket)

    def _sent(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            send(self._socket, data, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._no_launcher() from error
        return True

    def _no_launcher(self) -> LaunchError:
        return LaunchError(
            "the launcher is gone",
            target=SOCKET,
            hint="what runs goes on; try again: a new launcher is started",
        )

    # --- verbs --------------------------------------------------------------------------------------------------

    async def stage(self, request: StageRequest) -> Staged:
        """Builds one container up to its barrier. See contract.Launcher."""
        compiled = compile_steps(request.steps, confined=self._confined)
        self._plans[request.container_id] = request.steps, compiled
        try:
            with packed(request, compiled) as (body, fds):
                kind, answer, received = await self._ask("stage", body, fds)
        except trio.Cancelled:
            with trio.CancelScope(shield=True), trio.move_on_after(_DISCARD_DEADLINE):
                await self._discard(request.container_id)
            raise
        if kind != "ok":
            self._plans.pop(request.container_id, None)
            raise explain_row(answer, request.steps, compiled, request.container_id)
        if not received:  # this process has no descriptor left: the kernel drops what does not fit, recvmsg(2)
            await self._discard(request.container_id)
            message = "no descriptor left for the container's pidfd"
            raise LaunchError(message, id=request.container_id, errno="EMFILE")
        return Staged(request.container_id, answer["pid"], received[0])

    async def _discard(self, container_id: str) -> None:
        self._plans.pop(container_id, None)
        with suppress(LaunchError):  # no launcher: its barrier is closed, so the child has left by itself
            await self._ask("discard", {"id": container_id})

    async def release(self, barrier: str, *, wait: bool = True) -> None:
        """Opens a barrier. See contract.Launcher."""
        if wait:
            await self._must("release", {"barrier": barrier})
        else:
            await self._tell("release", {"barrier": barrier})

    async def abort(self, barrier: str) -> None:
        """Ends all that stand at a barrier; returns when they are reaped."""
        await self._must("abort", {"barrier": barrier})

    async def acknowledge(self, container_ids: Sequence[str]) -> None:
        """Lets the launcher forget exit records."""
        await self._tell("acknowledge", {"ids": list(container_ids)})

    async def inventory(self) -> list[Launched]:
        """Everything the launcher has."""
        _, answer, received = await self._ask("inventory", {})
        fds, lines = iter(received), list[Launched]()
        for line in answer["lines"]:
            pidfd = next(fds, None) if line["living"] else None
            ended = ended_of(line["ended"]) if line["ended"] else None
            about = line["id"], line["barrier"], line["pid"], line["phase"], line["note"], ended, pidfd, line.get("failed")
            lines.append(Launched(*about))
        return lines

    async def adopt(self, orphans: Sequence[Orphan]) -> None:
        """Hands containers of a dead launcher over. See contract.Launcher."""
        for first in range(0, len(orphans), _ORPHANS):
            some = orphans[first : first + _ORPHANS]
            lines = [
                {"id": each.container_id, "barrier": each.barrier, "pid": each.pid, "birth": each.birth, "note": each.note}
                for each in some
            ]
            await self._must("adopt", {"lines": lines}, [each.pidfd for each in some])

    async def hello(self) -> None:
        """Returns when the launcher serves us; from then on it tells its notices to us and to nobody else."""
        answer = await self._must("hello", {})
        self._build = str(answer.get("build"))

    @property
    def is_outdated(self) -> bool:
        """See contract.Launcher."""
        return self._build != build_id()

    async def upgrade(self) -> bool:
        """Asks it to execute this build's program. See contract.Launcher."""
        call = f"resume({self._run_dir!r}, {self._walker!r}, {build_id()!r}, int(sys.argv[1]))"
        program = open_program()
        self._changing = trio.Event()  # other requests wait
        self._quiet = True
        try:
            with suppress(LaunchError):  # that is how its end shows: the line is cut
                await self._ask("upgrade", {"argv": command_line(call)}, [program])
                return False
            await self.renew()
        finally:
            self._quiet = False
            changing, self._changing = self._changing, None
            changing.set()
            os.close(program)
        return True

    async def view(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Builds the mount tree `name` out of a host's files. See viewing.open_entries for the entries."""
        if name in self._views:
            return
        empty = os.path.join(self._run_dir, "empty")
        with suppress(FileExistsError):
            os.mkdir(empty, 0o555)
        prepared, fds = open_entries(entries, empty)
        try:
            await self._must("view", {"name": name, "entries": prepared}, fds)
        finally:
            _close_all(fds)
        self._views.add(name)

    async def stop(self) -> None:
        """Ends the launcher."""
        await self._must("stop", {})

    async def _must(self, verb: str, body: Mapping[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        kind, answer, _ = await self._ask(verb, body, fds)
        if kind != "ok":
            raise LaunchError(
                f"the launcher could not {verb}: {answer.get('message')}",
                errno=_errno.errorcode.get(answer.get("errno") or 0),
                target=str(body.get("name") or body.get("barrier") or "") or None,
            )
        return answer

    def close(self) -> None:
        """Leaves the launcher alone; containers go on."""
        if self._socket.fileno() >= 0:
            with suppress(RuntimeError):  # trio has ended already
                trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@asynccontextmanager
async def open_launcher(run_dir: str, *, walker: str | None = None) -> AsyncGenerator[LauncherClient]:
    """The launcher of `run_dir`, found or started. Leaving closes the connection and nothing else."""
    client: LauncherClient | None = None
    try:
        async with trio.open_nursery() as nursery:
            renewing = Renewing(run_dir, walker, nursery)
            with trio.fail_after(START_DEADLINE):
                while client is None:
                    client = LauncherClient(await renewing.connection(), run_dir, renewing=renewing)
                    nursery.start_soon(client.listen)
                    try:
                        await client.hello()
                    except LaunchError:  # it was just about to end for lack of anything to do
                        client.close()
                        client = None
            yield client
            nursery.cancel_scope.cancel()
    except trio.TooSlowError:
        raise too_slow(run_dir) from None
    finally:
        if client is not None:
            client.close()
