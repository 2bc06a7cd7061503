"""The options of converting research adapters."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Sizes of the depth transformer. None means the size in the file, or the default if there is no file."""

    head_hidden_size: int | None = field(
        default=None, metadata={"help": "width of the depth transformer (default: from the file)"}
    )
    head_num_layers: int | None = field(
        default=None, metadata={"help": "blocks of the depth transformer (default: from the file)"}
    )
    head_num_heads: int | None = field(
        default=None, metadata={"help": "attention heads of the depth transformer (default: of 64 dimensions each)"}
    )
