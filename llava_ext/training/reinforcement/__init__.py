"""Reinforcement of the image head: the model draws, rewards score its drawings, and better ones become more likely.

Group-relative policy optimization (Shao et al. 2024, arXiv 2402.03300) on the codes of drawn images.
"""
