"""The login page: a key, nothing else. Plain HTML: whoever has no key costs the gateway no live page.

Knows what the form sends, not what is done with it.
"""

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from treadle_gateway.http.dashboard.look import CSS, MARK

REFUSALS = {
    "unknown": "That key is unknown, revoked or expired.",
    "scope": "That key may only sample: the dashboard needs one with the scope train or admin.",
    "away": "Keys cannot be checked at the moment; try again.",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Treadle: log in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="/favicon.ico"><style>{css}</style></head>
<body class="plain-page"><main class="page"><section class="card narrow">
<div class="brand">{mark}Treadle</div>
<div class="faint">Log in with an API key of this deployment.</div>{refusal}
<form method="post" action="/login"><input type="hidden" name="next" value="{target}">
<input class="field" type="password" name="key" placeholder="API key" aria-label="API key" required autofocus
autocomplete="current-password"><button class="submit" type="submit">Log in</button></form>
<div class="faint">The key stays in a cookie of this browser that pages cannot read.</div>
</section></main></body></html>"""


async def login_page(request: Request) -> Response:
    """Answers with the form."""
    refusal = REFUSALS.get(request.query_params.get("refused", ""), "")
    return HTMLResponse(
        _PAGE.format(
            css=CSS,
            mark=MARK,
            target=escape(request.query_params.get("next", "/")),
            refusal=f'<div class="trouble">{refusal}</div>' if refusal else "",
        )
    )
