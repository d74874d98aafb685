"""From a plan to a job that runs: decide, check, upload, start."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import clifflab
from clifflab.errors import ClusterError, ConfigError, InputError, holds_credentials, without_credentials
from clifflab.runtime.submit.address import is_loopback
from clifflab.runtime.submit.client import Cluster
from clifflab.runtime.submit.examine import examine
from clifflab.runtime.submit.ids import JobView, decide, job_id, place_hash
from clifflab.runtime.submit.plan import Plan

ALWAYS = {"CLIFFLAB_STATUS_LINES": "1", "RAY_USAGE_STATS_ENABLED": "0", "CLIFFLAB_PACKAGE": "1"}
_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
# Names that say what they hold: in one of their words, or as a part of any word.
_SECRET_WORDS = frozenset(
    (
        "KEY", "KEYS", "PASS", "PWD", "AUTH", "SAS", "SIG", "SIGNATURE", "COOKIE", "BEARER", "PAT", "JWT", "DSN",
        "APIKEY", "ACCESSKEY", "SSHKEY", "DBPASS", "PGPASS",
    )
)  # fmt: skip
_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE_?KEY", re.IGNORECASE)
# Values that are what they look like: tokens of well-known services, signatures, keys.
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\b(?:AKIA|ASIA)[A-Z0-9]{8,}|\bgh[opsur]_\w{8,}|\bgithub_pat_\w{8,}|\bglpat-[\w-]{8,}|"
    r"\bsk-[\w-]{16,}|\bxox[abprs]-[\w-]{8,}|\bAIza[\w-]{20,}|\beyJ[\w-]{8,}\.eyJ|(?:^|[?&;\s])sig(?:nature)?=|"
    r"-----BEGIN|\bBearer\s"
)
_TRIES = 5


@dataclass(frozen=True)
class Sent:
    """What became of a submission.

    Attributes:
        job: The job.
        new: Whether it was sent now; it ran already otherwise.
    """

    job: JobView
    new: bool


def submit(
    cluster: Cluster,
    plan: Plan,
    *,
    env: Mapping[str, str],
    python: str = "python",
    check: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Sent:
    """Send a job, unless it runs already.

    Args:
        cluster: Where.
        plan: What.
        env: Environment of the job, beside what is always set.
        python: The interpreter on the nodes: a name that is looked for there, or a path.
        check: Ask the nodes first (see :func:`~clifflab.runtime.submit.examine.examine`).
        note: Told what a user should know.

    Raises:
        ClusterError: Something else runs under its name or into its output, or the cluster refuses it.
        UserError: The check found something.
    """
    address = cluster.head.address
    if cluster.head.token and address.startswith("http://") and not is_loopback(address):
        note(f"{address} gets the token over plain HTTP: who listens on the way can read it (https:// hides it)")
    digest = plan.digest(env, python)
    found = decide(cluster.jobs(), plan.name, plan.place, digest)
    if isinstance(found, JobView):
        return Sent(found, new=False)
    env = {**env, **ALWAYS}
    moved: dict[str, str] = {}
    if check:
        findings = examine(cluster, plan, env, python)
        for text in findings.notes:
            note(text)
        for shared in plan.shared:
            if shared.path in findings.unseen:
                moved[shared.path] = plan.package.add(shared.named, shared.path, shared.folder)
                note(f"{shared.named}: {shared.path} is not seen by every node, so it is uploaded")
    for text in plan.package.notes:
        note(text)
    entry = shlex.join([python, "-m", "clifflab", *plan.build(moved)])
    metadata = {
        "clifflab": clifflab.__version__,
        "name": plan.name,
        "kind": plan.kind,
        "digest": digest,
        "out": without_credentials(plan.place),
        "output": place_hash(plan.place),
        "base": job_id(plan.name, plan.place),
    }
    with tempfile.TemporaryDirectory(prefix="clifflab-") as folder:
        archive = Path(folder) / "package.zip"
        plan.package.write(archive)
        for _ in range(_TRIES):
            if cluster.send(found, entry, archive=archive, env=env, metadata=metadata):
                return Sent(_seen(cluster, found), new=True)
            # Somebody else sent this very id in the meantime, or a job of it was deleted and is remembered.
            again = decide(cluster.jobs(), plan.name, plan.place, digest)
            if isinstance(again, JobView):
                return Sent(again, new=False)
            found = again
    raise ClusterError("job", found, "cannot be sent: others send it too", "try again")


def parse_env(given: Sequence[str]) -> dict[str, str]:
    """Environment variables from ``NAME=VALUE``.

    Raises:
        ConfigError: It is no such thing, or looks like a secret: everybody on the cluster can read a job's environment.
    """
    found = dict[str, str]()
    remedy = "set it where ray start runs: every job on the cluster finds it there"
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not _NAME.match(name):
            raise ConfigError("--env", name, "is not NAME=VALUE", "write e.g. --env HF_HUB_OFFLINE=1")
        if name in ALWAYS:
            raise ConfigError("--env", name, "is set by clifflab itself", "leave it out")
        if name.upper().startswith("RAY_"):
            raise ConfigError("--env", name, "is the cluster's own to set", "set it where ray start runs")
        if _SECRET.search(name) or _SECRET_WORDS.intersection(name.upper().split("_")):
            raise ConfigError("--env", name, "looks like a secret, which a job's page would show", remedy)
        if holds_credentials(value) or without_credentials(value) != value or _SECRET_VALUE.search(value):
            raise ConfigError("--env", name, "its value holds a credential", remedy)
        found[name] = value
    return found


def check_name(name: str | None) -> str | None:
    """A job's name as a user gives it.

    Raises:
        InputError: It could not stand in an address.
    """
    from clifflab.config import SLUG

    if name is not None and not SLUG.match(name):
        remedy = "use letters, digits, '.', '_' and '-', starting with a letter or digit"
        raise InputError("--name", name, "cannot be a job's name", remedy)
    return name


def _seen(cluster: Cluster, submission_id: str) -> JobView:
    job = cluster.job(submission_id)
    if job is None:
        raise ClusterError("job", submission_id, "was sent and is not found", "see clifflab ls")
    return job
