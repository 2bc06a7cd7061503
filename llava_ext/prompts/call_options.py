"""Keywords of a processor call, named as in transformers: each is honored, without effect, or rejected by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.processing_utils import ImagesKwargs

from llava_ext.prompts.batching import BatchOptions

_NESTED = ("text_kwargs", "images_kwargs", "common_kwargs", "processor_kwargs", "videos_kwargs", "audio_kwargs")
_BATCH = tuple(option.name for option in fields(BatchOptions))
_IMAGES = tuple(name for name in ImagesKwargs.__annotations__ if name not in _BATCH)
_TOKEN_TYPES = "return_mm_token_type_ids"
_ACCEPTED = {*_BATCH, *_IMAGES, _TOKEN_TYPES}
# Keywords of other processors and tokenizers. False, 0 and None ask for nothing, so wrappers may pass them.
_OFF = (
    "audio",
    "is_split_into_words",
    "load_audio_from_video",
    "return_length",
    "return_metadata",
    "return_offsets_mapping",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_text_replacement_offsets",
    "return_token_type_ids",
    "sanitize_control_tokens",
    "stride",
    "text_pair",
    "text_pair_target",
    "text_target",
    "videos",
)


@dataclass(frozen=True)
class CallOptions:
    """Options of one call.

    Attributes:
        batch: padding, truncation and stacking of rows.
        images: keywords of the image processor.
        return_mm_token_type_ids: add `mm_token_type_ids`, 1 on the placeholders of images and 0 elsewhere.
    """

    batch: BatchOptions = BatchOptions()
    images: Mapping[str, Any] = field(default_factory=dict)
    return_mm_token_type_ids: bool = False

    @classmethod
    def of(cls, keywords: Mapping) -> "CallOptions":
        """Collect options from keywords, including those nested in `text_kwargs`, `images_kwargs` and others.

        Raises:
            ValueError: an unknown keyword, or one that is given twice with different values.
        """
        found: dict[str, Any] = {}
        for name, value in _flat(keywords):
            if name == "verbose" or (name in _OFF and not value):
                continue
            if name not in _ACCEPTED:
                accepted = ", ".join(sorted(_ACCEPTED))
                raise ValueError(f"the processor does not accept {f'{name}={value!r}':.80}; it accepts {accepted}")
            value = getattr(value, "value", value)  # transformers' enumerations
            if name in found and str(found[name]) != str(value):
                raise ValueError(f"{name} is given twice: {found[name]!r} and {value!r}")
            found[name] = value
        images = {name: found.pop(name) for name in _IMAGES if name in found}
        token_types = bool(found.pop(_TOKEN_TYPES, False))
        return cls(BatchOptions(**found), images, token_types)

    @classmethod
    def names(cls) -> set[str]:
        """Return the keywords that a processor's call accepts or knows."""
        return {*_ACCEPTED, *_NESTED, *_OFF, "verbose"}


def _flat(keywords: Mapping) -> Iterator[tuple[str, Any]]:
    """Yield keywords with their values, including nested ones; None means "not given", except for `return_tensors`."""
    for name, value in keywords.items():
        if name in _NESTED and isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None or name == "return_tensors":
            yield name, value
