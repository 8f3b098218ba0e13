"""The page that shows a server at work: one file, which needs nothing from anywhere else."""

import base64
import hashlib
import json
import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

COMMON = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@cache
def page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers: its own script and style run, and nothing else is loaded."""
    text = (files("qsteer.serving") / "page.html").read_text(encoding="utf-8")
    parts = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style")}
    allowed = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in found
        )
        for tag, found in parts.items()
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, COMMON | {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}


def show(state: Any) -> tuple[str, dict[str, str]]:
    """Return what the page asks for each second, and its headers; numbers that are none become null."""
    text = json.dumps(_finite(state), allow_nan=False, separators=(",", ":"))
    return text, COMMON | {"Content-Type": "application/json"}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
