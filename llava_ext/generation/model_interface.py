"""The attributes and methods of the model class that the generation mixins use."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from evotok_plugin import DepthTransformerHead, EvoTokModel
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead
from llava_ext.vocabulary import ResidualVocabulary


class ModelInterface(GenerationMixin):
    """Base class of the generation mixins: it declares what the model class defines, and adds nothing at run time."""

    config: EvoTokLlavaConfig
    generation_config: GenerationConfig
    language_model: PreTrainedModel
    lm_head: nn.Module
    vision_tower: EvoTokModel
    image_head: DepthTransformerHead | FlatHead
    vocabulary: ResidualVocabulary

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...

        @property
        def image_token_ids(self) -> list[int]: ...

        def expand_rows(self, inputs: dict[str, Tensor], expand_size: int) -> dict[str, Tensor]: ...

        def select_rows(self, inputs: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]: ...

        def images_of_rows(self, inputs: Mapping[str, Tensor | None]) -> dict[str, Sequence[Tensor]]: ...

        def get_input_embeddings(self) -> nn.Module: ...

        def embed_ids(self, ids: Tensor) -> Tensor: ...

        def text_logits(self, hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor: ...

        def placeholders_in(self, embeddings: Tensor) -> Tensor: ...

        def embed_written(self, codes: Tensor, positions: Tensor) -> Tensor: ...

        def embed_prompt(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            pixel_values: Tensor | None = None,
            image_codes: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]: ...
