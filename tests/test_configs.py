"""The recipes in configs/: valid, and their class lists are what TFDS calls them, without overlap."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from metatrain.config import load_config
from metatrain.evaluation.baselines import chosen_baselines

CONFIGS = Path(__file__).parents[1] / "configs"
_LABELS = {"imagenet_resized/64x64": "imagenet_resized_labels.txt", "places365_small": "categories_places365.txt"}


def _sets(options: dict[str, Any]) -> list[dict[str, Any]]:
    init = options.get("init", "random")
    return [options["target"], *([init["source"]] if isinstance(init, dict) else [])]


_RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "cluster")


@pytest.mark.parametrize("recipe", _RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_is_valid_and_says_its_command(recipe: Path) -> None:
    config = load_config(recipe)
    header = recipe.read_text().partition("\nname:")[0]
    assert re.search(rf"metatrain (run|evaluate \S+) configs/{recipe.relative_to(CONFIGS)}", header)
    how = config.evaluation
    choice: tuple[Any, ...] = ()
    if str(config.task.name).startswith("examples."):  # in PyTorch
        torch = pytest.importorskip("metatrain.evaluation.torch_baselines", reason="PyTorch is not installed")
        choice = (torch.find_torch_baseline, torch.ALL_TORCH)
    chosen_baselines(how.baselines, how.schedules, *choice)  # names and options
    if recipe.parent.name == "claims":
        assert re.search(r"\d+ (seconds|minutes|hours)", header), "the header has no cost"


@pytest.mark.parametrize(
    "name", ["resnet8-imagenet25", "resnet8-places25", "resnet18-imagenet25", "baselines/iomt-peft"]
)
def test_class_lists_exist_and_no_set_shares_a_class_with_another(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    _, task = config.task.form()
    settings = config.evaluation.settings.values()
    images = [s for options in (task, *settings) if "target" in options for s in _sets(options)]
    lists: dict[str, set[tuple[str, ...]]] = {}
    for image_set in images:
        lists.setdefault(image_set["tfds"], set()).add(tuple(image_set["classes"]))
    for builder, sets in lists.items():
        labels = (Path(tfds.__file__).parent / "image_classification" / _LABELS[builder]).read_text().split()
        classes = [label for classes in sets for label in classes]
        assert set(classes) <= set(labels)
        assert len(classes) == len(set(classes)), "two sets share a class"
    assert len(task["target"]["classes"]) == 25
    for options in settings:
        if "target" in options:
            assert len(options["target"]["classes"]) == 25
