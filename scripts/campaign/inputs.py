"""Whole inputs of every kind, and the commands and functions that read them.

`write(folder)` fills `folder/input` with the files that are damaged, and `folder` with other files that are needed.
`read(folder)` reads them as a user would, and returns an exit code or raises a UserError.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

import eval_tasks.cli
import evotok_plugin.cli
import llava_ext.cli
from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel
from evotok_plugin.common.recipes import find_recipe, load_recipe, recipes_folder
from evotok_plugin.data.code_cache import CodeCache
from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError
from llava_ext.assembly import assemble
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import RowOptions
from llava_ext.model_folder import INCLUDED_MODEL, save_model
from llava_ext.training.config import StageConfig


@dataclass(frozen=True)
class Input:
    """A kind of input.

    Attributes:
        damaged: patterns of the files below `input` of which one is damaged.
        read: reads the input in a folder; a command's exit code or None.
        words: an error may name one of these instead of the file: the settings of a recipe, which flags override.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], int | None]
    damaged: tuple[str, ...] = ("**/*",)
    words: tuple[str, ...] = ()


# Models ------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    torch.manual_seed(0)
    EvoTokModel(EvoTokConfig.preset("tiny")).save_pretrained(folder)
    EvoTokImageProcessor(size=48).save_pretrained(folder)


def _write_backbone(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    text = AutoTokenizer.from_pretrained(INCLUDED_MODEL)
    config = Qwen2Config(
        vocab_size=len(text), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)


def write_model(folder: Path) -> None:
    write_tokenizer(folder / "parts" / "tower")
    _write_backbone(folder / "parts" / "text")
    model, processor = assemble(folder / "parts" / "text", folder / "parts" / "tower", 32, 2, 2)
    save_model(model, folder / "input" / "model")
    processor.save_pretrained(folder / "input" / "model")
    _picture().save(folder / "a.png")


def read_model(folder: Path) -> int | None:
    model, image = str(folder / "input" / "model"), str(folder / "a.png")
    code = llava_ext.cli.main(["chat", "what?", "--model", model, "--image", image, "--max_new_tokens", "2"])
    return code or llava_ext.cli.main(["draw", "a", "--model", model, "-o", str(folder / "drawn")])


def write_tokenizer_folder(folder: Path) -> None:
    write_tokenizer(folder / "input" / "tokenizer")
    _picture().save(folder / "a.png")


def read_tokenizer_folder(folder: Path) -> int | None:
    return evotok_plugin.cli.main(
        ["reconstruct", str(folder / "a.png"), "--model", str(folder / "input" / "tokenizer"), "-o"]
        + [str(folder / "out.png")]
    )


# Images and data ---------------------------------------------------------------------------------------------


def _picture(seed: int = 0, mode: str = "RGB", size: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _encoded(seed: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    _picture(seed, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(folder: Path) -> None:
    """Images of every format and mode that the reader supports."""
    Image.init()
    kinds = [
        ("png", "PNG", ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")), ("jpg", "JPEG", ("RGB", "L", "CMYK")),
        ("webp", "WEBP", ("RGB", "RGBA")), ("gif", "GIF", ("P", "L")), ("bmp", "BMP", ("RGB", "P", "1")),
        ("tif", "TIFF", ("RGB", "RGBA", "CMYK", "I;16", "F", "LAB")), ("ppm", "PPM", ("RGB", "L")),
        ("avif", "AVIF", ("RGB", "RGBA")), ("jp2", "JPEG2000", ("RGB", "RGBA", "L")),
    ]  # fmt: skip
    for suffix, kind, modes in kinds:
        for mode in modes if kind in Image.SAVE else ():
            picture = _picture(0, mode if mode not in ("I;16", "F") else "L")
            if mode == "I;16":
                picture = Image.fromarray(np.asarray(picture, np.uint16) * 257)
            elif mode == "F":
                picture = Image.fromarray(np.asarray(picture, np.float32) / 255)
            picture.save(folder / "input" / f"{mode.replace(';', '')}.{suffix}", kind)
    others = [_picture(seed, "P") for seed in (1, 2)]
    for suffix in ("gif", "webp", "tif", "png"):
        path = folder / "input" / f"several.{suffix}"
        _picture(0, "P").save(path, save_all=True, append_images=others)
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        _picture().save(folder / "input" / f"{compression}.tif", compression=compression)
    exif = Image.Exif()
    exif[0x0112] = 6
    _picture().save(folder / "input" / "rotated.jpg", exif=exif, progressive=True)
    (folder / "input" / "jpeg.png").write_bytes(_encoded(0, "JPEG"))


def read_images(folder: Path) -> None:
    """Read all images; a broken image is an error of its own, so the first one ends this."""
    for path in sorted((folder / "input").iterdir()):
        open_picture(path)


def _encode(folder: Path, source: str, *flags: str) -> int | None:
    model = str(folder / "tokenizer")
    return evotok_plugin.cli.main(
        ["encode", source, "--model", model, "-o", str(folder / "codes"), "--num_workers", "0", *flags]
    )


def write_image_folder(folder: Path) -> None:
    write_tokenizer(folder / "tokenizer")
    (folder / "input" / "images").mkdir()
    for number in range(3):
        _picture(number).save(folder / "input" / "images" / f"{number}.png")


def read_image_folder(folder: Path) -> int | None:
    return _encode(folder, str(folder / "input" / "images"))


def _write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shards(folder: Path) -> None:
    write_tokenizer(folder / "tokenizer")
    for shard in range(2):
        members = [(f"{shard}{n}.{kind}", content) for n in range(3) for kind, content in _sample(n)]
        _write_shard(folder / "input" / f"{shard}.tar", members)


def _sample(number: int) -> list[tuple[str, bytes]]:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"a {number}"}]
    return [("png", _encoded(number, "PNG")), ("json", json.dumps({"conversations": turns}).encode()), ("cls", b"1")]


def read_shards(folder: Path) -> int | None:
    read_records(folder, "*.tar")
    return _encode(folder, str(folder / "input" / "*.tar"))


def rows(number: int = 6) -> list[dict]:
    return [
        {
            "id": f"r{n}",
            "image": f"{n}.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"a {n}"}],
        }
        for n in range(number)
    ]


def write_parquet(folder: Path) -> None:
    import datasets

    write_tokenizer(folder / "tokenizer")
    for part in range(2):
        kept = [{**row, "image": {"bytes": _encoded(n, "PNG"), "path": None}} for n, row in enumerate(rows(3))]
        turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        features = {"id": datasets.Value("string"), "image": datasets.Image(), "conversations": [turn]}
        datasets.Dataset.from_list(kept, datasets.Features(features)).to_parquet(folder / "input" / f"{part}.parquet")


def read_parquet(folder: Path) -> int | None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    read_records(folder, "*.parquet")
    return _encode(folder, str(folder / "input" / "*.parquet"))


def write_saved(folder: Path) -> None:
    import datasets

    write_tokenizer(folder / "tokenizer")
    kept = [{"image": {"bytes": _encoded(n, "PNG"), "path": None}, "text": f"a {n}"} for n in range(3)]
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    datasets.Dataset.from_list(kept, datasets.Features(features)).save_to_disk(str(folder / "input" / "saved"))


def read_saved(folder: Path) -> int | None:
    read_records(folder, "saved")
    return _encode(folder, str(folder / "input" / "saved"))


def _write_row_files(folder: Path) -> None:
    for number in range(6):
        _picture(number).save(folder / f"{number}.png")


def write_json(folder: Path) -> None:
    _write_row_files(folder)
    (folder / "input" / "rows.json").write_text(json.dumps(rows(), indent=1))


def write_json_lines(folder: Path) -> None:
    _write_row_files(folder)
    (folder / "input" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())) + "\n")


def read_records(folder: Path, pattern: str) -> None:
    """Read all rows and their images, as the scan before training and the encoding do."""
    source = open_records(folder / "input" / pattern, RowOptions(folder))
    for index in range(len(source)):
        name = source.row_name(index)
        try:
            for record in source.records(index):
                for number in range(len(record.images)):
                    source.picture(index, number)
        except UserError as error:  # an entry of bad_samples.jsonl
            raise UserError(f"{name}: {error}") from error


def write_cache(folder: Path) -> None:
    write_image_folder(folder)
    code = _encode(folder, str(folder / "input" / "images"), "--shard_size", "2")
    assert not code
    shutil.move(folder / "input" / "images", folder / "images")
    shutil.move(folder / "codes", folder / "input" / "codes")


def read_cache(folder: Path) -> int | None:
    source, codes = str(folder / "images"), str(folder / "input" / "codes")
    code = evotok_plugin.cli.main(["encode", "-o", codes, "--verify"])
    if code:
        return code
    cached = CodeCache(codes)
    for key in cached.keys():  # noqa: SIM118 - it is not a mapping
        cached.codes(key)
        cached.size_of(key)
    model = str(folder / "tokenizer")
    return evotok_plugin.cli.main(["encode", source, "--model", model, "-o", codes, "--num_workers", "0"])


# Runs --------------------------------------------------------------------------------------------------------


def write_tokenizer_run(folder: Path) -> None:
    """A tokenizer run that has written two checkpoints."""
    write_image_folder(folder)
    shutil.move(folder / "input" / "images", folder / "images")
    (folder / "tiny.yaml").write_text(
        "preset: tiny\nmax_steps: 2\nbatch_size: 2\nsave_every: 1\nval_every: 100\nval_images: 1\nsemantic_weight: 0\n"
        "kmeans_images: 0\nreport_to: none\nnum_workers: 0\nlpips_weight: 0\ngan_weight: 0\nval_fraction: 0\n"
        "model: {encoder_num_layers: 1, codebook_size: 8}\n"
    )
    assert not _train(folder, 2)


def _train(folder: Path, steps: int) -> int | None:
    return evotok_plugin.cli.main(
        ["train", "--recipe", str(folder / "tiny.yaml"), "--data", str(folder / "images"), "--max_steps", str(steps)]
        + ["--output_dir", str(folder / "input" / "run")]
    )


def read_tokenizer_run(folder: Path) -> int | None:
    return _train(folder, 3)


def write_stage_checkpoints(folder: Path) -> None:
    """A stage with two complete checkpoints, whose optimizer states are only names here."""
    from llava_ext.training.checkpoints import RunShape, claim_checkpoint, claim_outputs, mark_complete, owned_folder

    write_model(folder / "base")
    run, shape = folder / "input" / "run", RunShape(1)
    run.mkdir()
    claim_outputs(owned_folder(run))
    for step in (1, 2):
        checkpoint = run / f"checkpoint-{step}"
        foreign = claim_checkpoint(checkpoint)
        checkpoint.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder / "base" / "input" / "model" / name, checkpoint)
        state = {"global_step": step, "epoch": 1.0, "log_history": [], "max_steps": 4, "train_batch_size": 1}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        torch.save({"state": {}}, checkpoint / "optimizer.pt")
        mark_complete(checkpoint, shape, foreign)
    (run / "recipe.yaml").write_text(yaml.safe_dump(_STAGE_VALUES))


_STAGE_VALUES = {"learning_rate": 1e-3, "max_steps": 4}


def read_stage_checkpoints(folder: Path) -> None:
    """Decide how the run is resumed, and prepare its folder."""
    from llava_ext.training.checkpoints import RunShape
    from llava_ext.training.launch import prepare_processes
    from llava_ext.training.output_folder import check_inputs, plan_output, prepare_output

    config = StageConfig(model_name_or_path="base", output_dir=str(folder / "input" / "run"), **_STAGE_VALUES)
    prepare_processes(config)
    plan = plan_output(config, _STAGE_VALUES, RunShape(1))
    check_inputs(plan, config, {})
    prepare_output(config, _STAGE_VALUES, plan, {})


def write_recipes(folder: Path) -> None:
    for package, name in ((evotok_plugin, "tiny"), (llava_ext, "finetune"), (llava_ext, "reinforce")):
        shutil.copy(recipes_folder(package.__name__) / f"{name}.yaml", folder / "input")


def read_recipes(folder: Path) -> None:
    """Read the settings and check them as the commands do before anything is loaded."""
    from evotok_plugin.training.config import TokenizerTrainingConfig
    from llava_ext.training.reinforcement.config import ReinforceConfig
    from llava_ext.training.settings import stage_values

    for path in sorted((folder / "input").iterdir()):
        find_recipe(path, "llava_ext")
        if path.name == "tiny.yaml":
            load_recipe(path, TokenizerTrainingConfig, {"data": ["images"], "output_dir": "out", "teacher": "teacher"})
        else:
            schema = StageConfig if path.name == "finetune.yaml" else ReinforceConfig
            schema(**stage_values(str(path), {"output_dir": str(folder / "out")}, schema=schema))


# Evaluation --------------------------------------------------------------------------------------------------

RESULTS = {
    "results": {
        "mmbench_scenes": {"alias": "mmbench_scenes", "overall,none": 0.75, "overall_stderr,none": "N/A"},
        "pope": {"pope_accuracy,none": 0.86, "submission,none": None},
    },
    "group_subtasks": {},
    "n-samples": {name: {"original": 100, "effective": 100} for name in ("mmbench_scenes", "pope")},
    "config": {"model": "evotok", "model_args": "pretrained=m", "limit": None},
    "model_name": "evotok",
}


def write_results(folder: Path) -> None:
    (folder / "input" / "run").mkdir()
    (folder / "input" / "run" / "20260101_000000_results.json").write_text(json.dumps(RESULTS))


def read_results(folder: Path) -> int | None:
    return eval_tasks.cli.main(["report", str(folder / "input" / "run"), "-o", str(folder / "report")])


@cache
def _documents() -> tuple[dict, ...]:
    from evotok_plugin.scenes.captions import prompt_record
    from evotok_plugin.scenes.scene import sample_scene

    records = [prompt_record(sample_scene(np.random.default_rng(n), "colors"), "colors") for n in range(2)]
    return tuple(
        {"index": n, "tag": record["tag"], "prompt": record["prompt"], "record": json.dumps(record)}
        for n, record in enumerate(records)
    )


def _draw_pictures(run: Path) -> list[tuple[dict, str]]:
    """Write a picture for each document, and return the documents with the names of their pictures."""
    (run / "images").mkdir(parents=True)
    named = [(document, f"images/{document['index']}.png") for document in _documents()]
    for document, name in named:
        _picture(document["index"], size=48).save(run / name)
    return named


def write_samples(folder: Path) -> None:
    """A samples file of lmms-eval with its images."""
    run, lines = folder / "input" / "run", []
    for document, name in _draw_pictures(run):
        answer = json.dumps({"text": "", "images": [name]})
        lines.append(json.dumps({"target": json.dumps(document), "filtered_resps": answer}))
    (run / "20260101_000000_samples_geneval_scenes.jsonl").write_text("\n".join(lines))


def read_judged(folder: Path) -> int | None:
    return eval_tasks.cli.main(["judge", str(folder / "input" / "run"), "-o", str(folder / "report")])


def write_drawn(folder: Path) -> None:
    """A folder of stored drawn images."""
    run, lines = folder / "input" / "run", []
    for document, name in _draw_pictures(run):
        lines.append(json.dumps({"index": document["index"], "sample": 0, "image": name, "document": document}))
    (run / "drawn.jsonl").write_text("\n".join(lines))
    (run / "drawn.json").write_text(json.dumps({"task": "geneval_scenes", "images": 2, "faults": []}))


def write_prompts(folder: Path) -> None:
    (folder / "input" / "a.txt").write_text("a red circle\na blue square\n")
    (folder / "input" / "b.jsonl").write_text('{"prompt": "a red circle", "tag": "colors"}\n{"prompt": "a ring"}\n')
    (folder / "input" / "c.csv").write_text("item_id,text\n1,a red circle\n2,a ring\n")
    (folder / "input" / "d.json").write_text('{"1": {"prompt": "a ring"}, "2": {"prompt": "a star"}}')


def read_prompts(folder: Path) -> None:
    from eval_tasks.tasks.prompt_files import column, read_rows
    from llava_ext.data import prompt_files

    prompt_files.read_prompts([folder / "input" / "a.txt"])
    prompt_files.read_prompts([folder / "input" / "b.jsonl"])
    for name, names in (("b.jsonl", ("prompt",)), ("c.csv", ("text",)), ("d.json", ("prompt",))):
        path = folder / "input" / name
        for row in read_rows(path):
            column(row, names, path)


INPUTS = {
    given.name: given
    for given in (
        Input("model", write_model, read_model),
        Input("tokenizer", write_tokenizer_folder, read_tokenizer_folder),
        Input("image", write_images, read_images),
        Input("image_folder", write_image_folder, read_image_folder),
        Input("tar", write_shards, read_shards),
        Input("parquet", write_parquet, read_parquet),
        Input("saved_dataset", write_saved, read_saved),
        Input("json", write_json, partial(read_records, pattern="rows.json")),
        Input("jsonl", write_json_lines, partial(read_records, pattern="rows.jsonl")),
        Input("code_cache", write_cache, read_cache, ("codes/*",)),
        Input("tokenizer_run", write_tokenizer_run, read_tokenizer_run, ("run/**/*", "run/.evotok.json")),
        Input("stage_run", write_stage_checkpoints, read_stage_checkpoints, ("run/**/*", "run/.evotok.json")),
        Input("recipe", write_recipes, read_recipes, words=tuple(StageConfig.__dataclass_fields__)),
        Input("results", write_results, read_results),
        Input("samples", write_samples, read_judged),
        Input("drawn", write_drawn, read_judged),
        Input("prompts", write_prompts, read_prompts),
    )
}
