"""Pod documents from files, stdin and options: read as data, refused with the file's name and the field's path."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesocosm.kernel.cli import document, parser
from mesocosm.kernel.core.containers import DEFAULT_CAPABILITIES
from mesocosm.kernel.core.errors import MesoError, SpecError, TooLargeError
from mesocosm.kernel.core.spec import parse_pod

TOML = 'name = "web"\n[[tasks]]\nname = "a"\ncommand = "true"\n'
JSON = '{"name": "web", "tasks": [{"name": "a", "command": "true"}]}'
POD = {"name": "web", "tasks": [{"name": "a", "command": "true"}]}


def single(*words: str) -> dict[str, Any]:
    found = document.group_document(parser.parse(["run", *words]))
    parse_pod(found)
    return found


def refused(tmp_path: Path, content: str | bytes, name: str = "pod.toml") -> dict[str, Any]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MesoError) as caught:
        document.read_document(str(file))
    assert caught.value.exit_code == 2
    assert caught.value.fields["target"] == str(file)
    return caught.value.as_object()


@pytest.mark.parametrize(
    ("name", "content"), [("p.toml", TOML), ("p.json", JSON), ("p", TOML), ("p", JSON), ("p", "\ufeff" + JSON)]
)
def test_a_file_is_toml_or_json_by_its_suffix_or_its_looks(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert document.read_document(str(tmp_path / name)) == POD


def test_a_dash_is_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(JSON.encode())))
    assert document.group_document(parser.parse(["run", "-", "--name", "other"])) == {**POD, "name": "other"}


def test_bad_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    assert "line 2" in refused(tmp_path, "a = 1\nb = \nc = 2")["message"]
    assert "not valid JSON" in refused(tmp_path, "{", "p.json")["message"]
    assert "UTF-8" in refused(tmp_path, b"name = '\xff'")["message"]
    assert "a list" in refused(tmp_path, "[1]", "p.json")["message"]
    assert "twice" in refused(tmp_path, '{"name": 1, "name": 2}', "p.json")["message"]
    assert "too deep" in refused(tmp_path, '{"a":' + "[" * 100_000, "p.json")["message"]
    assert refused(tmp_path, "a = {b = [1979-05-27]}")["path"] == "$.a.b[0]"
    assert refused(tmp_path, '{"a": [123456789012345678901234567890]}', "p.json")["path"] == "$.a[0]"
    assert refused(tmp_path, b" " * (document.MAX_BYTES + 1))["code"] == "too_large"


def test_a_forgotten_pair_of_dashes_is_pointed_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        document.read_document("ls")
    assert caught.value.fields["hint"] == "for a command: meso run -- ls"


def test_the_options_of_the_single_form_become_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "yes")
    found = single(
        "--name", "x", "--cpus", "500m", "--memory", "64MiB", "--pids", "9", "--env", "A=b=c", "-e", "HERE", "-v", "/data:/d:ro",
        "-v", "tmpfs:1MiB:/t", "-u", "1000:1000", "-w", "/tmp", "--rootfs", "/srv", "--network", "none", "--limit", "nofile=5:10",
        "--hostname", "h", "--init", "--read-only", "--", "sh", "-c", "true",
    )  # fmt: skip
    assert found == {
        "name": "x",
        "executor": "command",
        "network": "none",
        "hostname": "h",
        "tasks": [
            {
                "name": "main",
                "command": ["sh", "-c", "true"],
                "resources": {"cpus": "500m", "memory": "64MiB", "pids": 9},
                "user": "1000:1000",
                "cwd": "/tmp",
                "rootfs": "/srv",
                "read_only": True,
                "init": True,
                "env": {"A": "b=c", "HERE": "yes"},
                "volumes": [{"source": "host:/data", "target": "/d", "read_only": True}, {"source": "tmpfs:1MiB", "target": "/t"}],
                "limits": {"nofile": [5, 10]},
            }
        ],
    }


def test_capabilities_are_added_to_and_dropped_from_the_default_ones() -> None:
    def kept(*words: str) -> list[str]:
        found: list[str] = single(*words, "--", "ls")["tasks"][0]["capabilities"]
        return found

    assert set(kept("--cap-add", "cap_net_admin")) == {*DEFAULT_CAPABILITIES, "NET_ADMIN"}
    assert set(kept("--cap-drop", "CHOWN")) == set(DEFAULT_CAPABILITIES) - {"CHOWN"}
    assert kept("--cap-drop", "ALL") == []
    assert kept("--cap-drop", "ALL", "--cap-add", "KILL") == ["KILL"]
    assert "capabilities" not in single("--", "ls")["tasks"][0]


@pytest.mark.parametrize(
    "words",
    [
        ["--env", "=x"],
        ["--env", "SURELY_NOT_SET"],
        ["--volume", "x"],
        ["--volume", ":/x"],
        ["--limit", "nofile"],
        ["--cap-add", "FLY"],
    ],
)
def test_bad_options_are_refused_before_anything_is_asked(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SURELY_NOT_SET", raising=False)
    with pytest.raises(SpecError) as caught:
        single(*words, "--", "ls")
    assert caught.value.fields["path"] == words[0] or caught.value.fields["hint"]


@pytest.mark.parametrize("words", [[], ["--"], ["f", "--", "ls"], ["f", "--cpus", "1"]])
def test_either_a_file_or_a_command_is_run(words: list[str]) -> None:
    with pytest.raises(SpecError):
        document.group_document(parser.parse(["run", *words]))


def test_default_names_are_names_and_differ() -> None:
    assert document.default_name("/usr/bin/g++.real", fixed=True) == "g-real"
    assert document.default_name("...", fixed=True) == "command"
    names = {single("--", "/bin/true")["name"] for _ in range(8)}
    assert len(names) > 1


def test_too_many_tasks_are_named_as_the_reason_of_a_document_that_does_not_fit() -> None:
    error = document.explain_size({"tasks": [{}] * 10_000}, TooLargeError("the request is too long"))
    assert error.as_object() == {
        "code": "bad_input", "message": "too many tasks for one group", "path": "$.tasks", "have": "10000", "need": "≤ 1000",
        "hint": "make several groups of them",
    }  # fmt: skip
    assert document.explain_size({"tasks": []}, TooLargeError("the request is too long")).code == "too_large"
