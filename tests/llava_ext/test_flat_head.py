"""The flat head: rows of residual tokens, their losses, and drawing one token per step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mixed_samples import make_sample

from evotok_plugin.errors import UserError
from evotok_plugin.losses import cross_entropy
from llava_ext import EvoTokLlavaConfig
from llava_ext.data.collators import Collator
from llava_ext.flat_head import FreeFlatHead, TiedFlatHead, initialize_rows
from llava_ext.generation.options import DrawingOptions
from llava_ext.model_folder import load_model, save_model
from llava_ext.processing_evotok_llava import TooLong

LEVELS, CODES, DIM, WIDTH = 3, 20, 4, 16
GREEDY = {"temperature": 0, "guidance_scale": 1.0}


@pytest.fixture
def codebooks():
    """Codebooks for more levels than are drawn, each smaller than the previous one, as residuals are."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LEVELS + 2, CODES, DIM, generator=generator) * 0.3 ** torch.arange(LEVELS + 2)[:, None, None]


@pytest.fixture(params=["tied", "free"])
def head(request, codebooks):
    torch.manual_seed(0)
    tied = request.param == "tied"
    head = TiedFlatHead(LEVELS, CODES, DIM, WIDTH) if tied else FreeFlatHead(LEVELS, CODES, WIDTH)
    initialize_rows(head, codebooks, 0.5, 0.25)
    return head


# Rows --------------------------------------------------------------------------------------------------------


def test_inputs_and_logits_are_those_of_plain_tables(head, codebooks):
    """An exported model needs only an embedding lookup before the LLM and a product with rows after it."""
    codes, hidden = torch.randint(CODES, (7, LEVELS)), torch.randn(7, WIDTH)
    inputs, outputs = head.input_rows(codebooks), head.output_rows(codebooks)
    for level in range(LEVELS):
        torch.testing.assert_close(head.embed(codes, codebooks)[:, level], inputs[level][codes[:, level]])
        torch.testing.assert_close(head.logits(hidden, level, codebooks), hidden @ outputs[level].T)


def test_rows_start_with_the_requested_scale_at_every_level(head, codebooks):
    for rows, size in ((head.input_rows(codebooks), 0.5), (head.output_rows(codebooks), 0.25)):
        sizes = rows.square().mean(dim=(1, 2)).sqrt()
        torch.testing.assert_close(sizes, torch.full((LEVELS,), size))


def test_similar_codes_start_with_similar_rows(head, codebooks):
    near = codebooks.clone()
    near[0, 1] = near[0, 0] * 1.01
    initialize_rows(head, near, 1.0, 1.0)
    for rows in (head.input_rows(near)[0], head.output_rows(near)[0]):
        apart = (rows[0] - rows).norm(dim=1)
        assert apart[1] < 0.2 * apart[2:].min()


def test_a_tied_head_can_make_two_distant_codes_likely_and_those_between_them_unlikely():
    """Products with raw codebook vectors only measure the distance to one point; the target here is both ends."""
    torch.manual_seed(0)
    codebooks = torch.linspace(-1, 1, 9)[None, :, None]
    head = TiedFlatHead(1, 9, 1, 32)
    hidden, ends = torch.randn(1, 32), torch.tensor([0.5, 0, 0, 0, 0, 0, 0, 0, 0.5])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(head.logits(hidden, 0, codebooks), ends[None]).backward()
        optimizer.step()
    assert head.logits(hidden, 0, codebooks).softmax(-1)[0, [0, 8]].min() > 0.4


def test_a_tied_head_does_not_grow_with_the_codebooks_and_does_not_store_them(flat_mllm):
    model, _ = flat_mllm
    vision = model.config.vision_config
    count = sum(parameter.numel() for parameter in model.image_head.parameters())
    rows = vision.pixel_depth * vision.codebook_size * 32
    tied = vision.pixel_depth * (2 * 32 * (vision.codebook_dim + 1) + 32 * 32 + 32 + 32 * 32)
    assert count == (tied if model.config.residual_embeddings == "tied" else 2 * rows)
    assert not [name for name in model.state_dict() if "image_head" in name and "codebook" in name]


# Losses ------------------------------------------------------------------------------------------------------


def test_the_loss_equals_that_of_logits_masked_to_the_current_level(head, codebooks):
    hidden = torch.randn(11, WIDTH, requires_grad=True)
    codes, levels = torch.randint(CODES, (11,)), torch.randint(LEVELS, (11,))
    everything = hidden @ head.output_rows(codebooks).flatten(0, 1).T  # (11, L x K)
    turn = (torch.arange(LEVELS * CODES) // CODES)[None] == levels[:, None]
    masked = everything.masked_fill(~turn, -torch.inf)
    expected = F.cross_entropy(masked, levels * CODES + codes)
    found = head.loss(hidden, codes, levels, codebooks)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_logits_of_all_tokens_never_exist_at_once(head, codebooks, monkeypatch):
    from functools import partial

    from llava_ext import flat_head

    seen, classify = [], head.classifier

    def watch(level, books):
        classifier = classify(level, books)
        forward = classifier.forward
        classifier.forward = lambda states: seen.append(states.shape[0]) or forward(states)
        return classifier

    monkeypatch.setattr(head, "classifier", watch)
    few = partial(cross_entropy.chunked_cross_entropy, max_logits=5 * CODES)
    monkeypatch.setattr(flat_head, "chunked_cross_entropy", few)
    head.loss(torch.randn(60, WIDTH), torch.zeros(60, dtype=torch.long), torch.zeros(60, dtype=torch.long), codebooks)
    assert max(seen) == 5 and sum(seen) == 60


def test_without_tokens_the_loss_is_zero_and_every_classifier_gets_a_gradient(head, codebooks):
    nothing = torch.zeros(0, dtype=torch.long)
    loss = head.loss(torch.randn(0, WIDTH), nothing, nothing, codebooks)
    loss.backward()
    assert loss == 0 and all(layer.weight.grad.abs().sum() == 0 for layer in head.classifiers)


def test_learned_positions_of_images_are_counted(flat_mllm):
    model, processor = flat_mllm
    with torch.no_grad():
        output = model(**Collator(processor)([make_sample(model, processor, "draw two")]))
    assert int(output.num_image_positions) == 2 * processor.num_positions


# Length ------------------------------------------------------------------------------------------------------

DRAWING = [{"role": "user", "content": "a ring"}, {"role": "assistant", "content": "<image>"}]


def test_every_token_of_the_flat_sequence_is_one_step(flat_mllm):
    model, processor = flat_mllm
    for kind in ("read", "draw", "both", "draw, then read", "text"):
        sample = make_sample(model, processor, kind)
        batch = Collator(processor)([sample])
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        assert states.shape[1] == len(sample.input_ids), kind
    codes = torch.zeros(processor.num_positions, processor.num_levels, dtype=torch.long)
    layout, ids = processor.lay_out(DRAWING), processor.encode_conversation(DRAWING, [codes]).input_ids
    assert layout.num_steps == len(ids)
    with pytest.raises(TooLong):
        layout.cut_to(len(ids) - 2)


def test_a_drawing_that_is_read_again_takes_as_many_steps_as_any_image_that_is_read(flat_mllm):
    _, processor = flat_mllm
    shown = processor.lay_out(DRAWING, drawn=[False]).num_steps
    assert shown == len(processor.encode_conversation(DRAWING, [None]).input_ids)
    assert processor.lay_out(DRAWING).num_steps - shown == processor.num_positions * (processor.num_levels - 1)


# Drawing -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, processor, prompt, guide=lambda position, level, with_prompt, without: with_prompt):
    """Codes (N, L) of an image; each step runs the complete sequences before it, with the prompt and without."""
    vision, books = model.config.vision_config, model.vision_tower.quantizer.codebooks
    rows = [model.get_input_embeddings()(processor.drawing_prompts([text])["input_ids"])[0] for text in (prompt, "")]
    codes = []
    for step in range(vision.num_positions * vision.pixel_depth):
        position, level = divmod(step, vision.pixel_depth)
        hidden = [model.language_model(inputs_embeds=row[None]).last_hidden_state[:, -1] for row in rows]
        code = guide(position, level, *(model.image_head.logits(one, level, books) for one in hidden)).argmax(-1)
        codes.append(code)
        rows = [torch.cat([row, model.image_head.embed_level(code, level, books)]) for row in rows]
    return torch.cat(codes).view(vision.num_positions, vision.pixel_depth)


def drawn_codes(model, processor, prompts, **options):
    *_, codes = model.draw_codes(prompts, processor, list(range(len(prompts))), DrawingOptions(**options))
    return codes


def test_drawing_equals_a_loop_without_cache(flat_mllm):
    from evotok_plugin.sampling import SamplingOptions

    model, processor = flat_mllm
    prompts = ["a ring", "two blue squares and a cross"]
    options = {"guidance_scale": 1.0, "sampling": SamplingOptions(temperature=0)}
    expected = torch.stack([greedy(model, processor, prompt) for prompt in prompts])
    assert torch.equal(drawn_codes(model, processor, prompts, **options), expected)


def test_guided_drawing_equals_a_loop_without_cache(flat_mllm):
    model, processor = flat_mllm
    vision = model.config.vision_config
    scales, start, end = [60.0, 1.0, 30.0, 20.0][: vision.pixel_depth], 0.2, 0.7

    def guide(position, level, with_prompt, without):
        inside = start <= position / vision.num_positions < end
        guided = without + scales[level] * (with_prompt - without)
        rescaled = 0.5 * guided + 0.5 * guided * with_prompt.std() / guided.std()
        return rescaled if inside else with_prompt

    options = {"guidance_scale": scales, "guidance_interval": (start, end), "guidance_rescale": 0.5, "temperature": 0}
    expected = greedy(model, processor, "a ring", guide)
    assert torch.equal(drawn_codes(model, processor, ["a ring"], **options)[0], expected)
    *_, fixed = model.draw_codes(["a ring"], processor, [0], DrawingOptions(**options), use_graphs=True)
    assert torch.equal(fixed[0], expected)
    assert not torch.equal(expected, greedy(model, processor, "a ring"))


def test_guidance_of_1_equals_the_conditional_model(flat_mllm):
    model, processor = flat_mllm
    plain, nearly = (drawn_codes(model, processor, ["a ring"], guidance_scale=g) for g in (1.0, 1.0 + 1e-6))
    assert torch.equal(plain, nearly)
    assert not torch.equal(plain, drawn_codes(model, processor, ["a ring"], guidance_scale=5.0))


def test_sampling_options_of_a_level_apply_to_that_level(flat_mllm):
    from evotok_plugin.sampling import SamplingOptions

    model, processor = flat_mllm
    levels = processor.num_levels
    first_greedy = SamplingOptions(temperature=(0.0,) + (1.0,) * (levels - 1))
    a, b = (
        next(iter(model.draw_codes(["a ring"], processor, [seed], DrawingOptions(1.0, sampling=first_greedy))))[0, 0]
        for seed in (1, 2)
    )
    assert a[0] == b[0] and not torch.equal(a[1:], b[1:])


def test_images_answers_and_progress_work_as_with_the_depth_head(flat_mllm):
    model, processor = flat_mllm
    seen = []
    images = model.generate_images(
        "a ring", processor, num_images=3, batch_size=2, on_progress=lambda *s: seen.append(s)
    )
    assert len(images) == 3 and seen[-1] == (27, 27)
    inputs = processor.apply_chat_template(DRAWING[:1], add_generation_prompt=True, tokenize=True)
    ids = model.generate(**inputs, modalities="image", processor=processor, drawing=DrawingOptions(1.0))
    answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert (answer[0], answer[-1]) == (processor.image_start_id, processor.image_end_id)
    vocabulary = processor.vocabulary
    expected = [step % vocabulary.num_levels for step in range(processor.num_positions * vocabulary.num_levels)]
    assert vocabulary.levels(torch.tensor(answer[1:-1])).tolist() == expected


# Folders -----------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(flat_mllm, tmp_path):
    model, processor = copy.deepcopy(flat_mllm[0]), flat_mllm[1]
    save_model(model, tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not any(name.startswith("write_projector") for name in loaded.state_dict())
    assert again.image_steps(drawn=True) == processor.image_steps(drawn=True)
    batch = Collator(again)([make_sample(model, processor, kind) for kind in ("read", "draw")])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loaded.eval()(**batch).loss)


@pytest.mark.parametrize("wrong", [{"image_head": "flatt"}, {"residual_embeddings": "loose"}])
def test_an_unknown_head_is_rejected(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}: expected .* or .*, got '{value}'"):
        EvoTokLlavaConfig(**wrong)
