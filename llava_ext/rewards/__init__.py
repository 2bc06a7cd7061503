"""Rewards: functions that score drawn images for their prompts, found by name and combined with weights."""

from llava_ext.rewards.loading import load_rewards
from llava_ext.rewards.protocol import Reward
from llava_ext.rewards.weighted import WeightedRewards

__all__ = ["Reward", "WeightedRewards", "load_rewards"]
