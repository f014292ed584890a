"""One resolver: a reference is a folder under a root, a Hub repository or a URL."""

from pathlib import Path

from fader_adapters.errors import AdapterInvalid, SourceForbidden, SourceNotFound
from fader_adapters.hub import HubRef, HubSource, with_revision
from fader_adapters.roots import Found, PassedOver
from fader_adapters.source import LocalSources, RawAdapter
from fader_adapters.urls import UrlSource


class Sources:
    """What clients and the operator may name. Safe to use from any thread.

    A folder under a root comes before a Hub repository of the same name.
    """

    def __init__(
        self,
        local: LocalSources,
        *,
        hub: HubSource | None = None,
        urls: UrlSource | None = None,
    ) -> None:
        self._local = local
        self._hub = hub
        self._urls = urls

    def fetch(self, reference: str, revision: str | None = None) -> RawAdapter:
        """Read what a client named. Raises as the source does; SourceForbidden for none of them."""
        raw = self.fetch_local(reference, revision)
        return self.fetch_remote(reference, revision) if raw is None else raw

    def fetch_local(self, reference: str, revision: str | None = None) -> RawAdapter | None:
        """The same for a folder under a root; None when the reference asks for the network.

        Raises as LocalSources.fetch does, AdapterInvalid for a revision of a folder.
        """
        if "://" in reference:
            return None
        if HubRef.read(reference) is not None and not self._local.holds(reference):
            return None
        if revision is not None:
            raise AdapterInvalid("a folder has no revision: leave it out, or ask for a sha256")
        return self._local.fetch(reference)

    def fetch_remote(self, reference: str, revision: str | None = None) -> RawAdapter:
        """The same for what is not a folder; may take long."""
        if "://" in reference:
            if revision is not None:
                raise AdapterInvalid("a URL has no revision: leave it out, or ask for a sha256")
            if self._urls is None:
                raise SourceForbidden("no URL prefix is allowed")
            return self._urls.fetch(reference)
        ref = HubRef.read(reference)
        if ref is None or self._hub is None:
            raise SourceNotFound(f"no adapter at {reference[:200]!r}")
        return self._hub.fetch(with_revision(ref, revision))

    def fetch_trusted(self, reference: str) -> RawAdapter:
        """Read what the operator named: any folder, any Hub repository, a URL under a prefix."""
        path = Path(reference)
        ref = HubRef.read(reference)
        if "://" in reference and not path.is_dir():
            return self.fetch_remote(reference)
        if ref is not None and self._hub is not None and not path.is_dir():
            return self._hub.fetch(ref, trusted=True)
        return self._local.fetch_trusted(path)

    def offers(self, reference: str) -> bool:
        """Whether a client's reference may lead anywhere: a folder stands there, or the Hub's list
        allows it. Cheap: asks nobody outside this machine. Raises SourceUnavailable."""
        try:
            if self._local.holds(reference):
                return True
        except SourceForbidden:
            return False
        ref = HubRef.read(reference)
        return ref is not None and self._hub is not None and self._hub.allows(ref.repo)

    def holds(self, reference: str) -> bool:
        """Whether a folder stands at the reference. Raises SourceForbidden, SourceUnavailable."""
        return self._local.holds(reference)

    def discover(self) -> list[Found]:
        """Adapter folders directly under the roots. Raises OSError."""
        return self._local.discover()

    def passed_over(self) -> list[PassedOver]:
        """Folders directly under the roots that cannot become adapters. Raises OSError."""
        return self._local.passed_over()
