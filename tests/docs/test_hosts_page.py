"""The table of hosts and laws names the hosts that the laws run over."""

import re
from pathlib import Path

import hosts

PAGE = Path(__file__).parents[2] / "docs" / "results" / "hosts.md"


def test_every_host_has_its_row():
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert named == {*hosts.HOSTS, *hosts.HEADS}
