"""Where a remote store lies: its URL, checked, and the folder on this machine that stands for it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from moescope.errors import InputError, MoescopeError
from store.whole import refusal, replacing

NAME_FILE = ".remote.json"
"""In a mirror: which store it stands for."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a store or a run is named by a URL."""
    return isinstance(text, str) and _URL.match(text) is not None


def located(text: str | os.PathLike[str]) -> Path:
    """The directory of a store given as a path or as a URL: itself, or its mirror.

    Raises:
        InputError: the URL cannot be one of a store.
        StoreError: the mirror cannot be made.
    """
    return mirror(str(text)) if is_url(text) else Path(text)


def split_stores(text: str) -> list[str]:
    """Several stores in one text, separated as in ``PATH``; the colon of a URL separates nothing."""
    return [part for part in re.split(rf"{re.escape(os.pathsep)}(?!//)", text) if part]


def mirror(url: str) -> Path:
    """The folder that stands for a store: made where it is not there; of ``file://``, the store itself.

    It lies in :func:`cache_root` and is named by a hash of the URL and of the service that answers for it.

    Raises:
        InputError: the URL holds a password, a question, ``..`` or control characters, or names no place.
        StoreError: the folder cannot be made.
    """
    url = checked(url)
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    naming = _naming(url)
    directory = cache_root() / _key(naming)
    if not (directory / NAME_FILE).is_file():
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(directory / NAME_FILE) as temporary:
                temporary.write_text(json.dumps(naming, sort_keys=True), encoding="utf-8")
        except OSError as error:
            raise no_place(directory, error) from error
    return directory


def no_place(path: Path, error: OSError) -> MoescopeError:
    """The error for what could not be written into the cache."""
    refused = refusal(path, error)
    return type(refused)(f"{refused}; MOESCOPE_CACHE names another folder for what is fetched")


def url_of(directory: Path) -> str | None:
    """The URL of the store that a folder stands for; None where it is no mirror of this cache.

    Raises:
        InputError: the environment names another service than the one that the mirror was made of.
    """
    try:
        content = json.loads((directory / NAME_FILE).read_text(encoding="utf-8"))
        naming = {"url": str(content["url"]), "endpoint": str(content["endpoint"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A folder that somebody handed over must not send us to a place of its choice.
    if directory.name != _key(naming) or directory.resolve().parent != cache_root().resolve():
        return None
    now = _naming(naming["url"])
    if now != naming:
        raise InputError(
            f"{directory} stands for {naming['url']} at {naming['endpoint'] or 'its usual service'}, and the"
            f" environment names {now['endpoint'] or 'the usual service'}: give --store {naming['url']}"
        )
    return naming["url"]


def cache_root() -> Path:
    """The folder of all mirrors: ``MOESCOPE_CACHE``, or ``~/.cache/moescope``."""
    given = os.environ.get("MOESCOPE_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "moescope"


def checked(url: str) -> str:
    """A URL as it is kept and shown: without a slash at its end.

    Raises:
        InputError: see :func:`mirror`. The message never repeats what may be a secret.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise InputError(f"{url!r} is no URL of a store: write s3://bucket/prefix")
    scheme, rest = found[1], found[2].rstrip("/")
    place, _, path = rest.partition("/")
    if ":" in place.rpartition("@")[0]:
        raise InputError(
            f"a {scheme}:// URL with a password in it is not taken: put credentials into the environment of the service"
        )
    if "?" in rest or "#" in rest:
        raise InputError(f"a store's URL takes no '?' and no '#': write {scheme}://bucket/prefix")
    if not rest.isprintable() or any(part in ("..", ".") for part in rest.split("/")):
        raise InputError(f"a store's URL takes no '.', '..' or control characters: write {scheme}://bucket/prefix")
    if scheme != "file" and not place and not (scheme == "memory" and path):
        raise InputError(f"{url!r} names no bucket: write {scheme}://bucket/prefix")
    if scheme == "file" and (place or not path):
        raise InputError(f"{url!r}: a file URL has three slashes and a path, file:///data/runs")
    return f"{scheme}://{re.sub('/{2,}', '/', rest)}"


def _naming(url: str) -> dict[str, str]:
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    parts = urlsplit(endpoint if url.startswith("s3") else "")
    return {"url": url, "endpoint": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else ""}


def _key(naming: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{naming['url']}\n{naming['endpoint']}".encode()).hexdigest()[:20]
