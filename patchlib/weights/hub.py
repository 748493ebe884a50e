"""Files from and to the Hub, through its own client: one commit, each file checked when it arrives.

Addresses, tokens, the cache and its locks, resuming and offline mode are the client's (huggingface_hub). Added here:
names are validated before any request; all files of a `HubRepo` come from one commit; a Hub that does not answer is
noticed after one request, and the cache used where it has the file; a file is hashed once, against the name that the
Hub gives its content. A receipt in the cache (size, time, sha256) remembers that: later loads compare size and time,
and only `HubRepo.verify` hashes again.
"""

import contextlib
import hashlib
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, overload

from patchlib.errors import HubError, InputError, WeightsError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))[A-Za-z0-9_](?:[A-Za-z0-9_.+/-]{0,253}[A-Za-z0-9_+-])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class HubRepo:
    """One model repository of the Hub, at one commit from its first file on.

    Args:
        repo_id: ``"user/name"``, or ``"name"`` for the Hub's oldest repositories.
        revision: a branch, tag or commit.
        cache_dir: where files are kept; by default the client's cache.
        token: an access token; by default the one that the client knows, ``False`` for none.
        local_files_only: send no request, use the cache alone.

    Raises:
        InputError: `repo_id` or `revision` is malformed. Nothing has been asked of the Hub then.
    """

    repo_id: str
    revision: str = "main"
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    commit: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not _REPO_ID.fullmatch(self.repo_id):
            allowed = "a repository of the Hub is called 'user/name', of letters, digits, '-', '_' and '.'"
            raise InputError(f"repository {self.repo_id!r}: {allowed}")
        if not _REVISION.fullmatch(self.revision):
            allowed = "a revision is a branch, tag or commit, such as 'main' or 'v1.0'"
            raise InputError(f"revision {self.revision!r} of {self.repo_id!r}: {allowed}")
        if self.cache_dir is not None:
            self.cache_dir = Path(self.cache_dir).expanduser().resolve()

    @classmethod
    def parse(
        cls,
        name: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "HubRepo":
        """The repository called ``"user/name"`` or ``"user/name@revision"``.

        Raises:
            InputError: the name is malformed, or names another revision than the argument.
        """
        repo_id, at, named = name.partition("@")
        if at and revision is not None and revision != named:
            raise InputError(f"{name!r} names revision {named!r}, and the argument {revision!r}: give one of them")
        chosen = named if at else "main" if revision is None else revision
        return cls(repo_id, chosen, cache_dir, token, local_files_only)

    @overload
    def file(self, filename: str, sha256: str | None = None, optional: Literal[False] = False) -> Path: ...
    @overload
    def file(self, filename: str, sha256: str | None = None, optional: bool = False) -> Path | None: ...
    def file(self, filename: str, sha256: str | None = None, optional: bool = False) -> Path | None:
        """The path of a file in the cache, fetched first where it is not there.

        The first file fixes `commit`; the others come from it, and what the cache has of it needs no request. A file
        met for the first time, or whose size or time changed, is hashed; a wrong one is fetched again once. A Hub that
        does not answer is given up after one request (10 seconds, or ``HF_HUB_ETAG_TIMEOUT``), a download that stands
        still after six (each 10 seconds, or ``HF_HUB_DOWNLOAD_TIMEOUT``).

        Args:
            filename: its path in the repository, with ``/``.
            sha256: of the content that is expected, in hex, beside what the Hub says.
            optional: answer None where the repository has no such file (without requests: where the cache has none).

        Raises:
            InputError: `filename` leads out of the repository.
            HubError: neither the Hub nor the cache gives the file; the message says why, and what helps.
            WeightsError: its content is not the expected one, also after fetching it again.
        """
        name = PurePosixPath(filename)
        if not name.parts or name.is_absolute() or ".." in name.parts or re.search(r"[\\:\0]", filename):
            raise InputError(f"file {filename!r}: has to be a path inside the repository {self.repo_id!r}, with '/'")
        file = self._locate(filename, optional)
        if file is None:
            return None
        self.commit = file.commit
        if not file.hashed_as(sha256):
            self._check(file, sha256)
        return file.path

    def verify(self, filename: str, sha256: str | None = None) -> str:
        """Hashes a file again and answers its sha256, in hex. Raises as `file` does; after a `WeightsError` the next
        `file` fetches it again."""
        file = _Cached(self.file(filename, sha256), filename)
        with file.lock():
            noted = file.noted()
            if problem := file.problem(noted or sha256, again=True):
                raise WeightsError(f"{self._name(filename)}: {problem}. It changed on the disk; load it to get it anew")
        return noted or sha256_of(file.path)

    def _locate(self, filename: str, optional: bool) -> "_Cached | None":
        """The file in the cache, not checked yet."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import OfflineModeIsEnabled, RemoteEntryNotFoundError, RevisionNotFoundError

        revision = self.commit or self.revision
        entry = try_to_load_from_cache(self.repo_id, filename, cache_dir=self.cache_dir, revision=revision)
        cached = _Cached(Path(entry), filename) if isinstance(entry, str) else None
        absent = cached is None and entry is not None  # the cache remembers that this commit has no such file
        if _COMMIT.fullmatch(revision) and (cached is not None or (absent and optional)):
            return cached
        try:
            if self.local_files_only:
                raise OfflineModeIsEnabled
            try:  # asked apart from the download, which tries for minutes where nobody answers
                remote = get_hf_file_metadata(hf_hub_url(self.repo_id, filename, revision=revision), token=self.token)
            except RemoteEntryNotFoundError:
                remote = None  # the download finds that too, and notes it in the cache
            file = cached
            if file is None or remote is None or remote.commit_hash != file.commit:
                file = _Cached(self._download(filename, revision), filename)
            if remote is None or remote.commit_hash != file.commit:  # it has moved between the two requests
                return file
            return _Cached(file.path, filename, remote.etag)
        except Exception as error:  # what httpx, its successor and hf_xet raise has no nearer common base
            offline = isinstance(error, OfflineModeIsEnabled)
            missing = isinstance(error, RemoteEntryNotFoundError)
            if optional and cached is None and (absent or offline or missing):
                return None
            reason = f"{self._name(filename)}: {_reason(error, self.revision)}"
            if cached is None or missing or isinstance(error, RevisionNotFoundError):
                raise HubError(reason) from error
            if not offline:
                warnings.warn(f"{reason}. Using the cached commit {cached.commit}", stacklevel=3)
            return cached

    def _download(self, filename: str, revision: str, force: bool = False) -> Path:
        from huggingface_hub import hf_hub_download

        tries = 2
        while True:
            tries -= 1
            try:
                return Path(
                    hf_hub_download(
                        self.repo_id,
                        filename,
                        revision=revision,
                        cache_dir=self.cache_dir,
                        token=self.token,
                        force_download=force,
                    )
                )
            except OSError as error:  # plain: the body has the wrong length, which is no better than a wrong hash
                if not tries or type(error) is not OSError or error.errno is not None:
                    raise

    def _check(self, file: "_Cached", sha256: str | None) -> None:
        """Hashes a file; fetches it again where it is wrong, and refuses it where it stays wrong."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        name = self._name(file.filename)
        with file.lock():  # of several processes one hashes and fetches, and the others find its receipt
            problem = file.problem(sha256)
            if problem is None:
                return
            if sha256 and len(file.etag) == 64 and file.etag != sha256:
                raise WeightsError(f"{name}: {problem}. The Hub has another file there; name the revision that fits")
            try:
                if self.local_files_only:
                    raise OfflineModeIsEnabled
                if not file.path.is_symlink():
                    file.path.unlink()  # the client puts a new file behind a link, but not over a file
                self._download(file.filename, file.commit, force=True)
            except Exception as error:  # see _locate
                raise WeightsError(f"{name}: {problem}. To fetch again: {_reason(error, self.revision)}") from error
            warnings.warn(f"{name}: {problem}. It was fetched again", stacklevel=3)
            if problem := file.problem(sha256):
                raise WeightsError(f"{name}: {problem}, also when fetched again. The Hub sends it damaged; try later")

    def _name(self, filename: str) -> str:
        return f"{filename!r} of {self.repo_id!r} at {self.commit or self.revision!r}"


@dataclass(frozen=True)
class _Cached:
    """A file of the client's cache, ``<cache>/models--user--name/snapshots/<commit>/<filename>``: a link to
    ``blobs/<etag>``, or the file itself on a system without links, where `told` is what the Hub said."""

    path: Path
    filename: str
    told: str | None = None

    @property
    def etag(self) -> str:
        """The Hub's name for the content: a large file's sha256, a small one's git hash; of a mirror, anything."""
        return Path(os.readlink(self.path)).name if self.path.is_symlink() else self.told or ""

    @property
    def commit(self) -> str:
        return self.path.parents[len(PurePosixPath(self.filename).parts) - 1].name

    @property
    def receipt(self) -> Path:
        repository = self.path.parents[len(PurePosixPath(self.filename).parts) + 1]
        return repository / ".patchlib" / self.commit / f"{self.filename}.receipt"

    def lock(self) -> contextlib.AbstractContextManager[object]:
        from huggingface_hub.utils import WeakFileLock

        with contextlib.suppress(OSError):
            self.receipt.parent.mkdir(parents=True, exist_ok=True)
        if os.access(self.receipt.parent, os.W_OK):
            return WeakFileLock(f"{self.receipt}.lock")
        return contextlib.nullcontext()  # nobody writes into a read-only cache

    def noted(self) -> str | None:
        """The sha256 that the receipt states, as long as the file keeps the size and time noted with it."""
        try:
            size, time, sha256 = self.receipt.read_text().split()
        except (OSError, ValueError):
            return None
        stat = self.path.stat()
        return sha256 if (size, time) == (str(stat.st_size), str(stat.st_mtime_ns)) else None

    def hashed_as(self, sha256: str | None) -> bool:
        """Whether the file was hashed already, and was what the Hub and `sha256` say."""
        noted = self.noted()
        named = self.etag if len(self.etag) == 64 else noted
        return noted is not None and noted == named == (sha256 or noted)

    def problem(self, sha256: str | None, again: bool = False) -> str | None:
        """What is wrong with the content, or None; the receipt is written or removed accordingly. A file that has a
        receipt is hashed only if `again`."""
        if not again and self.hashed_as(sha256):
            return None
        stat, found = self.path.stat(), sha256_of(self.path)
        checks = [("sha256", sha256, found)]
        if len(self.etag) == 64:
            checks.append(("sha256", self.etag, found))
        elif _COMMIT.fullmatch(self.etag):
            content = self.path.read_bytes()
            header = b"blob %d\0" % len(content)
            checks.append(("git hash", self.etag, hashlib.sha1(header + content, usedforsecurity=False).hexdigest()))
        wrong = [check for check in checks if check[1] and check[1] != check[2]]
        with contextlib.suppress(OSError):  # into a read-only cache nothing is written: it is hashed at each load
            if wrong:
                self.receipt.unlink(missing_ok=True)
            else:
                self.receipt.write_text(f"{stat.st_size} {stat.st_mtime_ns} {found}\n")
        if wrong:
            kind, expected, actual = wrong[0]
            return f"expected {kind} {expected}, found {actual} ({stat.st_size} bytes, {self.path})"
        return None


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool = False,
    message: str = "Upload model",
    revision: str | None = None,
) -> str:
    """Uploads the files of a folder as a commit, and answers its address, which ends with its hash.

    A missing repository (`private` or not) or branch (`revision`, ``"main"`` by default) is made first.

    Raises:
        InputError: `folder` is no directory, or `repo_id` or `revision` is malformed.
        HubError: the Hub refuses or does not answer; the message says what helps.
    """
    from huggingface_hub import HfApi

    repo = HubRepo.parse(repo_id, revision)
    if not Path(folder).is_dir():
        raise InputError(f"folder {str(folder)!r}: is no directory; give the one that save_pretrained wrote")
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo.repo_id, private=private, exist_ok=True).repo_id
        if repo.revision != "main":
            api.create_branch(name, branch=repo.revision, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=repo.revision)
    except Exception as error:  # see HubRepo._locate
        reason = _reason(error, repo.revision, wants="sending wants requests")
        raise HubError(f"push to {repo.repo_id!r} at {repo.revision!r}: {reason}") from error
    return commit.commit_url


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException | None, revision: str, wants: str = "no sound copy is in the cache") -> str:
    """Why the Hub's client failed, and what helps; `wants` says why a request was needed."""
    from huggingface_hub import errors

    login = "pass a token that may do this, or log in with `hf auth login`"
    match error:
        case errors.GatedRepoError():
            return f"the repository is gated; accept its licence on the Hub, then {login}"
        case errors.RepositoryNotFoundError():
            return f"there is no such repository; check its spelling; if it is private, {login}"
        case errors.RevisionNotFoundError():
            return f"there is no such revision; check the branch, tag or commit {revision!r}"
        case errors.RemoteEntryNotFoundError():
            return "there is no such file; check its spelling, or the revision"
        case errors.OfflineModeIsEnabled():
            return f"{wants}, and requests are off (local_files_only, HF_HUB_OFFLINE); allow them"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the Hub refuses access ({error.response.status_code}); {login}"
        case errors.HfHubHTTPError():
            said = " ".join((error.server_message or "nothing more").split())
            return f"the Hub answers {error.response.status_code} ({said}); try again later"
        case ValueError() | errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            # what the client met while it was forced, or saw no other way
            return _reason(error.__cause__, revision, wants)
    said = " ".join(str(error).split()) or "no answer"
    return f"{said} ({type(error).__name__}); check the connection, or try again later"
