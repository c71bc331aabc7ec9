"""The table of verbs: what each is for, how it is called, an example, its exit codes, and the module that does it.

What lives here: data and the declaration of arguments. What must not: doing anything. Help is made from this table alone
(parser.py), and so is the list of verbs that are known but not built yet.

A verb's module is imported when the verb is used; its function takes the parsed arguments and a Console, and answers
the exit code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import NamedTuple

PACKAGE = "mesocosm.kernel.cli"

EXITS: Mapping[int, str] = {
    0: "done",
    1: "failed",
    2: "input refused, nothing changed",
    3: "not found",
    4: "conflict: the id is taken, dying, or not in that state",
    5: "denied",
    6: "findings",
    7: "no agent",
    124: "deadline passed",
    125: "launch refused or rolled back: no program ran",
    126: "the program cannot be executed: nothing ran",
    127: "the program is not there: nothing ran",
}
PROGRAM = "else the program's own code, 128 + n for signal n"


class Verb(NamedTuple):
    """One verb. `exits` are those of EXITS that it can end with besides 0, 1 and 2; `program`: it hands on a program's code."""

    summary: str
    example: str
    module: str
    function: str
    declare: Callable[[argparse.ArgumentParser], None]
    exits: tuple[int, ...] = ()
    program: bool = False
    more: str = ""


def _nothing(parser: argparse.ArgumentParser) -> None:
    pass


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", action="store_true", help="what of the ledger has been set aside has been seen: forget it")


def _one_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="container id: GROUP, GROUP.TASK, GROUP.TASK.CHILD…")


def _group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="pod file, TOML or JSON; - for stdin")
    parser.add_argument("--name", metavar="NAME", help="what to call the group")
    single = parser.add_argument_group("for a single command (instead of FILE)")
    single.add_argument("--cpus", metavar="N", help="at most this much CPU time: 2, 0.5, 500m")
    single.add_argument("--memory", metavar="SIZE", help="at most this much memory: 64MiB")
    single.add_argument("--pids", metavar="N", type=int, help="at most this many processes and threads")
    single.add_argument("--limit", metavar="NAME=VALUE", action="append", help="resource limit: nofile=1024 or nofile=512:1024")
    single.add_argument("--env", "-e", metavar="K=V", action="append", help="variable; K alone takes the value it has here")
    single.add_argument(
        "--volume", "-v", metavar="SRC:TARGET[:ro]", action="append", help="/dir, tmpfs:16MiB or shared:NAME at TARGET"
    )
    single.add_argument("--user", "-u", metavar="USER", help="user name or uid[:gid] inside")
    single.add_argument("--cwd", "-w", metavar="DIR", help="working directory inside")
    single.add_argument("--rootfs", metavar="DIR", help="directory that becomes /; 'host' (default): a view of the host's programs")
    single.add_argument("--read-only", action="store_true", help="the root directory cannot be written")
    single.add_argument("--network", choices=("pod", "host", "none"), help="one of its own (pod, the default), the host's, or none")
    single.add_argument("--hostname", metavar="NAME", help="the host's name inside")
    single.add_argument("--cap-add", metavar="CAP", action="append", help="capability beyond the default ones")
    single.add_argument("--cap-drop", metavar="CAP", action="append", help="capability to go without; ALL for all")
    single.add_argument("--init", action="store_true", help="a small init as PID 1, which reaps")


def _run(parser: argparse.ArgumentParser) -> None:
    _group(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="print the id once all members run, and return")
    parser.add_argument("--in", metavar="ID", dest="inside", help="inside this running container, as a nested task")
    parser.add_argument("--timeout", metavar="S", help="end it after so many seconds (or '500ms', '2m'); exit code 124")


def _ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="dead ones too")


def _tree(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", nargs="?", help="only this container and those below it")
    _ps(parser)


def _logs(parser: argparse.ArgumentParser) -> None:
    _one_id(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the container is dead and all is read")
    parser.add_argument("--stream", choices=("stdout", "stderr"), help="only this one")
    parser.add_argument("--previous", action="store_true", help="of the container before this one that had its id")
    parser.add_argument("--raw", action="store_true", help="do not escape control characters on a terminal")


def _kill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", metavar="SIG", help="send just this signal: TERM, SIGUSR1, 9")
    parser.add_argument("ids", metavar="ID", nargs="+", help="container id; all below it end too")


def _wait(parser: argparse.ArgumentParser) -> None:
    _one_id(parser)
    parser.add_argument("--timeout", metavar="S", help="give up after so many seconds (or '500ms', '2m'); exit code 124")


def _rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="+", help="id of a dead container or group")


def _events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", metavar="SEQ", type=int, default=0, help="only events after this number; 0: all that are kept")
    parser.add_argument("id", metavar="ID", nargs="?", help="only events of this container and those below it")


def _audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="undo what is proven ours and dead, then audit again")


def _explain(parser: argparse.ArgumentParser) -> None:
    _one_id(parser)
    parser.add_argument("--life", metavar="N", type=int, help="not the latest of that id: the N-th (history shows the numbers)")


def _history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", metavar="TIME", help="who was there at that moment: '5m ago', 14:30, '2026-11-22 14:30'")
    parser.add_argument("--since", metavar="TIME", help="who was there then, or later")
    parser.add_argument("--limit", metavar="N", type=int, help="the latest N (50; with --at and --since all)")
    parser.add_argument("id", metavar="ID", nargs="?", help="only this container and those below it")


def _agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--idle-exit", metavar="S", help="end after so long without containers and clients")
    parser.add_argument("--stop", action="store_true", help="end every container, then the launcher and the running agent")
    parser.add_argument("--foreground", action="store_true", help="nothing new: the agent never detaches itself")
    parser.add_argument("--allow-faults", action="store_true", help="honour MESOCOSM_FAULT (tests)")


VERBS: Mapping[str, Verb] = {
    "run": Verb(
        "Run a pod file's task group, or one command: whole or not at all.",
        "meso run pod.toml\n  meso run --memory 64MiB -- sh -c 'echo $MESOCOSM_ID'\n"
        "  meso run --in web --name dump -v shared:data:/data -- ls /data",
        "run",
        "run",
        _run,
        (3, 4, 5, 7, 124, 125, 126, 127),
        program=True,
        more="A group ends with the code of the member that ended it, else 0.\n"
        "With --in, the tasks of FILE (or one command) start in a running container, behind\n"
        "one barrier, and end with it at the latest; how they end is nothing to it.\n"
        "ctrl-C ends it by its kill policy, a second ctrl-C at once.\n"
        "With --json: the event lines, 'output' lines with what members print, and\n"
        "last the 'end' line, which says whose code it was.",
    ),
    "plan": Verb(
        "Show what run would make and do, step by step, and make nothing.",
        "meso plan pod.toml\n  meso plan --json - < pod.json",
        "local",
        "plan",
        _group,
        (5,),
        more="Needs no agent and writes nothing.",
    ),
    "ps": Verb("List the containers that live.", "meso ps -a --json", "asking", "ps", _ps, (5, 7)),
    "tree": Verb("Show the containers as the tree they are.", "meso tree web", "asking", "tree", _tree, (3, 5, 7)),
    "logs": Verb(
        "Print what a container has written; of a group, what all members have.",
        "meso logs -f web.server",
        "watching",
        "logs",
        _logs,
        (3, 5, 7),
    ),
    "kill": Verb(
        "End containers by their kill policy (signal, grace, SIGKILL), or send one signal.",
        "meso kill web\n  meso kill -s USR1 web.server",
        "asking",
        "kill",
        _kill,
        (3, 4, 5, 7),
    ),
    "wait": Verb(
        "Wait until a container has ended, and say how.",
        "meso wait --timeout 10 web",
        "asking",
        "wait",
        _wait,
        (3, 5, 7, 124),
        program=True,
    ),
    "rm": Verb("Forget dead containers: their records, logs and sandboxes.", "meso rm web db", "asking", "rm", _rm, (3, 4, 5, 7)),
    "events": Verb(
        "Show what happens, as it happens; ctrl-C ends it.",
        "meso events --since 0 --json",
        "watching",
        "events",
        _events,
        (3, 5, 7),
    ),
    "explain": Verb(
        "Say why a container is in the state it is in: the chain of causes, and what to do.",
        "meso explain web.server\n  meso explain --life 2 web.server",
        "history",
        "explain",
        _explain,
        (3, 5, 7),
        more="Also of one that was removed long ago, as far as it is remembered.",
    ),
    "history": Verb(
        "Show what has been: which containers, when, for how long, and how they ended.",
        "meso history web\n  meso history --at '5m ago'\n  meso history --since 14:30 --json",
        "history",
        "history",
        _history,
        (4, 5, 7),
        more="Kept on disk, over removals and reboots, until it is older than what there is room for.\n"
        "An id that is used again has several lives, which are numbered.",
    ),
    "audit": Verb(
        "Compare what the ledger says with what is on the machine, both ways.",
        "meso audit\n  meso audit --repair",
        "audits",
        "audit",
        _audit,
        (5, 6, 7),
        more="Left over: there, proven ours, its container dead. Missing: not there, and should be.\n"
        "Strangers: look like ours without proof; nothing ever touches them.",
    ),
    "doctor": Verb(
        "Check what this machine and this user can have.",
        "meso doctor\n  meso doctor --forget",
        "local",
        "doctor",
        _doctor,
        (6,),
        more="Needs no agent, and starts none.",
    ),
    "plugins": Verb(
        "List the plug-ins of the set, loaded or not, and why.", "meso plugins --set minimal", "local", "plugins", _nothing
    ),
    "agent": Verb(
        "Serve the socket and supervise containers; other verbs start it when they need it.",
        "meso agent --idle-exit 10m\n  meso agent --stop",
        "serve",
        "agent",
        _agent,
        (4, 5, 7),
        more="SIGTERM ends the agent and leaves the containers running: the next agent takes them over.",
    ),
}

NOT_BUILT = (
    "stats",
    "top",
    "postmortem",
    "exec",
    "attach",
    "debug",
    "update",
    "selftest",
    "image",
    "volume",
    "csi",
    "roles",
    "offers",
    "quota",
    "weights",
    "reserve",
    "why",
    "apply",
)
