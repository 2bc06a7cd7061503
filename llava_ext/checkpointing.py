"""Model folders: assemble one from a text backbone and a tokenizer, open, save and export one, say what is wrong."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel
from evotok_plugin.common.files import write_folder
from evotok_plugin.common.weight_files import folder_fingerprint, named_weights
from evotok_plugin.model_folder import (
    load_strictly,
    load_whole,
    model_type_of,
    open_config,
    open_processor,
    open_tokenizer_folder,
    read_config,
)
from evotok_plugin.tokenizer_folder import load_tokenizer, open_image_processor
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead, start_rows
from llava_ext.generation.options import DrawingOptions, store_settings
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import put_rows_into_tables, start_new_rows
from llava_ext.processing_evotok_llava import IMAGE_TOKENS, EvoTokLlavaProcessor

TOWER = "vision_tower."  # how names of the tokenizer's weights begin in a model folder
NEW_PARTS = ("read_projector", "write_projector", "image_head")  # a flat model has no write_projector
INCLUDED_MODEL = Path(__file__).parent / "pretrained" / "scenes"
DEFAULT_MODELS = ("outputs/finetune", "outputs/quickstart/finetune")


def load_model(
    folder: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: object | None = None,
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Open a saved EvoTok-LLaVA folder; every weight must be there and fit.

    Args:
        dtype: of all weights but the tokenizer's, which stay float32; "auto" takes the one they were saved in.
        quantization_config: transformers', for a backbone that is quantized while it loads.

    Raises:
        ValueError: not such a folder, or weights that are missing, left over or of another shape.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds an adapter, not a whole model; fold it into the model that it was trained on: "
            f"evotok-llava merge BASE {folder} -o OUT"
        )
    kind = model_type_of(folder)
    if kind != EvoTokLlavaConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} holds a {kind or 'nameless'} model, expected {EvoTokLlavaConfig.model_type}; "
            "give the output folder of scripts/pretrain.sh or scripts/finetune.sh"
        )
    for part in ("text_config", "vision_config"):
        if not isinstance(read_config(folder).get(part), dict):  # a default would be a model of billions of weights
            raise ValueError(f"{Path(folder) / 'config.json'}: expected the settings of a model as {part}; restore it")
    model = load_whole(
        EvoTokLlavaForConditionalGeneration,
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    return model, open_llava_processor(folder, model.config)


def open_llava_processor(folder: str | Path, config: EvoTokLlavaConfig) -> EvoTokLlavaProcessor:
    """The processor of a model folder.

    Raises:
        ValueError: its files are missing or damaged, or it belongs to another model.
    """
    processor = open_processor(
        EvoTokLlavaProcessor,
        folder,
        "the processor",
        [("processor_config.json",), ("tokenizer_config.json",), ("tokenizer.json",)],
        "copy the processor's files from the folder that the model was trained or saved in, "
        "or write them with processor.save_pretrained",
    )
    if not isinstance(processor.image_processor, EvoTokImageProcessor):
        raise ValueError(
            f"{Path(folder) / 'processor_config.json'}: expected an EvoTokImageProcessor, got "
            f"{type(processor.image_processor).__name__}"
        )
    if processor.pad_id is None:
        raise ValueError(
            f"{Path(folder) / 'tokenizer_config.json'} names neither a pad_token nor an eos_token; restore it from the "
            "folder that the model was trained or saved in"
        )
    try:
        config.check_processor(processor)
    except ValueError as error:
        raise ValueError(f"the processor in {str(folder)!r} does not fit the model: {error}") from error
    return processor


def read_tower(folder: str | Path) -> EvoTokModel:
    """The tokenizer alone of a model folder, in float32 on the CPU, whatever engine is about to take the rest.

    Raises:
        ValueError: its weights are missing, damaged or do not fit.
    """
    config = open_config(EvoTokLlavaConfig, folder).vision_config
    weights = {name.removeprefix(TOWER): read() for name, _, read in named_weights(folder) if name.startswith(TOWER)}
    tower = EvoTokModel(config)
    load_strictly(tower, weights, f"the tokenizer in {str(folder)!r}")
    return tower.requires_grad_(False).eval()


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 over names, shapes, dtypes and first rows of a folder's weights, the tokenizer's left out.

    Only for adapters and runs from before `folder_fingerprint` was recorded: weights that differ in later rows alone
    have the same value here.
    """
    facts = []
    for name, part, read in named_weights(folder):
        if not name.startswith(TOWER):
            row = part[:1] if part.get_shape() else read()
            first = row.flatten().contiguous().view(torch.uint8).numpy().tobytes()
            facts.append(f"{name} {part.get_shape()} {part.get_dtype()} {hashlib.sha256(first).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()


def base_fingerprints(folder: str | Path) -> dict[str, str | None]:
    """Identity of the model that training starts from: `sha256` of its files (`folder_fingerprint`), and
    `fingerprint`, which earlier versions compare; both None where its weights are not at hand as safetensors."""
    if not any(Path(folder).glob("model*.safetensors")):
        return {"fingerprint": None, "sha256": None}
    return {"fingerprint": weights_fingerprint(folder), "sha256": folder_fingerprint(folder)}


def has_fingerprint(folder: str | Path, known: Mapping[str, str | None]) -> bool:
    """Whether a folder's model is the one of recorded `base_fingerprints`; true where none are recorded."""
    if known.get("sha256") is not None:
        return folder_fingerprint(folder) == known["sha256"]
    return known.get("fingerprint") is None or weights_fingerprint(folder) == known["fingerprint"]


def default_model_folder() -> Path:
    """Where the newest trained model of this working folder lies; without one, the model that comes with the package.

    Raises:
        ValueError: there is neither.
    """
    found = [Path(folder) for folder in DEFAULT_MODELS if (Path(folder) / "config.json").is_file()]
    if not found and (INCLUDED_MODEL / "config.json").is_file():
        return INCLUDED_MODEL
    if not found:
        raise ValueError(
            f"no trained model in {' or '.join(DEFAULT_MODELS)}; run `bash scripts/quickstart.sh`, "
            "or name one with --model"
        )
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)


def assemble(
    language_model: str | Path,
    vision_tower: str | Path,
    head_hidden_size: int,
    head_num_layers: int,
    head_num_heads: int,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: object | None = None,
    image_head: str = "depth",
    residual_embeddings: str = "tied",
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """A new model from a causal LM folder and an EvoTok folder; projectors and image head start at random.

    The new image tokens start near the mean of all others (`new_tokens`). Residual tokens have no rows in the backbone:
    the image head reads and writes them, the backbone's embedding and output layers end before them.

    Raises:
        ValueError: a folder that does not hold what is needed.
    """
    if model_type_of(vision_tower) != EvoTokConfig.model_type:
        raise ValueError(
            f"{str(vision_tower)!r} is not an EvoTok tokenizer (model_type {model_type_of(vision_tower)!r})"
        )
    if not Path(language_model).is_dir() and Path(language_model).exists():
        raise ValueError(f"text model {str(language_model)!r} is a file; give the folder of a causal LM or a hub id")
    if Path(language_model).is_dir():
        read_config(language_model)
    tower = load_tokenizer(vision_tower, dtype=torch.float32)  # what chooses codes is fp32
    tower.config.require_semantics(repr(str(vision_tower)))
    images = open_image_processor(vision_tower)
    tokenizer = open_tokenizer_folder(language_model, "the text tokenizer")
    backbone = load_whole(
        AutoModelForCausalLM,
        language_model,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    processor = EvoTokLlavaProcessor.from_parts(images, tokenizer, tower.config, backbone.config.vocab_size, image_head)
    new = {*tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)), *range(backbone.config.vocab_size, len(tokenizer))}
    if len(tokenizer) > backbone.config.vocab_size:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in {layer.weight for layer in (backbone.get_input_embeddings(), backbone.get_output_embeddings())}:
        start_new_rows(table, sorted(new))
    backbone.config.use_cache = True
    backbone.config._name_or_path = tower.config._name_or_path = ""  # a checkpoint names no folder of this machine
    config = EvoTokLlavaConfig(
        text_config=backbone.config.to_dict(),
        vision_config=tower.config.to_dict(),
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_id,
        image_end_token_id=processor.image_end_id,
        residual_token_offset=processor.residual_token_offset,
        image_head=image_head,
        residual_embeddings=residual_embeddings,
        head_hidden_size=head_hidden_size,
        head_num_layers=head_num_layers,
        head_num_heads=head_num_heads,
        initializer_range=backbone.config.initializer_range,
    )
    # A skeleton without memory receives the loaded parts; only what is new is then filled with random numbers.
    with torch.device("meta"):
        model = EvoTokLlavaForConditionalGeneration(config)
    model.vision_tower = tower.requires_grad_(False)
    model.language_model = backbone.get_decoder()
    model.lm_head = backbone.get_output_embeddings()
    model.config.text_config = model.language_model.config
    for part in (getattr(model, name) for name in NEW_PARTS if hasattr(model, name)):
        part.to_empty(device=tower.device)
        part.to(backbone.dtype)
        part.apply(model._init_weights)
    _start_on_the_scale_of_text(model)
    model.generation_config = backbone.generation_config
    if model.generation_config._from_model_config:  # where `use_cache` is what the backbone's training has left
        model.generation_config.use_cache = True
    store_settings(model.generation_config)
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model, processor


@torch.no_grad()
def _start_on_the_scale_of_text(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Scale what comes before the LLM so that images of random codes are as large as token embeddings, and the rows of
    a flat head's output like those of text.

    A tower's features may be tens of times larger; they would drown the embedding of the place in the image.
    """
    vision, tower = model.config.vision_config, model.vision_tower
    shape = (max(2, 256 // vision.num_positions), vision.num_positions, vision.num_quantizers)
    codes = torch.randint(vision.codebook_size, shape, generator=torch.Generator().manual_seed(0)).to(tower.device)
    size, of_output = (_root_mean_square(layer.weight) for layer in (model.get_input_embeddings(), model.lm_head))
    before = [(model.read_projector, tower.decode_semantics(codes))]
    if isinstance(model.image_head, FlatHead):
        start_rows(model.image_head, tower.quantizer.codebooks, size, of_output)
    else:
        before.append((model.write_projector, tower.codes_to_latents(codes[..., : vision.pixel_depth])))
    for projector, features in before:
        projected = projector.project(features.to(projector.linear_1.weight.dtype))
        projector.linear_2.weight.mul_(size / _root_mean_square(projected))


def _root_mean_square(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()


# Writing -----------------------------------------------------------------------------------------------------


def set_tower_aside(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Take the frozen tokenizer out of the model's modules; the model goes on calling it as `vision_tower`.

    An engine rounds all modules to the training dtype, spreads them over processes and saves them with every
    checkpoint. Rounded codebooks choose other codes, so the tokenizer is none of its business.
    """
    if "vision_tower" in model._modules:
        tower = model.vision_tower
        del model.vision_tower
        object.__setattr__(model, "vision_tower", tower)


def save_model(
    model: EvoTokLlavaForConditionalGeneration,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    **options,
) -> None:
    """Write weights and configuration; the tokenizer is set aside, so that the dtype noted down is the others', and
    new tokens' rows that train apart go into their tables.

    Args:
        state_dict: the weights where they are not the model's own (gathered from other processes); the tokenizer's
            are always those of the model.
        options: of `save_pretrained`.
    """
    set_tower_aside(model)
    weights = put_rows_into_tables(model, dict(model.state_dict() if state_dict is None else state_dict))
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")  # copies of tied weights no longer show that they are tied
    tower = {f"{TOWER}{name}": value for name, value in model.vision_tower.state_dict().items()}
    model.save_pretrained(folder, state_dict={**weights, **tower}, **options)


def export_model(
    folder: str | Path,
    output: str | Path,
    dtype: torch.dtype | str = "auto",
    decoder_dtype: torch.dtype | str = "float32",
) -> None:
    """Write a model folder that needs nothing else: weights, configuration, processor, how to load it.

    Args:
        folder: a trained model, or a checkpoint of a run.
        dtype: of all weights but the tokenizer's; "auto" leaves it.
        decoder_dtype: in which the tokenizer's two decoders are written; they are float32 again once loaded. What
            chooses codes is always written in float32.

    Raises:
        ValueError: the folder is no whole model, or the output is there already or cannot be written.
    """
    model, processor = load_model(folder, dtype)
    if isinstance(decoder_dtype, str):
        decoder_dtype = getattr(torch, decoder_dtype)
    for decoder in (model.vision_tower.pixel_decoder, model.vision_tower.semantic_decoder):
        decoder.to(decoder_dtype)

    def write(out: Path) -> None:
        save_model(model, out, max_shard_size="5GB")
        processor.save_pretrained(out)
        (out / "README.md").write_text(_model_card(model))

    write_folder(output, write)


def _model_card(model: EvoTokLlavaForConditionalGeneration) -> str:
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    drawing = DrawingOptions().for_model(model).settings()
    size, tower = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.vision_tower))
    rows = {
        "text backbone": f"{text.model_type}, {text.num_hidden_layers} layers, {text.hidden_size} wide",
        "image tokenizer": f"{vision.image_size} x {vision.image_size} pixels, {vision.num_positions} positions, "
        f"{vision.num_quantizers} levels of {vision.codebook_size} codes",
        "image head": f"{_head_in_words(config)}, {vision.pixel_depth} levels",
        "parameters": f"{size:.1f} M in {str(model.dtype).removeprefix('torch.')}",
        "of the tokenizer": f"{tower:.1f} M in float32",
        "draws with": ", ".join(f"{name} {value}" for name, value in drawing.items() if name != "negative_prompt"),
    }
    return _MODEL_CARD.replace("ROWS", "\n".join(f"| {name} | {value} |" for name, value in rows.items()))


def _head_in_words(config: EvoTokLlavaConfig) -> str:
    if config.image_head == "flat":
        how = "rows tied to the codebooks" if config.residual_embeddings == "tied" else "rows of their own"
        return f"flat: residual tokens are tokens of the LLM, {how}"
    return f"depth transformer, {config.head_num_layers} layers, {config.head_hidden_size} wide"


_MODEL_CARD = """# EvoTok-LLaVA

One model that answers questions about images and draws images.

| part | |
|---|---|
ROWS

It needs the package `evotok` (`import llava_ext`). In this folder:

```python
from llava_ext import EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor

model = EvoTokLlavaForConditionalGeneration.from_pretrained(".").eval()
processor = EvoTokLlavaProcessor.from_pretrained(".")
image = model.generate_images("a photo of a red circle", processor=processor, seed=0)[0]
image.save("drawn.png")

inputs = processor("<image>\\nWhat is it?", images=[image])
ids = model.generate(**inputs, max_new_tokens=32)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

```bash
evotok-llava draw "a photo of a red circle" --model . -o drawn/
evotok-llava chat "What is it?" --image drawn.png --model .
```
"""
