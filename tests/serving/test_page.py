"""The page: one file that loads nothing from elsewhere, and shows a server at work in a real browser."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from learning_robots import STATE, Robot, learning
from robots import Arithmetic, ask, http, observation, robot

from qsteer.auditing.page import Check
from qsteer.serving import Server
from qsteer.serving.page import page, show

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text, headers = page()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"\son\w+\s*=|\sstyle\s*=|innerHTML", text)  # forbidden, unsafe
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
    assert policy.count("'sha256-") == 2


def test_numbers_that_are_none_are_null() -> None:
    text, _ = show({"a": [float("nan"), (1.23456789, 2)], "b": float("inf"), "c": True})
    assert json.loads(text) == {"a": [None, [1.23457, 2]], "b": None, "c": True}


async def head_of(port: int, path: str, header: str = "") -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
    head, _, _ = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return head


def test_page_and_state_of_a_server_that_does_not_learn() -> None:
    async def main() -> None:
        async with Server(Arithmetic(), port=0) as server, robot(server) as one:
            await ask(one, observation(2.0, seed=5))
            status, text = await http(server.port, "/")
            assert status == 200 and text == page()[0]
            head = await head_of(server.port, "/")
            assert (
                head.count("\r\nContent-Type") == 1 and "Content-Security-Policy: default-src 'none'" in head
            )
            status, text = await http(server.port, "/state")
            state = json.loads(text)
            assert status == 200 and state["learning"] is None
            (mine,) = state["robots"]
            assert (mine["requests"], mine["value"], mine["episode"]) == (1, 1.0, None)
        assert server.watch.state()["robots"] == []

    asyncio.run(main())


def test_a_browser_may_give_the_key_as_a_password() -> None:
    async def main() -> None:
        async with Server(Arithmetic(), port=0, key="secret") as server:
            for path in ("/", "/state", "/metrics"):
                refused = await head_of(server.port, path)
                assert "401" in refused and "WWW-Authenticate: Basic" in refused
                for wrong in ("Og==", "eDp5", "?", ""):  # empty, another, no base64, nothing
                    assert "401" in await head_of(server.port, path, f"Authorization: Basic {wrong}\r\n")
                right = "Authorization: Basic eDpzZWNyZXQ=\r\n"  # x:secret
                assert "200 OK" in await head_of(server.port, path, right)
            upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            assert "401" in await head_of(server.port, "/", upgrade + right)  # robots send it as openpi does

    asyncio.run(main())


async def browse(port: int, *options: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--window-size=1240,1150",
        "--virtual-time-budget=4000", *options, f"http://127.0.0.1:{port}/",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await asyncio.wait_for(process.communicate(), 120)
    assert b"Refused" not in errors, errors  # by the page's own policy
    return out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_a_server_that_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Check("stored", "", "pass", "noise 0.93; other states 0.71", "")
    monkeypatch.setattr("qsteer.serving.learning.check_stored", lambda *args, **options: passing)
    learns = learning(tmp_path / "run")
    robots: list[Any] = []

    async def live(server: Server, name: str) -> None:
        body = Robot(name)
        async with robot(server) as one:
            while True:
                reply = await ask(one, body.ask())
                if (end := body.execute(reply["actions"])) is not None:
                    await ask(one, end)
                await asyncio.sleep(0.01)

    async def main() -> tuple[str, Path]:
        async with Server(learns.served, port=0, learning=learns) as server:
            robots.extend(asyncio.create_task(live(server, name)) for name in ("left-arm", "right-arm"))
            while learns.learner.update < 350:
                await asyncio.sleep(0.05)
            shot = tmp_path / "page.png"
            await browse(server.port, f"--screenshot={shot}")
            text = (await browse(server.port, "--dump-dom")).decode()
            for each in robots:
                each.cancel()
            return text, shot

    text, shot = asyncio.run(asyncio.wait_for(main(), 280))
    assert shot.stat().st_size > 10_000
    assert "steering</span>" in text and STATE not in text
    shown = re.sub(r"<[^>]+>", " ", text.partition("<script>")[0])
    assert re.search(r"left-arm-\d+", shown) and re.search(r"right-arm-\d+", shown)
    assert re.search(r"\d+\s*%\s+success, last", shown) and re.search(r"[\d,]+\s+rows stored", shown)
    assert text.count('class="curve"') >= 6 and "NaN" not in shown and "undefined" not in shown
