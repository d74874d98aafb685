"""One tree of errors that a user can act on.

Anything derived from :class:`ClifflabError` is printed as one line and ends the command with its ``exit_code``; every
other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import re

# What an address may carry beside its place: a name and a password before the host, a query behind the path. A colon
# in front of digits alone is a port; CONTAINER@ACCOUNT of Azure's stores is a place.
_USERINFO = re.compile(
    r"(?<=://)(?!\[|[\w$-]+@\w+\.(?:dfs|blob)\.core\.)(?:[^/?#\s]*@|[^/?#@\s]*:(?!\d*(?:[/?#]|$))[^@\s]*@)"
)
_QUERY = re.compile(
    r"(https?://[^\s?]*\?(?=[^\s<])|[a-z][a-z0-9+.-]*://[^\s?]*\?(?=[\w.%-]+=))[^\s'\")]*", re.IGNORECASE
)
_PUBLIC = "anonymous@"  # how a bucket is asked without a credential


class ClifflabError(Exception):
    """Base of the errors that a user can mend.

    Attributes:
        exit_code: Exit code of the command line when the error reaches it.
    """

    exit_code = 2


class UserError(ClifflabError):
    """A wrong input: names the field, the value and the remedy.

    Args:
        field: What was wrong (a config key, an option, a file's role).
        value: The offending value, shortened for display.
        problem: What is wrong with it.
        remedy: What to do about it.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(one_line(f"{field}: {shorten(value)}: {problem}; {remedy}"))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        """Pickle by arguments: the error crosses process borders."""
        return type(self), (self.field, shorten(self.value), self.problem, self.remedy)


class ConfigError(UserError):
    """The study's configuration is wrong."""


class InputError(UserError):
    """An input file or a model cannot be used."""


class OutputError(UserError):
    """The output folder cannot be used."""


class ClusterError(UserError):
    """A running Ray cannot be used: it is not there, it refuses this process, or it is another version."""


class TraceError(ClifflabError):
    """One trace cannot be used; it goes to the rejects with this reason.

    Args:
        reason: A short machine-readable reason (``closing_missing``, ``too_long``, ...).
        detail: A sentence for a reader.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self) -> tuple[type[TraceError], tuple[str, str]]:
        """Pickle by arguments: the error crosses process borders."""
        return type(self), (self.reason, self.detail)


class InterventionError(ClifflabError):
    """A hook that should have fired did not: the result would be meaningless."""


class WorkerError(ClifflabError):
    """A unit of work failed more often than allowed."""

    exit_code = 1


def shorten(value: object, limit: int = 120) -> str:
    """Text of a value for an error line: one line, at most ``limit`` characters."""
    text = one_line(str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(text: str) -> str:
    """Text that may be shown: one line of printable characters, whatever it held.

    White space is collapsed; what could drive a terminal or turn the direction of reading is written as its code.
    """
    text = without_credentials(" ".join(text.split()))
    return text if text.isprintable() else "".join(c if c.isprintable() else _code(c) for c in text)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def holds_credentials(address: str) -> bool:
    """Whether an address names a user or a password in front of its host."""
    return any(found[0] != _PUBLIC for found in _USERINFO.finditer(address))


def without_credentials(text: str) -> str:
    """Text whose addresses show neither who asks nor a query, which may be a signature."""
    if "://" not in text:
        return text
    text = _USERINFO.sub(lambda found: found[0] if found[0] == _PUBLIC else "<credentials>@", text)
    return _QUERY.sub(r"\1<query>", text)


def refuse_secret_address(field: str, text: str) -> None:
    """Fail where text is an address that shows who asks: it would come to stand in logs, files and process lists.

    A query counts, whatever it says: nothing tells a signature from a harmless one.

    Raises:
        ConfigError: It is; the credential itself is not shown.
    """
    if "://" in text and (holds_credentials(text) or without_credentials(text) != text):
        remedy = "leave it out of the address; the environment of the process that opens it is the place"
        raise ConfigError(field, without_credentials(text), "holds a credential, or a query that may be one", remedy)
