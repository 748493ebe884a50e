"""The Hub layer, with the real client against a small Hub on loopback.

Every load runs in a process of its own, whose Hub and cache are set before the client is imported. What is right is
taken from the bytes that were put on the server, and from its log of requests.
"""

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, run_client, start_client

from patchlib.errors import InputError
from patchlib.weights.hub import HubRepo, push_folder, sha256_of

CONFIG = b'{"architecture": "convmixer"}'
WEIGHTS = random.Random(0).randbytes(200_000)
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}

LOAD = """
import hashlib, json, sys, warnings
from patchlib.errors import PatchlibError
from patchlib.weights.hub import HubRepo

name, files, options, sha256, optional, method = json.loads({arguments!r})
answer = {{"files": {{}}, "error": "", "message": "", "commit": None}}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        repo = HubRepo.parse(name, **options)
        for file in files:
            if method == "verify":
                answer["files"][file] = repo.verify(file, sha256=sha256)
            else:
                path = repo.file(file, sha256=sha256, optional=optional)
                answer["files"][file] = path and hashlib.sha256(path.read_bytes()).hexdigest()
                answer["commit"] = repo.commit
    except PatchlibError as error:
        answer.update(error=type(error).__name__, message=str(error))
answer["warnings"] = [str(one.message) for one in caught]
answer["torch"] = "torch" in sys.modules
print(json.dumps(answer))
"""


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flipped(data: bytes) -> bytes:
    """What the server sends when it is told to corrupt."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


RIGHT = {name: sha(data) for name, data in FILES.items()}


def script(
    name: str = "user/model",
    files: tuple[str, ...] = tuple(FILES),
    sha256: str | None = None,
    optional: bool = False,
    method: str = "file",
    **options: Any,
) -> str:
    return LOAD.format(arguments=json.dumps([name, files, options, sha256, optional, method]))


def read(process: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def load(hub: HubServer, home: Path, env: dict[str, str] | None = None, **what: Any) -> dict[str, Any]:
    """Loads files in a process of its own; answers their hashes, the commit, warnings, and the error if any."""
    return read(run_client(hub, script(**what), home, env, timeout=120))


def cached(home: Path, file: str = "model.safetensors") -> Path:
    (path,) = (home / "hub/models--user--model/snapshots").glob(f"*/{file}")
    return path


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("user/model", FILES)
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def filled(hub: HubServer, home: Path) -> Path:
    """A cache that has both files, and a server that was asked nothing since."""
    assert load(hub, home)["files"] == RIGHT
    hub.behave()
    return home


# Names


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("user/model", None, ("user/model", "main")),
        ("gpt2", None, ("gpt2", "main")),
        ("timm/convmixer_768_32.in1k@v1.0", None, ("timm/convmixer_768_32.in1k", "v1.0")),
        ("user/model", "refs/pr/3", ("user/model", "refs/pr/3")),
        ("user/model@abc1234", "abc1234", ("user/model", "abc1234")),
        ("user/model@v1.0+cu118", None, ("user/model", "v1.0+cu118")),
    ],
)
def test_names(name: str, revision: str | None, expected: tuple[str, str]) -> None:
    repo = HubRepo.parse(name, revision)
    assert (repo.repo_id, repo.revision) == expected


MALFORMED = [
    *["", "/", "user/", "/model", "a/b/c", "../model", "user/..", "user/mo..del", "user/mo--del", "user/model.git"],
    *["user/mo del", "user/model ", "user/model\n", "user\\model", "user/.model", "-user/model", "user/модель"],
    *["user/model?x=1", "user/model#x", "https://host/user/model", "a" * 97, "user/model\0"],
    *["user/model@", "user/model@../../etc", "user/model@a b", "user/model@a//b", "user/model@/a", "user/model@a/"],
    *["user/model@-a", "user/model@a.lock", "user/model@a/.b", "user/model@a~1", "user/model@a^", "user/model@a:b"],
    *["user/model@a@{1}", "user/model@a?b", "user/model@a%2e%2e", "user/model@a\n", "user/model@" + "a" * 300],
]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_names(name: str) -> None:
    with pytest.raises(InputError, match=r"repository|revision"):
        HubRepo.parse(name)


def test_two_revisions() -> None:
    with pytest.raises(InputError, match=r"'v1'.*'v2'"):
        HubRepo.parse("user/model@v1", "v2")
    with pytest.raises(InputError, match="revision"):
        HubRepo.parse("user/model", "")


@pytest.mark.parametrize("file", ["", ".", "/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", "x\0"])
def test_files_outside_the_repository(file: str) -> None:
    with pytest.raises(InputError, match="inside the repository"):
        HubRepo("user/model", local_files_only=True).file(file)


def test_nothing_is_asked_about_malformed_names(hub: HubServer, home: Path) -> None:
    for what in ({"name": "user/model@../x"}, {"name": "user/mo..del"}, {"files": ("../config.json",)}):
        assert load(hub, home, **what)["error"] == "InputError"
    assert not hub.requests


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(HubRepo("user/model", token="secret"))


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Fetching and the cache


def test_import_is_light(hub: HubServer, home: Path) -> None:
    code = "import sys, patchlib.weights.hub; print([m for m in ('torch', 'huggingface_hub') if m in sys.modules])"
    assert run_client(hub, code, home).stdout.strip() == "[]"


def test_first_and_later_loads(hub: HubServer, home: Path) -> None:
    commit = hub.repos["user/model"].branches["main"]
    first = load(hub, home)
    assert (first["files"], first["commit"], first["warnings"], first["torch"]) == (RIGHT, commit, [], False)
    assert hub.count("GET") == 2
    hub.behave()
    assert load(hub, home)["files"] == RIGHT
    assert [one.method for one in hub.requests] == ["HEAD"]  # where is main? The rest is in the cache
    hub.behave()
    assert load(hub, home, revision=commit)["files"] == RIGHT
    assert not hub.requests


def test_the_clients_own_tools_accept_the_cache(hub: HubServer, filled: Path) -> None:
    code = "from huggingface_hub import scan_cache_dir as s; c = s(); print(len(c.repos), len(c.warnings))"
    assert run_client(hub, code, filled).stdout.split() == ["1", "0"]


def test_revisions(hub: HubServer, home: Path) -> None:
    old = hub.repos["user/model"].branches["main"]
    hub.add("user/model", {"config.json": b"{}"}, revision="other")
    new = hub.add("user/model", {"config.json": b"[]"})
    for name, data in [(old, CONFIG), ("other", b"{}"), ("main", b"[]"), (new, b"[]")]:
        answer = load(hub, home, name=f"user/model@{name}", files=("config.json",))
        assert answer["files"] == {"config.json": sha(data)}, name


def test_config_and_weights_come_from_one_commit(hub: HubServer, home: Path, tmp_path: Path) -> None:
    code = f"""
    import os, time
    from patchlib.weights.hub import HubRepo, sha256_of
    repo = HubRepo.parse("user/model")
    repo.file("config.json")
    while not os.path.exists({str(tmp_path / "moved")!r}):
        time.sleep(0.01)
    print(sha256_of(repo.file("model.safetensors")))
    """
    process = start_client(hub, code, home)
    while not hub.count("GET", "config.json"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    hub.add("user/model", {"model.safetensors": b"newer weights"})
    (tmp_path / "moved").touch()
    out, err = process.communicate(timeout=120)
    assert out.strip() == RIGHT["model.safetensors"], err


def test_a_moved_branch_is_followed(hub: HubServer, filled: Path) -> None:
    hub.add("user/model", {"config.json": b"[]"})
    answer = load(hub, filled)
    assert answer["files"] == {**RIGHT, "config.json": sha(b"[]")}
    assert hub.count("GET", "model.safetensors") == 0  # the new commit has the same weights


def test_optional_files(hub: HubServer, home: Path) -> None:
    files = ("config.json", "vocabulary.json")
    assert load(hub, home, files=files, optional=True)["files"]["vocabulary.json"] is None
    hub.behave()
    assert load(hub, home, files=files, optional=True)["files"]["vocabulary.json"] is None
    assert [one.file for one in hub.requests] == ["config.json"]  # that the commit has no vocabulary is remembered


def test_four_processes_fetch_once(hub: HubServer, home: Path) -> None:
    hub.misbehave("slow", "model.safetensors", seconds=0.5)  # long enough for all to be there
    clients = [start_client(hub, script(), home) for _ in range(4)]
    for client in clients:
        out, err = client.communicate(timeout=120)
        assert json.loads(out)["files"] == RIGHT, err
    assert (hub.count("GET", "config.json"), hub.count("GET", "model.safetensors")) == (1, 1)


def test_four_processes_fetch_damage_again_once(hub: HubServer, home: Path) -> None:
    hub.misbehave("corrupt", "model.safetensors", times=1)
    clients = [start_client(hub, script(), home) for _ in range(4)]
    for client in clients:
        out, err = client.communicate(timeout=120)
        assert json.loads(out)["files"] == RIGHT, err
    assert hub.count("GET", "model.safetensors") == 2


# Integrity


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["corrupt", "short"])
def test_damage_in_transit_is_fetched_again(hub: HubServer, home: Path, file: str, how: str) -> None:
    hub.misbehave(how, file, times=1)
    assert load(hub, home)["files"] == RIGHT
    assert hub.count("GET", file) == 2


def test_damage_that_stays_is_refused(hub: HubServer, home: Path) -> None:
    hub.misbehave("corrupt", "model.safetensors")
    answer = load(hub, home)
    assert answer["error"] == "WeightsError"
    for part in ("model.safetensors", "user/model", sha(WEIGHTS), sha(flipped(WEIGHTS)), str(len(WEIGHTS))):
        assert part in answer["message"]
    assert hub.count("GET", "model.safetensors") == 2
    hub.behave()
    assert load(hub, home)["files"] == RIGHT  # what was refused is not kept as good
    assert hub.count("GET", "model.safetensors") == 1


def test_a_body_that_stays_short_is_refused(hub: HubServer, home: Path) -> None:
    hub.misbehave("short", "model.safetensors")
    answer = load(hub, home)
    assert answer["error"] == "HubError"
    assert str(len(WEIGHTS)) in answer["message"]
    assert str(len(WEIGHTS) // 2) in answer["message"]
    assert hub.count("GET", "model.safetensors") == 2


def test_the_catalogues_hash(hub: HubServer, home: Path) -> None:
    weights = ("model.safetensors",)
    answer = load(hub, home, files=weights, sha256=sha(b"other"))
    assert answer["error"] == "WeightsError"
    assert sha(b"other") in answer["message"]
    assert sha(WEIGHTS) in answer["message"]
    assert "revision" in answer["message"]
    assert hub.count("GET", "model.safetensors") == 1  # the Hub names another content: no reason to fetch it again
    assert load(hub, home, files=weights, sha256=sha(WEIGHTS))["files"] == {weights[0]: sha(WEIGHTS)}
    assert load(hub, home, files=weights, sha256=sha(b"other"))["error"] == "WeightsError"  # although hashed before
    assert load(hub, home, files=("config.json",), sha256=sha(b"other"))["error"] == "WeightsError"


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_cached_file_is_fetched_again(hub: HubServer, filled: Path, file: str) -> None:
    os.truncate(cached(filled, file), 10)
    answer = load(hub, filled)
    assert answer["files"] == RIGHT
    assert hub.count("GET") == 1
    assert "10 bytes" in answer["warnings"][0]


def test_a_truncated_cached_file_that_cannot_be_fetched_is_refused(hub: HubServer, filled: Path) -> None:
    os.truncate(cached(filled), 10)
    hub.misbehave(503, "*", method="HEAD")
    answer = load(hub, filled)
    assert answer["error"] == "WeightsError"
    assert "10 bytes" in answer["message"]
    assert "503" in answer["message"]
    hub.behave()
    for options, env in [({"local_files_only": True}, {}), ({}, {"HF_HUB_OFFLINE": "1"})]:
        answer = load(hub, filled, env, **options)
        assert answer["error"] == "WeightsError"
        assert "requests are off" in answer["message"]
    assert not hub.requests


def test_corruption_on_the_disk_is_seen_by_verify(hub: HubServer, filled: Path) -> None:
    path = cached(filled)
    stat = path.stat()
    path.write_bytes(flipped(WEIGHTS))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk does it
    assert load(hub, filled)["files"]["model.safetensors"] == sha(flipped(WEIGHTS))  # loading does not hash
    answer = load(hub, filled, files=("model.safetensors",), method="verify")
    assert answer["error"] == "WeightsError"
    assert sha(WEIGHTS) in answer["message"]
    assert sha(flipped(WEIGHTS)) in answer["message"]
    assert hub.count("GET") == 0
    assert load(hub, filled)["files"] == RIGHT  # now it is suspect, and fetched again
    assert hub.count("GET", "model.safetensors") == 1
    answer = load(hub, filled, method="verify")
    assert (answer["error"], answer["files"]) == ("", RIGHT)


def test_a_file_written_since_is_hashed_again(hub: HubServer, filled: Path) -> None:
    cached(filled).write_bytes(flipped(WEIGHTS))
    assert load(hub, filled)["files"] == RIGHT
    assert hub.count("GET", "model.safetensors") == 1


def test_what_another_library_fetched_is_hashed_too(hub: HubServer, home: Path) -> None:
    hub.misbehave("corrupt", "model.safetensors", times=1)
    code = "import huggingface_hub as h; print(h.hf_hub_download('user/model', 'model.safetensors'))"
    assert Path(run_client(hub, code, home).stdout.strip()).read_bytes() == flipped(WEIGHTS)
    assert load(hub, home)["files"] == RIGHT


def test_where_links_do_not_work(hub: HubServer, home: Path) -> None:
    env = {"HF_HUB_DISABLE_SYMLINKS": "1"}
    hub.misbehave("corrupt", "model.safetensors", times=1)
    assert load(hub, home, env)["files"] == RIGHT
    path = cached(home)
    assert not path.is_symlink()
    stat = path.stat()
    path.write_bytes(flipped(WEIGHTS))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(hub, home, env, method="verify")["error"] == "WeightsError"


def test_where_no_receipt_can_be_written(hub: HubServer, filled: Path) -> None:
    receipts = filled / "hub/models--user--model/.patchlib"
    receipts.rename(filled / "elsewhere")
    receipts.touch()  # a file where the directory was: nothing can be written under it, by whomever
    assert load(hub, filled)["files"] == RIGHT
    cached(filled).write_bytes(flipped(WEIGHTS))
    assert load(hub, filled)["files"] == RIGHT  # hashed at each load, then
    assert hub.count("GET", "model.safetensors") == 1


# A Hub that does not answer


@pytest.mark.parametrize("how", [500, 503, "reset", "slow"])
def test_without_an_answer(hub: HubServer, filled: Path, tmp_path: Path, how: str | int) -> None:
    hub.misbehave(how, method="HEAD")
    env = {"HF_HUB_ETAG_TIMEOUT": "1"} if how == "slow" else {}
    answer = load(hub, filled, env)
    assert answer["files"] == RIGHT
    assert "Using the cached commit" in answer["warnings"][0]
    assert hub.count("HEAD") == 1  # the cached commit has the weights too
    hub.requests.clear()
    answer = load(hub, tmp_path / "empty", env)
    assert answer["error"] == "HubError"
    assert "config.json" in answer["message"]
    assert "try again later" in answer["message"]
    assert hub.count("HEAD") == 1  # soon: the client alone would go on for half a minute, or six


def test_without_a_server(filled: Path, tmp_path: Path) -> None:
    with HubServer() as gone:
        pass
    assert load(gone, filled)["files"] == RIGHT
    answer = load(gone, tmp_path / "empty")
    assert answer["error"] == "HubError"
    assert "check the connection" in answer["message"]


def test_downloads_that_fail(hub: HubServer, tmp_path: Path) -> None:
    ways: tuple[str | int, ...] = (503, "reset", "truncate", "slow")
    hub.add("user/model", {f"{how}.safetensors": WEIGHTS for how in ways})
    clients = {}
    for how in ways:  # side by side: the client takes its time until it gives up
        hub.misbehave(how, f"{how}.safetensors", seconds=20)
        code = script(files=("config.json", f"{how}.safetensors"))
        env = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"} if how == "slow" else {}
        clients[how] = start_client(hub, code, tmp_path / str(how), env)
    for how, client in clients.items():
        out, err = client.communicate(timeout=120)
        answer = json.loads(out)
        assert answer["error"] == "HubError", (how, err)
        assert f"{how}.safetensors" in answer["message"]
        assert "try again later" in answer["message"]
        assert answer["files"] == {"config.json": RIGHT["config.json"]}
        assert not list((tmp_path / str(how)).glob("**/*.incomplete"))
    assert [hub.count("GET", f"{how}.safetensors") for how in ways] == [1, 1, 6, 6]


def test_a_download_that_fails_where_an_older_commit_is_cached(hub: HubServer, filled: Path) -> None:
    old = hub.repos["user/model"].branches["main"]
    hub.add("user/model", {"config.json": b"[]"})
    hub.misbehave(503, "config.json")
    answer = load(hub, filled)
    assert (answer["files"], answer["commit"]) == (RIGHT, old)
    assert old in answer["warnings"][0]


def test_a_download_that_breaks_off_goes_on(hub: HubServer, home: Path) -> None:
    data = random.Random(1).randbytes(24 << 20)  # the client keeps a broken download in steps of 10 MiB
    hub.add("user/model", {"large.safetensors": data})
    hub.misbehave("truncate", "large.safetensors", times=1)
    assert load(hub, home, files=("large.safetensors",))["files"] == {"large.safetensors": sha(data)}
    first, second = (one.headers.get("Range") for one in hub.requests if one.method == "GET")
    assert (first, second) == (None, f"bytes={10 << 20}-")


def test_a_download_that_pauses_goes_on(hub: HubServer, home: Path) -> None:
    hub.misbehave("slow", "model.safetensors", times=1)
    assert load(hub, home, {"HF_HUB_DOWNLOAD_TIMEOUT": "1"})["files"] == RIGHT


# A Hub that refuses


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ({"name": "user/none"}, "no such repository; check its spelling; if it is private, pass a token"),
        ({"name": "user/none", "token": "reading"}, "no such repository"),
        ({"name": "user/private"}, "no such repository"),
        ({"name": "user/gated"}, "accept its licence"),
        ({"name": "user/model@v9"}, "check the branch, tag or commit 'v9'"),
        ({"name": "user/model@" + "0" * 40}, "check the branch, tag or commit"),
        ({"name": "user/model@v9", "optional": True}, "no such revision"),
        ({"files": ("none.json",)}, "no such file"),
    ],
)
def test_refusals(hub: HubServer, home: Path, what: dict[str, Any], remedy: str) -> None:
    hub.add("user/private", FILES, private=True)
    hub.add("user/gated", FILES, gated=True)
    answer = load(hub, home, **what)
    assert answer["error"] == "HubError"
    assert remedy in answer["message"]
    assert what.get("name", "user/model").partition("@")[0] in answer["message"]


def test_a_refused_token(hub: HubServer, home: Path) -> None:
    hub.misbehave(403, method="HEAD")
    answer = load(hub, home, token="reading")
    assert answer["error"] == "HubError"
    assert "403" in answer["message"]
    assert "hf auth login" in answer["message"]


def test_a_refusal_leaves_the_cache(hub: HubServer, filled: Path) -> None:
    hub.repos["user/model"].gated = True
    answer = load(hub, filled)
    assert answer["files"] == RIGHT
    assert "accept its licence" in answer["warnings"][0]


@pytest.mark.parametrize("repo", ["private", "gated"])
def test_tokens(hub: HubServer, home: Path, tmp_path: Path, repo: str) -> None:
    hub.add("user/kept", FILES, **{repo: True})
    assert load(hub, home, name="user/kept", token="reading")["files"] == RIGHT
    assert load(hub, tmp_path / "other", {"HF_TOKEN": "reading"}, name="user/kept")["files"] == RIGHT
    sent = {"content" in one.path: "Authorization" in {key.title() for key in one.headers} for one in hub.requests}
    assert sent == {False: True, True: False}  # the token goes to the Hub alone, not to where large files lie


# Without requests


@pytest.mark.parametrize(("options", "env"), [({"local_files_only": True}, {}), ({}, {"HF_HUB_OFFLINE": "1"})])
def test_offline(hub: HubServer, filled: Path, options: dict[str, Any], env: dict[str, str]) -> None:
    answer = load(hub, filled, env, **options)
    assert (answer["files"], answer["warnings"]) == (RIGHT, [])
    answer = load(hub, filled, env, files=("other.json",), **options)
    assert answer["error"] == "HubError"
    for part in ("other.json", "user/model", "requests are off"):
        assert part in answer["message"]
    assert load(hub, filled, env, files=("other.json",), optional=True, **options)["files"] == {"other.json": None}
    assert load(hub, filled, env, name="user/model@v1", **options)["error"] == "HubError"
    assert not hub.requests


def test_cache_dir(hub: HubServer, home: Path, tmp_path: Path) -> None:
    assert load(hub, home, cache_dir=str(tmp_path / "elsewhere"))["files"] == RIGHT
    assert (tmp_path / "elsewhere/models--user--model").is_dir()
    assert not (home / "hub/models--user--model").exists()
    offline = load(hub, home, cache_dir=str(tmp_path / "elsewhere"), local_files_only=True)
    assert offline["files"] == RIGHT


# Pushing

PUSH = """
from patchlib.errors import PatchlibError
from patchlib.weights.hub import push_folder
try:
    print(push_folder({folder!r}, {repo!r}, **{options!r}))
except PatchlibError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    (folder / "extra").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    (folder / "extra/labels.txt").write_text("cat\ndog\n")
    return folder


def push(hub: HubServer, home: Path, folder: Path, repo: str, **options: Any) -> str:
    process = run_client(hub, PUSH.format(folder=str(folder), repo=repo, options=options), home)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_a_push_without_requests_says_so(hub: HubServer, home: Path, folder: Path) -> None:
    code = PUSH.format(folder=str(folder), repo="user/new", options={})
    process = run_client(hub, code, home, {"HF_HUB_OFFLINE": "1"})
    assert "HubError push to 'user/new'" in process.stdout
    assert "requests are off (local_files_only, HF_HUB_OFFLINE); allow them" in process.stdout
    assert "cache" not in process.stdout


def test_push_and_load(hub: HubServer, home: Path, folder: Path) -> None:
    address = push(hub, home, folder, "user/new", token="writing", private=True)
    commit = hub.repos["user/new"].branches["main"]
    assert address == f"{hub.url}/user/new/commit/{commit}"
    assert hub.repos["user/new"].private
    pushed = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("**/*") if path.is_file()}
    assert {name: data for name, data in hub.files("user/new").items() if name != ".gitattributes"} == pushed
    assert hub.count("PUT", f"/upload/{RIGHT['model.safetensors']}") == 1
    answer = load(hub, home, name="user/new", files=tuple(pushed), token="reading")
    assert (answer["files"], answer["commit"]) == ({name: sha(data) for name, data in pushed.items()}, commit)


def test_push_again_and_to_a_branch(hub: HubServer, home: Path, folder: Path) -> None:
    push(hub, home, folder, "user/model", token="writing")
    (folder / "config.json").write_bytes(b"{}")
    push(hub, home, folder, "user/model", token="writing", revision="v2", message="Second")
    assert hub.files("user/model")["config.json"] == CONFIG
    assert hub.files("user/model", "v2")["config.json"] == b"{}"
    answer = load(hub, home, name="user/model@v2")
    assert answer["files"] == {**RIGHT, "config.json": sha(b"{}")}


def test_push_refused(hub: HubServer, home: Path, folder: Path) -> None:
    for options in ({}, {"token": "reading"}, {"token": "unknown"}):
        said = push(hub, home, folder, "user/new", **options)
        assert said.startswith("HubError")
        assert "hf auth login" in said
    hub.misbehave(500, "/api/repos/create", method="POST")
    assert "the Hub answers 500 (misbehaving" in push(hub, home, folder, "user/new", token="writing")
    assert "user/new" not in hub.repos


def test_push_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no directory"):
        push_folder(tmp_path / "none", "user/new")
    with pytest.raises(InputError, match="repository"):
        push_folder(tmp_path, "user/../new")
    with pytest.raises(InputError, match="revision"):
        push_folder(tmp_path, "user/new", revision="a b")
