"""The multimodal LLM: it reads images as semantic features and draws them as residual codes.

B batch, T flat tokens, S steps after folding, P written positions, I images, N positions per image, L levels, D LLM
width. A written position is a position of a drawn image. With the flat head nothing is folded: S is T, and a written
position takes L steps.
"""

import inspect
from dataclasses import dataclass, fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, Cache, GenerationMixin, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, TransformersKwargs, can_return_tuple

from evotok_plugin import DepthTransformerHead, EvoTokModel
from evotok_plugin.common.files import apply_umask_to_weights
from evotok_plugin.errors import UserError
from evotok_plugin.losses.cross_entropy import chunked_cross_entropy
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead
from llava_ext.folding import FoldedSequence, count_learned, fold_residual_tokens, merge_features
from llava_ext.generation import ImageGenerationMixin, InterleavedGenerationMixin, TextGenerationMixin
from llava_ext.generation.saved_settings import restore_settings, settings_to_save
from llava_ext.image_heads import build_image_head
from llava_ext.new_token_rows import NewTokenRows
from llava_ext.packed_attention import separate_samples
from llava_ext.projector import Projector
from llava_ext.vocabulary import ResidualVocabulary


@dataclass
class EvoTokLlavaOutput(ModelOutput):
    """Output of a forward pass.

    Attributes:
        loss: sum of both losses, present with `labels`.
        logits: (B, S', vocabulary) over text tokens; None with `labels`, where only learned steps are classified.
        text_loss, image_loss: mean cross-entropy over learned text tokens, and over learned positions and levels; 0
            if there are none.
        num_text_tokens, num_image_positions: numbers of learned text tokens and positions.
        past_key_values: the backbone's cache.
        last_hidden_state: (B, S, D); for packed samples with flash-attention (1, all steps, D).
        hidden_states, attentions: of the backbone's layers, if requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    num_text_tokens: Tensor | None = None
    num_image_positions: Tensor | None = None
    past_key_values: object | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple:
        """Return the fields that are set, in order: transformers accesses losses and logits by position."""
        return tuple(self[field.name] for field in fields(self) if self.get(field.name) is not None)


# Keywords of transformers' models without effect here: losses are always averaged over the batch itself.
_NOT_FOR_THE_BACKBONE = {"num_items_in_batch"}


class EvoTokLlavaForConditionalGeneration(
    PreTrainedModel, ImageGenerationMixin, InterleavedGenerationMixin, TextGenerationMixin, GenerationMixin
):
    """A causal LM that reads images through an EvoTok tokenizer and draws them through an image head."""

    config_class = EvoTokLlavaConfig
    config: EvoTokLlavaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # transformers' models assign tuples, too
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["vision_tower"]  # rounded codebooks would choose other codes
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    vision_tower: EvoTokModel
    language_model: PreTrainedModel
    lm_head: nn.Linear
    read_projector: Projector
    write_projector: Projector  # only with the depth transformer
    image_head: DepthTransformerHead | FlatHead
    new_token_rows: NewTokenRows | None  # present while they are trained separately from frozen tables
    vocabulary: ResidualVocabulary

    def __init__(self, config: EvoTokLlavaConfig) -> None:
        super().__init__(config)
        width, vision = config.text_config.hidden_size, config.vision_config
        self.vision_tower = EvoTokModel(vision)
        self.language_model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.read_projector = Projector(vision.semantic_dim, width, vision.num_positions)
        if config.image_head == "depth":
            self.write_projector = Projector(vision.codebook_dim, width, vision.num_positions)
        self.image_head = build_image_head(config)
        self.new_token_rows = None
        self.vocabulary = config.residual_vocabulary
        self.vision_tower.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthTransformerHead):
            nn.init.normal_(module.level_embedding, std=self.config.initializer_range)
        elif isinstance(module, Projector):
            # About as large as projected features: next to much larger ones, a model hardly learns where objects are.
            width = module.position_embedding.shape[-1]
            nn.init.normal_(module.position_embedding, std=0.35 * self.config.initializer_range * width**0.5)

    def train(self, mode: bool = True) -> "EvoTokLlavaForConditionalGeneration":
        """Set the mode of all parts but the tokenizer, which stays in evaluation mode: its codebooks are fixed."""
        super().train(mode)
        self.vision_tower.eval()
        return self

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
        apply_umask_to_weights(Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = cast(nn.Linear, value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the text rows as transformers does; residual tokens, which have no rows here, are moved after them.

        A processor of this model then needs the new offset: `processor.residual_token_offset =
        model.config.residual_token_offset`.

        Raises:
            ValueError: the image tokens would lose their rows.
        """
        config, before = self.config, self.config.text_config.vocab_size
        needed = 1 + max(config.image_token_id, config.image_start_token_id, config.image_end_token_id)
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(f"the image tokens need {needed} rows, got new_num_tokens={new_num_tokens}")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = config.text_config.vocab_size
        self.language_model.config.vocab_size = rows
        if before <= config.residual_token_offset < rows:
            config.residual_token_offset = rows
            self.vocabulary = config.residual_vocabulary
        return embeddings

    # From images to embeddings -------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor | None = None, image_codes: Tensor | None = None) -> Tensor:
        """LLM inputs (I, N, D) of images that are read, from pixels (I, 3, H, W) or cached codes (I, N, L).

        Raises:
            UserError: images of another size than the configuration's. The tokenizer could encode them, but every image
                has a fixed number of tokens in the sequence.
        """
        self._check_size(pixel_values, image_codes)
        with torch.no_grad():
            if image_codes is None:
                assert pixel_values is not None, "give pixel_values or image_codes"
                image_codes = self.vision_tower.encode(pixel_values.to(self.vision_tower.dtype)).codes
                assert image_codes is not None
            features = self.vision_tower.decode_semantics(image_codes)
        positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        return self.read_projector(features.to(self.read_projector.linear_1.weight.dtype), positions)

    def _check_size(self, pixel_values: Tensor | None, image_codes: Tensor | None) -> None:
        vision = self.config.vision_config
        if image_codes is None:
            assert pixel_values is not None, "give pixel_values or image_codes"
            size = vision.image_size
            if pixel_values.shape[-2:] != (size, size):
                raise UserError(
                    f"expected images of {size} x {size} pixels, {vision.num_positions} tokens each, got pixel_values "
                    f"{tuple(pixel_values.shape)}; the model's processor prepares images for it"
                )
        elif image_codes.shape[1] != vision.num_positions:
            raise UserError(
                f"expected image_codes (I, {vision.num_positions}, L), got {tuple(image_codes.shape)}; "
                f"encode images at {vision.image_size} x {vision.image_size} pixels"
            )

    def embed_written(self, codes: Tensor, positions: Tensor) -> Tensor:
        """LLM inputs (P, D) of written positions, from their codes (P, L) and their positions in the image (P,).

        With the flat head (P x L, D), one per residual token; it ignores `positions`.
        """
        if self.config.image_head == "flat":
            head = cast(FlatHead, self.image_head)
            return head.embed(codes, self.vision_tower.quantizer.codebooks).flatten(0, 1)
        latents = self.vision_tower.codes_to_latents(codes[None])[0]
        return self.write_projector(latents.to(self.write_projector.linear_1.weight.dtype), positions)

    def _embed(self, folded: FoldedSequence, pixel_values: Tensor | None, image_codes: Tensor | None) -> Tensor:
        ids = folded.input_ids.masked_fill(folded.written, 0)
        embeddings = self.get_input_embeddings()(ids)
        if self.new_token_rows is not None:
            embeddings = self.new_token_rows.put_into(embeddings, ids)
        vision = self.config.vision_config
        # In training, parts that a batch does not use still run, times zero, in their usual order: every rank then
        # gathers the same weights and reduces the same gradients in the same order, whatever its batch contains.
        nothing = folded.codes.new_zeros(1, vision.num_positions, vision.num_quantizers)
        if pixel_values is not None or image_codes is not None:
            features = self.get_image_features(pixel_values, image_codes)
            where = folded.input_ids == self.config.image_token_id
            embeddings = merge_features(embeddings, where, features.flatten(0, 1), "image")
        elif self.training:
            embeddings = embeddings + 0.0 * self.get_image_features(image_codes=nothing).sum()
        if folded.codes.shape[0]:
            written = self.embed_written(folded.codes, folded.written_positions(self.config.steps_per_drawn_image))
            embeddings = merge_features(embeddings, folded.written, written, "drawn image")
        elif self.training:
            first = folded.codes.new_zeros(1)
            embeddings = embeddings + 0.0 * self.embed_written(nothing[0, :1, : vision.pixel_depth], first).sum()
        return embeddings

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
        **kwargs: Any,
    ) -> EvoTokLlavaOutput:
        """Run a batch that may mix reading, drawing and text, with one or several samples per row.

        Args:
            input_ids: (B, T) flat sequence: text, delimiters, image placeholders and residual tokens.
            attention_mask: (B, T); padding on the right or on the left. Masks of other shapes, as transformers makes
                them for a static cache, are passed to the backbone unchanged.
            labels: (B, T), -100 where nothing is learned.
            pixel_values: images that are read, (I, 3, H, W) in [-1, 1], in the order of their placeholders.
            image_codes: the same images as cached codes (I, N, L), instead of `pixel_values`.
            segment_ids: (B, T), for rows of several samples: the sample of each token, numbered from 1, 0 on padding;
                replaces `attention_mask` and `position_ids`. Samples do not attend to each other.
            logits_to_keep: compute logits for this many last steps (0: all), or for the steps with these indices.
            return_dict: False returns a tuple.
            kwargs: further keywords of the backbone (`output_hidden_states`, `output_attentions`, ...).

        Raises:
            UserError: placeholders and images do not match, or the residual tokens of an image are incomplete.
            ValueError: a keyword that the backbone does not accept, or arguments that exclude or need each other.
        """
        extra = self._backbone_keywords(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both")
        if pixel_values is not None and image_codes is not None:
            raise ValueError("give images either as pixel_values or as image_codes, not both")
        if inputs_embeds is not None and (pixel_values is not None or image_codes is not None):
            raise ValueError("images need input_ids, whose placeholders mark their positions; got inputs_embeds")
        if labels is not None and input_ids is None:
            raise ValueError("labels need input_ids: the loss of a step depends on its token")
        others = (attention_mask, position_ids, past_key_values, inputs_embeds)
        if segment_ids is not None and any(value is not None for value in others):
            raise ValueError(
                "segment_ids replace attention_mask, position_ids and past_key_values; give them only with input_ids"
            )
        folded, steps = None, {"attention_mask": attention_mask, "position_ids": position_ids}
        if labels is not None or segment_ids is not None:
            use_cache = False  # with a cache, transformers does not detect packed samples
        if inputs_embeds is None:
            assert input_ids is not None
            fold = self.config.image_head == "depth"
            flat_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
            folded = fold_residual_tokens(self.vocabulary, input_ids, flat_mask, labels, segment_ids, fold)
            if segment_ids is not None:
                folded, steps = separate_samples(self.language_model, folded)
            elif flat_mask is not None:
                steps["attention_mask"] = folded.attention_mask
            elif attention_mask is not None and folded.input_ids.shape != input_ids.shape:
                raise ValueError("residual tokens are folded into fewer steps; give an attention_mask (B, T) with them")
            inputs_embeds = self._embed(folded, pixel_values, image_codes)
        self._check_positions(inputs_embeds.shape[1], past_key_values, **steps)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=use_cache, **steps, **extra
        )
        hidden = outputs.last_hidden_state  # (B, S, D)
        result = EvoTokLlavaOutput(
            last_hidden_state=hidden,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if labels is None:
            kept = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
            result.logits = self.lm_head(kept)
            if self.new_token_rows is not None:
                result.logits = self.new_token_rows.replaced_rows().put_into(result.logits, kept)
            return result
        assert folded is not None and folded.labels is not None
        counts = count_learned(folded.labels, self.vocabulary, folded.segment_ids)
        result.num_text_tokens, result.num_image_positions = counts.text_tokens, counts.image_positions
        result.text_loss = self._text_loss(hidden, folded)
        result.image_loss = self._image_loss(hidden, folded)
        result.loss = result.text_loss + result.image_loss
        return result

    def _check_positions(
        self,
        num_steps: int,
        past: Cache | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Check that all steps fit into the positions of the language model.

        Raises:
            UserError: the sequence is too long.
        """
        limit = self.config.max_positions
        taken = 0 if past is None else past.get_seq_length()
        # A static cache counts in a tensor; reading it would synchronize with the device in every step.
        total = num_steps + (taken if isinstance(taken, int) else 0)
        if limit is None or total <= limit:
            return
        if position_ids is not None:
            total = int(position_ids.max()) + 1
        elif isinstance(attention_mask, Tensor) and attention_mask.shape == (attention_mask.shape[0], total):
            total = int(attention_mask.nonzero()[:, 1].max()) + 1  # padding on the right takes no positions
        if total > limit:
            raise UserError(
                f"the sequence takes {total} steps, but the language model has {limit} positions "
                "(max_position_embeddings); shorten the text or use fewer images"
            )

    def _backbone_keywords(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords that are not None, all of which the backbone must accept.

        Raises:
            ValueError: the backbone does not accept one of them.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        parameters = set(inspect.signature(type(self.language_model).forward).parameters) - {"self", "kwargs"}
        known = (parameters | TransformersKwargs.__optional_keys__) - _NOT_FOR_THE_BACKBONE
        for name in given:
            if name not in known:
                near = get_close_matches(name, [*known, *inspect.signature(self.forward).parameters], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"forward got an unknown keyword {name!r}{hint}")
        return given

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

    # Generation ----------------------------------------------------------------------------------------------

    def embed_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the language model for a batch (B, T), with images as in `forward`: embeddings (B, S, D) and their
        mask (B, S), padded on the left."""
        fold = self.config.image_head == "depth"
        folded = fold_residual_tokens(self.vocabulary, input_ids, attention_mask, None, None, fold, pad_left=True)
        return self._embed(folded, pixel_values, image_codes), folded.attention_mask


AutoModelForImageTextToText.register(EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration, exist_ok=True)
