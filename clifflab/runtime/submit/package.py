"""What is uploaded: only what was named, in one archive whose bytes depend on nothing but the files' content."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from clifflab.artifacts import file_hash
from clifflab.errors import InputError

MAX_MB = 100
RAY_LIMIT_MB = 500  # Ray keeps archives in memory and refuses larger ones
_SYSTEM = tuple(Path(place) for place in ("/proc", "/sys", "/dev"))
# Folders and files that hold credentials: nobody means them by a prompt file.
_SECRETS = frozenset({".ssh", ".aws", ".gnupg", ".kube", ".docker", ".ray", ".git", ".netrc", ".env", "gcloud"})


# Variables that name a file of them.
_NAMED = (
    "RAY_AUTH_TOKEN_PATH", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE",
    "HF_TOKEN_PATH", "KUBECONFIG", "NETRC",
)  # fmt: skip


@dataclass
class Package:
    """Files of one job by their place in the archive.

    Attributes:
        limit_mb: Most megabytes of all files together.
        beside: Folder of the study: files in a hidden folder below the home are sent only if the study lies there too.
        notes: What was left out, a line each.
    """

    limit_mb: int = MAX_MB
    beside: Path | None = None
    notes: list[str] = field(default_factory=list)
    _texts: dict[str, str] = field(default_factory=dict)
    _files: dict[str, Path] = field(default_factory=dict)

    def text(self, place: str, content: str) -> None:
        """Put a text there; it replaces one of the same place."""
        self._texts[place] = content

    def add(self, named: str, path: str, folder: str) -> str:
        """Put a file, or a folder with all in it, into a folder of the archive.

        Args:
            named: What named it (a config field, an option), for error lines.
            path: As it was named.
            folder: Where it goes.

        Returns:
            Its place in the archive.

        Raises:
            InputError: It is a home folder or holds one, is the system's, lies where credentials lie or hidden below
                the home folder, is or holds a link that leads out of it, or no plain file; or everything together is
                too large.
        """
        given = Path(os.path.abspath(os.path.expanduser(path)))
        source = Path(os.path.expanduser(path)).resolve()
        place = f"{folder}/{given.name}"
        for real in (given, source):
            self._refuse_private(named, path, real)
        if source.is_dir():
            self._add_folder(named, path, source, place)
        else:
            self._put(named, source, place)
        self._check_size(named)
        return place

    def fits(self, path: str) -> bool:
        """Whether a file, or a folder with all in it, is below the limit by itself."""
        source = Path(os.path.expanduser(path))
        left = self.limit_mb << 20
        for file in source.rglob("*") if source.is_dir() else [source]:
            left -= file.stat().st_size if file.is_file() else 0
            if left < 0:
                return False
        return True

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file by its place."""
        texts = {place: hashlib.sha256(text.encode()).hexdigest() for place, text in self._texts.items()}
        return {**texts, **{place: file_hash(file) for place, file in self._files.items()}}

    def write(self, target: Path) -> None:
        """Write the archive (ZIP); the same content gives the same bytes.

        Raises:
            InputError: The files hold more than they said.
        """
        left = self.limit_mb << 20
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for place in sorted({*self._texts, *self._files}):
                entry = zipfile.ZipInfo(place, date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (stat.S_IFREG | 0o644) << 16
                if place in self._texts:
                    archive.writestr(entry, self._texts[place])
                    continue
                with archive.open(entry, "w", force_zip64=True) as out, self._files[place].open("rb") as data:
                    while block := data.read(1 << 20):
                        left -= len(block)
                        if left < 0:
                            problem = f"holds more than it said; the limit is {self.limit_mb} MB"
                            raise InputError("upload", self._files[place], problem, "does something write to it?")
                        out.write(block)

    def _refuse_private(self, named: str, path: str, source: Path) -> None:
        """Refuse what nobody means by the data of a study."""
        remedy = "copy the data elsewhere"
        if any(source.is_relative_to(place) for place in _SYSTEM):
            raise InputError(named, path, "is the system's own, and no plain file or folder", remedy)
        if secret := _SECRETS.intersection(source.parts):
            raise InputError(named, path, f"lies in {min(secret)}, where credentials are", remedy)
        homes = {Path.home(), Path.home().resolve()}
        beside = Path(os.path.abspath(self.beside)) if self.beside else None
        allowed = {part for place in (beside, beside and beside.resolve()) if place for part in (place, *place.parents)}
        for part in (source, *source.parents):
            hidden = part.name.startswith(".") and any(home in part.parents for home in homes)
            if hidden and part not in allowed:
                raise InputError(named, path, f"lies in {part.name}, hidden below the home folder", remedy)

    def _add_folder(self, named: str, path: str, source: Path, place: str) -> None:
        home = Path.home().resolve()
        if source == home or source in home.parents:
            raise InputError(named, path, "is a home folder or holds one", "name the folder of the data alone")
        hidden: list[str] = []
        for folder, folders, files in os.walk(source):
            here = Path(folder)
            hidden += [name for name in (*folders, *files) if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
            for name in folders:
                if (here / name).is_symlink():
                    raise InputError(named, here / name, "is a link to a folder", "put the folder itself there")
            for name in sorted(name for name in files if not name.startswith(".")):
                file = here / name
                if not file.resolve().is_relative_to(source):
                    raise InputError(named, file, f"is a link that leads out of {path}", "put the file itself there")
                self._put(named, file, f"{place}/{file.relative_to(source).as_posix()}")
        if hidden:
            shown = ", ".join(sorted(set(hidden))[:3])
            self.notes.append(f"{named}: {path}: {len(hidden)} hidden files or folders are not uploaded ({shown})")

    def _put(self, named: str, file: Path, place: str) -> None:
        if not file.is_file():
            problem = "is no plain file" if file.exists() else "no such file"
            raise InputError(named, file, problem, "name a file, or a folder of files")
        if not os.access(file, os.R_OK):
            raise InputError(named, file, "cannot be read", "check its permissions")
        for variable in _NAMED:
            keeper = os.path.expanduser(os.environ.get(variable, ""))
            if keeper and os.path.exists(keeper) and os.path.samefile(keeper, file):
                raise InputError(named, file, f"is what {variable} names, a credential", "leave it out")
        try:
            place.encode()
        except UnicodeEncodeError:
            raise InputError(named, file, "has a name that is not UTF-8", "rename it") from None
        self._files[place] = file

    def _check_size(self, named: str) -> None:
        sizes = {file: file.stat().st_size for file in self._files.values()}
        if sum(sizes.values()) <= self.limit_mb << 20:
            return
        largest = max(sizes, key=lambda file: sizes[file])
        total, most = (size / (1 << 20) for size in (sum(sizes.values()), sizes[largest]))
        problem = f"{total:,.0f} MB to upload, of which {largest} is {most:,.0f}; the limit is {self.limit_mb}"
        remedy = f"put it where every node sees it under this path, or give --max-upload (at most {RAY_LIMIT_MB})"
        raise InputError(named, largest.name, problem, remedy)
