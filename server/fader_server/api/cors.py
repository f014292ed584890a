"""Which pages of other origins a browser lets read answers. Knows no route and no key.

The outermost layer, so that refusals carry the headers too. A browser asks beforehand without a
key: that alone is answered here. It is no request of a user's, so it has no id and no log line.
"""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import ALL_METHODS, CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

EXPOSED = (
    "x-request-id",
    "x-fader-blend",
    "x-fader-lane",
    "retry-after",
    "x-should-retry",
    "openai-processing-ms",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
)
"""What pages may read beside the body."""


class Pages(CORSMiddleware):
    """Starlette's, but for questions of origins that are not allowed: the application answers
    those, as it does without this. Cookies and the like are never allowed."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=ALL_METHODS,
            allow_headers=("*",),
            expose_headers=EXPOSED,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if asked and not self.is_allowed_origin(Headers(scope=scope).get("origin", "")):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)
