"""The length and the global batch of a run next to those of its recipe."""

import pytest

from llava_ext.training.config import StageConfig
from llava_ext.training.run_length import describe_recipe
from llava_ext.training.settings import stage_values


@pytest.mark.parametrize(
    ("recipe", "flags", "processes", "expected"),
    [
        ("paper_finetune", {}, 8, "recipe paper_finetune: 1 epoch, 128 samples per step over all processes"),
        ("paper_finetune", {}, 2, "over all processes; --gradient_accumulation_steps 8 gives that batch here"),
        ("paper_finetune", {"per_device_train_batch_size": "3"}, 1, "its best learning rate may differ"),
        ("finetune_flat", {"max_steps": "3"}, 1, "steps, "),
    ],
)
def test_the_recipe_is_described_next_to_the_run(monkeypatch, recipe, flags, processes, expected):
    monkeypatch.setattr(StageConfig, "world_size", property(lambda self: processes))
    described = describe_recipe(recipe, StageConfig(**stage_values(recipe, flags)))
    assert expected in described and "3 steps" not in described
