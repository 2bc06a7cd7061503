"""EvoTok as a vision model of transformers: on its own, and in transformers' LLaVA classes."""

import json

import numpy as np
import pytest
import torch
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
    EvoTokVisionConfig,
    EvoTokVisionImageProcessor,
    EvoTokVisionModel,
)
from evotok_plugin.errors import UserError

POSITIONS, WIDTH = 9, 128  # of the tiny tokenizer
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


# The tower on its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 0, [-1], True])
def test_the_hidden_state_is_the_tokenizer_s_semantic_features(tower, pixel_values, features, layer):
    output = tower(pixel_values, output_hidden_states=layer, return_dict=True)
    torch.testing.assert_close(output.last_hidden_state, features, atol=1e-4, rtol=1e-4)
    assert len(output.hidden_states) == 1 and output.hidden_states[-1] is output.last_hidden_state
    assert features.shape == (2, POSITIONS, WIDTH) and tower.config.hidden_size == WIDTH


def test_hidden_states_are_returned_on_request(tower, pixel_values):
    assert tower(pixel_values).hidden_states is None
    assert tower(pixel_values, output_hidden_states=False).hidden_states is None
    (only,) = tower(pixel_values, return_dict=False)
    assert only.shape == (2, POSITIONS, WIDTH)


@pytest.mark.parametrize("layer", [-2, 1, [-1, -2]])
def test_a_layer_that_does_not_exist_is_explained(tower, pixel_values, layer):
    with pytest.raises(UserError, match="set vision_feature_layer=-1 and vision_feature_select_strategy"):
        tower(pixel_values, output_hidden_states=layer)


def test_a_tower_is_loaded_from_a_tokenizer_folder_without_the_pixel_decoder(tiny_evotok_folder, tokenizer):
    tower, report = EvoTokVisionModel.from_pretrained(tiny_evotok_folder, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {name: v for name, v in tokenizer.state_dict().items() if not name.startswith("pixel_decoder.")}
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())


def test_the_auto_classes_load_a_saved_tower(tower, tmp_path, pixel_values):
    tower.save_pretrained(tmp_path)
    EvoTokVisionImageProcessor(size=48).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, EvoTokVisionModel) and isinstance(loaded.config, EvoTokVisionConfig)
    assert torch.equal(loaded(pixel_values).last_hidden_state, tower(pixel_values).last_hidden_state)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, EvoTokVisionImageProcessor) and processor.size == {"shortest_edge": 48}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "evotok_vision"


def test_a_folder_of_another_model_is_rejected(tiny_backbone_folder):
    with pytest.raises(UserError, match="holds a qwen2 vision tower, expected evotok or evotok_vision"):
        EvoTokVisionModel.from_pretrained(tiny_backbone_folder)


def test_a_tower_is_loaded_from_the_model_that_contains_it(tiny_mllm, features, pixel_values, tmp_path):
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
    assert tower.training  # gradient checkpointing of the layers requires this


def test_an_unfrozen_tower_gets_the_straight_through_gradient(tower, pixel_values):
    weights = torch.randn(2, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))
    parameters = list(tower.encoder.parameters()) + list(tower.semantic_decoder.parameters())
    found = torch.autograd.grad((tower(pixel_values).last_hidden_state * weights).sum(), parameters)

    latents = tower.encoder(pixel_values)  # by hand: quantized in the forward pass, identity in the backward pass
    codes = tower.quantizer(latents).codes
    quantized = sum(tower.quantizer.codebooks[level][codes[..., level]] for level in range(codes.shape[-1]))
    by_hand = tower.semantic_decoder(latents + (quantized - latents).detach(), (3, 3))
    expected = torch.autograd.grad((by_hand * weights).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert any(gradient.abs().max() > 0 for gradient in found)


def test_gradient_checkpointing_does_not_change_gradients(tower, pixel_values):
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
def test_the_attention_implementation_does_not_change_features(tower, pixel_values, features, attention):
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


def test_the_image_processor_has_the_attributes_that_llava_reads(pictures):
    processor, plain = EvoTokVisionImageProcessor(size=48), EvoTokImageProcessor(size=48)
    assert processor.size["shortest_edge"] == processor.crop_size["height"] == processor.crop_size["width"] == 48
    assert tuple(int(255 * mean) for mean in processor.image_mean) == (127, 127, 127)
    expected = plain(pictures).pixel_values
    for images in (pictures, [pictures[:1], pictures[1:]], tuple(pictures)):
        assert torch.equal(processor.preprocess(images, return_tensors="pt")["pixel_values"], expected)
    frames = np.stack([np.array(pictures[0])] * 4)
    assert torch.equal(processor(frames).pixel_values, expected[:1].expand(4, -1, -1, -1))
    with pytest.raises(UserError, match="at least one image"):
        processor([[]])


# transformers' LLaVA classes -----------------------------------------------------------------------------------


def text_side(folder):
    """A text tokenizer with placeholder tokens, and a text configuration with its vocabulary size."""
    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    words.add_tokens(["<image>", "<video>"], special_tokens=True)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(words)
    return words, config


def assembled(model_class, config_class, tower, text_config, words, **options):
    """A LLaVA model with the tower and a random projector and language model."""
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


def test_the_tokenizer_s_image_processor_is_sufficient_for_one_image_per_text(llava, pictures):
    _, processor = llava
    plain = LlavaProcessor(
        EvoTokImageProcessor(size=48), processor.tokenizer, 16, "full", num_additional_image_tokens=0
    )
    arguments = {"text": ["<image> a", "<image> b"], "images": pictures[:2], "return_tensors": "pt"}
    found, expected = plain(**arguments), processor(**arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_the_language_model_receives_the_projected_semantic_features(llava, tokenizer, pictures):
    model, processor = llava
    batch = processor(text=["<image> what"], images=pictures[:1], return_tensors="pt")
    projected = model.model.multi_modal_projector(tokenizer(batch["pixel_values"]).features)
    output = model(**batch)
    torch.testing.assert_close(output.image_hidden_states.reshape(projected.shape), projected, atol=1e-4, rtol=1e-4)
    other = processor(text=["<image> what"], images=pictures[1:2], return_tensors="pt")
    assert not torch.allclose(output.logits, model(**other).logits, atol=1e-4)


def test_a_chat_with_images_gets_the_same_answer_alone_and_in_a_batch(llava, pictures):
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


def test_saving_and_loading_are_bit_identical(llava, pictures, tmp_path):
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


def test_bfloat16_and_separate_attention_implementations(llava, tokenizer, pictures, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path)
    batch = processor(text=["<image> what"], images=pictures[:1], return_tensors="pt")
    parts = {"text_config": "eager", "vision_config": "sdpa"}
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=parts)
    assert torch.equal(half.model.vision_tower.quantizer.codebooks, tokenizer.quantizer.codebooks)
    assert half.model.multi_modal_projector.linear_1.weight.dtype == torch.bfloat16
    assert torch.isfinite(half(**batch, labels=batch["input_ids"]).loss)


def test_input_gradients_and_gradient_checkpointing_work_with_a_frozen_tower(llava, pictures):
    model, processor = llava
    model.model.vision_tower.requires_grad_(False)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    batch = processor(text=["<image> what"], images=pictures[:1], return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without and all(name.startswith("model.vision_tower.") for name in without)


def test_training_the_projector_does_not_change_the_tower(llava, pictures):
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
    """LLaVA-NeXT and OneVision, which read an entire image and its tiles, with their own processors."""
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
def test_the_features_of_the_first_tile_are_those_of_the_entire_image(tiling, tokenizer, pictures):
    model, processor = tiling
    batch = processor(text=["<image> what"], images=[pictures[1:2]], return_tensors="pt")
    whole = model.model.multi_modal_projector(tokenizer(batch["pixel_values"][0, :1]).features)[0]
    read = model(**batch).image_hidden_states
    torch.testing.assert_close(read[:POSITIONS], whole, atol=1e-4, rtol=1e-4)


def test_models_with_tiles_generate_and_can_be_saved_and_loaded(tiling, pictures, tmp_path):
    model, processor = tiling
    batch = processor(text=["<image> what"], images=[pictures[2:]], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_onevision_reads_video_frames(tower, tiny_backbone_folder, pictures):
    words, text_config = text_side(tiny_backbone_folder)
    ids = words.convert_tokens_to_ids(["<image>", "<video>"])
    model = assembled(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, tower, text_config, words,
        video_token_index=ids[1], image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    frames = torch.rand(1, 4, 3, 48, 48) * 2 - 1
    inputs = torch.tensor([[5, *[ids[1]] * (4 * 4 + 1), 6]])  # 3x3 positions pooled to 2x2 per frame, and a newline
    assert torch.isfinite(model(input_ids=inputs, pixel_values_videos=frames, labels=inputs).loss)
