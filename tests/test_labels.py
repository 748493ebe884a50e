"""The class names: their order is held by checksums of timm's lists, their words by names known from elsewhere."""

import hashlib

import pytest

from patchlib.errors import UnknownNameError
from patchlib.labels import class_names, labels_for, synsets

# of the synsets, one a line, as timm 1.0.31 lists them: printed by goldens/make_labels.py
CHECKSUMS = {
    "imagenet-1k": (1000, "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"),
    "imagenet-12k": (11821, "009d4c9f19667ccf35878fb10718a90ccc9afe27004b4d42880d5feab073a3b1"),
    "imagenet-21k": (21843, "c03345e3490e010defaeac86b00012db28ecb79af13daba0b72525fa37c66e94"),
    "imagenet-22k": (21841, "6320b72b72e43c09a768f0253d28c3b55707760bbf3b9d308887800b0d86658d"),
}


@pytest.mark.parametrize("dataset", CHECKSUMS)
def test_the_order_is_that_of_the_checkpoints(dataset: str) -> None:
    count, checksum = CHECKSUMS[dataset]
    assert hashlib.sha256("\n".join(synsets(dataset)).encode()).hexdigest() == checksum
    assert len(synsets(dataset)) == len(class_names(dataset)) == count


@pytest.mark.parametrize("dataset", CHECKSUMS)
def test_names_are_words_and_differ(dataset: str) -> None:
    names = class_names(dataset)
    assert len(set(names)) == len(names)
    assert all(name and name == name.strip() and name.isprintable() for name in names)
    assert all(name.count("(") == name.count(")") for name in names)


@pytest.mark.parametrize(
    ("index", "synset", "name"),
    [
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (134, "n02012849", "crane (bird)"),
        (151, "n02085620", "Chihuahua"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby"),
        (285, "n02124075", "Egyptian cat"),
        (388, "n02510455", "giant panda"),
        (517, "n03126707", "crane (machine)"),
        (638, "n03710637", "maillot"),
        (639, "n03710721", "maillot, tank suit"),
        (817, "n04285008", "sports car"),
        (954, "n07753592", "banana"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_known_classes_of_imagenet_1k(index: int, synset: str, name: str) -> None:
    assert (synsets("imagenet-1k")[index], class_names("imagenet-1k")[index]) == (synset, name)


def test_the_larger_lists_are_parts_of_the_largest() -> None:
    largest = dict(zip(synsets("imagenet-21k"), class_names("imagenet-21k"), strict=True))
    assert set(largest) - set(synsets("imagenet-22k")) == {"n09859684", "n03931044"}
    for dataset in ("imagenet-22k", "imagenet-12k"):
        assert class_names(dataset) == tuple(largest[synset] for synset in synsets(dataset))
    assert set(synsets("imagenet-1k")) - set(largest) == {"n04399382"}  # the teddy: Google's list has it elsewhere
    assert largest["n02012849"] == "crane (bird)"
    assert "cock, rooster" in largest.values()  # the cock of a gun is another


def test_labels_for_guesses_by_the_number_of_classes() -> None:
    assert labels_for(1000) == class_names("imagenet-1k")
    assert labels_for(21843) == class_names("imagenet-21k")
    assert labels_for(21841) == class_names("imagenet-22k")
    assert labels_for(10) is None


def test_an_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean.*imagenet-21k"):
        class_names("imagenet21k")
