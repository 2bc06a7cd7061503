"""The model without output layer: from a batch of tokens and images to the hidden states of the language model.

B batch, T flat tokens, S steps after folding, P written positions, I images, N positions per image, L levels, D LLM
width. A written position is a position of a drawn image. With the flat head nothing is folded: S is T, and a written
position takes L steps.
"""

import functools
import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TransformersKwargs, can_return_tuple

from evotok_plugin import DepthTransformerHead, EvoTokModel
from evotok_plugin.common.files import apply_umask_to_weights
from evotok_plugin.errors import UserError
from llava_ext.adapter_guard import keep_adapters_out
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead
from llava_ext.folding import FoldedSequence, fold_residual_tokens, merge_features, sequence_of_embeddings
from llava_ext.image_heads import build_image_head
from llava_ext.model_outputs import EvoTokLlavaModelOutput
from llava_ext.new_token_rows import NewTokenRows
from llava_ext.packed_attention import separate_samples
from llava_ext.projector import Projector
from llava_ext.vocabulary import ResidualVocabulary

# Keywords of other models' processors and collators that say what the ids already say: which tokens are images.
_IGNORED = {"mm_token_type_ids", "token_type_ids"}
# Keywords for the attention function that serving engines register with transformers (vLLM).
_FOR_ATTENTION = {"attention_instances"}


@dataclass
class Embedded:
    """LLM inputs of a sequence, (B, S, D), and those of the images that are read, (I, N, D), which they include."""

    sequence: Tensor
    images: Tensor | None


@dataclass
class BackboneRun:
    """Output of the backbone for a batch, and the folded sequence that it ran on."""

    outputs: EvoTokLlavaModelOutput
    folded: FoldedSequence


class EvoTokLlavaModel(PreTrainedModel):
    """Image tokenizer, language model, projectors and image head; `AutoModel` loads it."""

    config_class = EvoTokLlavaConfig
    config: EvoTokLlavaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # transformers' models assign tuples, too
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["vision_tower"]  # rounded codebooks would choose other codes
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    vision_tower: EvoTokModel
    language_model: PreTrainedModel
    read_projector: Projector
    write_projector: Projector  # only with the depth transformer
    image_head: DepthTransformerHead | FlatHead
    new_token_rows: NewTokenRows | None  # present while they are trained separately from frozen tables
    vocabulary: ResidualVocabulary

    def __init__(self, config: EvoTokLlavaConfig) -> None:
        super().__init__(config)
        width, vision = config.text_config.hidden_size, config.vision_config
        self.vision_tower = EvoTokModel(vision)
        self.vision_tower.quantizer.fix()
        self.language_model = AutoModel.from_config(config.text_config)
        self._add_output_layer()  # here: the order of parts decides initial weights and the order of optimizer states
        self.read_projector = Projector(vision.semantic_dim, width, vision.num_positions)
        if config.image_head == "depth":
            self.write_projector = Projector(vision.codebook_dim, width, vision.num_positions)
        self.image_head = build_image_head(config)
        self.new_token_rows = None
        self.vocabulary = config.residual_vocabulary
        self.vision_tower.requires_grad_(False)
        keep_adapters_out(self.vision_tower)
        self.post_init()

    def _add_output_layer(self) -> None:
        """Add the output layer of text tokens; a model without one leaves it out."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthTransformerHead):
            nn.init.normal_(module.level_embedding, std=self.config.initializer_range)
        elif isinstance(module, Projector):
            # About as large as projected features: next to much larger ones, a model hardly learns where objects are.
            width = module.position_embedding.shape[-1]
            nn.init.normal_(module.position_embedding, std=0.35 * self.config.initializer_range * width**0.5)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model; the image tokenizer always stays in float32."""
        return self.language_model.dtype

    def train(self, mode: bool = True) -> "EvoTokLlavaModel":
        """Set the mode of all parts but the tokenizer, which stays in evaluation mode: its codebooks are fixed."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; the file permissions of the weights follow the umask."""
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_umask_to_weights(Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

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

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Read images, from pixels (I, 3, H, W) or cached codes (I, N, L).

        Args:
            output_hidden_states: also return `hidden_states`, of which there is one: `last_hidden_state`.
            return_dict: False returns a tuple.

        Returns:
            `pooler_output`, the LLM inputs of each image, I tensors (N, D), and `last_hidden_state`, the semantic
            features that they are made from, (I, N, semantic_dim).

        Raises:
            UserError: images of another size than the configuration's. The tokenizer could encode them, but every image
                has a fixed number of tokens in the sequence.
        """
        features = self._semantic_features(pixel_values, image_codes)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=list(self._project(features)),  # type: ignore[arg-type]  # a list in transformers, too
            hidden_states=(features,) if output_hidden_states else None,
        )

    def embed_read(self, pixel_values: Tensor | None = None, image_codes: Tensor | None = None) -> Tensor:
        """LLM inputs (I, N, D) of images that are read, given as in `get_image_features`."""
        return self._project(self._semantic_features(pixel_values, image_codes))

    @torch.no_grad()
    def _semantic_features(self, pixel_values: Tensor | None, image_codes: Tensor | None) -> Tensor:
        self._check_size(pixel_values, image_codes)
        if image_codes is None:
            assert pixel_values is not None, "give pixel_values or image_codes"
            image_codes = self.vision_tower.encode(_in_precision(pixel_values, self.vision_tower.dtype)).codes
            assert image_codes is not None
        return self.vision_tower.decode_semantics(image_codes)

    def _project(self, features: Tensor) -> Tensor:
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

    def embed_ids(self, ids: Tensor) -> Tensor:
        """The embeddings (B, T, D) of ids of text (B, T)."""
        embeddings = self.get_input_embeddings()(ids)
        return embeddings if self.new_token_rows is None else self.new_token_rows.put_into(embeddings, ids)

    def _embed(self, folded: FoldedSequence, pixel_values: Tensor | None, image_codes: Tensor | None) -> Embedded:
        embeddings = self.embed_ids(folded.input_ids.masked_fill(folded.written, 0))
        vision = self.config.vision_config
        # In training, parts that a batch does not use still run, times zero, in their usual order: every rank then
        # gathers the same weights and reduces the same gradients in the same order, whatever its batch contains.
        nothing = folded.codes.new_zeros(1, vision.num_positions, vision.num_quantizers)
        read = self._read_images(pixel_values, image_codes)
        if read is not None:
            where = folded.input_ids == self.config.image_token_id
            embeddings = merge_features(embeddings, where, read.flatten(0, 1), "image")
        elif self.training:
            embeddings = embeddings + 0.0 * self.embed_read(image_codes=nothing).sum()
        if folded.codes.shape[0]:
            written = self.embed_written(folded.codes, folded.written_positions(self.config.steps_per_drawn_image))
            embeddings = merge_features(embeddings, folded.written, written, "drawn image")
        elif self.training:
            first = folded.codes.new_zeros(1)
            embeddings = embeddings + 0.0 * self.embed_written(nothing[0, :1, : vision.pixel_depth], first).sum()
        return Embedded(embeddings, read)

    def _embed_around(self, embeddings: Tensor, pixel_values: Tensor | None, image_codes: Tensor | None) -> Embedded:
        """Put images into embeddings (B, S, D) where these are the embedding of the image placeholder."""
        read = self._read_images(pixel_values, image_codes)
        if read is not None:
            embeddings = merge_features(embeddings, self.placeholders_in(embeddings), read.flatten(0, 1), "image")
        return Embedded(embeddings, read)

    def placeholders_in(self, embeddings: Tensor) -> Tensor:
        """Where embeddings (B, S, D) are that of the image placeholder: (B, S), bool."""
        token = torch.tensor([[self.config.image_token_id]], device=embeddings.device)
        return (embeddings == self.embed_ids(token).to(embeddings.dtype)).all(dim=-1)

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
        return self._embed(folded, pixel_values, image_codes).sequence, folded.attention_mask

    def _read_images(self, pixel_values: Tensor | None, image_codes: Tensor | None) -> Tensor | None:
        if pixel_values is None and image_codes is None:
            return None
        return self.embed_read(pixel_values, image_codes)

    # Forward -------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_codes: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> EvoTokLlavaModelOutput:
        """Compute the language model's hidden states; arguments and errors as in
        `EvoTokLlavaForConditionalGeneration.forward`."""
        return self.run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_codes=image_codes,
            segment_ids=segment_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        ).outputs

    def run_backbone(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        image_codes: Tensor | None,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> BackboneRun:
        """Fold a batch, embed it and run the language model on it.

        Arguments and errors are those of `EvoTokLlavaForConditionalGeneration.forward`; `labels` are only folded.
        """
        extra = self._backbone_keywords(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and image_codes is not None:
            raise ValueError("give images either as pixel_values or as image_codes, not both")
        others = (attention_mask, position_ids, past_key_values, inputs_embeds)
        if segment_ids is not None and any(value is not None for value in others):
            raise ValueError(
                "segment_ids replace attention_mask, position_ids and past_key_values; give them only with input_ids"
            )
        steps: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        if labels is not None or segment_ids is not None:
            use_cache = False  # with a cache, transformers does not detect packed samples
        fold = self.config.image_head == "depth"
        flat_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        if inputs_embeds is not None:
            folded = sequence_of_embeddings(self.vocabulary, inputs_embeds, flat_mask, labels, fold)
            embedded = self._embed_around(inputs_embeds, pixel_values, image_codes)
        else:
            assert input_ids is not None
            folded = fold_residual_tokens(self.vocabulary, input_ids, flat_mask, labels, segment_ids, fold)
            if segment_ids is not None:
                folded, steps = separate_samples(self.language_model, folded)
            elif flat_mask is not None:
                of_cache = flat_mask[:, : -input_ids.shape[1]]  # empty, unless the mask includes tokens in a cache
                steps["attention_mask"] = torch.cat([of_cache.to(input_ids.dtype), folded.attention_mask], dim=1)
            elif attention_mask is not None and folded.input_ids.shape != input_ids.shape:
                raise ValueError("residual tokens are folded into fewer steps; give an attention_mask (B, T) with them")
            embedded = self._embed(folded, pixel_values, image_codes)
        inputs = embedded.sequence
        self._check_positions(inputs.shape[1], past_key_values, **steps)
        outputs = self.language_model(
            inputs_embeds=inputs, past_key_values=past_key_values, use_cache=use_cache, **steps, **extra
        )
        return BackboneRun(
            EvoTokLlavaModelOutput(
                last_hidden_state=outputs.last_hidden_state,
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                image_hidden_states=embedded.images,
            ),
            folded,
        )

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
        given = {name: value for name, value in kwargs.items() if value is not None and name not in _IGNORED}
        known = (
            _parameters_of(cast(Hashable, type(self.language_model)))
            | TransformersKwargs.__optional_keys__
            | _FOR_ATTENTION
        )
        for name in given:
            if name not in known:
                near = get_close_matches(name, [*known, *inspect.signature(self.forward).parameters], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"forward got an unknown keyword {name!r}{hint}")
        return given


@functools.cache
def _parameters_of(language_model: type[nn.Module]) -> frozenset[str]:
    """The names of the parameters of a language model's `forward`."""
    return frozenset(inspect.signature(language_model.forward).parameters) - {"self", "kwargs"}


def _in_precision(pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert pixels in [-1, 1] to a dtype; a lower precision gets back the 8-bit levels that it was rounded from.

    Callers cast all inputs to the dtype of the language model. The codes of rounded pixels would differ.
    """
    values = pixel_values.to(dtype)
    if pixel_values.is_floating_point() and pixel_values.dtype.itemsize < dtype.itemsize:
        levels = ((values + 1) * 127.5).round() / 127.5 - 1.0
        return torch.where(levels.to(pixel_values.dtype) == pixel_values, levels, values)
    return values


AutoModel.register(EvoTokLlavaConfig, EvoTokLlavaModel, exist_ok=True)
