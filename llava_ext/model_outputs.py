"""Outputs of the model classes, in transformers' order: tuples start like those of its own models.

B batch, S steps after folding, S' steps of the requested logits, I images, N positions per image, D LLM width.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class EvoTokLlavaModelOutput(ModelOutput):
    """Output of the model without output layer.

    Attributes:
        last_hidden_state: (B, S, D); for packed samples with flash-attention (1, all steps, D).
        past_key_values: the backbone's cache.
        hidden_states, attentions: of the backbone's layers, if requested.
        image_hidden_states: LLM inputs (I, N, D) of the images that are read.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class EvoTokLlavaOutput(ModelOutput):
    """Output of a forward pass.

    Attributes:
        loss: sum of both losses, present with `labels`.
        logits: (B, S', vocabulary) over text tokens; None with `skip_logits`.
        past_key_values, hidden_states, attentions, image_hidden_states, last_hidden_state: as in
            `EvoTokLlavaModelOutput`.
        text_loss, image_loss: mean cross-entropy over learned text tokens, and over learned positions and levels; 0
            if there are none.
        num_text_tokens, num_image_positions: numbers of learned text tokens and positions.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    last_hidden_state: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    num_text_tokens: Tensor | None = None
    num_image_positions: Tensor | None = None
