"""The adapter: dispatch, batches, seeds, files, options, padding, errors."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin.common import temporary_names
from evotok_plugin.common.temporary_names import own_temporary_path
from evotok_plugin.errors import UserError

DRAW = {"modality": "image", "num_images": 2, "until": []}


def seeded(prompt: str, seed: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (seed % 251, seed // 251 % 251, len(prompt) % 251))


def test_one_list_of_reading_and_drawing_requests(make_lm, instance, tmp_path):
    lm = make_lm(lambda text, images: text.upper(), seeded, batch_size=4)
    requests = []
    for n in range(7):
        requests.append(instance(lm, "read", n, "x" * n + f"say {n}", {"max_new_tokens": 8, "until": ["\n\n"]}))
        requests.append(instance(lm, "draw", n, f"draw {n}", DRAW))
    answers = lm.generate_until(requests)
    for n in range(7):
        assert answers[2 * n] == "X" * n + f"SAY {n}"
        drawn = json.loads(answers[2 * n + 1])
        expected = [tmp_path / f"images/draw/{n:05d}_{sample}.png" for sample in range(2)]
        assert drawn == {"text": "", "images": [str(path) for path in expected]}
        assert all(path.is_file() for path in expected)
    assert lm._processor.batch_sizes == [4, 3]
    assert len(lm._model.draw_kwargs) == 14  # two images per request
    assert lm._model.draw_kwargs[0]["guidance_scale"] == 3.0 and lm._model.max_rows == 4


def test_images_depend_only_on_task_document_sample_and_seed(make_lm, instance):
    def drawn(lm, documents, task="draw"):
        answers = lm.generate_until([instance(lm, task, n, f"draw {n}", DRAW) for n in documents])
        return {
            (n, sample): Image.open(path).tobytes()
            for n, answer in zip(documents, answers, strict=True)
            for sample, path in enumerate(json.loads(answer)["images"])
        }

    everything = drawn(make_lm(drawer=seeded, batch_size=8), range(5))
    assert len(set(everything.values())) == 10
    some = drawn(make_lm(drawer=seeded), [3, 1])
    assert some == {key: everything[key] for key in some}
    assert not set(drawn(make_lm(drawer=seeded, seed=1), range(5)).values()) & set(everything.values())
    assert not set(drawn(make_lm(drawer=seeded), range(5), "other").values()) & set(everything.values())


def test_a_resumed_run_draws_only_missing_images(make_lm, instance, tmp_path):
    def drawn_prompts(texts=("a", "b", "c"), **kwargs):
        lm = make_lm(drawer=seeded, **kwargs)
        answers = lm.generate_until([instance(lm, "draw", n, text, DRAW) for n, text in enumerate(texts)])
        assert all(len(json.loads(answer)["images"]) == 2 for answer in answers)
        return sorted(call["prompt"] for call in lm._model.draw_kwargs)

    assert drawn_prompts() == ["a", "a", "b", "b", "c", "c"]
    before = (tmp_path / "images/draw/00000_1.png").read_bytes()
    (tmp_path / "images/draw/00002_0.png").unlink()
    assert drawn_prompts() == ["c"]
    assert drawn_prompts(("a", "other", "c")) == ["other", "other"]
    assert (tmp_path / "images/draw/00000_1.png").read_bytes() == before
    for changed in ({"fingerprint": "trained on"}, {"seed": 1}, {"guidance_scale": 2.0}, {"negative_prompt": "x"}):
        assert len(drawn_prompts(**changed)) == 6 and drawn_prompts(**changed) == []


def test_images_are_complete_files_when_the_answers_are_returned(make_lm, instance, tmp_path, monkeypatch):
    from eval_tasks import drawing

    write = drawing.write_png
    monkeypatch.setattr(drawing, "write_png", lambda *a, **kw: time.sleep(0.01) or write(*a, **kw))
    lm = make_lm(drawer=seeded)
    folder = tmp_path / "images/draw"
    folder.mkdir(parents=True)
    abandoned = [folder / name for name in (own_temporary_path(folder / "00000_0.png").name, ".00009_0.png.part")]
    monkeypatch.setattr(temporary_names, "_is_running", lambda pid: False)
    for path in abandoned:
        path.touch()
    answers = lm.generate_until([instance(lm, "draw", n, f"draw {n}", DRAW) for n in range(5)])
    paths = [path for answer in answers for path in json.loads(answer)["images"]]
    assert all(Image.open(path).text["prompt"].startswith("draw") for path in paths)
    assert [path.exists() for path in abandoned] == [False, True]  # the second is not a name of ours


def test_images_that_were_drawn_before_an_error_are_kept(make_lm, instance, tmp_path):
    def fails(prompt, seed):
        if prompt == "broken":
            raise RuntimeError("out of memory")
        return seeded(prompt, seed)

    lm = make_lm(drawer=fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm.generate_until([instance(lm, "draw", n, text, DRAW) for n, text in enumerate(("fine!!", "broken"))])
    assert sorted(path.name for path in (tmp_path / "images/draw").iterdir()) == ["00000_0.png", "00000_1.png"]


def test_a_file_that_cannot_be_written_ends_the_run(make_lm, instance, tmp_path):
    (tmp_path / "images/draw/00001_0.png").mkdir(parents=True)
    lm = make_lm(drawer=seeded)
    with pytest.raises(UserError, match="00001_0.png cannot be written"):
        lm.generate_until([instance(lm, "draw", n, "x", DRAW) for n in range(3)])


def test_an_empty_prompt_is_not_drawn(make_lm, instance):
    lm = make_lm(drawer=seeded)
    with pytest.raises(UserError, match="draw, document 0: the prompt is empty"):
        lm.generate_until([instance(lm, "draw", 0, " ", DRAW)])


def test_repeated_requests_are_further_samples(make_lm, instance):
    lm = make_lm(drawer=seeded)
    request = instance(lm, "draw", 0, "draw", DRAW)
    answers = lm.generate_until([request, request])
    assert [path[-6:] for answer in answers for path in json.loads(answer)["images"]] == [
        "_0.png",
        "_1.png",
        "_2.png",
        "_3.png",
    ]
    assert len({call["seed"] for call in lm._model.draw_kwargs}) == 4


def test_padding_clones_draw_nothing(make_lm, instance, tmp_path):
    lm = make_lm(drawer=seeded)
    real, clone = instance(lm, "draw", 0, "draw", DRAW), instance(lm, "draw", 1, "draw", DRAW)
    clone.metadata["__padding_only__"] = True
    answers = lm.generate_until([real, clone])
    assert answers[1] == "" and len(list((tmp_path / "images/draw").iterdir())) == 2


def test_only_known_generation_kwargs_reach_the_model(make_lm, instance):
    lm = make_lm(lambda text, images: " B\x07\n###rest", seeded, guidance_scale=2, temperature=0.5)
    upstream = {
        "until": "###", "max_new_tokens": 5, "temperature": 0, "top_p": None, "num_beams": 1,
        "do_sample": False, "image_aspect_ratio": "original",
    }  # fmt: skip
    sampled = {"max_new_tokens": 5, "temperature": 0.7, "until": [], "repetition_penalty": 1.0}
    requests = [
        instance(lm, "read", 0, "x", upstream),
        instance(lm, "read", 1, "x", sampled),
        instance(lm, "draw", 0, "x", {**DRAW, "guidance_scale": 5, "image_aspect_ratio": "original"}),
        instance(lm, "draw", 1, "x", DRAW),
    ]
    assert lm.generate_until(requests)[0] == "B"
    greedy, drawn = lm._model.generate_kwargs, lm._model.draw_kwargs
    assert greedy[0] == {"max_new_tokens": 5, "num_beams": 1, "do_sample": False}
    assert greedy[1]["do_sample"] and greedy[1]["temperature"] == 0.7
    assert greedy[1]["repetition_penalty"] == 1.0  # overrides the model's own
    assert [call["guidance_scale"] for call in drawn] == [5, 5, 2.0, 2.0]
    assert {call["temperature"] for call in drawn} == {0.5}


def test_images_are_drawn_with_the_models_own_settings(lmms_eval_tasks, instance, tiny_mllm, tmp_path, monkeypatch):
    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    model, _ = tiny_mllm
    own = {"guidance_scale": 1.5, "temperature": [0.5, 1.0, 1.0, 1.0], "top_k": 3}
    monkeypatch.setattr(model.generation_config, "image_generation", own, raising=False)

    def recorded(task, gen_kwargs, **model_args):
        lm = EvoTokLmms(
            "random",
            load=lambda *_: OpenModel(*tiny_mllm, "", ""),
            device="cpu",
            images_dir=str(tmp_path),
            **model_args,
        )
        (answer,) = lm.generate_until([instance(lm, task, 0, "a ring", {**DRAW, "num_images": 1, **gen_kwargs})])
        return json.loads(Image.open(json.loads(answer)["images"][0]).text["settings"])

    plain = recorded("a", {})
    assert plain["guidance_scale"] == 1.5 and plain["temperature"] == [0.5, 1.0, 1.0, 1.0] and plain["top_p"] == 1.0
    assert recorded("b", {}, guidance_scale=3, top_k=0) == {**plain, "guidance_scale": 3.0, "top_k": 0}
    limited = {"guidance_scale": [3.0, 2.0, 1.0, 1.0], "guidance_interval": [0.0, 0.5], "guidance_rescale": 0.5}
    given = {"guidance_scale": "3:2:1:1", "guidance_interval": "0:0.5", "guidance_rescale": 0.5}
    assert recorded("e", {}, **given) == recorded("f", given) == recorded("g", limited) == {**plain, **limited}
    levels = [1, 0.5, 0.5, 0.5]
    assert recorded("c", {"temperature": levels, "top_k": 2.0}) == {**plain, "temperature": levels, "top_k": 2}
    with pytest.raises(ValueError, match="top_k must be a whole number, got '2'"):
        recorded("d", {"top_k": "2"})
    with pytest.raises(ValueError, match="top_p must be from 0 to 1"):
        recorded("d", {"top_p": 7})


def test_images_reach_the_model_as_rgb(make_lm, instance, tmp_path):
    seen = []
    lm = make_lm(lambda text, images: seen.extend(images) or "A")
    gray = Image.new("L", (4, 4))
    gray.save(tmp_path / "gray.png")
    media = [("image", gray), ("image", str(tmp_path / "gray.png"))]
    lm.generate_until([instance(lm, "read", 0, "x", {}, media)])
    assert [image.mode for image in seen] == ["RGB", "RGB"]


def test_unsupported_media_are_rejected(make_lm, instance):
    lm = make_lm()
    with pytest.raises(ValueError, match="read, document 0.*video"):
        lm.generate_until([instance(lm, "read", 0, "x", {}, [("video", "film.mp4")])])
    with pytest.raises(ValueError, match="draws from text"):
        lm.generate_until([instance(lm, "draw", 0, "x", DRAW, [("image", Image.new("RGB", (4, 4)))])])
    with pytest.raises(NotImplementedError):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError):
        lm.generate_until_multi_round([])


def test_wrong_checkpoints_get_one_clear_error(lmms_eval_tasks, tmp_path):
    from eval_tasks.model import EvoTokLmms

    for name, content in (("empty", None), ("other", '{"model_type": "qwen2"}'), ("broken", '{"model_type": ')):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "config.json").write_text(content)
    cases = {
        "nowhere": "'.*nowhere' does not exist",
        "empty": "it holds no config.json",
        "other": "holds a qwen2 model, expected evotok_llava",
        "broken": "broken/config.json cannot be read as JSON",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"--model_args pretrained={tmp_path / name}: .*{message}"):
            EvoTokLmms(str(tmp_path / name), device="cpu")


def test_without_a_checkpoint_the_default_is_used_and_logged(lmms_eval_tasks, tmp_path, monkeypatch, caplog):
    from eval_tasks import model as adapter
    from llava_ext.model_folder import OpenModel

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter, "default_model_folder", lambda: tmp_path / "newest")
    opened = []
    adapter.EvoTokLmms(device="cpu", load=lambda *a: opened.append(a[0]) or OpenModel(None, None, "", ""))
    assert opened == [str(tmp_path / "newest")] and str(tmp_path / "newest") in caplog.text


def test_model_args(make_lm):
    assert make_lm(batch_size="12").batch_size == 12
    assert make_lm(batch_size="auto").batch_size == 16
    assert make_lm(batch_size="auto", max_batch_size=3).batch_size == 3
    for wrong in ("many", 0):
        with pytest.raises(ValueError, match="batch_size must be"):
            make_lm(batch_size=wrong)
    with pytest.raises(ValueError, match="did you mean 'guidance_scale'"):
        make_lm(guidance=3)
    with pytest.raises(ValueError, match="dtype must be one of"):
        make_lm(dtype="fp7")


def test_candidates_are_drawn_and_recorded(make_lm, instance, tmp_path):
    def drawn(gen_kwargs, **model_args):
        lm = make_lm(batch_size=8, **model_args)
        requests = [instance(lm, "a", number, "a ring", {**DRAW, **gen_kwargs}) for number in range(3)]
        answers = [json.loads(answer) for answer in lm.generate_until(requests)]
        texts = [Image.open(path).text for answer in answers for path in answer["images"]]
        calls = lm._model.draw_kwargs
        return [call["best_of"] for call in calls], {json.loads(text["settings"]).get("best_of") for text in texts}

    assert drawn({}) == ([1] * 6, {None})
    assert drawn({}, best_of=1) == ([], {None})  # the same images, which exist
    assert drawn({}, best_of=2.0) == ([2] * 6, {2})
    assert drawn({}, best_of=2) == ([], {2})
    assert drawn({"best_of": 3}, best_of=2) == ([3] * 6, {3})
    with pytest.raises(ValueError, match="--model_args: best_of must be from 1 to 1024, got 0"):
        make_lm(best_of=0)
    with pytest.raises(ValueError, match="a: generation_kwargs: best_of must be a whole number, got 1.5"):
        drawn({"best_of": 1.5})


def test_dtype_and_default_images_dir(lmms_eval_tasks, tmp_path, monkeypatch):
    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    monkeypatch.chdir(tmp_path)
    loaded = []

    def build(**kwargs):
        return EvoTokLmms(
            "runs/finetune", load=lambda *args: loaded.append(args) or OpenModel(None, None, "", ""), **kwargs
        )

    plain, bf16, guided = (
        build(device="cpu"),
        build(device="cpu", dtype="bfloat16"),
        build(device="cpu", guidance_scale=5),
    )
    assert [call[1] for call in loaded[:2]] == [torch.float32, torch.bfloat16]
    assert plain.images_dir.parent == tmp_path / "outputs/lmms_eval_images"
    assert plain.images_dir.name.startswith("runs__finetune-")
    assert plain.images_dir == bf16.images_dir != guided.images_dir
    several = build(device="cpu", best_of=4)
    assert plain.images_dir == build(device="cpu", best_of=1).images_dir != several.images_dir
    assert not plain.images_dir.exists()  # not created before the first image


def test_a_real_model_answers_the_same_in_any_batch(lmms_eval_tasks, instance, tiny_mllm, tmp_path):
    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    def answers(batch_size):
        folder = tmp_path / str(batch_size)
        lm = EvoTokLmms(
            "random",
            load=lambda *_: OpenModel(*tiny_mllm, "", ""),
            device="cpu",
            batch_size=batch_size,
            images_dir=str(folder),
        )
        requests = []
        for n in range(3):
            picture = Image.new("RGB", (60, 48), (80 * n, 0, 0))
            text = "What color is the circle? " * (n + 1)
            requests.append(instance(lm, "read", n, text, {"max_new_tokens": 4}, [("image", picture)]))
            requests.append(instance(lm, "draw", n, f"a photo of {n} circles", DRAW))
        found = lm.generate_until(requests)
        paths = [path for answer in found[1::2] for path in json.loads(answer)["images"]]
        return found[::2], np.stack([np.asarray(Image.open(path), dtype=int) for path in paths])

    (texts, images), (batched_texts, batched_images) = answers(1), answers(4)
    assert texts == batched_texts
    assert np.abs(images - batched_images).max() <= 1  # one gray level: convolutions of a batch round differently
    assert len({image.tobytes() for image in images}) == 6 and Image.open(tmp_path / "4/draw/00000_0.png").size == (
        48,
        48,
    )


# Arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance_scale=abc", "guidance_scale must be a number, got 'abc'"),
        ("guidance_scale=0.5", "guidance_scale must be at least 1, got 0.5"),
        ("guidance_scale=2:wide", "guidance_scale must be a number, got '2:wide'"),
        ("guidance_interval=0:1.5", "guidance_interval must be from 0 to 1, got 1.5"),
        ("guidance_interval=0.5", "guidance_interval: expected two fractions of the positions"),
        ("guidance_rescale=2", "guidance_rescale must be from 0 to 1, got 2"),
        ("temperature=-1", "temperature must be at least 0"),
        ("top_k=0.5", "top_k must be a whole number"),
        ("top_p=2", "top_p must be from 0 to 1"),
        ("seed=1.5", "seed must be a whole number"),
        ("seed=true", "seed must be a whole number"),
        ("gudiance_scale=2", "unknown argument 'gudiance_scale'; did you mean 'guidance_scale'"),
        ("pretrained", "must be KEY=VALUE"),
        ("device=cuda:77", "device cuda:77"),
        ("device=quantum", "device quantum cannot be used here"),
        ("batch_size=0", "batch_size must be a number of at least 1"),
        ("batch_size=2,max_batch_size=8", "max_batch_size has no effect with batch_size 2"),
        ("batch_size=auto:x", "batch_size must be a number of at least 1 or auto"),
    ],
)
def test_invalid_and_unused_arguments_are_rejected(make_lm, text, message):
    from eval_tasks.model import EvoTokLmms

    with pytest.raises(ValueError, match=message):
        EvoTokLmms.create_from_arg_string(text, {"batch_size": 1})


def test_an_option_given_twice_is_rejected(lmms_eval_tasks):
    from eval_tasks.arguments import parse_model_args

    assert parse_model_args("batch_size=8", {"batch_size": 1, "device": None}) == {"batch_size": 8}
    with pytest.raises(ValueError, match="batch_size is given twice"):
        parse_model_args("batch_size=8", {"batch_size": "4"})


@pytest.mark.parametrize(("given", "largest", "size"), [("auto", None, 16), ("auto:4", None, 16), ("auto:4", 8, 8)])
def test_automatic_batch_sizes(make_lm, given, largest, size):
    assert make_lm(batch_size=given, max_batch_size=largest).batch_size == size


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"max_new_tokens": "many"}, "read: generation_kwargs: max_new_tokens must be a whole number, got 'many'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"do_sample": True, "temperature": 0}, "do_sample=true needs a temperature above 0"),
        ({"until": 7}, "until must be a text or a list of texts"),
        ({"modality": "video"}, "modality must be text, image, edit, document, reconstruction, got 'video'"),
        ({**DRAW, "num_images": 0}, "num_images must be at least 1"),
    ],
)
def test_invalid_generation_kwargs_are_rejected(make_lm, instance, gen_kwargs, message):
    lm = make_lm()
    with pytest.raises(ValueError, match=message):
        lm.generate_until([instance(lm, "read", 0, "x", gen_kwargs)])


def test_unused_generation_kwargs_are_logged_once_per_task(make_lm, instance, caplog):
    lm = make_lm()
    requests = [instance(lm, "read", n, "x", {"image_aspect_ratio": "original", "until": []}) for n in range(2)]
    lm.generate_until(requests)
    assert caplog.text.count("read: generation_kwargs without effect on evotok: image_aspect_ratio") == 1


@pytest.mark.parametrize(
    ("tasks", "gen_kwargs", "message"),
    [
        (["mmbench_scenes"], "max_new_tokens=4,num_beams=2", None),
        (["mmbench_scenes"], "do_sample=true,temperature=0.5,top_p=0.9", None),
        (["mmbench_scenes", "geneval_scenes"], "guidance_scale=2,max_new_tokens=4", None),
        (["mmbench_scenes"], "guidance_scale=2", "guidance_scale has no effect on mmbench_scenes"),
        (["geneval_scenes"], "num_beams=2", "num_beams has no effect on geneval_scenes"),
        (["mmbench_scenes"], "max_new_token=4", "did you mean 'max_new_tokens'"),
        (["mmbench_scenes"], "quality=best", "options for text: .*max_new_tokens.*for image: .*guidance_scale"),
        (["mmbench_scenes"], "temperature=0.7", "answer without sampling; add do_sample=true"),
    ],
)
def test_gen_kwargs_have_an_effect_or_are_rejected(make_lm, evaluate, lmms_eval_tasks, tasks, gen_kwargs, message):
    lm = make_lm(batch_size=8)
    if message is None:
        evaluate(lm, tasks, limit=1, gen_kwargs=gen_kwargs)
        return
    with pytest.raises(ValueError, match=message):
        evaluate(lm, tasks, limit=1, gen_kwargs=gen_kwargs)
    evaluate(lm, tasks, limit=1)  # later runs in the same process are not affected


# The response cache --------------------------------------------------------------------------------------------


def cached(lm, requests, folder):
    """Answer through lmms-eval's response cache, as with `--use_cache`."""
    from lmms_eval.caching.response_cache import ResponseCache

    cache = ResponseCache(str(folder / "cache.db"), str(folder / "audit.jsonl"), "evotok|pretrained=m")
    return cache.execute(lm, "generate_until", requests)


def test_cached_answers_belong_to_the_weights(make_lm, instance, tmp_path):
    """`--use_cache` reuses only answers of the same weights."""

    def run(fingerprint, answer):
        asked = []
        lm = make_lm(lambda text, images: asked.append(text) or answer, fingerprint=fingerprint, batch_size=8)
        requests = [instance(lm, "read", n, f"x{n}", {"max_new_tokens": 4, "until": []}) for n in range(3)]
        requests.insert(1, instance(lm, "draw", 0, "x", DRAW))
        answers = cached(lm, requests, tmp_path)
        assert len(json.loads(answers.pop(1))["images"]) == 2
        return len(asked), set(answers)

    assert run("first", "A") == (3, {"A"})
    assert run("first", "B") == (0, {"A"})
    assert run("trained on", "B") == (3, {"B"})
    assert run("first", "C") == (0, {"A"})


def test_images_are_drawn_again_after_training_and_never_come_from_the_cache(make_lm, instance, tmp_path):
    def answers(fingerprint, color):
        lm = make_lm(drawer=lambda prompt, seed: Image.new("RGB", (4, 4), color), fingerprint=fingerprint)
        (answer,) = cached(lm, [instance(lm, "draw", 0, "x", DRAW)], tmp_path)
        return Image.open(json.loads(answer)["images"][0]).getpixel((0, 0))

    assert answers("first", (1, 0, 0)) == (1, 0, 0)
    assert answers("trained on", (2, 0, 0)) == (2, 0, 0)
    assert answers("first", (3, 0, 0)) == (3, 0, 0)


def test_other_models_use_the_cache_as_before(make_lm, instance, tmp_path):
    make_lm()

    class Other:
        task_dict: dict = {}
        calls = 0

        def generate_until(self, requests):
            self.calls += len(requests)
            return ["text"] * len(requests)

    other = Other()
    requests = [instance(other, "draw", 0, "x", {"modality": "image", "until": []})]
    assert cached(other, requests, tmp_path) == cached(other, requests, tmp_path) == ["text"]
    assert other.calls == 1
