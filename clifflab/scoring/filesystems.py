"""Where input and output lie: the local disk, buckets, and whatever fsspec reaches.

A path says all that a worker needs to open it. Credentials come from the environment of the process that opens; error
lines name what was looked for and never a value.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pyarrow as pa

from clifflab.errors import InputError, OutputError, UserError, holds_credentials, without_credentials

FIELD, OUTPUT = "--input", "output"  # whose path it is, as error lines call it
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_PATIENCE = 10  # seconds that a bucket may take to answer
_ATTEMPTS = 3
# What each kind of store signs requests with. Values of these variables never reach a message.
_S3_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ADDRESSES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
_SECRETS = (*_S3_SECRETS, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_DENIED = re.compile(
    r"access.?denied|forbidden|\b40[13]\b|credential|permission|unauthori[sz]ed|unauthenticated|InvalidAcc|Signature|gated",
    re.IGNORECASE,
)
_BUSY = re.compile(
    r"SLOW_?DOWN|SERVICE_?UNAVAILABLE|THROTTLING|INTERNAL_|NETWORK_CONNECTION|timed? ?out", re.IGNORECASE
)
# Parameters of an address that sign or name who asks; a question mark elsewhere stands for a character.
_SIGNED = re.compile(
    r"[?&;](?:x-(?:amz|goog)-\w+|aws\w*|(?:\w*[_-])?(?:access|secret|api)?[_-]?key(?:[_-]?id)?|\w*token|"
    r"\w*password|passwd|user|username|secret|sig|signature|credentials?|auth\w*)=",
    re.IGNORECASE,
)
_KEEPERS = {  # where a credential belongs
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of ~/.aws by AWS_PROFILE",
    "gs": "name the file that holds it by GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud",
    "hf": "set HF_TOKEN, or log in with hf auth login",
}
_SIGNATURE = re.compile(r"(?<=Signature=)\w+")


def scheme_of(path: str) -> str:
    """``s3`` of ``s3://bucket/key``; empty for a local path (``file://`` counts as one)."""
    found = _SCHEME.match(path)
    return "" if found is None or found[1].lower() == "file" else found[1].lower()


def local_path(path: str) -> str:
    """A local path, absolute, without ``file://``; ``~`` is the home folder."""
    if _SCHEME.match(path):
        path = path.partition("://")[2]
    return os.path.abspath(os.path.expanduser(path))


def refuse_credentials(path: str, field: str = FIELD) -> None:
    """Fail where an address holds a credential: it would come to stand in files and messages.

    Raises:
        UserError: It does; says where such a thing belongs, and shows none of it.
    """
    scheme = scheme_of(path)
    if not scheme:
        return
    if not holds_credentials(path) and not _SIGNED.search(path):
        return
    default = f"keep it in fsspec's own settings: FSSPEC_{scheme.upper()}_..., or ~/.config/fsspec"
    remedy = _KEEPERS.get("gs" if scheme == "gcs" else scheme, default)
    shown = without_credentials(path)
    raise _kind(field)(field, shown, "holds a credential", f"leave it out of the address; {remedy}")


def locate(path: str, field: str = FIELD) -> tuple[Any, str]:
    """The filesystem of a path and the path as that filesystem knows it.

    Returns:
        A ``pyarrow.fs.FileSystem`` and a path.

    Raises:
        UserError: The scheme is unknown, or a package that it needs is missing.
    """
    from pyarrow import fs

    scheme = scheme_of(path)
    if not scheme:
        return fs.LocalFileSystem(), local_path(path)
    rest = path.partition("://")[2].rstrip("/")
    anonymous = rest.startswith("anonymous@")
    try:
        filesystem = _remote(scheme, anonymous)
    except (ImportError, ValueError, OSError) as error:
        raise _kind(field)(
            field, f"{scheme}://", f"no such filesystem here ({without_secrets(str(error))})",
            "use a local path, s3:// or gs://, or install the fsspec package of this scheme",
        ) from None  # fmt: skip
    if scheme.startswith("http"):  # whose paths are whole addresses
        return filesystem, path
    return filesystem, rest.removeprefix("anonymous@")


@lru_cache(maxsize=16)
def _remote(scheme: str, anonymous: bool) -> Any:
    from pyarrow import fs

    if scheme == "s3":
        return _s3(anonymous)
    if scheme in ("gs", "gcs"):
        return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=_PATIENCE))
    import fsspec

    return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))


def _s3(anonymous: bool) -> Any:
    """A client that answers within seconds, also where the bucket does not."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rpartition("://")
    return fs.S3FileSystem(
        anonymous=anonymous,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        endpoint_override=host.rstrip("/") or None,
        scheme=scheme or None,
        connect_timeout=_PATIENCE,
        request_timeout=_PATIENCE * 6,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        allow_delayed_open=True,  # a small object is one request, and there or not
    )


@contextmanager
def reading(path: str, field: str = FIELD) -> Iterator[None]:
    """Turn what a filesystem raises into one line about the path.

    Raises:
        UserError: The path cannot be read, or written to where it is an output; for a bucket it names the credential
            that was looked for.
    """
    try:
        yield
    except (UserError, UnicodeError):
        raise
    except FileNotFoundError as error:
        raise _kind(field)(field, path, f"no such file or bucket ({_short(error)})", _remedy(path)) from None
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise unreadable(path, error, field) from None
    except Exception as error:
        if not scheme_of(path) or not of_store(error):
            raise
        raise unreadable(path, error, field) from None


def of_store(error: Exception) -> bool:
    """Whether a filesystem may raise it: fsspec's backends have errors of their own packages; the rest are bugs."""
    return not isinstance(error, AttributeError | TypeError | LookupError | AssertionError)


def denied(error: Exception) -> bool:
    """Whether a store refuses who asks, and will when asked again."""
    return _DENIED.search(str(error)) is not None and _BUSY.search(str(error)) is None


def unreadable(path: str, error: Exception, field: str = FIELD) -> UserError:
    """The error line for a path that exists and cannot be read (or written to), or does not answer."""
    kind, verb = _kind(field), "used" if field == OUTPUT else "read"
    if not scheme_of(path):
        return kind(field, path, f"cannot be {verb} ({_short(error)})", "check the file; copy it again if damaged")
    what = "access denied" if denied(error) else f"cannot be {verb}"
    return kind(field, path, f"{what} ({_short(error)}); looked for {looked_for(path)}", _remedy(path))


def _kind(field: str) -> type[UserError]:
    return OutputError if field == OUTPUT else InputError


def looked_for(path: str) -> str:
    """Which credential a store was asked with: names of variables and files, never a value."""
    scheme = scheme_of(path)
    if path.partition("://")[2].startswith("anonymous@"):
        return "no credential (anonymous)"
    if scheme == "s3":
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            return "AWS_ACCESS_KEY_ID (set)"
        profile = os.environ.get("AWS_PROFILE", "default")
        return f"AWS_ACCESS_KEY_ID (not set), then profile {profile!r} of ~/.aws, then the machine's own role"
    if scheme in ("gs", "gcs"):
        state = "set" if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") else "not set"
        return f"GOOGLE_APPLICATION_CREDENTIALS ({state}), then gcloud's default login, then the machine's own role"
    if scheme == "hf":
        state = "set" if os.environ.get("HF_TOKEN") else "not set"
        return f"HF_TOKEN ({state}), then the token of `hf auth login`"
    return f"what fsspec's {scheme} filesystem takes from the environment"


def without_secrets(text: str) -> str:
    """A message without the values of credentials, should a store repeat them."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, f"<{name}>")
    for name in _ADDRESSES:
        user = os.environ.get(name, "").rpartition("://")[2].rpartition("@")[0]
        if user:
            text = text.replace(f"{user}@", f"<{name}>@")
    return _SIGNATURE.sub("<signature>", text)


def _short(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or error.__class__.__name__
    text = " ".join(without_secrets(text).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _remedy(path: str) -> str:
    scheme = scheme_of(path)
    return {
        "": "check the path",
        "s3": "check the name, AWS_REGION and AWS_ENDPOINT_URL, or write s3://anonymous@BUCKET for a public one",
        "gs": "check the name, or write gs://anonymous@BUCKET for a public one",
        "hf": "check the name, and log in if it is gated",
    }.get("gs" if scheme == "gcs" else scheme, "check the name and the credential")
