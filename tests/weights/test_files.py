"""Checkpoint files: what is read, what is refused, and that writing is all or nothing."""

import io
import json
import os
import pickle
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchlib.errors import WeightsError
from patchlib.weights.files import (
    MAX_HEADER,
    MAX_JSON,
    check_plain,
    read_json,
    read_shards,
    read_tensors,
    write_files,
    write_tensors,
    write_text,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}


class Evil:
    """A pickle of it writes a file when it is read by a plain unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


# safetensors


def test_tensors_come_back_as_they_were(tmp_path):
    write_tensors(tmp_path / "w.safetensors", TENSORS)
    found = read_tensors(tmp_path / "w.safetensors")
    assert same(found, TENSORS)
    assert [found[k].dtype for k in TENSORS] == [t.dtype for t in TENSORS.values()]
    assert same(found, load_file(tmp_path / "w.safetensors"))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists what is mapped")
def test_tensors_are_mapped_not_copied(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.ones(300, 300), "b": torch.zeros(500)})
    found = read_tensors(path)
    with open("/proc/self/maps") as lines:
        maps = [line.split()[0] for line in lines if line.rstrip().endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in span.split("-")) for span in maps]
    for tensor in found.values():
        assert any(low <= tensor.data_ptr() < high for low, high in ranges)


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    write_tensors(tmp_path / "w.safetensors", TENSORS)
    read_tensors(tmp_path / "w.safetensors")["a"].zero_()
    assert same(read_tensors(tmp_path / "w.safetensors"), TENSORS)


def header(text, body=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "four bytes": b"\x01\x02\x03\x04",
    "only a length": struct.pack("<Q", 4),
    "a length beyond the file": struct.pack("<Q", 10**6) + b'{"a":1}',
    "a length beyond memory": struct.pack("<Q", 2**63) + b"{}" + b" " * 100,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a zip archive": b"PK\x03\x04" + bytes(64),
    "a pickle": pickle.dumps({"a": 1}, protocol=2) + bytes(64),
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "no JSON": header(b'{"a": '),
    "a list": header([1, 2]),
    "no UTF-8": header(b'{"\xff": 1}'),
    "deep nests": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "another dtype": header({"a": {**F32, "dtype": "F31"}}, bytes(8)),
    "a shape too large": header({"a": {**F32, "shape": [3]}}, bytes(8)),
    "a shape beyond memory": header({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(8)),
    "a negative shape": header({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "data missing": header({"a": F32}, bytes(7)),
    "data over": header({"a": F32}, bytes(9)),
    "offsets backwards": header({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "offsets that overlap": header({"a": F32, "b": F32}, bytes(8)),
    "metadata of another kind": header({"__metadata__": {"a": 1}, "a": F32}, bytes(8)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_safetensors_file_is_refused(case, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(WeightsError, match=r"w\.safetensors: .*(again|convert)"):
        read_tensors(path)


def test_a_header_longer_than_any_model_needs_is_refused_unread(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{")
        file.truncate(MAX_HEADER + 1000)
    with pytest.raises(WeightsError, match=str(MAX_HEADER)):
        read_tensors(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 9, 40, 200, -1])
def test_a_truncated_file_is_refused(keep, tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"w\.safetensors: .*again"):
        read_tensors(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading it would wait for ever
    for path in (tmp_path, tmp_path / "absent.safetensors", tmp_path / "pipe.safetensors"):
        with pytest.raises(WeightsError, match="no such file"):
            read_tensors(path)


# pickles


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".tar"])
def test_a_pickle_is_read_only_when_asked(suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    torch.save(TENSORS, path)
    with pytest.raises(WeightsError, match="allow_pickle=True"):
        read_tensors(path)
    assert same(read_tensors(path, allow_pickle=True), TENSORS)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_the_state_dict_of_a_training_checkpoint_is_found(wrapper, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, wrapper: TENSORS, "optimizer": {"lr": 0.1}}, path)
    assert same(read_tensors(path, allow_pickle=True), TENSORS)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(name, zipped, tmp_path):
    path, trace = tmp_path / name, tmp_path / "executed"
    torch.save({"a": torch.ones(2), "b": Evil(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"weights_only|convert it"):
        read_tensors(path, allow_pickle=True)
    assert not trace.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert trace.exists()  # it would have


def test_what_a_pickle_holds_is_named_and_torchs_advice_to_run_it_is_not_repeated(tmp_path):
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"it holds 'torch\.nn\.modules\.linear\.Linear', which is no") as caught:
        read_tensors(tmp_path / "w.pt", allow_pickle=True)
    content = (tmp_path / "w.pt").read_bytes().replace(b"linear\nLinear", b"linea\x1b\nLinear")
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="not readable") as other:
        read_tensors(tmp_path / "w.pt", allow_pickle=True)
    for message in (str(caught.value), str(other.value)):
        assert message.isprintable()
        assert "trust" not in message


def test_a_bare_pickle_never_runs(tmp_path):
    path, trace = tmp_path / "w.bin", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Evil(trace), protocol=2))
    with pytest.raises(WeightsError, match="weights_only"):
        read_tensors(path, allow_pickle=True)
    assert not trace.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, 2],
        lambda: {"a": 1},
        lambda: {"state_dict": {"a": [1.0]}},
        lambda: torch.ones(2),
        lambda: {"a": torch.ones(2, device="meta")},
        lambda: {"a": torch.eye(2).to_sparse()},
        lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    ],
    ids=["list", "number", "nested list", "tensor", "meta", "sparse", "quantised"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_pickle_of_anything_but_plain_tensors_is_refused(make, tmp_path):
    torch.save(make(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt: .*state_dict"):
        read_tensors(tmp_path / "w.pt", allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(50), b"\x80\x02}q\x00", b"hello", bytes(100)])
def test_a_damaged_pickle_is_refused(content, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pt: "):
        read_tensors(tmp_path / "w.pt", allow_pickle=True)


# shards


def sharded(folder, weight_map, **shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return read_shards(index, lambda name: folder / name)


def test_shards_are_one_checkpoint(tmp_path):
    a, b = {"a": TENSORS["a"]}, {"b": TENSORS["b"], "n": TENSORS["n"]}
    found = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "n": "2.safetensors"}, **{"1": a, "2": b})
    assert same(found, TENSORS)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "..", "", "x.bin",
        "a\\b.safetensors", "x\0.safetensors", "x" * 300 + ".safetensors", "C:x.safetensors",
    ],
)  # fmt: skip
def test_a_shard_outside_the_folder_is_refused_unread(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": TENSORS["a"]}, tmp_path / "secret.safetensors")
    with pytest.raises(WeightsError, match=r"weight_map names .*same folder"):
        sharded(folder, {"a": name})


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, "1.safetensors"])
def test_an_index_of_another_form_is_refused(weight_map, tmp_path):
    with pytest.raises(WeightsError, match=r"index\.json: field 'weight_map'"):
        sharded(tmp_path, weight_map)


@pytest.mark.parametrize("weight_map", [{"a": "1.safetensors"}, {"a": "1.safetensors", "b": "1.safetensors"}])
def test_a_shard_that_holds_something_else_than_the_index_says_is_refused(weight_map, tmp_path):
    held = {"a": TENSORS["a"], "n": TENSORS["n"]}
    with pytest.raises(WeightsError, match=r"index\.json: it and 1\.safetensors differ .*n"):
        sharded(tmp_path, weight_map, **{"1": held})


# JSON


def test_json_is_read(tmp_path):
    content = {"a": [1, 2.5, None, True, "ä\U0001f431"], "b": {"c": {}}}
    (tmp_path / "c.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "c.json") == content


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON"),
        ("[1]", "found list.*JSON object"),
        ('"text"', "found str"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": {"b": 1, "c": 3, "b": 1}}', "'b' stands twice"),
        ('{"a": NaN}', "found NaN"),
        ('{"a": Infinity}', "found Infinity"),
        ('{"a": -Infinity}', "found -Infinity"),
        ('{"a": 1e999}', "found inf"),
        ('{"a": [-1e999]}', "found -inf"),
        ('{"a": 1' + "0" * 30 + "}", "found 1000.*finite"),
        ('{"a": 1' + "0" * 4000 + "}", "found 1000.*finite"),
        ('{"a": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"a":' * 33 + "1" + "}" * 33, "deeper than 32"),
        ('{"a":' + "[" * 900 + "]" * 900 + "}", "deeper than 32"),
        ('{"a":' + "[" * 40_000 + "]" * 40_000 + "}", "deeper than 32"),
        ("[" * 2_000_000, "found 2000000 lists and objects; allowed: at most"),
        ('{"a": [' + "{}," * 1_000_000 + "1]}", "found 1000002 lists and objects; allowed: at most"),
        ('{"a": "' + "x" * 20_000 + '"}', "text of 20000 characters"),
        ('{"' + "x" * 20_000 + '": 1}', "text of 20000 characters"),
    ],
    ids=range(23),
)
def test_json_that_is_no_config_is_refused(text, named, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(WeightsError, match=named) as caught:
        read_json(tmp_path / "c.json")
    assert str(tmp_path / "c.json") in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_json_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "c.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(WeightsError, match="not valid JSON"):
        read_json(tmp_path / "c.json")


def test_large_json_is_refused_unread(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"a":' + "[" * (20 * 2**20))
    with pytest.raises(WeightsError, match=rf"found \d+ bytes; allowed: at most {MAX_JSON}"):
        read_json(path)


def test_the_names_of_22000_classes_are_no_trouble(tmp_path):
    """Each key is compared once, not with all others."""
    labels = {str(i): f"a class of the name {i}" for i in range(22_000)}
    (tmp_path / "c.json").write_text(json.dumps({"id2label": labels, "label2id": {v: k for k, v in labels.items()}}))
    assert read_json(tmp_path / "c.json")["id2label"] == labels


@pytest.mark.parametrize("value", [{1: 2}, object(), b"bytes", {"a": torch.ones(1)}, float("nan"), 2**60, {"a": {1}}])
def test_what_json_cannot_hold_is_no_plain_data(value):
    with pytest.raises(ValueError, match="found"):
        check_plain({"info": value})


# writing


def test_files_get_the_users_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_files({tmp_path / "w.safetensors": TENSORS, tmp_path / "t.txt": "text"})
    finally:
        os.umask(old)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        "w.safetensors": "0o640",
        "t.txt": "0o640",
    }


def test_folders_are_made_and_nothing_is_left_over(tmp_path):
    write_text(tmp_path / "a" / "b" / "t.txt", "ä")
    assert (tmp_path / "a" / "b" / "t.txt").read_bytes() == b"\xc3\xa4"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["t.txt"]


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "t.txt", tmp_path / "folder"):
        with pytest.raises(WeightsError, match=f"{path}: cannot be written"):
            write_text(path, "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_text_that_has_no_bytes_leaves_no_file(tmp_path):
    with pytest.raises(WeightsError, match="cannot be written"):
        write_files({tmp_path / "w.safetensors": TENSORS, tmp_path / "t.txt": "\ud800"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "contents",
    [
        {"w.safetensors": {"a": torch.zeros(2, 3)}, "t.txt": "x" * 300_000},
        {"t.txt": "new", "w.safetensors": {"a": torch.zeros(300, 300)}},
    ],
    ids=["text too long", "tensor too large"],
)
def test_a_full_disk_leaves_every_file_as_it_was(contents, tmp_path):
    """The second file does not fit; the first was written by then."""
    write_files({tmp_path / "w.safetensors": TENSORS, tmp_path / "t.txt": "old"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match=r"w\.safetensors.*cannot be written.*unchanged"):
            write_files({tmp_path / name: content for name, content in contents.items()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.txt", "w.safetensors"]
    assert same(read_tensors(tmp_path / "w.safetensors"), TENSORS)
    assert (tmp_path / "t.txt").read_text() == "old"
