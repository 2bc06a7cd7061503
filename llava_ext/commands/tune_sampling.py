"""`evotok-llava tune-sampling`: search the settings of drawing with a judge, and write the best to the model."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_file, user_path
from evotok_plugin.common.locks import locked
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.recipes import check_seed
from evotok_plugin.common.weight_files import folder_fingerprint
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import GENERATION_CONFIG
from llava_ext.commands.options import SharedOptions
from llava_ext.data.prompt_files import Prompt, read_prompts
from llava_ext.generation import DrawingOptions
from llava_ext.generation.saved_settings import write_settings
from llava_ext.model_folder import INCLUDED_MODEL, open_model
from llava_ext.rewards import WeightedRewards, load_rewards
from llava_ext.tuning.candidates import CURRENT, Candidate, read_candidates, search_space
from llava_ext.tuning.evaluation import Evaluator
from llava_ext.tuning.journal import Identity, Journal
from llava_ext.tuning.scores import Job, make_jobs
from llava_ext.tuning.search import Outcome, count_images, plan_rounds, search
from llava_ext.tuning.table import as_table


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "tune-sampling",
        epilog=examples_of(
            "evotok-llava tune-sampling outputs/finetune --prompts prompts.jsonl --judge scene_judge",
            "evotok-llava tune-sampling outputs/finetune --prompts prompts.txt --judge clip_score=1 -n 8 --dry_run",
            text="The score of settings is the mean over skills of the mean score of their images. All candidates draw "
            "a few images with the same prompts and seeds, the better half twice as many, and so on; at most four "
            "draw all of them, among them the model's current settings and the best ones without guidance. Ties "
            "within one standard error of the best score go to the settings that cost least: guidance 1 first, "
            "then the interval of guidance that ends first. Only image_generation in MODEL/generation_config.json "
            "changes. Interruptible: rerun the same command to resume from the journal, which belongs to the "
            "weights, the prompts, the judge and the seed.",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="model folder whose settings are tuned")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help="a prompt per line, or .jsonl rows with a prompt and a tag, which names its skill",
    )
    parser.add_argument(
        "--judge", metavar="SPEC", required=True, help="NAME or NAME=WEIGHT,...: rewards, or package.module:function"
    )
    parser.add_argument("-n", "--num_images", type=int, default=4, help="images per prompt")
    parser.add_argument(
        "--settings",
        metavar="FILE.yaml",
        help="candidates instead of the default grid, a line each: 'strong: {guidance_scale: 3, min_p: 0.1}'; the "
        "model's settings fill the others",
    )
    parser.add_argument("--dry_run", action="store_true", help="search and print, but do not write the best settings")
    parser.add_argument("--batch_size", type=int, default=16, help="images drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; each further image adds 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--journal",
        metavar="FILE.jsonl",
        help="file that keeps finished evaluations (default: outputs/tune_sampling/MODEL-SEARCH.jsonl)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Search, print the table, and write the best settings."""
    folder = user_path(arguments.model)
    _check(arguments, folder)
    prompts = read_prompts([arguments.prompts])
    jobs = make_jobs(prompts, arguments.num_images, arguments.seed)
    num_skills = _check_skills(jobs)
    judge = load_rewards(arguments.judge)
    identity = _identity(arguments, folder, prompts, judge)
    path = _journal_path(arguments, folder, identity)
    with locked(path.with_name(f".{path.name}.lock"), path):
        _search(arguments, folder, Journal.open(path, identity), judge, jobs, num_skills)


def _search(
    arguments: argparse.Namespace,
    folder: Path,
    journal: Journal,
    judge: WeightedRewards,
    jobs: Sequence[Job],
    num_skills: int,
) -> None:
    opened = open_model(folder, arguments.device)
    current = DrawingOptions().for_model(opened.model)
    if arguments.settings:
        candidates = read_candidates(user_path(arguments.settings), current)
        for candidate in candidates:
            candidate.options.for_model(opened.model)  # checks the number of levels
    else:
        candidates = search_space(current, opened.model.config.vision_config.pixel_depth)
    rounds = plan_rounds(len(candidates), len(jobs), least=2 * num_skills)
    print(f"{len(candidates)} candidates; journal: {journal.path}", file=sys.stderr)
    with progress_bar(total=count_images(rounds), desc="drawing", unit="image") as bar:
        evaluator = Evaluator(opened, judge, jobs, arguments.batch_size, journal, bar.update)
        try:
            outcome = search(candidates, rounds, evaluator.evaluate)
        except KeyboardInterrupt:
            print(f"finished batches are kept in {journal.path}; the same command resumes", file=sys.stderr)
            raise
    print(as_table([*outcome.finalists, *outcome.dropped]))
    _finish(outcome, folder, arguments.dry_run)


def _finish(outcome: Outcome, folder: Path, dry_run: bool) -> None:
    best: Candidate = outcome.best.candidate
    path = folder / GENERATION_CONFIG
    print(f"\nbest: {best.name}")
    if dry_run:
        print(f"{path} is unchanged (--dry_run)")
    elif best.name == CURRENT:
        print(f"{path} is unchanged")
    else:
        write_settings(folder, best.options)
        print(f"written to {path}")


# Checks before the search ----------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace, folder: Path) -> None:
    """Validate what can be checked before the model is loaded.

    Raises:
        UserError: a number is too small, or an output cannot be written.
    """
    for name in ("num_images", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    check_seed(arguments.seed)
    if not folder.is_dir():
        raise UserError(f"model folder {str(folder)!r} does not exist")
    if arguments.dry_run:
        return
    if folder.resolve() == INCLUDED_MODEL.resolve():
        raise UserError(
            f"{folder} is the model included in the package, whose settings are not changed; tune a copy of the "
            "folder, or pass --dry_run"
        )
    check_output_file(folder / GENERATION_CONFIG, [".json"], "MODEL")


def _check_skills(jobs: Sequence[Job]) -> int:
    """Count the skills.

    Raises:
        UserError: a skill has a single image, which gives no standard error.
    """
    tags = [job.prompt.tag for job in jobs]
    if single := [tag for tag in dict.fromkeys(tags) if tags.count(tag) < 2]:
        raise UserError(f"expected at least 2 images per skill, got 1 for {single[0] or 'the prompts'}; pass -n 2")
    return len(set(tags))


# The journal -----------------------------------------------------------------------------------------------------


def _identity(
    arguments: argparse.Namespace, folder: Path, prompts: Sequence[Prompt], judge: WeightedRewards
) -> Identity:
    texts = json.dumps([[prompt.text, prompt.tag] for prompt in prompts])
    return Identity(
        weights=folder_fingerprint(folder, without=[GENERATION_CONFIG]),
        prompts=hashlib.sha256(texts.encode()).hexdigest(),
        judge=judge.weights,
        seed=arguments.seed,
    )


def _journal_path(arguments: argparse.Namespace, folder: Path, identity: Identity) -> Path:
    """The file of --journal, by default one of this search in the working folder.

    Raises:
        UserError: it cannot be written.
    """
    search_id = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    default = Path("outputs/tune_sampling") / f"{folder.resolve().name}-{search_id}.jsonl"
    path = user_path(arguments.journal) if arguments.journal else default
    check_output_file(path, [".jsonl"], "--journal")
    return path
