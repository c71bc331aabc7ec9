"""A launcher becomes one of another build without leaving: execve(2) in place.

What lives here: what goes from the old program to the new one. What must not: when (the agent asks for it).

Theory: a process that executes another program keeps its pid, its children, its parent (the keeper) and the descriptors that
are left open to it: the listener and the pidfds. What it knew goes through a sealed memfd: the containers that run, the
exit records that nobody has acknowledged. While anything is being built there is far more to know, so it refuses then. Up to
execve everything can be taken back; should the new program not come up, its containers are adopted by a next launcher like
those of one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Any, NoReturn

import msgpack

from mesocosm.kernel.launcher.adopted import Adopted
from mesocosm.kernel.launcher.births import Birth, Births
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import namespaces

_VERSION = 1
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def refuse_if_busy(births: Births) -> None:
    """OSError EBUSY while a container is on its way, or has not been seen to run yet."""
    busy = [birth.id for birth in births.by_id.values() if birth.status is not None or birth.mid]
    if busy or births.barriers:
        raise OSError(errno.EBUSY, f"containers are being started: {' '.join(busy[:5]) or 'their barrier is there'}")


def become(program: int, argv: list[str], births: Births, adopted: Adopted, listener: int, host_mount: int) -> NoReturn:
    """Executes `program` with `argv` and the number of the state's descriptor. OSError: nothing has changed."""
    foreign = adopted.as_lines()
    theirs = {pidfd for _, pidfd in foreign}
    own = [_as_state(birth) for birth in births.by_id.values() if birth.pidfd not in theirs or birth.ended]
    state = msgpack.packb(
        {"version": _VERSION, "listener": listener, "own": own, "adopted": [[line, pidfd] for line, pidfd in foreign]}
    )
    inherited = [listener, *theirs, *(each["pidfd"] for each in own if each["pidfd"] >= 0)]
    womb = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    file = os.memfd_create("upgrade", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(file, state)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        for fd in (*inherited, file):
            os.set_inheritable(fd, True)  # noqa: FBT003 - the library's own signature
        namespaces.setns(host_mount, c.CLONE_NEWNS)  # where the interpreter's files are
        os.execve(program, [*argv, str(file)], dict(os.environ))
    except OSError:
        namespaces.setns(womb, c.CLONE_NEWNS)
        for fd in inherited:
            os.set_inheritable(fd, False)  # noqa: FBT003 - the library's own signature
        raise
    finally:
        os.close(womb)
        os.close(file)


def _as_state(birth: Birth) -> dict[str, Any]:
    return {
        "id": birth.id, "barrier": birth.barrier, "pid": birth.pid, "note": birth.note, "ended": birth.ended,
        "pidfd": -1 if birth.ended else birth.pidfd, "failure": birth.failure, "record": birth.record,
    }  # fmt: skip


def read_state(file: int) -> dict[str, Any]:
    """What the old program left. ValueError if it was of a version that this one does not know."""
    state: dict[str, Any] = msgpack.unpackb(os.pread(file, os.fstat(file).st_size, 0), max_bin_len=1 << 25)
    os.close(file)
    if state["version"] != _VERSION:
        raise ValueError(f"the state of a launcher in version {state['version']}; {_VERSION} is known here")
    return state


def take_over(state: dict[str, Any], births: Births, adopted: Adopted) -> None:
    """Knows all that the old program knew."""
    for each in state["own"]:
        birth = Birth(each["id"], each["barrier"], 0, None, each["note"], None)
        birth.phase, birth.pid, birth.ended = "running", each["pid"], each["ended"]
        birth.concluded, birth.failure = birth.ended is not None, each.get("failure")
        birth.record = each.get("record", b"")
        births.restore(birth, each["pidfd"])
    for line, pidfd in state["adopted"]:
        os.set_inheritable(pidfd, False)  # noqa: FBT003 - the library's own signature
        adopted.adopt(line, pidfd)
