"""Where an agent's socket, run directory and state are, for root and for ordinary users.

What lives here: the table of directories and the environment variables that move them, and the making of the
run directory. What must not: anything that opens or reads those files.

Theory: everything follows from the run directory. An ordinary user without a login session has no
XDG_RUNTIME_DIR; then it is a directory in /tmp that carries the user's number. /tmp belongs to everybody, so
such a directory is believed only if it is ours alone: whoever made it first could otherwise be our agent.
"""

from __future__ import annotations

import os
import stat

from mesocosm.kernel.core.errors import DeniedError

NAME = "mesocosm"


def run_dir() -> str:
    """The run directory: MESOCOSM_RUN_DIR; root's /run/mesocosm; a user's own below XDG_RUNTIME_DIR, /run/user/UID or /tmp."""
    if named := os.environ.get("MESOCOSM_RUN_DIR"):
        return os.path.abspath(named)
    uid = os.geteuid()
    if uid == 0:
        return f"/run/{NAME}"
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    # After `su` or `sudo -u` the variable is often still that of the other user: a directory that is not ours is no use.
    for base in (session, f"/run/user/{uid}"):
        if base.startswith("/") and _is_private(base, uid):
            return os.path.join(base, NAME)
    return f"/tmp/{NAME}-{uid}"


def state_dir() -> str:
    """The durable state's directory: MESOCOSM_STATE_DIR, /var/lib/mesocosm (root), $XDG_STATE_HOME/mesocosm."""
    if named := os.environ.get("MESOCOSM_STATE_DIR"):
        return os.path.abspath(named)
    return f"/var/lib/{NAME}" if os.geteuid() == 0 else _user_dir("XDG_STATE_HOME", "~/.local/state")


def config_dirs() -> list[str]:
    """Directories that may hold `sets.d`, the weakest first: the distribution's, the administrator's, the user's."""
    system = [f"/usr/lib/{NAME}", f"/etc/{NAME}"]
    return system if os.geteuid() == 0 else [*system, _user_dir("XDG_CONFIG_HOME", "~/.config")]


def socket() -> str:
    """The agent's socket: MESOCOSM_SOCKET, else `agent.sock` in the run directory."""
    if named := os.environ.get("MESOCOSM_SOCKET"):
        return os.path.abspath(named)
    return os.path.join(run_dir(), "agent.sock")


def set_name(asked: str | None = None) -> str | None:
    """The plug-in set: what was asked for (`--set`), else MESOCOSM_SET, else None for the configured default."""
    return asked or os.environ.get("MESOCOSM_SET") or None


def is_inside_container() -> bool:
    """Whether this process was started as a container by mesocosm: its agent is outside and cannot be started from here."""
    return bool(os.environ.get("MESOCOSM_ID"))


def make_run_dir() -> str:
    """The run directory, made if it was absent; DeniedError if somebody else could write in it.

    Only its own level is made with care; an absent parent (an odd MESOCOSM_RUN_DIR) is made too.
    """
    path = run_dir()
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, mode)
    except FileExistsError:
        pass
    except OSError as error:
        raise DeniedError(
            f"the run directory cannot be made: {error.strerror}",
            target=path,
            hint="set MESOCOSM_RUN_DIR to a directory that may be made",
        ) from None
    check_run_dir(path)
    os.makedirs(os.path.join(path, "containers"), mode, exist_ok=True)
    return path


def check_run_dir(path: str) -> None:
    """DeniedError unless `path` is absent, or a directory of ours (or root's) that nobody else can write in."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DeniedError(f"the run directory cannot be looked at: {error.strerror}", target=path, syscall="lstat") from None
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.geteuid())
    # A named directory may be open to a group on purpose; writable for everybody is never meant.
    if is_ours and not status.st_mode & stat.S_IWOTH:
        return
    raise DeniedError(
        "the run directory belongs to somebody else, or others can write in it",
        target=path,
        have=f"owner {status.st_uid}, mode {stat.filemode(status.st_mode)}",
        need=f"owner {os.geteuid()}, mode drwx------",
        hint="remove it, or set MESOCOSM_RUN_DIR to a directory of your own",
    )


def _is_private(path: str, uid: int) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & stat.S_IWOTH


def _user_dir(variable: str, fallback: str) -> str:
    named = os.environ.get(variable, "")
    return os.path.join(named if named.startswith("/") else os.path.expanduser(fallback), NAME)
