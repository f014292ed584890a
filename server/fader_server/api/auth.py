"""Who calls: keys to principals, deny by default. Knows keys by their sha256 only."""

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from fader_server.api.errors import Forbidden, Unauthorized
from fader_server.api.visible import Sees, everything
from fader_server.config import ServeConfig
from fader_server.tenants import Tenant, digest_of

Role = Literal["user", "admin"]


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: what it may do, and the tenant its prefix cache belongs to."""

    role: Role
    tenant: str
    """"" when nobody needs a key; a tenant's name; else `key:1` for the first --api-key and so on,
    or `key:admin`, which no tenant's name may be. Told in logs and metrics: nothing of the key."""
    sees: Sees = everything
    max_tokens: int | None = None
    """Of one answer; None: as many as the server gives."""


class Guard:
    """Decides for every request. Holds digests of the keys, never the keys."""

    def __init__(self, config: ServeConfig, tenants: Iterable[Tenant] = ()) -> None:
        self._fixed = [
            (digest_of(key), Principal("user", f"key:{number}"))
            for number, key in enumerate(config.api_key, 1)
        ]
        if config.admin_key is not None:
            self._fixed.append((digest_of(config.admin_key), Principal("admin", "key:admin")))
        self._keys = self._fixed
        self.replace(tenants)
        self._user_open = config.user_open
        self._admin_open = config.admin_open
        self._pages = bool(config.allow_origin)
        self._has_admin_key = config.admin_key is not None

    def replace(self, tenants: Iterable[Tenant]) -> None:
        """Other tenants from the next request on."""
        own = [
            (key, Principal("user", tenant.name, tenant.sees, tenant.max_tokens))
            for tenant in tenants
            for key in tenant.keys
        ]
        self._keys = own + self._fixed

    def user(self, request: Request) -> Principal:
        """The caller of a user route. Raises Unauthorized."""
        known = self._known(_presented(request))
        if known is not None:
            return known
        if self._user_open:  # clients send made-up keys to servers without one
            return Principal("user", "")
        raise Unauthorized("A valid API key is required: Authorization: Bearer KEY.")

    def observer(self, request: Request) -> Principal:
        """The caller of a route that tells of all tenants, with a key also where users need none.
        Raises Unauthorized or Forbidden."""
        known = self._known(_presented(request))
        if known is None:
            raise Unauthorized("A valid API or admin key is required: Authorization: Bearer KEY.")
        if known.sees is not everything:
            raise Forbidden("This route tells of all tenants: a tenant's key does not open it.")
        return known

    def admin(self, request: Request) -> Principal:
        """The caller of an admin route. Raises Unauthorized or Forbidden."""
        if self._admin_open:
            if not _is_loopback_host(request.headers.get("host", "")):
                raise Forbidden("Admin routes without a key answer to loopback host names only.")
            if self._pages and "origin" in request.headers:  # whoever made the page is a stranger
                raise Forbidden("Admin routes without a key answer no pages of other origins.")
            return Principal("admin", "")
        known = self._known(_presented(request))
        if known is None and self._keys:
            raise Unauthorized("A valid admin key is required: Authorization: Bearer KEY.")
        if known is None or known.role != "admin":
            hint = "" if self._has_admin_key else " This server runs without --admin-key."
            raise Forbidden(f"This route needs the admin key.{hint}")
        return known

    def _known(self, presented: bytes | None) -> Principal | None:
        if presented is None:
            return None
        digest = hashlib.sha256(presented).digest()
        found = None
        for key, principal in self._keys:  # always all of them: no early exit to time
            if hmac.compare_digest(key, digest):
                found = principal
        return found


Check = Callable[[Request], Awaitable[None]]


def requires(decide: Callable[[Request], Principal]) -> Check:
    """The dependency that routes carry, of a method of Guard; leaves the principal in
    request.state."""

    async def check(request: Request) -> None:
        request.state.principal = decide(request)
        request.state.log.tenant = request.state.principal.tenant

    return check


def _presented(request: Request) -> bytes | None:
    given = [value for name, value in request.scope["headers"] if name == b"authorization"]
    if not given:
        return None
    scheme, _, key = given[0].partition(b" ")
    if len(given) > 1 or scheme.lower() != b"bearer":
        return b""
    return key.strip()


def _is_loopback_host(host: str) -> bool:
    """True for localhost and loopback addresses, whatever the port: guards against rebinding."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
