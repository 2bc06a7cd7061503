"""One multimodal LLM that reads images (semantic features in) and draws them (residual codes out).

B batch, T flat tokens, S steps after folding, P written positions, N positions an image, L levels, D LLM width. With
the flat head nothing is folded: S is T, and a written position takes L steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead, EvoTokModel
from evotok_plugin.common.files import apply_umask_to_weights
from evotok_plugin.losses.cross_entropy import chunked_cross_entropy
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.embedding_merge import FoldedSequence, fold_residual_tokens, merge_features
from llava_ext.flat_head import FlatHead, FreeFlatHead, TiedFlatHead
from llava_ext.generation import ImageGenerationMixin, InterleavedGenerationMixin
from llava_ext.losses import count_learned
from llava_ext.packed_attention import tell_samples_apart
from llava_ext.projector import Projector


@dataclass
class EvoTokLlavaOutput(ModelOutput):
    """Result of a forward pass.

    Attributes:
        loss: sum of both losses, present with `labels`.
        logits: (B, S', vocabulary) over text tokens; None with `labels`, where only learned steps are classified.
        text_loss, image_loss: mean cross-entropy over learned text tokens, and over learned positions and levels.
        num_text_tokens, num_image_positions: how many were learned; a loss over none is 0.
        past_key_values: the backbone's cache.
        last_hidden_state: (B, S, D); of packed samples under flash-attention (1, all steps, D).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    num_text_tokens: Tensor | None = None
    num_image_positions: Tensor | None = None
    past_key_values: object | None = None
    last_hidden_state: Tensor | None = None


class EvoTokLlavaForConditionalGeneration(
    PreTrainedModel, ImageGenerationMixin, InterleavedGenerationMixin, GenerationMixin
):
    """A causal LM with an EvoTok tokenizer before it, and a depth transformer or the flat head behind it."""

    config_class = EvoTokLlavaConfig
    config: EvoTokLlavaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["vision_tower"]  # rounded codebooks would choose other codes
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EvoTokLlavaConfig) -> None:
        super().__init__(config)
        width, vision = config.text_config.hidden_size, config.vision_config
        self.vision_tower = EvoTokModel(vision)
        self.language_model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.read_projector = Projector(vision.semantic_dim, width, vision.num_positions)
        if config.image_head == "flat":
            self.image_head = _flat_head(config)
        else:
            self.write_projector = Projector(vision.codebook_dim, width, vision.num_positions)
            self.image_head = _depth_head(config)
        self.vocabulary = config.residual_vocabulary
        self.vision_tower.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthTransformerHead):
            nn.init.normal_(module.level_embedding, std=self.config.initializer_range)
        elif isinstance(module, Projector):
            nn.init.normal_(module.position_embedding, std=self.config.initializer_range)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the weights get the mode that the umask asks for."""
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_umask_to_weights(save_directory)

    def train(self, mode: bool = True) -> "EvoTokLlavaForConditionalGeneration":
        """The tokenizer stays in evaluation mode: its codebooks never move here."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    # From images to embeddings -------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor | None = None, image_codes: Tensor | None = None) -> Tensor:
        """What the LLM reads of images, (I, N, D), from pixels (I, 3, H, W) or from cached codes (I, N, L).

        Raises:
            ValueError: images of another size than the configuration's. The tokenizer could encode them, but an image
                stands in the sequence as a fixed number of tokens.
        """
        self._check_size(pixel_values, image_codes)
        with torch.no_grad():
            if image_codes is None:
                image_codes = self.vision_tower.encode(pixel_values.to(self.vision_tower.dtype)).codes
            features = self.vision_tower.decode_semantics(image_codes)
        positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        return self.read_projector(features.to(self.read_projector.linear_1.weight.dtype), positions)

    def _check_size(self, pixel_values: Tensor | None, image_codes: Tensor | None) -> None:
        vision = self.config.vision_config
        if image_codes is None:
            size = vision.image_size
            if pixel_values.shape[-2:] != (size, size):
                raise ValueError(
                    f"expected images of {size} x {size} pixels, {vision.num_positions} tokens each, got pixel_values "
                    f"{tuple(pixel_values.shape)}; the model's processor prepares images for it"
                )
        elif image_codes.shape[1] != vision.num_positions:
            raise ValueError(
                f"expected image_codes (I, {vision.num_positions}, L), got {tuple(image_codes.shape)}; "
                f"encode images at {vision.image_size} x {vision.image_size} pixels"
            )

    def embed_written(self, codes: Tensor, positions: Tensor) -> Tensor:
        """LLM inputs of written positions from their codes (P, L) and places in the image: (P, D) from places (P,).

        With the flat head (P x L, D), one a residual token; it looks at no places.
        """
        if self.config.image_head == "flat":
            return self.image_head.embed(codes, self.vision_tower.quantizer.codebooks).flatten(0, 1)
        latents = self.vision_tower.codes_to_latents(codes[None])[0]
        return self.write_projector(latents.to(self.write_projector.linear_1.weight.dtype), positions)

    def _embed(self, folded: FoldedSequence, pixel_values: Tensor | None, image_codes: Tensor | None) -> Tensor:
        embeddings = self.get_input_embeddings()(folded.input_ids.masked_fill(folded.written, 0))
        vision = self.config.vision_config
        # While training, what a batch does not use still runs, times zero and in its usual place: every rank then
        # gathers the same weights and reduces the same gradients in the same order, whatever its batch holds.
        nothing = folded.codes.new_zeros(1, vision.num_positions, vision.num_quantizers)
        if pixel_values is not None or image_codes is not None:
            features = self.get_image_features(pixel_values, image_codes)
            where = folded.input_ids == self.config.image_token_id
            embeddings = merge_features(embeddings, where, features.flatten(0, 1), "image")
        elif self.training:
            embeddings = embeddings + 0.0 * self.get_image_features(image_codes=nothing).sum()
        if folded.codes.shape[0]:
            written = self.embed_written(folded.codes, folded.written_places(self.config.steps_per_drawn_image))
            embeddings = merge_features(embeddings, folded.written, written, "drawn image")
        elif self.training:
            place = folded.codes.new_zeros(1)
            embeddings = embeddings + 0.0 * self.embed_written(nothing[0, :1, : vision.pixel_depth], place).sum()
        return embeddings

    # Forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> EvoTokLlavaOutput:
        """One pass over a batch that may mix reading, drawing and text, one sample a row or several.

        Args:
            input_ids: (B, T) flat sequence: text, delimiters, image placeholders and residual tokens.
            attention_mask: (B, T); padding on the right or on the left.
            labels: (B, T), -100 where nothing is learned.
            pixel_values: images that are read, (I, 3, H, W) in [-1, 1], in the order of their placeholders.
            image_codes: the same images as cached codes (I, N, L), instead of `pixel_values`.
            segment_ids: (B, T), for rows of several samples: which of them a token belongs to, numbered from 1, 0 on
                padding; in place of `attention_mask` and `position_ids`. No sample sees another.

        Raises:
            ValueError: placeholders and images do not match, or an image's residual tokens are not whole.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if pixel_values is not None and image_codes is not None:
            raise ValueError("give images either as pixel_values or as image_codes, and not both")
        if labels is not None and input_ids is None:
            raise ValueError("labels need input_ids: what is learned at a step depends on its token")
        others = (attention_mask, position_ids, past_key_values, inputs_embeds)
        if segment_ids is not None and any(value is not None for value in others):
            raise ValueError(
                "segment_ids say what belongs together; give them with input_ids, and without attention_mask, "
                "position_ids or past_key_values"
            )
        folded, steps = None, {"attention_mask": attention_mask, "position_ids": position_ids}
        if labels is not None or segment_ids is not None:
            use_cache = False  # with a cache, transformers does not look for packed samples
        if inputs_embeds is None:
            fold = self.config.image_head == "depth"
            folded = fold_residual_tokens(self.vocabulary, input_ids, attention_mask, labels, segment_ids, fold)
            if segment_ids is not None:
                folded, steps = tell_samples_apart(self.language_model, folded)
            elif attention_mask is not None:
                steps["attention_mask"] = folded.attention_mask
            inputs_embeds = self._embed(folded, pixel_values, image_codes)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=use_cache, **steps
        )
        hidden = outputs.last_hidden_state  # (B, S, D)
        result = EvoTokLlavaOutput(last_hidden_state=hidden, past_key_values=outputs.past_key_values)
        if labels is None:
            result.logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            return result
        counts = count_learned(folded.labels, self.vocabulary, folded.segment_ids)
        result.num_text_tokens, result.num_image_positions = counts.text_tokens, counts.image_positions
        result.text_loss = self._text_loss(hidden, folded)
        result.image_loss = self._image_loss(hidden, folded)
        result.loss = result.text_loss + result.image_loss
        return result

    def _text_loss(self, hidden: Tensor, folded: FoldedSequence) -> Tensor:
        learned = (folded.labels != -100) & ~folded.written
        targets, states = folded.labels[learned], hidden[:, :-1][learned[:, 1:]]  # the step before predicts
        total = chunked_cross_entropy(self.lm_head, states, targets, self.config.text_config.vocab_size)
        return total / max(1, targets.shape[0])

    def _image_loss(self, hidden: Tensor, folded: FoldedSequence) -> Tensor:
        learned = (folded.labels != -100) & folded.written
        states = hidden[:, :-1][learned[:, 1:]]
        if self.config.image_head == "flat":
            tokens, codebooks = folded.labels[learned], self.vision_tower.quantizer.codebooks
            levels = self.vocabulary.levels(tokens)
            return self.image_head.loss(states, self.vocabulary.codes(tokens), levels, codebooks)
        codes = folded.codes[learned[folded.written]]
        if not codes.shape[0]:
            zero = hidden.new_zeros((), dtype=torch.float32)
            if not self.training:
                return zero
            nothing = folded.codes.new_zeros(1, self.config.vision_config.pixel_depth)
            return zero + 0.0 * self._head_loss(hidden[:1, 0], nothing)
        return self._head_loss(states, codes)

    def _head_loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        latents = self.vision_tower.level_latents(codes[None])[0]  # (P, L, C)
        return self.image_head.loss(hidden, latents.to(hidden.dtype), codes)

    # Generation ----------------------------------------------------------------------------------------------

    def embed_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the language model reads of a batch (B, T), with images as `forward` takes them: embeddings (B, S, D)
        and their mask (B, S), padded on the left."""
        fold = self.config.image_head == "depth"
        folded = fold_residual_tokens(self.vocabulary, input_ids, attention_mask, None, None, fold, pad_left=True)
        return self._embed(folded, pixel_values, image_codes), folded.attention_mask

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, image_codes=None, is_first_iteration=False, **kwargs
    ):
        if is_first_iteration and bool(self.vocabulary.is_residual(input_ids).any()):
            raise ValueError(
                'a drawn image stands in the prompt: generate(modalities="auto", processor=processor) goes on from it'
            )
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            inputs.update(pixel_values=pixel_values, image_codes=image_codes)
        return inputs


def _depth_head(config: EvoTokLlavaConfig) -> DepthTransformerHead:
    vision = config.vision_config
    return DepthTransformerHead(
        DepthTransformerConfig(
            llm_hidden_size=config.text_config.hidden_size,
            codebook_dim=vision.codebook_dim,
            codebook_size=vision.codebook_size,
            num_levels=vision.pixel_depth,
            hidden_size=config.head_hidden_size,
            num_layers=config.head_num_layers,
            num_heads=config.head_num_heads,
        )
    )


def _flat_head(config: EvoTokLlavaConfig) -> FlatHead:
    vision, width = config.vision_config, config.text_config.hidden_size
    if config.residual_embeddings == "free":
        return FreeFlatHead(vision.pixel_depth, vision.codebook_size, width)
    return TiedFlatHead(vision.pixel_depth, vision.codebook_size, vision.codebook_dim, width)
