"""The multimodal model against naive expectations: mixed batches, folding, save and load, generation."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evotok_plugin.errors import UserError
from evotok_plugin.scenes.scene import render, sample_scene
from llava_ext import EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration
from llava_ext.data.collators import Collator
from llava_ext.data.dataset import Sample


def picture(rng) -> Image.Image:
    return render(sample_scene(rng, "two_object"))


def encode(model, processor, image):
    return model.vision_tower.encode(processor.image_processor(image).pixel_values).codes[0]


def conversation(processor, kind, codes):
    """Encode one sample of a kind as the data set does."""
    texts = {
        "read": [("<image>\nWhat is it?", "a ring"), ("Which color?", "red")],
        "draw": [("a photo of a ring", "<image>")],
        "both": [("<image>\nDraw it again.", "here: <image>")],
        "text": [("What is a ring?", "a round shape")],
    }[kind]
    messages = [m for q, a in texts for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    drawn = {"read": [None], "draw": [codes], "both": [None, codes], "text": []}[kind]
    encoded = processor.encode_conversation(messages, drawn)
    return Sample(encoded.input_ids, encoded.labels, [codes] * drawn.count(None))


@pytest.fixture(scope="module")
def samples(tiny_mllm):
    import numpy as np

    model, processor = tiny_mllm
    codes = encode(model, processor, picture(np.random.default_rng(1)))
    return [conversation(processor, kind, codes) for kind in ("read", "draw", "both", "text")]


def learned_counts(model, sample):
    residual = model.vocabulary.is_residual(sample.labels)
    return int(((sample.labels != -100) & ~residual).sum()), int(residual.sum()) // model.vocabulary.num_levels


def test_a_mixed_batch_has_the_losses_of_its_samples(tiny_mllm, samples):
    model, processor = tiny_mllm
    collate = Collator(processor)
    with torch.no_grad():
        together = model(**collate(samples))
        single = [model(**collate([sample])) for sample in samples]
    counts = [learned_counts(model, sample) for sample in samples]
    for index, name in enumerate(("text_loss", "image_loss")):
        weights = torch.tensor([float(count[index]) for count in counts])
        mean = (torch.stack([out[name] for out in single]) * weights).sum() / weights.sum()
        torch.testing.assert_close(together[name], mean, atol=1e-5, rtol=1e-5)
    assert counts[0][1] == 0 and counts[1][1] == 9 and counts[3][1] == 0
    torch.testing.assert_close(together.loss, together.text_loss + together.image_loss)


def test_image_loss_equals_a_position_by_position_computation(tiny_mllm, samples):
    """The head sees the hidden state before each position and the true codes of the levels before."""
    model, processor = tiny_mllm
    batch = Collator(processor)([samples[1]])
    ids = batch["input_ids"][0]
    start = int((ids == processor.image_start_id).nonzero()[0])
    codes = model.vocabulary.codes(ids[start + 1 : start + 1 + 9 * 4]).view(9, 4)
    with torch.no_grad():
        before = model.get_input_embeddings()(ids[: start + 1])
        written = model.embed_written(codes, torch.arange(9))
        hidden = model.language_model(inputs_embeds=torch.cat([before, written])[None]).last_hidden_state[0]
        losses = []
        for position in range(9):
            latents = model.vision_tower.level_latents(codes[None])[0, position][None]
            logits = model.image_head(hidden[start + position][None], latents)
            losses += [F.cross_entropy(level, codes[position, i][None]) for i, level in enumerate(logits)]
        expected = torch.stack(losses).mean()
        torch.testing.assert_close(model(**batch).image_loss, expected, atol=1e-5, rtol=1e-5)


def test_cached_levels_equal_teacher_forcing(tiny_mllm):
    model, _ = tiny_mllm
    head, hidden = model.image_head, torch.randn(5, 32)
    codes = torch.randint(0, model.vocabulary.codebook_size, (5, 4))
    latents = model.vision_tower.level_latents(codes[None])[0]
    with torch.no_grad():
        forced, cache = head(hidden, latents), head.new_cache(5)
        for level in range(4):
            conditioning = hidden if level == 0 else latents[:, :level].sum(dim=1)
            torch.testing.assert_close(head.step(level, conditioning, cache), forced[level], atol=1e-5, rtol=1e-5)


def test_every_trained_part_gets_gradients_from_any_batch_and_the_tokenizer_gets_none(
    tiny_backbone_folder, tiny_evotok_folder, samples
):
    from llava_ext.assembly import assemble

    torch.manual_seed(0)
    model, processor = assemble(tiny_backbone_folder, tiny_evotok_folder, 32, 2, 2)
    model.train()
    assert not model.vision_tower.training
    model(**Collator(processor)([samples[3]])).loss.backward()  # text alone, but every trained part takes part
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vision_tower."), name


def test_pixels_and_cached_codes_give_the_same_loss(tiny_mllm, samples, rng):
    model, processor = tiny_mllm
    image = picture(rng)
    sample = conversation(processor, "read", encode(model, processor, image))
    batch = Collator(processor)([sample])
    with torch.no_grad():
        from_codes = model(**batch).loss
        batch.pop("image_codes")
        from_pixels = model(**batch, pixel_values=processor.image_processor(image).pixel_values).loss
    torch.testing.assert_close(from_codes, from_pixels)


def test_images_and_placeholders_must_match(tiny_mllm, samples):
    model, processor = tiny_mllm
    batch = Collator(processor)([samples[0]])
    batch["image_codes"] = batch["image_codes"].repeat(2, 1, 1)
    with pytest.raises(UserError, match="9 image placeholders .* 18 image positions"):
        model(**batch)


def test_images_of_another_size_are_rejected_although_the_tokenizer_accepts_them(tiny_mllm, samples):
    model, processor = tiny_mllm
    vision = model.config.vision_config
    larger = torch.zeros(1, 3, 2 * vision.image_size, 2 * vision.image_size)
    codes = model.vision_tower.encode(larger).codes
    assert codes.shape[1] == 4 * vision.num_positions
    batch = Collator(processor)([samples[0]])
    for images, message in (
        ({"pixel_values": larger}, f"expected images of {vision.image_size} x {vision.image_size} pixels"),
        ({"image_codes": codes}, rf"expected image_codes \(I, {vision.num_positions}, L\)"),
    ):
        with pytest.raises(UserError, match=message):
            model(**batch | {"image_codes": None} | images)


def test_save_and_load_round_trip(tiny_mllm, samples, tmp_path):
    model, processor = tiny_mllm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, EvoTokLlavaForConditionalGeneration)
    again = AutoProcessor.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    batch = Collator(processor)(samples)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loaded.eval()(**batch).loss)
    text = "a ring"
    assert again.user_turns(text)["input_ids"].tolist() == processor.user_turns(text)["input_ids"].tolist()
    assert again.vocabulary == processor.vocabulary == loaded.vocabulary


def test_generate_gives_the_same_answers_in_a_batch_and_alone(tiny_mllm, rng):
    model, processor = tiny_mllm
    questions = ["What is it?", "How many rings are there in this image?"]
    images = [picture(rng), picture(rng)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": q}]}]
        for i, q in zip(images, questions, strict=True)
    ]
    settings = {"max_new_tokens": 6, "do_sample": False}

    def answer(batch):
        inputs = processor.apply_chat_template(batch, add_generation_prompt=True, tokenize=True)
        ids = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        return [row[row != model.generation_config.pad_token_id].tolist() for row in ids]

    assert answer(chats) == answer(chats[:1]) + answer(chats[1:])


@pytest.mark.parametrize("backbone", ["qwen3", "llama"])
def test_other_backbones(backbone, make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, tmp_path):
    from llava_ext.assembly import assemble

    model, processor = assemble(make_backbone(tiny_tokenizer_folder, tmp_path, backbone), tiny_evotok_folder, 32, 2, 2)
    codes = torch.randint(0, model.vocabulary.codebook_size, (9, 8))
    loss = model(**Collator(processor)([conversation(processor, kind, codes) for kind in ("read", "draw")])).loss
    assert torch.isfinite(loss)
    loss.backward()
    assert len(model.generate_images("a ring", processor, seed=1)) == 1


def test_config_rejects_ids_inside_the_residual_range():
    with pytest.raises(UserError, match="outside the residual range"):
        EvoTokLlavaConfig(residual_token_offset=0, image_token_id=5, image_start_token_id=6, image_end_token_id=7)


def test_gradient_checkpointing_does_not_change_gradients_of_the_image_head(tiny_backbone_folder, tiny_evotok_folder):
    from llava_ext.assembly import assemble

    torch.manual_seed(0)
    model, _ = assemble(tiny_backbone_folder, tiny_evotok_folder, 32, 2, 2)
    model.train()
    head, hidden = model.image_head, torch.randn(5, 32, requires_grad=True)
    codes = torch.randint(model.vocabulary.codebook_size, (5, 4))
    latents = model.vision_tower.level_latents(codes[None])[0]
    leaves = [hidden, *head.parameters()]
    expected = torch.autograd.grad(head.loss(hidden, latents, codes), leaves)
    model.gradient_checkpointing_enable()
    assert head.blocks[0].gradient_checkpointing
    found = torch.autograd.grad(head.loss(hidden, latents, codes), leaves)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
