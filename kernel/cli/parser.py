"""Arguments in, a namespace out; help that teaches; suggestions for what was misspelt.

What lives here: the shape of a command line. What must not: what a verb does with it. Every refusal is a SpecError,
so it is reported like any other bad input (and as an error object with --json).

Theory: only the parser of the verb that is used is built; argparse's sub-parsers would cost a millisecond for each of
the others, and could not take `--json` both before and after the verb.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mesocosm.kernel.cli.verbs import EXITS, NOT_BUILT, PROGRAM, VERBS, Verb
from mesocosm.kernel.core.errors import SpecError, UnsupportedError

OPTIONS = """\
  --json         results as JSON Lines on stdout and nothing else there; an error is the line {"error": {...}}
  --socket PATH  the agent's socket (MESOCOSM_SOCKET); with it no agent is started
  --set NAME     the plug-in set (MESOCOSM_SET): for plan, plugins, doctor and for an agent that is started
"""
_TAKES_VALUE = ("--socket", "--set")


class Help(Exception):  # noqa: N818 - it is not an error
    """Not an error: the text that was asked for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _Layout(argparse.RawDescriptionHelpFormatter):
    """``-e, --env K=V`` on one line: the value's name once, and room for it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = sorted(action.option_strings, key=len)
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(message, hint=f"meso {self.prog.removeprefix('meso ')} --help")

    def print_help(self, file: Any = None) -> None:
        raise Help(self.format_help())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of `argv` (without the program's name); `verb` names the verb, `command` is what follows ``--``.

    Raises Help for ``--help``, ``--version`` and for nothing at all, SpecError or UnsupportedError for the rest.
    """
    words, verb, command = list(argv), "", None
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    before: list[str] = []
    while words and not verb:
        word = words.pop(0)
        if word in ("-h", "--help"):
            raise Help(overview())
        if word == "--version":
            raise Help(version())
        if word in _TAKES_VALUE and words:
            before += [word, words.pop(0)]
        elif word.startswith("-"):
            before.append(word)
        else:
            verb = word
    if verb == "help":
        verb, words = (words[0], ["--help"]) if words else ("", [])
    if not verb:
        if before and set(before) != {"--json"}:
            raise SpecError(f"which verb? {' '.join(before)} stands alone", hint="meso --help")
        raise Help(overview())
    arguments = parser_of(verb).parse_args([*before, *words])
    if command is not None and verb not in ("run", "plan"):
        raise SpecError(f"meso {verb} takes no command after --", hint=f"meso {verb} --help")
    arguments.verb, arguments.command = verb, command
    return arguments


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one verb; UnsupportedError for one that is not built, SpecError with a suggestion for no verb."""
    verb = VERBS.get(name)
    if verb is None:
        if name in NOT_BUILT:
            raise UnsupportedError(f"meso {name} is not built yet in this version", hint="meso --help lists what is")
        raise SpecError(f"meso has no verb {name[:40]!r}", hint=_suggestion(name))
    two_forms = f"meso {name} [options] FILE\n       meso {name} [options] -- COMMAND [ARGUMENT...]"
    parser = _Parser(
        prog=f"meso {name}", usage=two_forms if name in ("run", "plan") else None, description=verb.summary, allow_abbrev=False,
        epilog=_epilog(verb), formatter_class=_Layout,
    )  # fmt: skip
    verb.declare(parser)
    common = parser.add_argument_group("on every verb")
    common.add_argument("--json", action="store_true", help='JSON Lines on stdout and nothing else; errors as {"error": {…}}')
    common.add_argument("--socket", metavar="PATH", help="the agent's socket; with it no agent is started")
    common.add_argument("--set", metavar="NAME", help="the plug-in set")
    return parser


def overview() -> str:
    """What `meso --help` prints."""
    verbs = "\n".join(f"  {name:<9}{verb.summary}" for name, verb in VERBS.items())
    return (
        "meso: pods and nested containers that start whole or not at all\n\n"
        "usage: meso VERB [options] [arguments]\n\n"
        f"verbs:\n{verbs}\n\n"
        f"on every verb:\n{OPTIONS}\n"
        "start here:\n"
        "  meso run -- echo hello       one command in a container of its own\n"
        "  meso run pod.toml            a task group: all members, or none\n"
        "  meso plan pod.toml           what that would do, without doing it\n"
        "  meso doctor                  what this machine can have\n"
        "  meso VERB --help             an example and the exit codes of a verb\n"
    )


def version() -> str:
    """`mesocosm VERSION`, as installed; a checkout that is not installed says so."""
    from importlib import metadata

    try:
        return f"mesocosm {metadata.version('mesocosm')}\n"
    except metadata.PackageNotFoundError:
        return "mesocosm (not installed: running from its source)\n"


def _epilog(verb: Verb) -> str:
    codes = [f"  {code:<4} {EXITS[code]}" for code in (0, 1, 2, *verb.exits)]
    if verb.program:
        codes.append(f"       {PROGRAM}")
    more = f"\n\n{verb.more}" if verb.more else ""
    return f"example:\n  {verb.example}\n\nexit codes:\n" + "\n".join(codes) + more


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [*VERBS, *NOT_BUILT], n=1, cutoff=0.5)
    return f"did you mean 'meso {near[0]}'?" if near else f"the verbs are: {' '.join(VERBS)}"
