"""What tests share: where data lies, and quiet, repeatable torch."""

import os
from pathlib import Path

import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the suite runs in several processes; threads of each would wait for the others'


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with photographs and texts; tests that want it are skipped where it is absent."""
    folder = Path(os.environ.get("PATCHLIB_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no data folder at {folder}; set PATCHLIB_SHARED to one")
    return folder / "data"
