"""Templates: one environment with autoescaping for every file, and what all of them may use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.templating import Jinja2Templates
from starlette.responses import Response

from guard.review import wording

_HERE = Path(__file__).resolve().parent
STATIC = _HERE / "static"
THEMES = ("auto", "light", "dark")

try:
    _VERSION = version("backdoor-guard")
except PackageNotFoundError:  # run from a folder that was never installed
    _VERSION = "0"

_environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"),
    autoescape=True,  # for every name: a hostile label or image name is text, never markup
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters.update(
    ago=wording.ago, moment=wording.moment, one_in=wording.one_in, percent=wording.percent, thousands="{:,}".format
)
_environment.globals.update(version=_VERSION)
_templates = Jinja2Templates(env=_environment)


def render(
    request: Request,
    template: str,
    context: Mapping[str, Any],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a page or a part of one; `session`, `theme` and the current path are always known to it."""
    theme = request.cookies.get("guard_theme", "auto")
    known = {
        "session": None,
        "theme": theme if theme in THEMES else "auto",
        "path": request.url.path,
        "text": "",
        "is_error": False,
    }
    return _templates.TemplateResponse(request, template, {**known, **context}, status_code=status, headers=headers)


def is_part(request: Request) -> bool:
    """True if a script of the page asks for a part of it only."""
    return request.headers.get("hx-request") == "true"
