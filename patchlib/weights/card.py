"""The README.md that goes with a model on the Hub."""

from typing import Any

from ..models.base import Model


def model_card(model: Model, repo_id: str) -> str:
    """A model card in Markdown: front matter for the Hub, facts from `model.info`, and how to load it.

    Of `model.info` it uses ``license``, ``terms``, ``source``, ``data``, ``command``, ``score``, ``date`` and
    ``notes``; what is not there is left out.
    """
    info = model.info
    parameters = sum(p.numel() for p in model.parameters())
    tags = ["patchlib", "image-classification" if hasattr(model, "patch_embed") else "text-generation"]
    front = ["---", "library_name: patchlib", f"pipeline_tag: {tags[1]}", "tags:", *(f"- {tag}" for tag in tags)]
    if "license" in info:
        front.append(f"license: {_cell(info['license'])}")
    facts = [f"| Model | {type(model).__name__} |", f"| Parameters | {parameters:,} |"]
    for key in ("data", "command", "score", "date", "source", "license", "terms", "notes"):
        if key in info:
            facts.append(f"| {key.capitalize()} | {_cell(info[key])} |")
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {repo_id.split('/')[-1]}",
            "",
            "| | |",
            "|---|---|",
            *facts,
            "",
            "```python",
            "import patchlib",
            "",
            f'model = patchlib.create_model("hf-hub:{repo_id}")',
            "```",
            "",
        ]
    )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
