import itertools
import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from evotok_plugin.errors import UserError
from llava_ext import EvoTokLlavaForConditionalGeneration
from llava_ext.generation import PromptReader, SelectionOptions
from llava_ext.generation.selection import Selector, candidate_seed, candidates_for
from llava_ext.generation.selection_options import DEFAULTS

PROMPTS = ["a photo of a ring", "a photo of a red circle above a blue square"]


def brightness(prompts, images):
    """A reward: the mean of the pixels."""
    return [float(np.asarray(image).mean()) for image in images]


def chosen(model, processor, best_of, **more):
    """The images of both prompts as pixels, and the choices among their candidates."""
    choices = []
    pixels = model.generate_images(
        PROMPTS, processor, num_images=2, seed=5, output_type="pt", best_of=best_of, on_choice=choices.extend, **more
    )
    return pixels, choices


def codes_of(model, processor, candidates):
    texts, seeds = [one.prompt for one in candidates], [one.seed for one in candidates]
    return list(model.draw_codes(texts, processor, seeds))[-1]


def test_seeds_of_candidates_are_distinct_and_far_from_those_of_further_images():
    seeds = {candidate_seed(seed, number) for seed in (*range(-50, 50), 2**62 - 1) for number in range(30)}
    assert len(seeds) == 101 * 30
    assert candidate_seed(7, 0) == 7 and candidate_seed(-7, 0) == -7
    assert all(2**62 <= candidate_seed(seed, number) < 2**63 for seed in (0, -1, 2**40) for number in range(1, 100))


def test_one_candidate_is_bit_identical_to_drawing_without_a_selection(any_mllm):
    model, processor = any_mllm
    candidates = candidates_for([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, [5, 6, 7, 8], 1)
    batches = [codes_of(model, processor, candidates[part]) for part in (slice(0, 3), slice(3, 4))]
    once, choices = chosen(model, processor, 1, batch_size=3)
    assert torch.equal(once, torch.cat([model.vision_tower.decode_pixels(codes) for codes in batches]))
    assert [(one.candidate.number, one.candidate.seed, one.score) for one in choices] == [
        (0, seed, None) for seed in (5, 6, 7, 8)
    ]


def test_the_candidate_with_the_best_reading_is_kept(any_mllm):
    model, processor = any_mllm
    pixels, choices = chosen(model, processor, 3, batch_size=4)
    candidates = candidates_for([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, [5, 6, 7, 8], 3)
    codes = codes_of(model, processor, candidates)
    scores = PromptReader(model, processor).scores([one.prompt for one in candidates], codes).total.view(4, 3)
    best = scores.argmax(dim=1)
    assert [one.candidate.number for one in choices] == best.tolist()
    assert [one.candidate.image for one in choices] == [0, 1, 2, 3]
    assert [one.score for one in choices] == pytest.approx(scores.amax(dim=1).tolist(), abs=1e-4)
    assert torch.equal(torch.stack([one.codes for one in choices]), codes.view(4, 3, 9, 4)[torch.arange(4), best])
    expected = model.vision_tower.decode_pixels(torch.stack([one.codes for one in choices]))
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)


def test_the_first_candidates_are_the_same_for_every_number(tiny_mllm):
    model, processor = tiny_mllm
    assert candidates_for(PROMPTS, [1, 2], 4)[4:6] == candidates_for(PROMPTS, [1, 2], 2)[2:]
    drawn: dict[int, list] = {2: [], 4: []}
    for count, seen in drawn.items():

        def judge(prompts, images, seen=seen):
            seen += [np.asarray(image, dtype=int) for image in images]
            return brightness(prompts, images)

        model.generate_images(PROMPTS[0], processor, seed=9, best_of=count, judge=judge)
    assert len(drawn[2]) == 2 and len(drawn[4]) == 4
    for a, b in zip(drawn[2], drawn[4], strict=False):
        np.testing.assert_allclose(a, b, atol=1)


def test_a_judge_takes_the_place_of_the_reading(tiny_mllm):
    model, processor = tiny_mllm
    images = model.generate_images(PROMPTS, processor, seed=[3, 4], best_of=4, judge=brightness)
    candidates = candidates_for(PROMPTS, [3, 4], 4)
    pixels = model.vision_tower.decode_pixels(codes_of(model, processor, candidates))
    scores = np.reshape(brightness([], processor.image_processor.to_pil(pixels)), (2, 4))
    assert brightness([], images) == pytest.approx(scores.max(axis=1).tolist(), abs=0.5)
    with pytest.raises(UserError, match="reward judge: expected 4 scores"):
        model.generate_images(PROMPTS[0], processor, best_of=4, judge=lambda prompts, images: [1.0])


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 12])
def test_candidates_arrive_in_batches_of_any_size(batch):
    candidates = candidates_for(["a", "b", "c"], [0, 0, 0], 4)
    codes = torch.tensor([3, 1, 3, 2, 0, 5, 5, 1, 4, 4, 4, 4]).view(12, 1, 1)
    scored = []

    def score(prompts, some):
        scored.extend(zip(prompts, some.flatten().tolist(), strict=True))
        return [float(value) for value in some.flatten()]

    selector, choices = Selector(4, score), []
    for start in range(0, 12, batch):
        choices += selector.add(candidates[start : start + batch], codes[start : start + batch])
    # Of equal scores the first counts, and equal codes are scored once.
    assert [one.candidate.number for one in choices] == [0, 1, 0]
    assert [one.score for one in choices] == [3.0, 5.0, 4.0]
    expected = [("a", 3), ("a", 1), ("a", 2), ("b", 0), ("b", 5), ("b", 1), ("c", 4)]
    assert scored == expected


def test_progress_and_previews_cover_all_candidates(tiny_mllm):
    model, processor = tiny_mllm
    progress, previews = [], []
    model.generate_images(
        PROMPTS,
        processor,
        best_of=3,
        batch_size=4,
        on_progress=lambda *counts: progress.append(counts),
        on_preview=lambda images: previews.append(len(images)),
        preview_every=4,
    )
    assert progress[-1] == (54, 54) and all(a < b for a, b in itertools.pairwise(progress))
    assert previews == [4, 4, 2, 2]


@pytest.mark.parametrize("count", [0, 1025, 2.5, True, "2"])
def test_a_wrong_number_of_candidates_is_rejected(tiny_mllm, count):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match="best_of must be a whole number from 1 to 1024"):
        model.generate_images("a ring", processor, best_of=count)


def test_a_judge_without_candidates_is_rejected(tiny_mllm):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match="a judge has no effect with best_of=1"):
        model.generate_images("a ring", processor, judge=brightness)


# Settings of a model -----------------------------------------------------------------------------------------


def rewritten(folder, out, **entries):
    """A copy of a model folder with entries in its generation_config.json."""
    import shutil

    shutil.copytree(folder, out)
    path = out / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return out


@pytest.mark.parametrize("from_model_config", [False, True])
def test_a_model_has_its_own_settings(model_folder, tmp_path, from_model_config):
    own = {"best_of": 2, "instruction": "Name it."}
    entries = {"image_selection": own, "_from_model_config": from_model_config}
    model = EvoTokLlavaForConditionalGeneration.from_pretrained(rewritten(model_folder, tmp_path / "own", **entries))
    complete = SelectionOptions().for_model(model)
    assert (complete.best_of, complete.instruction) == (2, "Name it.")
    assert SelectionOptions(best_of=1).for_model(model).best_of == 1
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["image_selection"] == own


def test_settings_default_to_those_of_the_library(tiny_mllm):
    assert SelectionOptions().for_model(tiny_mllm[0]) == DEFAULTS
    assert DEFAULTS.best_of == 1 and DEFAULTS.instruction == "Write a prompt for this image."


def test_a_model_with_a_setting_draws_candidates_and_converses(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    monkeypatch.setattr(model.generation_config, "image_selection", {"best_of": 2}, raising=False)
    counts = []
    model.generate_images("a ring", processor, on_progress=lambda done, total: counts.append(total))
    assert counts[-1] == 18
    inputs = processor.user_turns(text="a ring")
    assert model.generate(**inputs, modalities="image", processor=processor).shape[0] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best_off": 2}, "unknown setting 'best_off'; did you mean 'best_of'"),
        ({"best_of": 0}, "image_selection: best_of must be a whole number"),
        ({"best_of": None}, "best_of has no value"),
        ({"instruction": " "}, "expected a text that is not empty"),
        ([2], "expected a mapping of best_of, instruction"),
    ],
)
def test_invalid_settings_of_a_model_name_the_file(model_folder, tmp_path, values, message):
    folder = rewritten(model_folder, tmp_path / "own", image_selection=values)
    with pytest.raises(UserError, match=message) as caught:
        EvoTokLlavaForConditionalGeneration.from_pretrained(folder)
    assert str(folder / "generation_config.json") in str(caught.value)


def test_a_generation_config_carries_the_entry():
    assert GenerationConfig(image_selection={"best_of": 2}).image_selection == {"best_of": 2}
