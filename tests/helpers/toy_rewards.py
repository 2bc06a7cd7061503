"""Rewards for reinforcement runs in tests, by dotted path: "toy_rewards:brightness"."""

import numpy as np

from evotok_plugin.errors import UserError


def brightness(prompts, images):
    """Mean of all pixels in [0, 1]."""
    return [float(np.asarray(image, dtype=float).mean() / 255) for image in images]


def equal(prompts, images):
    return [1.0] * len(images)


def not_a_number(prompts, images):
    return [float("nan")] * len(images)


class FailsInTheThirdStep:
    """Raises an error of its own in the third call."""

    calls = 0

    def __call__(self, prompts, images):
        self.calls += 1
        if self.calls == 3:
            raise ZeroDivisionError("the judge broke")
        return brightness(prompts, images)


def unsure(prompts, images):
    raise UserError(f"prompt {prompts[0]!r} cannot be judged")


def first_prompt(prompts, images):
    """Brightness for drawings of prompts with "red", 0 for others."""
    return [
        light if "red" in prompt else 0.0 for prompt, light in zip(prompts, brightness(prompts, images), strict=True)
    ]
