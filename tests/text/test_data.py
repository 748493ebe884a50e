from pathlib import Path

import numpy as np
import pytest
import torch

from patchlib.errors import InputError, WeightsError
from patchlib.text.data import Windows, read_tokens, split_windows, write_tokens
from patchlib.text.tokenizer import ByteTokenizer, Tokenizer

MAPS = Path("/proc/self/maps")


class Numbers(Tokenizer):
    """A vocabulary of any size."""

    def __init__(self, size):
        self.tokens = [str(i) for i in range(size)]

    def encode(self, text):
        return [int(word) for word in text.split()]

    def _decode(self, ids):
        return " ".join(map(str, ids))

    def to_json(self):
        return "{}"


@pytest.mark.parametrize(("size", "width"), [(256, 2), (65_536, 2), (65_537, 4)])
def test_tokens_come_back_as_they_were(tmp_path, size, width):
    tokenizer, path = Numbers(size), tmp_path / "text.safetensors"
    ids = [0, size - 1, 7, size // 2] * 1000
    write_tokens(path, ids, tokenizer)
    tokens = read_tokens(path, tokenizer)
    assert tokens.tolist() == ids
    assert 0 <= path.stat().st_size - width * len(ids) < 1000
    assert Windows(tokens, range(0, 3990), 4).take(torch.tensor([1, 3])).tolist() == [ids[1:5], ids[3:7]]


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux, which lists what a process has mapped")
def test_files_are_mapped(tmp_path):
    path = tmp_path / "text.safetensors"
    write_tokens(path, torch.full((1000,), 65), ByteTokenizer())
    tokens = read_tokens(path)
    assert str(path) in MAPS.read_text()
    assert tokens.sum() == 65_000


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    path = tmp_path / "text.safetensors"
    write_tokens(path, b"abc", ByteTokenizer())
    with pytest.raises(InputError, match="another tokenizer's than Numbers"):
        read_tokens(path, Numbers(256))


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "text.safetensors"
    write_tokens(path, [1, 2], ByteTokenizer())
    for ids, message in (([1, 256], r"ids\[1\]: found 256"), ([-1], "found -1"), ([], "at least one")):
        with pytest.raises(InputError, match=message):
            write_tokens(path, ids, ByteTokenizer())
    with pytest.raises(InputError, match=r"call it text\.safetensors"):
        write_tokens(tmp_path / "text.bin", [1], ByteTokenizer())
    assert read_tokens(path).tolist() == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["text.safetensors"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64"])
def test_tensors_of_every_kind_of_integer_are_written(tmp_path, dtype):
    path, ids = tmp_path / "text.safetensors", [104, 0, 127]
    for tokenizer in (ByteTokenizer(), Numbers(65_536), Numbers(70_000)):
        write_tokens(path, torch.tensor(ids, dtype=getattr(torch, dtype)), tokenizer)
        assert read_tokens(path, tokenizer).tolist() == ids
        write_tokens(path, np.array(ids, dtype=dtype), tokenizer)
        assert read_tokens(path, tokenizer).tolist() == ids
    with pytest.raises(InputError, match=r"ids\[0\]: found 104; allowed: 0 to 103"):
        write_tokens(path, torch.tensor(ids, dtype=getattr(torch, dtype)), Numbers(104))


def test_a_token_file_is_rewritten_in_part(tmp_path):
    path = tmp_path / "text.safetensors"
    write_tokens(path, range(200), ByteTokenizer())
    write_tokens(path, read_tokens(path)[50:60], ByteTokenizer())
    assert read_tokens(path).tolist() == list(range(50, 60))


@pytest.mark.parametrize("ids", [[1.7], [1, 2.5], "ab", [[1], [2]], [[1], 2], 3, None, [True], torch.tensor([1.0])])
def test_what_is_no_integer_is_no_token(tmp_path, ids):
    with pytest.raises(InputError, match="ids: found"):
        write_tokens(tmp_path / "text.safetensors", ids, ByteTokenizer())
    with pytest.raises(InputError, match="tokens: found"):
        split_windows(ids, 1)


def test_lists_and_mapped_arrays_are_tokens(tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "text.bin")
    mapped = np.memmap(tmp_path / "text.bin", dtype=np.uint16, mode="c")
    wanted = split_windows(torch.arange(500), 9)[1]
    for tokens in (mapped, list(range(500)), np.arange(500), [np.int64(i) for i in range(500)]):
        part = split_windows(tokens, 9)[1]
        assert torch.equal(part.take(range(len(part))), wanted.take(range(len(wanted))))
    mapped[:] = 7
    assert split_windows(mapped, 9)[1].tokens.data_ptr() == mapped.ctypes.data


def test_damaged_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "text.safetensors"
    write_tokens(path, range(200), ByteTokenizer())
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(WeightsError, match=r"text\.safetensors"):
        read_tokens(path)
    save_file({"tokens": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="no token file"):
        read_tokens(path)


def test_parts_by_position_share_no_token():
    tokens = torch.arange(1000)
    parts = split_windows(tokens, 17, (0.8, 0.1, 0.1))
    seen = [set(part.take(torch.arange(len(part))).flatten().tolist()) for part in parts]
    assert [(min(s), max(s), len(s)) for s in seen] == [(0, 799, 800), (800, 899, 100), (900, 999, 100)]
    assert parts[1][0].tolist() == list(range(800, 817))


def test_parts_of_random_windows_share_tokens_but_no_window():
    tokens = torch.arange(1000)
    train, validation = split_windows(tokens, 17, split="random_windows", seed=3)
    starts = [set(part.take(torch.arange(len(part)))[:, 0].tolist()) for part in (train, validation)]
    assert len(starts[0]) == 886  # 0.9 of 1000 - 17 + 1
    assert not starts[0] & starts[1]
    assert starts[0] | starts[1] == set(range(984))
    covered = {token for start in starts[0] for token in range(start, start + 17)}
    inside = [set(range(start, start + 17)) <= covered for start in starts[1]]
    assert sum(inside) > 0.9 * len(inside)  # why losses on it are too good
    again = split_windows(tokens, 17, split="random_windows", seed=3)[1]
    other = split_windows(tokens, 17, split="random_windows", seed=4)[1]
    assert torch.equal(validation.starts, again.starts)
    assert not torch.equal(validation.starts, other.starts)


@pytest.mark.parametrize("split", ["position", "random_windows"])
def test_batches_are_windows_of_the_part(split):
    part = split_windows(torch.arange(500), 9, split=split)[0]
    batch = part.sample(300, torch.Generator().manual_seed(0))
    assert batch.shape == (300, 9)
    assert batch.dtype == torch.int64
    assert (batch.diff() == 1).all()
    assert torch.equal(batch, part.sample(300, torch.Generator().manual_seed(0)))
    assert set(batch[:, 0].tolist()) <= {part[i][0].item() for i in range(len(part))}
    assert len(set(batch[:, 0].tolist())) > 150
    loader = torch.utils.data.DataLoader(part, batch_size=4)
    assert torch.equal(next(iter(loader)), part.take(torch.arange(4)))


@pytest.mark.parametrize("split", ["position", "random_windows"])
def test_no_index_crosses_the_cut(split):
    part = split_windows(torch.arange(1000), 10, split=split)[0]
    count = len(part)
    for index in (-1, -2, -5, -count, 0, 3, count - 1):
        assert torch.equal(part.take(torch.tensor([index]))[0], part[index]), index
        assert torch.equal(part.take([index])[0], part[index]), index
    for index in (count, count + 3, -count - 1):
        with pytest.raises(InputError, match=rf"indices\[1\]: found {index}; allowed: -{count} to {count - 1}"):
            part.take(torch.tensor([0, index]))
        with pytest.raises(IndexError):
            part[index]
    with pytest.raises(InputError, match="indices: found"):
        part.take([1.5])
    assert part.take(torch.arange(0)).shape == (0, 10)


def test_spread_is_even_and_from_end_to_end():
    part = split_windows(torch.arange(1000), 10)[0]
    few = part.spread(7)
    starts = few.take(torch.arange(7))[:, 0]
    assert starts[0] == 0
    assert set(starts.diff().tolist()) <= {len(part) // 7, len(part) // 7 + 1}
    assert part.spread(10_000) is part


def test_bad_splits_are_named():
    tokens = torch.arange(100)
    with pytest.raises(InputError, match="add up to 1"):
        split_windows(tokens, 5, (0.9, 0.2))
    with pytest.raises(InputError, match="split: found 'positions'; did you mean 'position'"):
        split_windows(tokens, 5, split="positions")
    with pytest.raises(InputError, match=r"parts\[1\]: 0.1 of 100 tokens has no window of 11"):
        split_windows(tokens, 11)
