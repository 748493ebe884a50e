"""Writes the class names in patchlib/data from the WordNet lemmas, glosses and class lists that timm installs.

    python tests/goldens/make_labels.py

Each line is a synset, the datasets that have it, and its name, in the order of the checkpoints' outputs. Where
torchvision is installed, its names of the 1,000 classes, made elsewhere, are compared. It prints the checksums that the
tests hold.
"""

import gzip
import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

import timm.data

SOURCE = Path(timm.data.__file__).parent / "_info"
TARGET = Path(__file__).parents[2] / "patchlib" / "data"

LISTS = {
    "imagenet-1k": "imagenet_synsets.txt",
    "imagenet-12k": "imagenet12k_synsets.txt",
    "imagenet-21k": "imagenet21k_goog_synsets.txt",
    "imagenet-22k": "imagenet22k_synsets.txt",
}
# the only two of the 1,000 that share all their lemmas; their glosses are long
SHORT = {"n02012849": "crane (bird)", "n03126707": "crane (machine)"}


def read_pairs(name: str) -> dict[str, str]:
    return dict(line.split("\t") for line in (SOURCE / name).read_text().splitlines())


def shorten(gloss: str) -> str:
    """The first clause, without what stands in parentheses."""
    return re.sub(r"\s*\([^)]*\)\s*", " ", gloss).split(";")[0].strip()


def name_classes(synsets: list[str], lemmas: dict[str, str], glosses: dict[str, str]) -> dict[str, str]:
    """Names each synset with as few of its lemmas as tell it apart, or with its gloss where they cannot."""
    words = {synset: tuple(lemmas[synset].split(", ")) for synset in synsets}
    beginnings = Counter(words[synset][:n] for synset in synsets for n in range(1, len(words[synset]) + 1))
    names = {}
    for synset, own in words.items():
        n = next((n for n in range(1, len(own)) if beginnings[own[:n]] == 1), len(own))
        names[synset] = ", ".join(own[:n])
    alike = defaultdict(list)
    for synset, name in names.items():
        alike[name].append(synset)
    for name, group in ((name, group) for name, group in alike.items() if len(group) > 1):
        briefs = {synset: shorten(glosses[synset]) for synset in group}
        taken = Counter(briefs.values())
        for synset, brief in briefs.items():
            gloss = brief if brief and taken[brief] == 1 else glosses[synset]
            names[synset] = SHORT.get(synset, f"{name} ({gloss})")
    return names


def write(name: str, synsets: list[str], members: dict[str, set[str]]) -> None:
    lemmas, glosses = read_pairs("imagenet_synset_to_lemma.txt"), read_pairs("imagenet_synset_to_definition.txt")
    names = name_classes(synsets, lemmas, glosses)
    assert len(set(names.values())) == len(names)
    rows = [
        f"{synset}\t{' '.join(dataset for dataset in members if synset in members[dataset])}\t{names[synset]}\n"
        for synset in synsets
    ]
    target = TARGET / f"{name}.tsv.gz"
    target.write_bytes(gzip.compress("".join(rows).encode(), 9, mtime=0))
    print(f"{target}: {len(rows)} classes, {target.stat().st_size} bytes")


def compare_with_torchvision(synsets: list[str]) -> None:
    try:
        from torchvision.models import _meta
    except ImportError:
        print("torchvision is not installed: not compared")
        return
    lemmas = read_pairs("imagenet_synset_to_lemma.txt")
    differ = [
        (i, other, lemmas[synset])
        for i, (synset, other) in enumerate(zip(synsets, _meta._IMAGENET_CATEGORIES, strict=True))
        if other.lower() not in lemmas[synset].lower().split(", ")
    ]
    print(f"torchvision's name is one of the lemmas for all classes but {len(differ)}: {differ}")


if __name__ == "__main__":
    lists = {dataset: (SOURCE / file).read_text().split() for dataset, file in LISTS.items()}
    write("imagenet-1k", lists["imagenet-1k"], {"imagenet-1k": set(lists["imagenet-1k"])})
    larger = {dataset: set(synsets) for dataset, synsets in lists.items() if dataset != "imagenet-1k"}
    for synsets in lists.values():
        assert synsets == sorted(synsets)
    for synsets in larger.values():
        assert synsets <= larger["imagenet-21k"]
    write("imagenet-21k", lists["imagenet-21k"], larger)
    for dataset, synsets in lists.items():
        print(dataset, len(synsets), hashlib.sha256("\n".join(synsets).encode()).hexdigest())
    compare_with_torchvision(lists["imagenet-1k"])
