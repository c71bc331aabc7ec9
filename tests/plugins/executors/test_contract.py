"""Both executors keep the contract that we ask of everybody's."""

from __future__ import annotations

from mesocosm.kernel.testing import ExecutorContract
from mesocosm.plugins.executors import command, default


class TestDefault(ExecutorContract):
    executor = default


class TestCommand(ExecutorContract):
    executor = command
