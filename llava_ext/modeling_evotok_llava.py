"""The multimodal LLM: it reads images as semantic features and draws them as residual codes.

B batch, T flat tokens, S steps after folding, P written positions, D LLM width.
"""

from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Cache,
    GenerationMixin,
)
from transformers.utils import GENERATION_CONFIG_NAME, can_return_tuple

from evotok_plugin import DepthTransformerHead
from evotok_plugin.losses.cross_entropy import chunked_cross_entropy
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead
from llava_ext.folding import FoldedSequence, count_learned
from llava_ext.generation.images import ImageGenerationMixin
from llava_ext.generation.interleaved import InterleavedGenerationMixin
from llava_ext.generation.many_answers import ManyAnswersMixin
from llava_ext.generation.saved_settings import restore_settings, settings_to_save
from llava_ext.generation.text import TextGenerationMixin
from llava_ext.model_outputs import EvoTokLlavaOutput
from llava_ext.modeling_base import EvoTokLlavaModel

__all__ = ["EvoTokLlavaForConditionalGeneration", "EvoTokLlavaModel", "EvoTokLlavaOutput"]


class EvoTokLlavaForConditionalGeneration(
    EvoTokLlavaModel,
    ImageGenerationMixin,
    InterleavedGenerationMixin,
    ManyAnswersMixin,
    TextGenerationMixin,
    GenerationMixin,
):
    """A causal LM that reads images through an EvoTok tokenizer and draws them through an image head."""

    output_modalities = ("text", "image")  # type: ignore[assignment]  # annotated as a tuple of one
    accepts_loss_kwargs = False  # Trainer divides by labels that are not learned here, and counts a position L times
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}

    lm_head: nn.Linear

    def _add_output_layer(self) -> None:
        text = self.config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and check the model's drawing and selection settings.

        Raises:
            UserError: invalid settings in generation_config.json.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        file = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder", ""), GENERATION_CONFIG_NAME)
        restore_settings(model, file)
        return loaded

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; generation_config.json always contains the drawing settings, and the file
        permissions of the weights follow the umask. The model's own settings are not changed.

        Raises:
            UserError: transformers refuses to save the generation settings.
        """
        with settings_to_save(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = cast(nn.Linear, value)

    # Forward -------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> EvoTokLlavaOutput:
        """Run a batch that may mix reading, drawing and text, with one or several samples per row.

        Args:
            input_ids: (B, T) flat sequence: text, delimiters, image placeholders and residual tokens.
            attention_mask: (B, T); padding on the right or on the left. Masks of other shapes, as transformers makes
                them for a static cache, are passed to the backbone unchanged.
            labels: (B, T), -100 where nothing is learned. Image placeholders and padding are never learned, whatever
                their labels are, so `labels=input_ids` is valid for texts with images.
            pixel_values: images that are read, (I, 3, H, W) in [-1, 1], in the order of their placeholders.
            image_codes: the same images as cached codes (I, N, L), instead of `pixel_values`.
            inputs_embeds: (B, S, D) instead of `input_ids`; images replace the embeddings of their placeholders. Labels
                (B, S) of residual tokens are only possible with the flat head.
            segment_ids: (B, T), for rows of several samples: the sample of each token, numbered from 1, 0 on padding;
                replaces `attention_mask` and `position_ids`. Samples do not attend to each other.
            logits_to_keep: compute logits for this many last steps (0: all), or for the steps with these indices.
            skip_logits: do not return logits. The losses classify only learned steps, a chunk at a time, so training
                then needs less memory.
            num_items_in_batch: number of learned tokens in the whole step of the optimizer. The loss is then the sum
                over the learned tokens of this batch divided by it, instead of the sum of the mean losses.
            return_dict: False returns a tuple.
            kwargs: further keywords of the backbone (`output_hidden_states`, `output_attentions`, ...).

        Raises:
            UserError: placeholders and images do not match, or the residual tokens of an image are incomplete.
            ValueError: a keyword that the backbone does not accept, or arguments that exclude or need each other.
        """
        run = self.run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_codes=image_codes,
            segment_ids=segment_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            labels=None if labels is None else self._learnable(labels, attention_mask),
            **kwargs,
        )
        hidden = run.outputs.last_hidden_state
        assert hidden is not None
        logits = None if skip_logits else self.text_logits(hidden, logits_to_keep)
        if labels is None:
            return EvoTokLlavaOutput(logits=logits, **run.outputs)
        return EvoTokLlavaOutput(logits=logits, **self._losses(hidden, run.folded, num_items_in_batch), **run.outputs)

    def text_logits(self, hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """The logits of text (B, t, V) after the hidden states (B, T, D); `logits_to_keep` as in `forward`."""
        kept = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(kept)
        return logits if self.new_token_rows is None else self.new_token_rows.replaced_rows().put_into(logits, kept)

    def _losses(
        self, hidden: Tensor, folded: FoldedSequence, num_items_in_batch: Tensor | int | None
    ) -> dict[str, Any]:
        assert folded.labels is not None
        counts = count_learned(folded.labels, self.vocabulary, folded.segment_ids)
        text_loss, image_loss = self._text_loss(hidden, folded), self._image_loss(hidden, folded)
        loss = text_loss + image_loss
        if num_items_in_batch is not None:
            num_residual = counts.image_positions * self.vocabulary.num_levels
            loss = (text_loss * counts.text_tokens + image_loss * num_residual) / num_items_in_batch
        return {
            "loss": loss,
            "text_loss": text_loss,
            "image_loss": image_loss,
            "num_text_tokens": counts.text_tokens,
            "num_image_positions": counts.image_positions,
        }

    def _learnable(self, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Labels (B, T) without those of image placeholders and of padding, of which nothing can be learned."""
        labels = labels.masked_fill(labels == self.config.image_token_id, -100)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            labels = labels.masked_fill(attention_mask[:, -labels.shape[1] :] == 0, -100)
        return labels

    def _text_loss(self, hidden: Tensor, folded: FoldedSequence) -> Tensor:
        assert folded.labels is not None
        learned = (folded.labels != -100) & ~folded.written
        targets, states = folded.labels[learned], hidden[:, :-1][learned[:, 1:]]  # the step before predicts
        replaced = None if self.new_token_rows is None else self.new_token_rows.replaced_rows()
        classes = self.config.text_config.vocab_size
        total = chunked_cross_entropy(self.lm_head, states, targets, classes, replaced=replaced)
        return total / max(1, targets.shape[0])

    def _image_loss(self, hidden: Tensor, folded: FoldedSequence) -> Tensor:
        assert folded.labels is not None
        learned = (folded.labels != -100) & folded.written
        states = hidden[:, :-1][learned[:, 1:]]
        if self.config.image_head == "flat":
            tokens, codebooks = folded.labels[learned], self.vision_tower.quantizer.codebooks
            levels, head = self.vocabulary.levels(tokens), cast(FlatHead, self.image_head)
            return head.loss(states, self.vocabulary.codes(tokens), levels, codebooks)
        codes = folded.codes[learned[folded.written]]
        if not codes.shape[0]:
            zero = hidden.new_zeros((), dtype=torch.float32)
            if not self.training:
                return zero
            nothing = folded.codes.new_zeros(1, self.config.vision_config.pixel_depth)
            return zero + 0.0 * self._depth_loss(hidden[:1, 0], nothing)
        return self._depth_loss(states, codes)

    def _depth_loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        latents = self.vision_tower.level_latents(codes[None])[0]  # (P, L, C)
        return cast(DepthTransformerHead, self.image_head).loss(hidden, latents.to(hidden.dtype), codes)


for _auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    _auto_class.register(EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration, exist_ok=True)
