import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

import patchlib
from patchlib.text.tokenizer import load_tokenizer

pytest.importorskip("tokenizers", reason="needs the extra 'text'")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_text.py"
SMALL = '{"dim":16,"depth":1,"heads":2}'


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The example as a function of its command line, on text whose next word depends on the one before."""
    spec = importlib.util.spec_from_file_location("train_text", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words, draw = ["the"], random.Random(0)
    follows = {"the": ["cat", "mat", "sun"], "cat": ["sat", "ate"], "sat": ["on"], "on": ["the"], "ate": ["the"],
               "mat": ["shone", "."], "sun": ["shone"], "shone": ["on", "."], ".": ["the"]}  # fmt: skip
    while len(words) < 12_000:
        words.append(draw.choice(follows[words[-1]]))
    (tmp_path / "text.txt").write_text(" ".join(words))

    def run(*options):
        command = [str(EXAMPLE), str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
        command += ["--tokenizer", "270", "--batch-size", "2", "--targets", "8", "--final-targets", "40", *options]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        return json.loads((tmp_path / "out" / "results.json").read_text())["models"]

    return module, run, tmp_path / "out"


def test_compares_saves_and_does_nothing_twice(example, capsys):
    _, run, out = example
    options = ["--models", f"gpt_tiny:{SMALL}", "--minutes", "0.01", "--lr", "1e-4", "1e-2", "--seeds", "0", "1"]
    rows = run(*options)
    gpt, bigram, trigram = rows
    tried = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    tried = [run for run in tried if run["minutes"] < 0.01]
    assert len(tried) == 2
    assert gpt["lr"] == min(tried, key=lambda run: run["best"])["lr"]
    assert len(gpt["validation"]) == len(gpt["test"]) == 2
    assert trigram["test"][0] <= bigram["test"][0] + 0.1 < 2
    assert "| bigram |" in capsys.readouterr().out
    assert (out / "losses.png").stat().st_size > 5000

    folder = next(path for path in out.iterdir() if path.name.startswith("gpt_tiny"))
    model, tokenizer = patchlib.create_model(f"local-dir:{folder}"), load_tokenizer(folder)
    assert model.config.vocab_size == tokenizer.vocab_size == 270
    # its loss is the one that was reported, over targets that this test picks itself: the last 5 % but 256 tokens
    tokens = torch.tensor(tokenizer.encode((out.parent / "text.txt").read_text()))
    last = tokens[round(len(tokens) * 0.95) :]
    starts = [i * (len(last) - 256) // 40 for i in range(40)]
    with torch.no_grad():
        logits = model(torch.stack([last[s : s + 256] for s in starts]))[:, -1]
    loss = torch.nn.functional.cross_entropy(logits, last[torch.tensor(starts) + 256]).item()
    assert min(abs(loss - reported) for reported in gpt["test"]) < 1e-4

    again = run(*options)
    assert [row["histories"] for row in again[:1]] == [gpt["histories"]]
    assert again[0]["test"] == gpt["test"]


def test_another_text_or_tokenizer_is_another_run(example):
    _, run, out = example
    options = ["--models", f"gpt_tiny:{SMALL}", "--minutes", "0.005", "--context", "16"]
    text = out.parent / "text.txt"
    first = run(*options, "--tokenizer", "bytes")
    small = text.read_text()
    text.write_text(small.upper())  # as many tokens, of the same tokenizer
    shouted = run(*options, "--tokenizer", "bytes")
    assert shouted[0]["sample"].strip("\ufffd")[:4].isupper()
    assert shouted[0]["histories"] != first[0]["histories"]
    assert len(list(out.glob("runs/*/result.json"))) == 2
    text.write_text(small)
    merged = load_tokenizer(out / next(p.name for p in out.iterdir() if p.name.startswith("gpt_tiny")))
    assert merged.vocab_size == 256
    # the same vocabulary, but text is cut otherwise
    content = json.loads(merged.to_json())
    content["normalizer"] = {"type": "Lowercase"}
    (out.parent / "tokenizer.json").write_text(json.dumps(content))
    run(*options, "--tokenizer", str(out.parent))
    assert len(list(out.glob("runs/*/result.json"))) == 3
    assert run(*options, "--tokenizer", "bytes")[0]["histories"] == first[0]["histories"]


@pytest.mark.parametrize("option", ["--minutes", "--tune-minutes", "--batch-size", "--context", "--targets"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_numbers_that_train_nothing_are_refused(example, capsys, option, value):
    with pytest.raises(SystemExit):
        example[1](option, value)
    assert f"{option}: " in capsys.readouterr().err


def test_an_interrupted_training_goes_on(example, monkeypatch):
    module, run, out = example
    options = ["--models", f"gpt_tiny:{SMALL}", "--minutes", "0.03", "--lr", "1e-2"]
    evaluate, calls = module.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    saved = torch.load(next(out.glob("runs/*/last.pt")), weights_only=True)["state"]
    assert len(saved["history"]) == 1
    row = run(*options)[0]
    assert row["histories"][0][:1] == saved["history"]
    assert row["histories"][0][-1][0] >= 0.03 * 60
    assert not list(out.glob("runs/*/last.*"))
