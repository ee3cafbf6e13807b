"""A real server: foreign names and origins, paths that lead elsewhere, sessions apart, and whom the server talks to."""

from __future__ import annotations

import asyncio
import http.client
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from app.guard import HEADERS, Guard
from benchmarks.page_client import Visitor, visitor
from tests.loops import in_own_loop
from tests.security.serving import Served


def ask(served: Served, path: str, **headers: str) -> http.client.HTTPResponse:
    """The answer to one GET, with the path and the headers as they stand here."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{served.port}", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    connection.close()
    return answer


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST.", "[::1]:8501", "192.0.2.7", "moe.example.org", "moe.example.org:443",
     "a.lab.example", "a.b.lab.example:8"],
)  # fmt: skip
def test_known_names_and_addresses_are_answered(served: Served, host: str) -> None:
    assert ask(served, "/some/where/_stcore/health", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8501", "127.0.0.1.evil.example", "localhost.evil.example", "lab.example",
     "evillab.example", "moe.example.org.evil.example", "localhost@evil.example", "evil.example/localhost", "",
     "localhost:a", "localhost:99999", "localhost evil.example", "[::1", "0x7f.1", "localhost#", "localhost?a"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/some/where/", "/some/where/_stcore/health", "/some/where/static/js/x", "/"])
def test_foreign_names_are_refused(served: Served, host: str, path: str) -> None:
    assert ask(served, path, Host=host).status in (400, 403)  # 400 where the server itself reads no name in it


def test_two_names_at_once_and_none_are_refused(served: Served) -> None:
    guard = Guard(None, ["localhost"])  # type: ignore[arg-type]
    from starlette.datastructures import Headers

    both = [(b"host", b"localhost"), (b"host", b"evil.example")]
    assert guard.refusal(Headers(raw=both)) and guard.refusal(Headers(raw=[]))
    assert guard.refusal(Headers(raw=both[:1])) is None


def test_another_page_gets_no_answer(served: Served) -> None:
    own = f"127.0.0.1:{served.port}"
    for origin in ("http://evil.example", f"http://localhost:{served.port}", "http://127.0.0.1:9", "null",
                   f"http://{own}.evil.example", f"ftp://{own}", ""):  # fmt: skip
        answer = ask(served, "/some/where/_stcore/health", Origin=origin)
        assert answer.status == 403 and answer.getheader("Access-Control-Allow-Origin") is None, origin
    assert ask(served, "/some/where/", Origin=f"http://{own}").status == 200
    # Behind a proxy that ends TLS the scheme differs, and the name is its own.
    assert ask(served, "/some/where/", Origin="https://moe.example.org", Host="moe.example.org").status == 200


def test_a_websocket_from_another_page_is_refused(served: Served) -> None:
    async def opened(origin: str) -> None:
        await (await visitor(served.url, origin=origin)).leave()

    for origin in ("http://evil.example", f"http://localhost:{served.port}", "http://127.0.0.1:9", "null"):
        with pytest.raises(InvalidStatus, match="403"):
            in_own_loop(opened(origin))
    in_own_loop(opened(f"http://127.0.0.1:{served.port}"))


def test_every_answer_says_what_a_browser_may_load(served: Served) -> None:
    for path in ("/some/where/", "/some/where/routing", "/some/where/_stcore/host-config", "/nothing/there"):
        answer = ask(served, path)
        assert {name: answer.getheader(name) for name in HEADERS} == HEADERS
        assert answer.getheader("Access-Control-Allow-Origin") in (None, f"http://127.0.0.1:{served.port}")
    policy = HEADERS["Content-Security-Policy"]
    assert "http:" not in policy and "https:" not in policy and "*" not in policy


@pytest.mark.parametrize("start", ["", "/some/where"])
@pytest.mark.parametrize(
    "path",
    ["/static/{}", "/media/{}", "/component/{}", "/component/moescope_picks/{}", "/app/static/{}", "/{}",
     "/_stcore/bidi-components/moescope_picks/{}", "/_stcore/upload_file/{}", "/routing/{}"],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_not_followed(served: Served, tmp_path: Path, start: str, path: str) -> None:
    (tmp_path / "secret.txt").write_text("a secret", encoding="utf-8")
    up = "../" * 20
    for target in (f"{up}etc/passwd", f"{up[:-1]}{tmp_path}/secret.txt", f"/{tmp_path}/secret.txt"):
        for written in (target, target.replace("../", "%2e%2e/"), target.replace("/", "%2f"),
                        target.replace("../", "..%5c"), target.replace("../", "%252e%252e%252f")):  # fmt: skip
            answer = ask(served, start + path.format(written))
            body: bytes = answer.body  # type: ignore[attr-defined]
            assert b"root:" not in body and b"a secret" not in body, written


def test_what_is_not_offered_is_shut(served: Served) -> None:
    for method, path in (("POST", "/_stcore/agent/interact"), ("PUT", "/_stcore/upload_file/a/b")):
        request = urllib.request.Request(served.url + path, data=b"{}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code in (400, 403, 404, 405), path


def test_two_users_never_see_each_other(served: Served) -> None:
    """Both look at once, each at another run, page, layer and expert."""

    async def look(user: Visitor, layer: str, expert: str, page: str, section: str) -> None:
        await user.open(page)
        await user.choose("layer", layer)
        await user.choose("expert", expert)
        await user.choose("section", section)

    async def both() -> tuple[Visitor, Visitor]:
        one, other = await visitor(served.url, "run=ada"), await visitor(served.url, "run=bob")
        await asyncio.gather(one.open(), other.open())
        for _ in range(2):
            await asyncio.gather(
                look(one, "1", "3", "routing", "Confidence"), look(other, "5", "7", "similarity", "Pairs")
            )
        for user, name, foreign in ((one, "ada", "bob"), (other, "bob", "ada")):
            assert not user.errors
            assert user.chosen["run"] == name, user.chosen
            assert f"{foreign} " not in " ".join(user.words) + " "
        assert (one.chosen["layer"], one.chosen["expert"]) == ("1", "3")
        assert (other.chosen["layer"], other.chosen["expert"]) == ("5", "7")
        await asyncio.gather(one.leave(), other.leave())
        return one, other

    one, other = in_own_loop(both())
    assert one.errors == other.errors == []


def test_the_server_talks_to_nobody(served: Served) -> None:
    """After all of the above, foreign origins included: for those, Streamlit alone would ask the internet."""
    in_own_loop(_visit_all(served.url))
    noted = served.notes.read_text(encoding="utf-8").splitlines()
    foreign = {line for line in noted if not any(own in line for own in ("'127.0.0.1'", "'localhost'", "'::1'"))}
    assert foreign == {"began"}


async def _visit_all(url: str) -> None:
    user = await visitor(url, "run=ada&sql=from+layer")
    for page in ("", "routing", "data"):
        await user.open(page)
    await user.leave()
    assert user.errors == []
