"""tests/README.md names tests that exist, or says what is missing for one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (TESTS / "README.md").read_text().partition("## The tests of recovery")[2].splitlines()
    if line.startswith("| ") and not line.startswith("| Mesos's")
]


def test_every_shape_that_has_to_be_there_is() -> None:
    named = " ".join(row[0] for row in ROWS)

    for name in (
        "RecoverNested,", "RecoverLauncherOrphans", "RecoverNestedLauncherOrphans", "RecoverNestedContainersWithLauncherOrphans",
        "RecoverLauncherOrphanAndMultipleNestedLauncherOrphans", "DestroyDebugContainerOnRecover", "RebootWithExecutorPidReused",
        "PublishUnpublishResourcesPluginKilled", "DestroyPersistentMountVolumeFailed", "RetryRpcWithExponentialBackoff",
        "SlaveRecoveryWithMetadataCheckpointed", "SlaveRecoveryTest.Reboot",
    ):  # fmt: skip
        assert name.rstrip(",") in named


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split(",")[0])
def test_a_row_names_tests_that_exist_or_says_that_they_come_later(row: list[str]) -> None:
    assert len(row) in (2, 3)
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[2]) if len(row) == 3 else []

    assert bool(named) != row[1].startswith("later: "), row
    for path, test in named:
        assert re.search(rf"def {test}\b", (TESTS / path).read_text()), f"{path} has no {test}"
