"""Compare settings of guidance on prompts of colored shapes, by skill; prints a Markdown table.

    python scripts/benchmark/guidance.py                              # the included model
    python scripts/benchmark/guidance.py --model outputs/finetune -n 4
    python scripts/benchmark/guidance.py --save_prompts held_out.jsonl  # only writes the prompts

The prompts are not those of the task `geneval_scenes`. Skills with too few plain prompts to hold some out get prompts
with more detail ("three red circles"). All settings draw the same prompts with the same seeds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from report import Table, add_json_option, machine, write_report

from eval_tasks.tasks.geneval_scenes import task as geneval_scenes
from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import check_output_file, write_text
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import prompt_record, rich_prompt
from evotok_plugin.scenes.scene import SKILLS, sample_scene
from llava_ext.data.prompt_files import Prompt, read_prompts
from llava_ext.generation import DrawingOptions
from llava_ext.model_folder import INCLUDED_MODEL, open_model
from llava_ext.rewards import load_rewards
from llava_ext.tuning.candidates import Candidate
from llava_ext.tuning.evaluation import Evaluator
from llava_ext.tuning.scores import make_jobs
from llava_ext.tuning.table import as_cells

STREAM = 7_002  # of random numbers; corpora and geneval_scenes use others
SCENES_TRIED = 2_000  # per skill; most of them repeat a prompt
SAMPLING = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.2}
FULL_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def settings_of(num_levels: int) -> dict[str, dict[str, Any]]:
    """The settings to compare, by name, for images of `num_levels` levels."""
    half = num_levels // 2
    first, last = [3.0] * (num_levels - half) + [1.0] * half, [1.0] * (num_levels - half) + [3.0] * half
    return {
        "guidance 1": {"guidance_scale": 1.0},
        "guidance 1.5": {"guidance_scale": 1.5},
        "guidance 2": {"guidance_scale": 2.0},
        "guidance 3": {"guidance_scale": 3.0},
        "guidance 3, linear": {"guidance_scale": 3.0, "guidance_schedule": "linear"},
        "guidance 2, positions 0 to 0.25": {"guidance_scale": 2.0, "guidance_interval": (0, 0.25)},
        "guidance 3, positions 0 to 0.125": {"guidance_scale": 3.0, "guidance_interval": (0, 0.125)},
        "guidance 3, positions 0 to 0.25": {"guidance_scale": 3.0, "guidance_interval": (0, 0.25)},
        "guidance 3, positions 0 to 0.5": {"guidance_scale": 3.0, "guidance_interval": (0, 0.5)},
        "guidance 3, positions 0.5 to 1": {"guidance_scale": 3.0, "guidance_interval": (0.5, 1)},
        "guidance 3, first half of the levels": {"guidance_scale": first},
        "guidance 3, last half of the levels": {"guidance_scale": last},
        "guidance 3, rescale 1": {"guidance_scale": 3.0, "guidance_rescale": 1.0},
        "guidance 1, full distribution": {"guidance_scale": 1.0, **FULL_SAMPLING},
        "guidance 3, full distribution": {"guidance_scale": 3.0, **FULL_SAMPLING},
        "guidance 3, full distribution, rescale 1": {"guidance_scale": 3.0, "guidance_rescale": 1.0, **FULL_SAMPLING},
    }


def held_out_prompts(num_prompts: int, seed: int) -> list[Prompt]:
    """Sample prompts that geneval_scenes does not use, `num_prompts` of each skill."""
    rng = np.random.default_rng([seed, STREAM])
    folder = Path(geneval_scenes.__file__).parent
    rows = [json.loads(line) for line in (folder / "skills.jsonl").read_text(encoding="utf-8").splitlines()]
    used = {document["prompt"] for document in geneval_scenes.make_documents(rows, rows[0]["seed"])}
    chosen: dict[str, list[str]] = {skill: [] for skill in SKILLS}
    for detailed in (False, True):  # plain prompts first
        for skill in SKILLS:
            for _ in range(SCENES_TRIED):
                scene = sample_scene(rng, skill)
                text = rich_prompt(scene, skill, rng) if detailed else prompt_record(scene, skill)["prompt"]
                lists_objects = "," in text  # names the cells of several objects, which is another skill
                if len(chosen[skill]) < num_prompts and text not in used and not lists_objects:
                    used.add(text)
                    chosen[skill].append(text)
    return [Prompt(text, skill) for skill in SKILLS for text in chosen[skill]]


def save_prompts(prompts: list[Prompt], path: Path) -> None:
    """Write prompts as `read_prompts` reads them."""
    write_text(path, "".join(json.dumps({"prompt": one.text, "tag": one.tag}) + "\n" for one in prompts))


def run(arguments: argparse.Namespace) -> None:
    """Draw and judge the images of all settings, and print the table."""
    if arguments.save_prompts is not None:
        check_output_file(arguments.save_prompts, [".jsonl"], "--save_prompts")
        if arguments.save_prompts.exists():
            raise UserError(f"--save_prompts {arguments.save_prompts} exists; name a new file")
    given = arguments.prompts
    prompts = read_prompts([given]) if given else held_out_prompts(arguments.num_prompts, arguments.seed)
    if arguments.save_prompts is not None:
        save_prompts(prompts, arguments.save_prompts)
        print(arguments.save_prompts)
        return
    judge = load_rewards(arguments.judge)
    opened = open_model(arguments.model, arguments.device)
    jobs = make_jobs(prompts, arguments.num_images, arguments.seed)
    own = DrawingOptions().for_model(opened.model)
    base = DrawingOptions(guidance_schedule="constant", guidance_interval=(0, 1), guidance_rescale=0)
    settings = settings_of(opened.model.config.vision_config.pixel_depth)
    candidates = [Candidate("the model's own", own)]
    for name, values in settings.items():
        options = DrawingOptions(**{**SAMPLING, **values}).above(base)
        candidates.append(Candidate(name, options.completed()))
    with progress_bar(total=len(candidates) * len(jobs), desc="drawing", unit="image") as bar:
        evaluator = Evaluator(opened, judge, jobs, arguments.batch_size, on_images=bar.update)
        results = [evaluator.evaluate(candidate, len(jobs)) for candidate in candidates]
    on = machine(opened.model.device, model=opened.fingerprint[:12])
    print(", ".join(f"{key} {value}" for key, value in on.items()), end="; ")
    print(f"{len(prompts)} prompts, judge {arguments.judge}, seed {arguments.seed}")
    shared = ", ".join(f"{name} {value:g}" for name, value in SAMPLING.items())
    header, *rows = as_cells(results)
    print(f"sampling, unless the row says otherwise: {shared}\n\n{Table(header, rows).markdown()}")
    write_report(arguments.json, __file__, {"guidance": Table(header, rows)}, on, {"sampling": SAMPLING})


def main() -> int:
    """Parse the flags and run the comparison."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", default=str(INCLUDED_MODEL), help="model folder (default: the included model)")
    parser.add_argument("--prompts", metavar="FILE", help="prompts with tags instead of generated scene prompts")
    parser.add_argument("--num_prompts", type=int, default=40, help="generated prompts per skill")
    parser.add_argument("-n", "--num_images", type=int, default=2, help="images per prompt")
    parser.add_argument("--judge", default="scene_judge", metavar="SPEC", help="reward that scores the images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated prompts and of the first image")
    parser.add_argument("--batch_size", type=int, default=16, help="images drawn at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--save_prompts", type=Path, metavar="FILE.jsonl", help="write the prompts, and do not draw")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
