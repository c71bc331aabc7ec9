"""Set files: precedence, masks, and errors that name the file."""

from __future__ import annotations

import pytest

from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.sets.selection import SetFile, select

PACKAGED = SetFile("/pkg/default.toml", "default.toml", '[set.default]\nisolators = ["a", "b"]\nrequired = ["a"]\n')


def test_a_stronger_file_replaces_keys_and_nothing_else() -> None:
    site = SetFile("/etc/site.toml", "site.toml", '[set.default]\nisolators = ["b", "a"]\n[set.small]\nisolators = ["a"]\n')
    chosen = select([PACKAGED, site])
    assert (chosen.isolators, chosen.required, chosen.name) == (("b", "a"), ("a",), "default")
    assert select([PACKAGED, site], "small").isolators == ("a",)


def test_a_file_of_the_same_name_replaces_and_an_empty_one_masks() -> None:
    distro = SetFile("/usr/x.toml", "x.toml", '[set.x]\nisolators = ["a"]\n')
    admin = SetFile("/etc/x.toml", "x.toml", "  \n")
    assert select([PACKAGED, distro], "x").isolators == ("a",)
    with pytest.raises(SpecError) as caught:
        select([PACKAGED, distro, admin], "x")
    assert caught.value.fields["need"] == "default"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[set.default", "/etc/x.toml"),
        ("[sets.default]\n", "/etc/x.toml"),
        ("[set.default]\nisolator = []\n", "/etc/x.toml: set.default"),
        ('[set.default]\nisolators = "a"\n', "set.default"),
        ('[set.default]\nisolators = ["a", "a"]\n', "set.default.isolators"),
        ('[set.default]\nrequired = ["zzz"]\n', "set.default.required"),
    ],
)
def test_a_wrong_file_is_named(text: str, path: str) -> None:
    with pytest.raises(SpecError) as caught:
        select([PACKAGED, SetFile("/etc/x.toml", "x.toml", text)])
    assert caught.value.fields["path"] == path
