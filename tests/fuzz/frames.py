"""Throws mutated frames at the simulated world, and says how many, how long it took and what was found.

    python tests/fuzz/frames.py [--frames 20000] [--seed 1] [--engine atheris|random] [--findings DIRECTORY]

With atheris (the extra `fuzz`) a coverage-guided fuzzer chooses among what it has learned reaches something new, and the
mutator of `mutation` is one of its ways to change an input. Without it that mutator alone makes every input, from a seed: the
same inputs every time, but blind. The last line of standard output is JSON: {"engine", "seed", "frames", "inputs", "seconds",
"covered", "features", "corpus", "finding"}; `finding` is null, or says what was found and where the inputs are that lead to it:
exit 1 then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
PRODUCT = ["mesocosm.kernel.wire", "mesocosm.kernel.core", "mesocosm.kernel.runtime", "mesocosm.kernel.sets", "mesocosm.plugins"]
LARGEST = 64 * 1024  # of a coverage-guided input; larger ones are slow, and the system tests send them on purpose


class Run:
    """Counts, and ends the process when enough has been done or something was found."""

    def __init__(self, arguments: argparse.Namespace, world: Any, opened: ExitStack) -> None:
        self._arguments = arguments
        self._world = world
        self._opened = opened
        self._started = time.monotonic()
        self._inputs = 0
        self.progress: Callable[[], dict[str, int]] = dict

    def one(self, sent: bytes) -> None:
        """One input; does not return after the last one."""
        self._inputs += 1
        try:
            self._world.converse(sent)
        except BaseException as error:
            self._end("".join(traceback.format_exception(error)))
        if self._world.frames >= self._arguments.frames:
            self._end(None)

    def _end(self, finding: str | None) -> NoReturn:
        if finding is not None:
            self._keep()
        told = {
            "engine": self._arguments.engine,
            "seed": self._arguments.seed,
            "frames": self._world.frames,
            "inputs": self._inputs,
            "seconds": round(time.monotonic() - self._started, 1),
            **self.progress(),
            "finding": finding and f"{finding[-2000:]} (inputs in {self._arguments.findings})",
        }
        self._opened.close()
        print(json.dumps(told), flush=True)
        os._exit(finding is not None)  # libFuzzer owns this process, and would report its end as a crash

    def _keep(self) -> None:
        """Every input since the world was made anew: an earlier one may have prepared what the last one found."""
        directory = Path(self._arguments.findings)
        directory.mkdir(parents=True, exist_ok=True)
        for number, sent in enumerate(self._world.since_renewal):
            (directory / f"{number:03}.bin").write_bytes(sent)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("atheris", "random"))
    parser.add_argument("--findings", default=os.path.join(tempfile.gettempdir(), "mesocosm-findings"))
    arguments = parser.parse_args()
    if arguments.engine is None:
        arguments.engine = "atheris" if importlib.util.find_spec("atheris") else "random"
        if arguments.engine == "random":
            print("atheris is not installed (pip install -e .[fuzz]): mutating without coverage", file=sys.stderr)
    {"atheris": guided, "random": blind}[arguments.engine](arguments)


def blind(arguments: argparse.Namespace) -> None:
    """The seeds, then inputs of the mutator until there have been enough frames."""
    from mutation import Mutator, corpus
    from simulated_world import SimulatedWorld

    seeds = corpus()
    mutator = Mutator(arguments.seed, seeds)
    with ExitStack() as opened:
        run = Run(arguments, opened.enter_context(SimulatedWorld()), opened)
        for sent in seeds:
            run.one(sent)
        while True:
            run.one(mutator.fresh())


def guided(arguments: argparse.Namespace) -> None:
    """libFuzzer with the coverage of the product's Python. Half of its changes are of our mutator, half its own."""
    import atheris

    with atheris.instrument_imports(include=PRODUCT):
        from mutation import Mutator, corpus
        from simulated_world import SimulatedWorld

    seeds = corpus()
    mutator = Mutator(arguments.seed, seeds)

    def changed(data: bytes, largest: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, largest))
        mutator.reseed(seed)
        return mutator.mutate(data, largest)

    with ExitStack() as opened:
        # libFuzzer's words go to a file: in its last line with figures are the edges and features that were covered.
        words = opened.enter_context(tempfile.TemporaryFile())
        os.dup2(words.fileno(), 2)
        directory = opened.enter_context(tempfile.TemporaryDirectory(prefix="meso-corpus-"))
        for number, sent in enumerate(seeds):
            (Path(directory) / str(number)).write_bytes(sent)
        run = Run(arguments, opened.enter_context(SimulatedWorld()), opened)
        run.progress = lambda: _figures(words)
        options = [f"-seed={arguments.seed}", f"-max_len={LARGEST}", "-timeout=60", "-rss_limit_mb=2000", "-len_control=0"]
        atheris.Setup([sys.argv[0], *options, directory], run.one, custom_mutator=changed)
        atheris.Fuzz()


def _figures(words: Any) -> dict[str, int]:
    words.seek(0)
    found = re.findall(rb"cov: (\d+) ft: (\d+) corp: (\d+)", words.read())
    return dict(zip(("covered", "features", "corpus"), map(int, found[-1]), strict=True)) if found else {}


if __name__ == "__main__":
    main()
