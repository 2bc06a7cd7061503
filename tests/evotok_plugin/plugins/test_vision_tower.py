"""EvoTok as the vision tower of transformers' LLaVA classes and of the LLaVA code bases."""

import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
)

from evotok_plugin import (
    EvoTokImageProcessor,
    EvoTokModel,
    EvoTokVisionConfig,
    EvoTokVisionImageProcessor,
    EvoTokVisionModel,
    EvoTokVisionTower,
    register_llava,
)

POSITIONS, WIDTH = 9, 128  # of the tiny tokenizer
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_evotok_folder):
    return EvoTokModel.from_pretrained(tiny_evotok_folder)


@pytest.fixture
def tower(tiny_evotok_folder):
    return EvoTokVisionModel.from_pretrained(tiny_evotok_folder)


@pytest.fixture(scope="module")
def pixel_values():
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def features(tokenizer, pixel_values):
    with torch.no_grad():
        return tokenizer(pixel_values).features


@pytest.fixture(scope="module")
def pictures():
    """A square, a wide and a tall one."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((64, 64), (40, 96), (90, 50))
    ]


# The tower itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 0, [-1], True])
def test_the_layer_to_read_is_the_tokenizer_s_semantic_features(tower, pixel_values, features, layer):
    output = tower(pixel_values, output_hidden_states=layer, return_dict=True)
    torch.testing.assert_close(output.last_hidden_state, features, atol=1e-4, rtol=1e-4)
    assert len(output.hidden_states) == 1 and output.hidden_states[-1] is output.last_hidden_state
    assert features.shape == (2, POSITIONS, WIDTH) and tower.config.hidden_size == WIDTH


def test_hidden_states_come_when_asked_for(tower, pixel_values):
    assert tower(pixel_values).hidden_states is None
    assert tower(pixel_values, output_hidden_states=False).hidden_states is None
    (only,) = tower(pixel_values, return_dict=False)
    assert only.shape == (2, POSITIONS, WIDTH)


@pytest.mark.parametrize("layer", [-2, 1, [-1, -2]])
def test_a_layer_that_does_not_exist_is_explained(tower, pixel_values, layer):
    with pytest.raises(ValueError, match="set vision_feature_layer=-1 and vision_feature_select_strategy"):
        tower(pixel_values, output_hidden_states=layer)


def test_a_tokenizer_folder_gives_every_weight_but_those_of_the_pixel_decoder(tiny_evotok_folder, tokenizer):
    tower, report = EvoTokVisionModel.from_pretrained(tiny_evotok_folder, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {name: v for name, v in tokenizer.state_dict().items() if not name.startswith("pixel_decoder.")}
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())


def test_the_auto_classes_know_a_saved_tower(tower, tmp_path, pixel_values):
    tower.save_pretrained(tmp_path)
    EvoTokVisionImageProcessor(size=48).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, EvoTokVisionModel) and isinstance(loaded.config, EvoTokVisionConfig)
    assert torch.equal(loaded(pixel_values).last_hidden_state, tower(pixel_values).last_hidden_state)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, EvoTokVisionImageProcessor) and processor.size == {"shortest_edge": 48}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "evotok_vision"


def test_a_folder_of_something_else_is_refused(tiny_backbone_folder):
    with pytest.raises(ValueError, match="holds a qwen2 vision tower, expected evotok or evotok_vision"):
        EvoTokVisionModel.from_pretrained(tiny_backbone_folder)


def test_a_tower_is_taken_out_of_the_model_around_it(tiny_mllm, features, pixel_values, tmp_path):
    tiny_mllm[0].save_pretrained(tmp_path)
    tower, report = EvoTokVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(tower(pixel_values).last_hidden_state, features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("from_folder", [True, False])
def test_codebooks_never_learn(tiny_evotok_folder, pixel_values, from_folder):
    config = EvoTokVisionConfig.from_pretrained(tiny_evotok_folder)
    tower = EvoTokVisionModel.from_pretrained(tiny_evotok_folder) if from_folder else AutoModel.from_config(config)
    before = tower.quantizer.codebooks.clone()
    for prepare in (lambda: None, tower.train, torch.nn.ModuleList([tower]).train):
        prepare()
        tower(pixel_values).last_hidden_state.sum().backward()
        assert torch.equal(tower.quantizer.codebooks, before)
    assert tower.training  # the layers take part in gradient checkpointing, which asks for this


def test_an_unfrozen_tower_gets_the_straight_through_gradient(tower, pixel_values):
    weights = torch.randn(2, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))
    parameters = list(tower.encoder.parameters()) + list(tower.semantic_decoder.parameters())
    found = torch.autograd.grad((tower(pixel_values).last_hidden_state * weights).sum(), parameters)

    latents = tower.encoder(pixel_values)  # the same by hand: quantized forward, identity backward
    codes = tower.quantizer(latents).codes
    quantized = sum(tower.quantizer.codebooks[level][codes[..., level]] for level in range(codes.shape[-1]))
    by_hand = tower.semantic_decoder(latents + (quantized - latents).detach(), (3, 3))
    expected = torch.autograd.grad((by_hand * weights).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert any(gradient.abs().max() > 0 for gradient in found)


def test_gradient_checkpointing_changes_no_gradient(tower, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        tower.train().zero_grad()
        if checkpointing:
            tower.gradient_checkpointing_enable()
        tower(pixel_values).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("how", ["from_pretrained", "to", "from_config"])
def test_codebooks_stay_in_float32(tiny_evotok_folder, tower, tokenizer, pixel_values, features, how):
    if how == "from_pretrained":
        half = EvoTokVisionModel.from_pretrained(tiny_evotok_folder, dtype=torch.bfloat16)
    elif how == "to":
        half = tower.to(torch.bfloat16)
    else:
        half = AutoModel.from_config(tower.config, dtype=torch.bfloat16)
        half.load_state_dict(tower.state_dict())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.quantizer.codebooks, tokenizer.quantizer.codebooks)
    output = half(pixel_values).last_hidden_state
    assert output.dtype == torch.bfloat16 and output.shape == features.shape


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_it_works_beside_a_language_model_that_attends_in_another_way(tower, pixel_values, features, attention):
    other = AutoModel.from_config(tower.config, attn_implementation=attention)
    other.load_state_dict(tower.state_dict())
    torch.testing.assert_close(other(pixel_values).last_hidden_state, features, atol=1e-4, rtol=1e-4)


def test_images_of_another_size(tower, tokenizer):
    pixel_values = torch.rand(1, 3, 64, 96) * 2 - 1
    found = tower(pixel_values).last_hidden_state
    assert found.shape == (1, 24, WIDTH)
    torch.testing.assert_close(found, tokenizer(pixel_values).features, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="multiples of the patch size 16"):
        tower(torch.zeros(1, 3, 50, 48))


# transformers' LLaVA classes -----------------------------------------------------------------------------------


def text_side(folder):
    """A text tokenizer with the placeholders, and a text configuration of its size."""
    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    words.add_tokens(["<image>", "<video>"], special_tokens=True)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(words)
    return words, config


def assembled(model_class, config_class, tower, text_config, words, **options):
    """A LLaVA with random projector and language model around the tower."""
    torch.manual_seed(0)
    config = config_class(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **options,
    )
    model = model_class(config).eval()
    model.model.vision_tower = tower
    return model


@pytest.fixture
def llava(tower, tiny_backbone_folder, tiny_evotok_folder):
    words, text_config = text_side(tiny_backbone_folder)
    processor = LlavaProcessor(
        image_processor=EvoTokVisionImageProcessor.from_pretrained(tiny_evotok_folder),
        tokenizer=words,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
    return assembled(LlavaForConditionalGeneration, LlavaConfig, tower, text_config, words), processor


def test_placeholders_and_features_agree(llava, pictures):
    model, processor = llava
    texts, images = ["<image> what", "<image> beside <image>"], [pictures[:1], pictures[1:]]
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
    counts = (batch["input_ids"] == model.config.image_token_id).sum(dim=1)
    assert counts.tolist() == [POSITIONS, 2 * POSITIONS] and batch["pixel_values"].shape == (3, 3, 48, 48)
    assert torch.isfinite(model(**batch, labels=batch["input_ids"]).loss)
    sizes = [picture.size[::-1] for picture in pictures]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [POSITIONS] * 3


def test_the_tokenizer_s_own_image_processor_does_for_one_picture_a_text(llava, pictures):
    _, processor = llava
    plain = LlavaProcessor(
        EvoTokImageProcessor(size=48), processor.tokenizer, 16, "full", num_additional_image_tokens=0
    )
    arguments = {"text": ["<image> a", "<image> b"], "images": pictures[:2], "return_tensors": "pt"}
    found, expected = plain(**arguments), processor(**arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_the_language_model_reads_the_projected_semantic_features(llava, tokenizer, pictures):
    model, processor = llava
    batch = processor(text=["<image> what"], images=pictures[:1], return_tensors="pt")
    projected = model.model.multi_modal_projector(tokenizer(batch["pixel_values"]).features)
    output = model(**batch)
    torch.testing.assert_close(output.image_hidden_states.reshape(projected.shape), projected, atol=1e-4, rtol=1e-4)
    other = processor(text=["<image> what"], images=pictures[1:2], return_tensors="pt")
    assert not torch.allclose(output.logits, model(**other).logits, atol=1e-4)


def test_a_chat_with_images_is_answered_alone_as_in_a_batch(llava, pictures):
    model, processor = llava
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(pictures, (" a", " what is it", " how many"), strict=True)
    ]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **settings)
    together = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, -5:]
    for chat, answer in zip(chats, together, strict=True):
        inputs = processor.apply_chat_template([chat], **settings)
        alone = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(alone[0, -5:], answer)


def test_saving_and_loading_are_bit_equal(llava, pictures, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaForConditionalGeneration) and isinstance(again, LlavaProcessor)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    arguments = {"text": ["<image> what"], "images": pictures[:1], "return_tensors": "pt"}
    batch, same = processor(**arguments), again(**arguments)
    assert all(torch.equal(value, same[name]) for name, value in batch.items())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**same).logits)
    assert isinstance(EvoTokVisionConfig.from_pretrained(tmp_path), EvoTokVisionConfig)


def test_bfloat16_and_attention_by_part(llava, tokenizer, pictures, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path)
    batch = processor(text=["<image> what"], images=pictures[:1], return_tensors="pt")
    parts = {"text_config": "eager", "vision_config": "sdpa"}
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=parts)
    assert torch.equal(half.model.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks)
    assert half.model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16
    assert torch.isfinite(half(**batch, labels=batch["input_ids"]).loss)


def test_adapters_and_gradient_checkpointing_work_around_a_frozen_tower(llava, pictures):
    model, processor = llava
    model.model.vision_tower.requires_grad_(False)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    batch = processor(text=["<image> what"], images=pictures[:1], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without and all(name.startswith("model.vision_tower.") for name in without)


def test_training_the_projector_leaves_the_tower_as_it_was(llava, pictures):
    model, processor = llava
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = processor(text=["<image> a ring"], images=pictures[:1], return_tensors="pt")
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert losses[-1] < losses[0] and changed and all("multi_modal_projector" in name for name in changed)


PINPOINTS = [[48, 96], [96, 48], [96, 96]]
SCALE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_grid_pinpoints": PINPOINTS}


@pytest.fixture(params=["next", "onevision"])
def tiling(request, tower, tiny_backbone_folder):
    """LLaVA-NeXT and OneVision, which read a picture whole and in tiles, with their own processors."""
    words, text_config = text_side(tiny_backbone_folder)
    if request.param == "next":
        images = LlavaNextImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, **SCALE)
        processor = LlavaNextProcessor(images, words, 16, "full", num_additional_image_tokens=0)
        classes, options = (LlavaNextForConditionalGeneration, LlavaNextConfig), {}
    else:
        size = {"height": 48, "width": 48}
        videos = LlavaOnevisionVideoProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        images = LlavaOnevisionImageProcessor(size=size, **SCALE)
        processor = LlavaOnevisionProcessor(images, words, videos, POSITIONS, "full")
        classes = (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig)
        options = {"video_token_index": words.convert_tokens_to_ids("<video>")}
    model = assembled(*classes, tower, text_config, words, image_grid_pinpoints=PINPOINTS, **options)
    return model, processor


def test_tiles_and_placeholders_agree(tiling, pictures):
    model, processor = tiling
    texts, images = ["<image> a", "<image> what", "<image> b"], [[picture] for picture in pictures]
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assert batch["pixel_values"].ndim == 5 and batch["pixel_values"].abs().max() <= 1
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss) and model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_first_tile_is_the_whole_picture_in_the_tokenizer_s_features(tiling, tokenizer, pictures):
    model, processor = tiling
    batch = processor(text=["<image> what"], images=[pictures[1:2]], return_tensors="pt")
    whole = model.model.multi_modal_projector(tokenizer(batch["pixel_values"][0, :1]).features)[0]
    read = model(**batch).image_hidden_states
    torch.testing.assert_close(read[:POSITIONS], whole, atol=1e-4, rtol=1e-4)


def test_models_with_tiles_generate_and_load_again(tiling, pictures, tmp_path):
    model, processor = tiling
    batch = processor(text=["<image> what"], images=[pictures[2:]], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_onevision_reads_frames(tower, tiny_backbone_folder, pictures):
    words, text_config = text_side(tiny_backbone_folder)
    ids = words.convert_tokens_to_ids(["<image>", "<video>"])
    model = assembled(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, tower, text_config, words,
        video_token_index=ids[1], image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    frames = torch.rand(1, 4, 3, 48, 48) * 2 - 1
    inputs = torch.tensor([[5, *[ids[1]] * (4 * 4 + 1), 6]])  # 3x3 positions are pooled to 2x2, and a newline
    assert torch.isfinite(model(input_ids=inputs, pixel_values_videos=frames, labels=inputs).loss)


# The LLaVA code bases, stood in for by what they ask of a tower -----------------------------------------------

BUILDER = """
def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    return {"built_by": "llava", "name": name, **kwargs}
"""
ARCH = """
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .multimodal_encoder.builder import build_vision_tower


class LlavaMetaModel:
    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=config.delay_load)
            self.mm_projector = nn.Linear(config.mm_hidden_size, config.hidden_size)

    def initialize_vision_modules(self, model_args):
        self.config.mm_vision_tower = model_args.vision_tower
        if getattr(self, "vision_tower", None) is None:
            self.vision_tower = build_vision_tower(model_args)
        else:
            self.vision_tower.load_model()
        self.config.mm_hidden_size = self.vision_tower.hidden_size
        self.mm_projector = nn.Linear(self.config.mm_hidden_size, self.config.hidden_size)


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen_stand_in"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    config_class = LlavaQwenConfig

    def __init__(self, config):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def encode_images(self, images):
        return self.model.mm_projector(self.model.vision_tower(images))
"""


@pytest.fixture
def llava_code(tmp_path, monkeypatch):
    """A package `llava` to import that hangs together as LLaVA's does; `arch()` imports its models."""
    encoder = tmp_path / "code" / "llava" / "model" / "multimodal_encoder"
    encoder.mkdir(parents=True)
    for folder in (encoder, encoder.parent, encoder.parent.parent):
        (folder / "__init__.py").touch()
    (encoder / "builder.py").write_text(BUILDER)
    (encoder.parent / "llava_arch.py").write_text(ARCH)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield SimpleNamespace(
        arch=lambda: importlib.import_module("llava.model.llava_arch"),
        builder=lambda: importlib.import_module("llava.model.multimodal_encoder.builder"),
        folder=tmp_path / "code" / "llava",
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
        del sys.modules[name]


@pytest.mark.parametrize("llava_first", [True, False])
def test_one_call_makes_llava_build_evotok_towers(llava_code, tiny_evotok_folder, llava_first):
    if llava_first:
        llava_code.arch()
    register_llava()
    for module in (llava_code.builder(), llava_code.arch()):
        for arguments in ({"mm_vision_tower": str(tiny_evotok_folder)}, {"vision_tower": str(tiny_evotok_folder)}):
            assert isinstance(module.build_vision_tower(SimpleNamespace(**arguments)), EvoTokVisionTower)


def test_other_towers_are_built_by_llava(llava_code, tiny_backbone_folder, tmp_path):
    register_llava()
    (tmp_path / "config.json").write_text("no json")
    build = llava_code.arch().build_vision_tower
    for name in ("openai/clip-vit-large-patch14-336", str(tiny_backbone_folder), str(tmp_path), "", None):
        built = build(SimpleNamespace(mm_vision_tower=name), delay_load=True)
        assert built == {"built_by": "llava", "name": name, "delay_load": True}


def test_calling_it_again_changes_nothing(llava_code, tiny_evotok_folder):
    register_llava()
    once = llava_code.arch().build_vision_tower
    register_llava()
    assert llava_code.arch().build_vision_tower is once is llava_code.builder().build_vision_tower
    assert once(SimpleNamespace(vision_tower="clip"))["built_by"] == "llava"


def test_without_llava_it_says_what_to_do(monkeypatch):
    def absent(name, path=None, target=None):
        if name == "llava":
            raise ModuleNotFoundError("No module named 'llava'", name=name)

    monkeypatch.delitem(sys.modules, "llava", raising=False)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=absent), *sys.meta_path])
    with pytest.raises(ImportError, match="llava is not installed; install the LLaVA or LLaVA-NeXT code base"):
        register_llava()


def test_a_llava_that_cannot_be_imported_says_why(llava_code):
    (llava_code.folder / "model" / "__init__.py").write_text("from transformers import no_such_name")
    with pytest.raises(ImportError, match="llava cannot be imported .*no_such_name.*5.17 or newer"):
        register_llava()


def test_the_tower_has_what_llava_asks_of_one(tiny_evotok_folder, pixel_values, features):
    tower = EvoTokVisionTower(str(tiny_evotok_folder))
    assert tower.is_loaded and not any(p.requires_grad for p in tower.parameters())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size) == (WIDTH, 9, 3, 48)
    assert (tower.config.hidden_size, tower.config.image_size, tower.config.patch_size) == (WIDTH, 48, 16)
    assert tower.dtype == torch.float32 and tower.device == torch.device("cpu")
    assert torch.equal(tower.dummy_feature, torch.zeros(1, WIDTH))
    found = tower(pixel_values)
    torch.testing.assert_close(found, features, atol=1e-4, rtol=1e-4)
    assert not found.requires_grad
    one_by_one = tower(list(pixel_values))
    assert [part.shape for part in one_by_one] == [(1, POSITIONS, WIDTH)] * 2
    torch.testing.assert_close(torch.cat(one_by_one), found, atol=1e-4, rtol=1e-4)


def test_features_come_in_the_dtype_of_the_images(tiny_evotok_folder, tokenizer, pixel_values):
    tower = EvoTokVisionTower(str(tiny_evotok_folder)).to(dtype=torch.bfloat16)
    assert tower.dtype == tower.dummy_feature.dtype == torch.bfloat16
    assert torch.equal(tower.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert tower(pixel_values.to(dtype)).dtype == dtype
        assert tower([image.to(dtype) for image in pixel_values])[0].dtype == dtype


def test_weights_may_be_loaded_later(tiny_evotok_folder, pixel_values, features):
    tower = EvoTokVisionTower(str(tiny_evotok_folder), SimpleNamespace(), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters()) and tower.hidden_size == WIDTH
    assert tower.image_processor.crop_size == {"height": 48, "width": 48}
    with pytest.raises(ValueError, match="are not loaded yet; call load_model"):
        tower(pixel_values)
    tower.load_model(device_map="cpu")
    held = tower.vision_tower
    tower.load_model()
    assert tower.is_loaded and tower.vision_tower is held and not any(p.requires_grad for p in tower.parameters())
    torch.testing.assert_close(tower(pixel_values), features, atol=1e-4, rtol=1e-4)


def test_a_folder_that_is_not_whole_is_refused(tiny_evotok_folder, tokenizer, tmp_path):
    shutil.copytree(tiny_evotok_folder, tmp_path / "tower")
    state = {name: value for name, value in tokenizer.state_dict().items() if name != "quantizer.codebooks"}
    tokenizer.save_pretrained(tmp_path / "tower", state_dict=state)
    with pytest.raises(ValueError, match=r"weights 1 missing \(quantizer.codebooks\)"):
        EvoTokVisionTower(tmp_path / "tower")
    weights = tmp_path / "tower" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors is cut off or damaged"):
        EvoTokVisionTower(tmp_path / "tower")
    weights.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        EvoTokVisionTower(tmp_path / "tower")


def llava_config(arch, backbone, tower, **options):
    config = arch.LlavaQwenConfig.from_pretrained(backbone)
    settings = {"mm_vision_tower": str(tower), "mm_hidden_size": WIDTH, "delay_load": False} | options
    for name, value in settings.items():
        setattr(config, name, value)
    return config


TRAINED = [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}]


@pytest.mark.parametrize(
    ("delay_load", "holds_tower", "dtype"), itertools.product([False, True], [False, True], ["float32", "bfloat16"])
)
def test_a_frozen_tower_inside_from_pretrained_comes_from_its_folder(
    llava_code,
    tiny_backbone_folder,
    tiny_evotok_folder,
    pixel_values,
    features,
    tmp_path,
    delay_load,
    holds_tower,
    dtype,
):
    """There models are built without memory, and what their checkpoint lacks would become random numbers."""
    register_llava()
    arch = llava_code.arch()
    config = llava_config(arch, tiny_backbone_folder, tiny_evotok_folder, delay_load=delay_load)
    model = arch.LlavaQwenForCausalLM.from_pretrained(tiny_backbone_folder, config=config)
    if holds_tower:
        model.model.vision_tower.load_model()
    model.save_pretrained(tmp_path / "llava")

    loaded = arch.LlavaQwenForCausalLM.from_pretrained(tmp_path / "llava", dtype=dtype)
    loaded.model.vision_tower.load_model()
    torch.testing.assert_close(loaded.model.vision_tower(pixel_values), features, atol=1e-4, rtol=1e-4)
    assert loaded.encode_images(pixel_values.to(loaded.dtype)).shape == (2, POSITIONS, 32)


@pytest.mark.parametrize(("trained", "delay_load"), itertools.product(TRAINED, [False, True]))
def test_a_trained_tower_comes_from_the_checkpoint_and_what_that_lacks_from_its_folder(
    llava_code,
    tiny_backbone_folder,
    tiny_evotok_folder,
    tokenizer,
    pixel_values,
    features,
    tmp_path,
    trained,
    delay_load,
):
    register_llava()
    arch = llava_code.arch()
    options = {"delay_load": delay_load, **trained}
    config = llava_config(arch, tiny_backbone_folder, tiny_evotok_folder, **options)
    model = arch.LlavaQwenForCausalLM.from_pretrained(tiny_backbone_folder, config=config)
    tower = model.model.vision_tower
    assert tower.is_loaded
    torch.testing.assert_close(tower(pixel_values), features, atol=1e-4, rtol=1e-4)  # the backbone holds nothing of it

    with torch.no_grad():
        tower.vision_tower.encoder.to_latent[2].bias += 1
    learned = tower(pixel_values)
    weights = {name: value for name, value in model.state_dict().items() if "quantizer" not in name}
    model.save_pretrained(tmp_path / "llava", state_dict=weights)  # parameters alone, as with adapters
    for dtype in (torch.float32, torch.bfloat16):
        again = arch.LlavaQwenForCausalLM.from_pretrained(tmp_path / "llava", dtype=dtype).model.vision_tower
        again.load_model()
        assert again.dtype == dtype and torch.equal(
            again.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks
        )
        if dtype == torch.float32:
            assert torch.equal(again(pixel_values), learned) and not torch.allclose(learned, features, atol=1e-2)


def test_a_projector_is_trained_from_pictures(
    llava_code, tiny_backbone_folder, tiny_evotok_folder, tokenizer, pictures
):
    """A plain language model becomes a LLaVA, as the code bases do it in their first stage."""
    register_llava()
    arch = llava_code.arch()
    model = arch.LlavaQwenForCausalLM.from_pretrained(tiny_backbone_folder)
    model.model.initialize_vision_modules(SimpleNamespace(vision_tower=str(tiny_evotok_folder)))
    model.train()
    tower = model.model.vision_tower
    images = torch.stack(
        [tower.image_processor.preprocess(p, return_tensors="pt")["pixel_values"][0] for p in pictures]
    )
    with torch.no_grad():
        torch.testing.assert_close(tower(images), tokenizer(images).features, atol=1e-4, rtol=1e-4)
    embedded = model.encode_images(images)
    model(inputs_embeds=embedded, labels=torch.zeros(3, POSITIONS, dtype=torch.long)).loss.backward()
    assert model.model.mm_projector.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in tower.parameters())
    assert torch.equal(tower.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks)


def test_an_unfrozen_tower_learns(tiny_evotok_folder, pixel_values):
    tower = EvoTokVisionTower(str(tiny_evotok_folder)).requires_grad_(True)
    tower(pixel_values).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


def test_the_image_processor_has_what_llava_s_data_code_reads(pictures):
    processor, plain = EvoTokVisionImageProcessor(size=48), EvoTokImageProcessor(size=48)
    assert processor.size["shortest_edge"] == processor.crop_size["height"] == processor.crop_size["width"] == 48
    assert tuple(int(255 * mean) for mean in processor.image_mean) == (127, 127, 127)
    expected = plain(pictures).pixel_values
    for images in (pictures, [pictures[:1], pictures[1:]], tuple(pictures)):
        assert torch.equal(processor.preprocess(images, return_tensors="pt")["pixel_values"], expected)
    frames = np.stack([np.array(pictures[0])] * 4)
    assert torch.equal(processor(frames).pixel_values, expected[:1].expand(4, -1, -1, -1))
    with pytest.raises(ValueError, match="at least one image"):
        processor([[]])


def test_photographs_are_read_through_both_routes(tiny_evotok_folder, tower):
    folder = Path(__file__).resolve().parents[4] / "shared" / "data" / "photos_256"
    if not folder.is_dir():
        pytest.skip("the photographs (../shared/data/photos_256) are not here")
    photographs = [Image.open(path) for path in sorted(folder.glob("*.jpg"))[:4]]
    plugged = EvoTokVisionTower(str(tiny_evotok_folder))
    pixel_values = plugged.image_processor(photographs).pixel_values
    found = plugged(pixel_values)
    assert torch.equal(found, tower(pixel_values).last_hidden_state)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
