"""How an agent comes to its end."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import trio

from mesocosm.kernel.cli import serve
from mesocosm.kernel.core.errors import ConflictError


def test_an_agent_adrift_goes_on_until_what_cannot_be_ended_has_ended(monkeypatch: Any) -> None:
    """SIGTERM while a container is stuck: no agent after this one could find it."""
    monkeypatch.setattr(serve, "AGAIN_SECONDS", 0)
    attempts, said = [], []

    async def stop_agent() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 4:
            raise ConflictError("web cannot be ended now", id="web")

    async def main() -> str:
        server: Any = SimpleNamespace(stopped=trio.Event())
        service: Any = SimpleNamespace(is_idle=False, stop_agent=stop_agent)
        reasons = []
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def serving() -> None:
                    console: Any = SimpleNamespace(words=said.append)
                    berth: Any = SimpleNamespace(is_adrift=True)
                    reasons.append(await serve._until_over(server, service, berth, None, console))

                before = signal.getsignal(signal.SIGTERM)
                nursery.start_soon(serving)
                while signal.getsignal(signal.SIGTERM) == before:
                    await trio.lowlevel.checkpoint()
                os.kill(os.getpid(), signal.SIGTERM)
        return reasons[0]

    assert trio.run(main) == "SIGTERM: everything has ended"
    assert len(attempts) == 4
    assert len([words for words in said if "web cannot be ended now" in words]) == 1
