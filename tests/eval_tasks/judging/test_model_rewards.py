"""Rewards with models: equal to the judges that they use, independent of the batch, and early errors."""

import judges
import pytest
import torch
from torch.nn import functional as F

from eval_tasks.judging.clip import load_clip
from eval_tasks.judging.colors import ColorClassifier
from eval_tasks.judging.detectors import Mask2FormerDetector
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.rewards import ClipReward, GenEvalReward, VqaReward
from eval_tasks.judging.rules import colors_wanted, evaluate
from eval_tasks.judging.vqa import YesNoJudge
from eval_tasks.tasks.geneval.prompt_parser import parse_prompt
from evotok_plugin.errors import UserError

IMAGES = [judges.picture(seed, *((64, 64) if seed % 3 else (80, 48))) for seed in range(7)]
# The random CLIP gives positive similarities to the first prompt, and negative ones to the others.
PROMPTS = ["zebra", "a dog", "zebra", "music", "zebra", "two cats and a car", "zebra"]


@pytest.fixture
def make(judge_folders, monkeypatch):
    """Creates a reward with small random judges from the environment."""

    def create(kind, batch_size: int = 3, **folders):
        for name, folder in {**judge_folders, **folders}.items():
            monkeypatch.setenv(f"EVOTOK_JUDGE_{name.upper()}", str(folder))
        monkeypatch.setenv("EVOTOK_JUDGE_DEVICE", "cpu")
        monkeypatch.setenv("EVOTOK_JUDGE_BATCH_SIZE", str(batch_size))
        return kind()

    return create


@pytest.mark.parametrize("kind", [ClipReward, VqaReward])
def test_scores_do_not_depend_on_the_batch(make, kind):
    reward = make(kind)
    together = reward(PROMPTS, IMAGES)
    alone = [score for pair in zip(PROMPTS, IMAGES, strict=True) for score in reward(pair[:1], pair[1:])]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) > 3 and reward([], []) == []


def test_clip_scores_equal_the_definition(make, judge_folders):
    clip = load_clip(judge_folders["clip"], "CLIP")
    with torch.no_grad():
        images = clip.model.encode_image(torch.stack([clip.transform(image) for image in IMAGES]))
        texts = clip.model.encode_text(clip.tokenizer(PROMPTS))
    expected = (2.5 * F.cosine_similarity(images, texts).clamp(min=0)).tolist()
    assert make(ClipReward)(PROMPTS, IMAGES) == pytest.approx(expected, abs=1e-5)
    assert max(expected) > 0


def test_vqa_scores_are_the_probability_of_yes(make, judge_folders):
    vqa = YesNoJudge.open(judge_folders["vqa"])
    expected = [
        vqa.ask([image], [f'Does this figure show "{prompt}"? Please answer yes or no.'])[0].yes
        for prompt, image in zip(PROMPTS, IMAGES, strict=True)
    ]
    assert make(VqaReward)(PROMPTS, IMAGES) == pytest.approx(expected, abs=1e-5)


def test_geneval_scores_are_the_verdicts_on_what_is_detected(make, judge_folders):
    """Prompts about the classes that the random detector finds, so that some are fulfilled."""
    detector = Mask2FormerDetector.open(judge_folders["detector"])
    classifier = ColorClassifier.open(judge_folders["clip"])
    prompts, expected = [], []
    for image in IMAGES:
        (instances,) = detector.detect_batch([image])
        label = max(instances, key=lambda instance: instance.score).label
        for prompt in (f"a photo of {'an' if label[0] in 'aeiou' else 'a'} {label}", f"a photo of a red {label}"):
            record, colored = parse_prompt(prompt), list(instances)
            for instance in colors_wanted(record, instances):
                (color,) = classifier.classify([classifier.prepare(image, instance)])
                index = colored.index(instance)
                colored[index] = type(instance)(**{**vars(instance), "color": color})
            prompts.append(prompt)
            expected.append(float(evaluate(record, colored).correct))
    images = [image for image in IMAGES for _ in range(2)]
    for batch_size in (1, 4):
        assert make(GenEvalReward, batch_size)(prompts, images) == expected
    assert 0 < sum(expected) < len(expected)
    with pytest.raises(UserError, match="'a photo of a ring' is not one of GenEval's"):
        make(GenEvalReward)(["a photo of a ring"], IMAGES[:1])


@pytest.mark.parametrize(
    ("kind", "name"), [(GenEvalReward, "detector"), (GenEvalReward, "clip"), (ClipReward, "clip"), (VqaReward, "vqa")]
)
def test_missing_weights_are_reported_at_creation(make, tmp_path, kind, name):
    with pytest.raises(UserError, match=f"missing.*EVOTOK_JUDGE_{name.upper()}"):
        make(kind, **{name: tmp_path / "missing"})


def test_the_detector_of_scenes_is_rejected():
    with pytest.raises(UserError, match="use scene_judge"):
        GenEvalReward(JudgeOptions(detector="scenes"))
