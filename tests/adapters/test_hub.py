"""The Hub: only what is allowed, two files of one commit, whole and as the Hub hashed them."""

import threading

import pytest

from fader_adapters.cache import DiskCache
from fader_adapters.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterTooLarge,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from fader_adapters.hub import HubRef, HubSource, with_revision
from fader_adapters.limits import Limits, Patience
from fader_adapters.mlx import in_peft_terms
from fader_adapters.source import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from tests.adapters.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, serving
from tests.adapters.mlx_files import MLX_WEIGHTS_FILE, mlx_files
from tests.adapters.peft_files import make_raw, make_tensors

RAW = make_raw()
NEWER = make_raw(tensors=make_tensors(seed=1))


@pytest.fixture
def hub():
    with serving() as hub:
        hub.add("org/tone", RAW)
        yield hub


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "cache", max_bytes=1 << 30)


def source(hub: FakeHub, *allowed: str, **options) -> HubSource:
    options = {"endpoint": hub.url, "offline": False} | options
    return HubSource(allowed or ("org",), **options)


def ref(text: str) -> HubRef:
    found = HubRef.read(text)
    assert found is not None
    return found


def test_an_allowed_repository_is_read_at_a_commit_and_says_which(hub):
    raw = source(hub).fetch(ref("org/tone"))
    assert (raw.config, raw.weights, raw.revision) == (RAW.config, RAW.weights, COMMIT)
    assert raw.origin == f"org/tone@{COMMIT}"


def test_only_the_two_files_are_fetched(hub):
    hub.files["org/tone", COMMIT] |= {"README.md": b"x", PICKLE_FILE: b"x", "tokenizer.json": b"x"}
    source(hub).fetch(ref("org/tone"))
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {CONFIG_FILE, WEIGHTS_FILE}


@pytest.mark.parametrize("globs", [("org",), ("org/*",), ("org/t?ne",), ("no", "o*"), ("*",)])
def test_globs_that_allow(hub, globs):
    assert source(hub, *globs).fetch(ref("org/tone")).weights == RAW.weights


@pytest.mark.parametrize("globs", [("or",), ("org/to",), ("ORG",), ("org/tone-*",), ("x", "y/*")])
def test_globs_that_do_not_allow_ask_the_hub_nothing(hub, globs):
    with pytest.raises(SourceForbidden):
        source(hub, *globs).fetch(ref("org/tone"))
    assert hub.asked == []


def test_without_a_list_only_the_operator_may_name_one(hub):
    closed = HubSource((), endpoint=hub.url, offline=False)
    with pytest.raises(SourceForbidden):
        closed.fetch(ref("org/tone"))
    assert closed.fetch(ref("org/tone"), trusted=True).weights == RAW.weights


def test_a_repository_that_moved_out_of_the_list_is_forbidden(hub):
    hub.add("evil/tone", RAW)
    hub.moved["org/tone"] = "evil/tone"
    with pytest.raises(SourceForbidden, match="moved"):
        source(hub).fetch(ref("org/tone"))
    assert hub.downloads == 0
    assert source(hub, "org", "evil").fetch(ref("org/tone"))


def test_branches_tags_and_commits_are_revisions(hub):
    hub.add("org/tone", NEWER, OTHER_COMMIT, "v2/final")
    assert source(hub).fetch(ref("org/tone@v2/final")).weights == NEWER.weights
    assert source(hub).fetch(ref(f"org/tone@{OTHER_COMMIT}")).revision == OTHER_COMMIT
    assert source(hub).fetch(ref("org/tone@main")).weights == RAW.weights
    with pytest.raises(SourceNotFound):
        source(hub).fetch(ref("org/tone@absent"))


@pytest.mark.parametrize(
    "text",
    ["tone", "a/b/c", "../tone", "org/..", "org/.x", "org/to ne", "org/tone@", "org/tone@../x",
     "org/tone@a..b", "org/tone@a b", "org/tone@/x", "org/tone@x/", "/org/tone", "org/tone\n",
     "org--x/tone"],
)  # fmt: skip
def test_what_is_no_hub_reference(text):
    assert HubRef.read(text) is None


def test_a_revision_beside_the_reference_must_not_differ():
    assert with_revision(ref("org/tone"), "v1") == ref("org/tone@v1")
    assert with_revision(ref("org/tone@v1"), "v1") == ref("org/tone@v1")
    for reference, revision in (("org/tone@v1", "v2"), ("org/tone", "../v1"), ("org/tone", "")):
        with pytest.raises(AdapterInvalid):
            with_revision(ref(reference), revision)


def test_missing_repositories_and_files_are_not_found(hub):
    with pytest.raises(SourceNotFound):
        source(hub).fetch(ref("org/absent"))
    del hub.files["org/tone", COMMIT][WEIGHTS_FILE]
    with pytest.raises(SourceNotFound):
        source(hub).fetch(ref("org/tone"))
    hub.files["org/tone", COMMIT][PICKLE_FILE] = b"x"
    with pytest.raises(AdapterInvalid, match="safe_serialization"):
        source(hub).fetch(ref("org/tone"))
    assert hub.downloads == 0


def test_a_file_over_the_limit_is_refused_before_a_byte_is_fetched(hub):
    for limits in (Limits(file_bytes=len(RAW.weights) - 1), Limits(config_bytes=10)):
        with pytest.raises(AdapterTooLarge):
            source(hub, limits=limits).fetch(ref("org/tone"))
    assert hub.downloads == 0
    exact = Limits(file_bytes=len(RAW.weights), config_bytes=len(RAW.config))
    assert source(hub, limits=exact).fetch(ref("org/tone"))


def _faults():
    size = len(RAW.weights)
    yield "truncated", {"cut": 100}
    yield "shorter than told", {"lie": {"size": size + 1}}
    yield "longer than told", {"lie": {"size": size - 1}}
    yield "other bytes", {"damage": True}
    yield "other hash", {"lie": {"lfs": {"size": size, "sha256": "0" * 64, "pointerSize": 1}}}
    yield "500", {"status": 500}
    yield "503", {"status": 503}
    yield "429", {"status": 429}
    yield "nonsense", {"lie": {"lfs": {"sha256": 1}}}


@pytest.mark.parametrize("fault", [f[1] for f in _faults()], ids=[f[0] for f in _faults()])
def test_a_bad_answer_is_unavailable_now_and_leaves_nothing_behind(hub, cache, fault):
    good = {name: getattr(hub, name) for name in fault}
    for name, value in fault.items():
        setattr(hub, name, value)
    with pytest.raises(SourceUnavailable) as caught:
        source(hub, cache=cache).fetch(ref("org/tone"))
    assert hub.url not in str(caught.value)
    assert cache.used_bytes == 0
    for name, value in good.items():
        setattr(hub, name, value)
    assert source(hub, cache=cache).fetch(ref("org/tone")).weights == RAW.weights


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_looks_like_nothing_there(hub, status):
    hub.status = status
    with pytest.raises(SourceNotFound):
        source(hub).fetch(ref("org/tone"))


def test_a_hub_that_is_down_is_unavailable():
    with serving() as hub:
        address = hub.url
    dead = HubSource(("org",), endpoint=address, offline=False)
    with pytest.raises(SourceUnavailable, match="reached"):
        dead.fetch(ref("org/tone"))


def test_a_slow_download_ends_at_the_deadline(hub):
    hub.drip = threading.Event()
    with pytest.raises(SourceUnavailable, match=r"0\.2 seconds"):
        source(hub, patience=Patience(silence=5, total=0.2)).fetch(ref("org/tone"))
    assert 0 < hub.dripped < len(RAW.config), "it waited for more than the deadline allows"


def test_a_silent_download_ends_after_the_silence(hub, monkeypatch):
    silent = threading.Event()
    answer = hub.answer

    def stall(path: str):
        if "/resolve/" in path:
            silent.wait(10)
        return answer(path)

    monkeypatch.setattr(hub, "answer", stall)
    try:
        with pytest.raises(SourceUnavailable, match="Timeout"):
            source(hub, patience=Patience(silence=0.1)).fetch(ref("org/tone"))
    finally:
        silent.set()


def test_the_token_goes_to_the_hub_and_not_where_it_sends_us(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere = True
    assert source(hub).fetch(ref("org/tone")).weights == RAW.weights
    assert set(hub.keys) == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_what_was_fetched_is_not_fetched_again(hub, cache):
    source(hub, cache=cache).fetch(ref("org/tone"))
    assert hub.downloads == 2
    again = source(hub, cache=cache).fetch(ref("org/tone"))
    assert (again.weights, again.revision) == (RAW.weights, COMMIT)
    assert hub.downloads == 2
    hub.add("org/tone", NEWER, OTHER_COMMIT)
    assert source(hub, cache=cache).fetch(ref("org/tone")).weights == NEWER.weights
    assert hub.downloads == 4


def test_a_commit_in_the_cache_needs_no_hub(hub, cache):
    source(hub, cache=cache).fetch(ref("org/tone"))
    hub.status = 503
    assert source(hub, cache=cache).fetch(ref(f"org/tone@{COMMIT}")).weights == RAW.weights
    with pytest.raises(SourceUnavailable):  # a branch may have moved: nobody guesses
        source(hub, cache=cache).fetch(ref("org/tone@main"))


def test_offline_nothing_is_asked_and_the_last_commit_seen_serves(hub, cache):
    source(hub, cache=cache).fetch(ref("org/tone"))
    before = len(hub.asked)
    offline = source(hub, cache=cache, offline=True)
    assert offline.fetch(ref("org/tone")).revision == COMMIT
    with pytest.raises(SourceNotFound, match="OFFLINE"):
        offline.fetch(ref("org/absent"))
    assert len(hub.asked) == before


def test_offline_reads_the_librarys_own_cache(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--kept"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / CONFIG_FILE).write_bytes(RAW.config)
    (snapshot / WEIGHTS_FILE).write_bytes(RAW.weights)
    raw = source(hub, offline=True).fetch(ref("org/kept"))
    assert (raw.weights, raw.revision) == (RAW.weights, COMMIT)
    with pytest.raises(AdapterTooLarge):
        source(hub, offline=True, limits=Limits(file_bytes=9)).fetch(ref("org/kept"))
    assert hub.asked == []


def test_no_message_names_an_address(hub):
    for change in ({"status": 500}, {"status": 403}, {"cut": 5}, {"lie": {"size": None}}):
        for name, value in change.items():
            setattr(hub, name, value)
        with pytest.raises(AdapterError) as caught:
            source(hub).fetch(ref("org/tone"))
        assert "127.0.0.1" not in str(caught.value)


def test_an_adapter_of_mlx_is_read_in_peft_terms_and_kept_so(hub, cache):
    config, weights = mlx_files()
    hub.files["org/tone", COMMIT] = {CONFIG_FILE: config, MLX_WEIGHTS_FILE: weights}
    want = in_peft_terms(config, weights, Limits())
    for _ in range(2):
        raw = source(hub, cache=cache).fetch(ref(f"org/tone@{COMMIT}"))
        assert (raw.config, raw.weights, raw.revision) == (*want, COMMIT)
    assert hub.downloads == 2
