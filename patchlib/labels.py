"""The words for ImageNet's classes, in the order of the checkpoints' outputs."""

import gzip
from functools import cache
from importlib.resources import files

from .errors import UnknownNameError, nearest

_COUNTS = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k"}


def class_names(dataset: str) -> tuple[str, ...]:
    """Returns one name for each class, in the order of a classifier's outputs.

    Args:
        dataset: `"imagenet-1k"` (1,000 classes), `"imagenet-21k"` (21,843: Google's list, of `in21k` weights),
            `"imagenet-22k"` (21,841: the release of fall 2011, of `in22k` weights) or `"imagenet-12k"` (11,821: a part
            of it, of `in12k` weights).

    A name is a class's first WordNet lemma; where other classes of the dataset begin with the same, as many lemmas as
    tell it from them, and where all are the same, its gloss in parentheses. Names are unique within a dataset, but a
    class may have a longer one in a larger dataset.

    Raises:
        UnknownNameError: there is no such dataset.

    Example:
        >>> class_names("imagenet-1k")[281]
        'tabby'
    """
    return tuple(name for _, name in _classes(dataset))


def synsets(dataset: str) -> tuple[str, ...]:
    """Returns the WordNet 3.0 id of each class (`"n02123045"`), in the order of `class_names`.

    Raises:
        UnknownNameError: there is no such dataset.
    """
    return tuple(synset for synset, _ in _classes(dataset))


def labels_for(num_classes: int) -> tuple[str, ...] | None:
    """Returns the class names of the ImageNet dataset that has as many classes, or None where none has.

    It is a guess, for weights that do not say what they were trained on.
    """
    dataset = _COUNTS.get(num_classes)
    return None if dataset is None else class_names(dataset)


@cache
def _classes(dataset: str) -> tuple[tuple[str, str], ...]:
    """The (synset, name) pairs of a dataset. Every dataset is in the order of its synsets."""
    if dataset not in _COUNTS.values():
        raise UnknownNameError(f"no class names for {dataset!r}{nearest(dataset, _COUNTS.values())}")
    file = "imagenet-1k.tsv.gz" if dataset == "imagenet-1k" else "imagenet-21k.tsv.gz"
    text = gzip.decompress((files(__package__) / "data" / file).read_bytes()).decode()
    rows = (line.split("\t") for line in text.splitlines())
    return tuple((synset, name) for synset, members, name in rows if dataset in members.split())
