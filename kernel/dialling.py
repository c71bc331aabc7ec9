"""Where the agent's socket is, and the connection to it; and the error that everything about it ends in.

What lives here: what a client needs before it has a word to say. What must not: frames (`client`), or anything of the agent.
The standard library alone.
"""

from __future__ import annotations

import _socket  # what is under `socket`, without its selectors and enum tables: 5 ms that every `meso ps` would pay
import os
import sys
from collections.abc import Mapping
from typing import Any


class RemoteError(Exception):
    """`error`: the error object that the agent sent, or that says what became of the agent; `code`: its code."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.error = dict(error)
        self.code = str(self.error.get("code", "internal"))
        super().__init__(str(self.error.get("message", "no message")))

    def __str__(self) -> str:
        known = [key for key in ("path", "id", "target", "errno", "have", "need", "hint") if self.error.get(key)]
        return "; ".join([f"{self.code}: {self.error.get('message', '')}", *(f"{key}: {self.error[key]}" for key in known)])


def problem(code: str, message: str, **fields: Any) -> RemoteError:
    """An error of our own making, in the form of the agent's."""
    return RemoteError({"code": code, "message": message, **fields})


def default_run_dir() -> str:
    """The run directory: MESOCOSM_RUN_DIR, root's /run/mesocosm, or the user's own (with fallbacks)."""
    if found := os.environ.get("MESOCOSM_RUN_DIR"):
        return found
    uid = os.geteuid()
    if uid == 0:
        return "/run/mesocosm"
    for base in (os.environ.get("XDG_RUNTIME_DIR") or "/", f"/run/user/{uid}"):
        # After `su` the variable is often still that of the other user.
        if os.path.isdir(base) and (status := os.stat(base)).st_uid == uid and not status.st_mode & 0o002:
            return f"{base}/mesocosm"
    return f"/tmp/mesocosm-{uid}"


def default_socket() -> str:
    """The agent's socket: MESOCOSM_SOCKET, else agent.sock in the run directory."""
    return os.environ.get("MESOCOSM_SOCKET") or os.path.join(default_run_dir(), "agent.sock")


def dial(path: str | os.PathLike[str] | None, timeout: float | None) -> _socket.socket:
    """The connected socket alone; for a client of another kind. Errors as `connect`."""
    wanted = os.fspath(path) if path is not None else default_socket()
    named = path is not None or any(os.environ.get(name) for name in ("MESOCOSM_SOCKET", "MESOCOSM_RUN_DIR"))
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    directory = -1
    try:
        if timeout is not None:  # with a timeout of Python's, connect(2) would not wait where many others wait to be taken
            timeval = b"".join(part.to_bytes(8, sys.byteorder) for part in divmod(max(1, int(timeout * 1e6)), 10**6))
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, timeval)
        target = wanted
        if len(os.fsencode(wanted)) > 107:  # what fits into a sockaddr_un, unix(7)
            directory = os.open(os.path.dirname(wanted), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            target = f"/proc/self/fd/{directory}/{os.path.basename(wanted)}"
        sock.connect(target)
        sock.settimeout(timeout)
        uid = int.from_bytes(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise problem("denied", "this user may not use the agent's socket", target=wanted) from None
        if isinstance(error, BlockingIOError):
            raise problem("timeout", f"the agent took no connection for {timeout} s", target=wanted) from None
        reason = error.strerror or error
        raise problem("agent_gone", f"no agent answers: {reason}", target=wanted, hint="meso agent starts one") from None
    finally:
        if directory >= 0:
            os.close(directory)
    # A fallback directory below /tmp could be somebody else's trap; a path that was given is the giver's choice.
    if not named and uid not in (0, os.geteuid()):
        sock.close()
        raise problem("denied", f"the agent there runs as uid {uid}", target=wanted, hint="--socket says that you mean it")
    return sock
