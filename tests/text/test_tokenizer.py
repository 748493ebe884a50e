import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, run_client

import patchlib
from patchlib.errors import InputError, UnknownNameError, WeightsError
from patchlib.text.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text'")

TEXTS = [
    "",
    "O Romeo, Romeo!\n\nwherefore",
    "  two  spaces\t\n",
    "héllo, 日本語 😀\x00",
    "<|endoftext|>a",
    "don't 1999's",
]
RHYME = "the cat sat on the mat, the cat ate the rat, and that was that. " * 20


@pytest.fixture(scope="module")
def gpt2(shared):
    return load_tokenizer(shared / "gpt2_tokenizer")


def test_gpt2_counts_the_sonnets_tokens(gpt2, shared):
    text = (shared / "shakespeare" / "sonnets.txt").read_text(encoding="utf-8")
    ids = gpt2.encode(text)
    assert len(ids) == 25_284
    assert gpt2.decode(ids) == text
    assert gpt2.vocab_size == 50_257


def test_gpt2_ids_are_the_published_ones(gpt2):
    # ids that OpenAI's encoder gives
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" the\n") == [262, 198]
    assert gpt2.end_id == 50_256
    assert gpt2.encode("a<|endoftext|>") == [64, 50_256]


def test_gpt2_survives_saving(gpt2, tmp_path):
    assert gpt2.save(tmp_path) == tmp_path / "tokenizer.json"
    for source in (tmp_path, f"local-dir:{tmp_path}", tmp_path / "tokenizer.json"):
        again = load_tokenizer(source)
        assert again.fingerprint == gpt2.fingerprint
        assert [again.encode(text) for text in TEXTS] == [gpt2.encode(text) for text in TEXTS]
    foreign = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert foreign.encode(TEXTS[1]).ids == gpt2.encode(TEXTS[1])


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_from_the_hub_in_both_forms(tmp_path, form):
    trained = BPETokenizer.train([RHYME], 270)
    trained.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    files = {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    if form == "vocab.json":
        files = {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()}
    program = (
        "from patchlib.text.tokenizer import load_tokenizer\n"
        "tokenizer = load_tokenizer('hf-hub:user/model@main')\n"
        f"print(tokenizer.encode({RHYME!r}), tokenizer.fingerprint)\n"
    )
    with HubServer() as hub:
        hub.add("user/model", files)
        done = run_client(hub, program, tmp_path)
    assert done.stdout.strip() == f"{trained.encode(RHYME)} {trained.fingerprint}", done.stderr


def test_bytes_are_utf8_and_the_librarys_own(tmp_path):
    tokenizer = ByteTokenizer()
    foreign = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode("utf-8"))
        assert foreign.encode(text).ids == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(range(256)) == foreign.decode(list(range(256)))
    assert BPETokenizer(foreign).fingerprint == tokenizer.fingerprint
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_bytes_need_no_library(tmp_path):
    ByteTokenizer().save(tmp_path)
    program = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from patchlib.text.tokenizer import BPETokenizer, load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).encode('hé'))\n"
        "try: BPETokenizer.train(['text'], 300)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "[104, 195, 169]"
    assert "patchlib[text]" in done.stdout


def test_training_learns_frequent_words_and_repeats_itself(tmp_path):
    (tmp_path / "rhyme.txt").write_text(RHYME)
    tokenizer = BPETokenizer.train(tmp_path / "rhyme.txt", 280)
    assert tokenizer.vocab_size == 280
    assert tokenizer.end_id == 0
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(RHYME)) < len(RHYME) / 2
    assert tokenizer.fingerprint == BPETokenizer.train([RHYME], 280).fingerprint
    assert tokenizer.fingerprint != BPETokenizer.train([RHYME], 281).fingerprint
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(RHYME) == tokenizer.encode(RHYME)
    assert BPETokenizer.train(["ab"], 280).vocab_size < 280


def test_ids_outside_the_vocabulary_are_an_error(gpt2):
    with pytest.raises(InputError, match=r"ids\[1\]: found 50257; allowed: 0 to 50256"):
        gpt2.decode([0, 50_257])
    with pytest.raises(InputError, match=r"ids\[0\]: found -1"):
        gpt2.decode([-1])
    with pytest.raises(InputError, match=r"ids\[2\]: found 256; allowed: 0 to 255"):
        ByteTokenizer().decode([1, 2, 256, 3])
    for ids in (
        [65, 1.5],
        [65, True],
        [65, "B"],
        [65, None],
        [65, [66]],
        torch.tensor([65, 66.5]),
        np.array([65, 6.5]),
    ):
        with pytest.raises(InputError, match=r"ids\[[01]\]: found"):
            ByteTokenizer().decode(ids)
    with pytest.raises(InputError, match="ids: found 65; allowed: a list of ids"):
        ByteTokenizer().decode(65)


def test_numbers_of_numpy_and_torch_are_ids():
    for ids in (np.array([79, 33]), torch.tensor([79, 33], dtype=torch.uint8), [np.int64(79), torch.tensor(33)], b"O!"):
        assert ByteTokenizer().decode(ids) == "O!"
    assert ByteTokenizer().decode(iter([79, 33])) == "O!"


def test_missing_ids_are_those_without_a_token():
    assert ByteTokenizer().missing(256) == ByteTokenizer().missing(9) == []
    assert ByteTokenizer().missing(259) == [256, 257, 258]
    holes = ByteTokenizer()
    holes.tokens = ["a", None, "b", None]
    assert holes.missing(6) == [1, 3, 4, 5]
    assert holes.missing(2) == [1]


@pytest.mark.parametrize("name", ["gpt_tiny", "gpt_tiny.tiny_shakespeare", "convnextv2_lm_tiny.tiny_shakespeare"])
def test_by_the_name_of_a_model_with_weights(name, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(name)
    model = patchlib.create_model(name, pretrained=True)
    assert tokenizer.vocab_size == model.config.vocab_size
    assert tokenizer.fingerprint == ByteTokenizer().fingerprint
    # a folder of that name is meant by its path
    BPETokenizer.train([RHYME], 270).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer(name).vocab_size == 256
    assert [load_tokenizer(source).vocab_size for source in (f"./{name}", f"local-dir:{name}", Path(name))] == [270] * 3


def test_names_without_weights_or_a_tokenizer():
    with pytest.raises(UnknownNameError, match="no weights of 'causal_conv_lm_tiny'"):
        load_tokenizer("causal_conv_lm_tiny")
    with pytest.raises(UnknownNameError, match="the tag 'shakespeare'"):
        load_tokenizer("gpt_tiny.shakespeare")
    with pytest.raises(WeightsError, match=r"convmixer_16\.cats_dogs.*tokenizer\.json"):
        load_tokenizer("convmixer_16")


def test_the_end_is_looked_up_once():
    tokenizer = BPETokenizer.train([RHYME], 270)
    end = tokenizer.end_id
    tokenizer.tokens = None
    assert tokenizer.end_id == end == 0


def test_pieces_of_a_stream_end_between_characters():
    tokenizer, text = ByteTokenizer(), "a é 日本 😀!"
    assert list(tokenizer.decode_stream(tokenizer.encode(text))) == list(text)
    cut = tokenizer.encode("é")[:1]
    assert "".join(tokenizer.decode_stream(cut)) == tokenizer.decode(cut) == "\ufffd"
    trained = BPETokenizer.train([RHYME], 270)
    assert "".join(trained.decode_stream(trained.encode(text))) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer.train([RHYME], 270)], ids=["bytes", "bpe"])
def test_what_is_no_text(tokenizer):
    with pytest.raises(InputError, match="text: found bytes"):
        tokenizer.encode(b"abc")
    with pytest.raises(InputError, match="half a surrogate pair"):
        tokenizer.encode("ab\ud800")


def test_bad_training_arguments(tmp_path):
    with pytest.raises(InputError, match="vocab_size: found 256; allowed: at least 257"):
        BPETokenizer.train([RHYME], 256)
    with pytest.raises(InputError, match="no text file in UTF-8"):
        BPETokenizer.train(tmp_path / "missing.txt", 300)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="no text file in UTF-8"):
        BPETokenizer.train(tmp_path / "latin.txt", 300)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"}}', b"[" * 200_000],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_absurd_ids_are_refused(tmp_path):
    path = BPETokenizer.train([RHYME], 270).save(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 4_000_000_000
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="found token id 4000000000"):
        load_tokenizer(path)


def test_damaged_parts_are_refused(tmp_path):
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"a": 0, "b": 1}))
    merges.write_text("#version: 0.2\na c\n")
    with pytest.raises(WeightsError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)
    merges.unlink()
    with pytest.raises(WeightsError, match=r"merges\.txt: cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(WeightsError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path / "nowhere" / "tokenizer.json")
