"""Where the input lies: the local disk, buckets, and whatever fsspec reaches.

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

from clifflab.errors import InputError, holds_credentials, without_credentials

FIELD = "--input"
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


def scheme_of(path: str) -> str:
    """``s3`` of ``s3://bucket/key``; empty for a local path (``file://`` counts as one)."""
    found = _SCHEME.match(path)
    return "" if found is None or found[1].lower() == "file" else found[1].lower()


def local_path(path: str) -> str:
    """A local path, absolute, without ``file://``; ``~`` is the home folder."""
    if _SCHEME.match(path):
        path = path.partition("://")[2]
    return os.path.abspath(os.path.expanduser(path))


def refuse_credentials(path: str) -> None:
    """Fail where an address holds a credential: it would come to stand in files and messages.

    Raises:
        InputError: It does; says where such a thing belongs, and shows none of it.
    """
    scheme = scheme_of(path)
    if not scheme:
        return
    if not holds_credentials(path) and not _SIGNED.search(path):
        return
    default = f"keep it in fsspec's own settings: FSSPEC_{scheme.upper()}_..., or ~/.config/fsspec"
    remedy = _KEEPERS.get("gs" if scheme == "gcs" else scheme, default)
    raise InputError(FIELD, without_credentials(path), "holds a credential", f"leave it out of the address; {remedy}")


def locate(path: str) -> tuple[Any, str]:
    """The filesystem of a path and the path as that filesystem knows it.

    Returns:
        A ``pyarrow.fs.FileSystem`` and a path.

    Raises:
        InputError: The scheme is unknown, or a package that it needs is missing.
    """
    from pyarrow import fs

    scheme = scheme_of(path)
    if not scheme:
        return fs.LocalFileSystem(), local_path(path)
    rest = path.partition("://")[2].rstrip("/")
    anonymous = rest.startswith("anonymous@")
    filesystem = _remote(scheme, anonymous)
    if scheme.startswith("http"):  # whose paths are whole addresses
        return filesystem, path
    return filesystem, rest.removeprefix("anonymous@")


@lru_cache(maxsize=16)
def _remote(scheme: str, anonymous: bool) -> Any:
    from pyarrow import fs

    try:
        if scheme == "s3":
            return _s3(anonymous)
        if scheme in ("gs", "gcs"):
            return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=_PATIENCE))
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ImportError, ValueError, OSError) as error:
        raise InputError(
            FIELD, f"{scheme}://", f"no such filesystem here ({without_secrets(str(error))})",
            "use a local path, s3://, gs:// or hf://, or install the fsspec package of this scheme",
        ) from None  # fmt: skip


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
    )


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a filesystem raises into one line about the path.

    Raises:
        InputError: The path cannot be read; for a bucket it names the credential that was looked for.
    """
    try:
        yield
    except (InputError, UnicodeError):
        raise
    except FileNotFoundError as error:
        raise InputError(FIELD, path, f"no such file or bucket ({_short(error)})", _remedy(path)) from None
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise unreadable(path, error) from None
    except Exception as error:
        # fsspec's backends raise errors of their own packages; elsewhere such an error is a bug and stays one.
        if not scheme_of(path) or isinstance(error, AttributeError | TypeError | LookupError | AssertionError):
            raise
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> InputError:
    """The error line for a path that exists and cannot be read, or does not answer."""
    if not scheme_of(path):
        return InputError(FIELD, path, f"cannot be read ({_short(error)})", "check the file; copy it again if damaged")
    denied = _DENIED.search(str(error)) is not None
    problem = f"{'access denied' if denied else 'cannot be read'} ({_short(error)}); looked for {looked_for(path)}"
    return InputError(FIELD, path, problem, _remedy(path))


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
    return text


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
