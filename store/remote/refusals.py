"""What services answer, and what fails on the way to them, as one line each: without their own words, which may hold
addresses and keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moescope.errors import InputError, MoescopeError, StoreError

_UNREACHABLE = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "HTTPClientError",
    "ProxyConnectionError", "SSLError", "ClientConnectorError", "ClientConnectionError", "ServerTimeoutError",
    "FSTimeoutError", "TimeoutError", "ConnectionError", "gaierror", "IncompleteRead", "ClientPayloadError",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoAuthTokenError",
    "TokenRetrievalError", "DefaultCredentialsError", "ClientAuthenticationError", "SSOTokenLoadError",
}  # fmt: skip
_DENIED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_RIGHT = {"listed": "list", "read": "read", "written": "write"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}


class Unreachable(StoreError):
    """The service did not answer; what was known of the store may go on being shown."""


class Vanished(StoreError):
    """An object is not there (any more)."""


@contextmanager
def telling(url: str, doing: str) -> Iterator[None]:
    """Turn whatever a service or its library raises into one line.

    Args:
        url: of the store or the object.
        doing: ``listed``, ``read`` or ``written``.
    """
    try:
        yield
    except MoescopeError:
        raise
    except Exception as error:
        # The cause stays out: its text may hold addresses with keys, and a log would show it.
        raise refusal_of(url, doing, error) from None


def refusal_of(url: str, doing: str, error: BaseException) -> MoescopeError:
    """The error to raise for what a service, or the library that speaks to it, said."""
    chain = list(_chain(error))
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    codes = {code for one in chain if (code := code_of(one))}
    scheme = url.partition("://")[0]
    if "ImportError" in names or (isinstance(error, ValueError) and "rotocol not known" in str(error)):
        return not_installed(scheme)
    if names & _NO_CREDENTIALS:
        hint = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" if scheme.startswith("s3") else "see docs"
        return StoreError(f"{url} cannot be {doing}: no credentials were found; set those of the service ({hint})")
    if "NoSuchBucket" in codes or ("FileNotFoundError" in names and doing == "listed"):
        return StoreError(
            f"{url} cannot be {doing}: there is no such bucket; look at its name, at the region"
            + (" and at AWS_ENDPOINT_URL" if scheme.startswith("s3") else "")
        )
    if names & {"PermissionError"} or codes & _DENIED:
        return StoreError(
            f"{url} cannot be {doing}: access was denied; ask for the right to {_RIGHT[doing]} there, or take other"
            " credentials"
        )
    if "FileNotFoundError" in names:
        return Vanished(f"{url} is not there any more: list the store again with moescope runs")
    if names & _UNREACHABLE:
        return Unreachable(
            f"{url} cannot be {doing}: the service does not answer; look at the network"
            + (" and at AWS_ENDPOINT_URL" if scheme.startswith("s3") else "")
            + ", then try again"
        )
    code = next((f" {code}" for code in sorted(codes) if code.isalnum()), "")
    return StoreError(f"{url} cannot be {doing} ({type(error).__name__}{code}): try again, or ask its owner")


def not_installed(scheme: str) -> InputError:
    """What to install for URLs of a scheme."""
    if scheme in _PACKAGES:
        package = _PACKAGES[scheme]
        return InputError(f"{scheme}:// needs {package}: pip install 'moescope[remote]' {package}")
    if scheme.startswith("s3") or scheme == "memory":
        return InputError(f"{scheme}:// needs fsspec and s3fs: pip install 'moescope[remote]'")
    return InputError(f"nothing that is installed reads {scheme}://; fsspec's documentation lists what it knows")


def code_of(error: BaseException) -> str:
    """The code that a service gave, such as ``NoSuchBucket``; empty where there is none."""
    response = getattr(error, "response", None)
    said = response.get("Error") if isinstance(response, dict) else None
    return str(said.get("Code") or "") if isinstance(said, dict) else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
