"""The benchmarks run, go on where they stopped, and compute what they say. No time is asserted."""

import json
import sys

import pytest

from benchmarks import growth, results, speed
from benchmarks.__main__ import main
from benchmarks.runner import BenchmarkError, Piece, Row, call

TINY = {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 8}


def tiny(what):
    piece = Piece("ConvMixer", TINY, what, "fp32", batch=2, side=16)
    return speed.Work(piece, ("patchlib", "plain", "timm"), {"plain": 1e-9, "timm": 1})


def test_a_run_writes_each_row_and_a_second_run_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "WORK", [tiny("training")])
    command = ["--only", "speed", "--rounds", "1", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "speed.png"}
    (first,) = json.loads((tmp_path / "results.json").read_text())["parts"]["speed"]
    assert first["values"].keys() == {"patchlib", "plain"}, "timm has no environment here"
    assert first["ratios"] == {"plain": first["values"]["plain"] / first["values"]["patchlib"]}
    assert first["reached"] == {"plain": True}
    assert first["gflops"] > 0

    monkeypatch.setattr(speed, "WORK", [tiny("training"), tiny("inference")._replace(contenders=("patchlib",))])
    capsys.readouterr()
    assert main(command) == 0
    assert "training" not in capsys.readouterr().out.split("Measured")[0]
    kept, second = json.loads((tmp_path / "results.json").read_text())["parts"]["speed"]
    assert kept == first
    assert "inference" in second["name"]
    with pytest.raises(SystemExit, match="another --out"):
        main([*command, "--threads", "2"])
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "speeed", "--out", str(tmp_path)])
    assert "no row's name has 'speeed' in it" in capsys.readouterr().err


def test_a_process_that_fails_says_why():
    assert call(sys.executable, "-c", "print('note')\nprint('[1, 2]')") == [1, 2]
    with pytest.raises(BenchmarkError, match="ValueError: no weights"):
        call(sys.executable, "-c", "raise ValueError('no weights')")


def test_the_exponent_of_a_power_law():
    sizes = [64, 128, 256, 512]
    assert growth.exponent(sizes, [3e-6 * x**1.7 for x in sizes]) == pytest.approx(1.7)
    assert growth.exponent(sizes, [1e9, *(x**2 for x in sizes[1:])]) == pytest.approx(2), "of the last three"


def test_ratios_and_targets_in_the_table():
    faster = Row("a", "s", {"patchlib": 0.5, "timm": 1.5, "other": 1.0}, {"timm": 3.1}, gflops=99.6)
    smaller = Row("b", "MB", {"patchlib": 300.0, "timm": 1000.0}, {"timm": 0.6}, share=True)
    assert results.ratio_table([faster, smaller])[2:] == [
        "| a | 500 ms | timm | 1.5 s | 3.00 | at least 3.1 | no | 100 |",
        "| a | 500 ms | other | 1 s | 2.00 |  |  | 100 |",
        "| b | 300 MB | timm | 1,000 MB | 0.30 | at most 0.6 | yes |  |",
    ]


def test_growth_is_written_with_its_exponents(tmp_path):
    sizes = [1.0, 2.0, 4.0]
    curves = {"patchlib": {"x": sizes, "s": sizes, "MB": [x * x for x in sizes]}}
    folder = results.Results(tmp_path, {"threads": 1})
    folder.add("growth", Row("ViT, batch", "s", {"patchlib": 4.0}, curves=curves))
    assert (
        "| ViT, batch | patchlib | 1, 2, 4 | 1 s, 2 s, 4 s | 1.00 | 1 MB, 4 MB, 16 MB | 2.00 |"
        in (tmp_path / "report.md").read_text()
    )
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    again = results.Results(tmp_path, {"threads": 1})
    assert again.has("growth", "ViT, batch")
    assert again.rows == folder.rows
