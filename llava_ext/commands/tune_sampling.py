"""`evotok-llava tune-sampling`: search the settings of drawing with a judge, and write the best to the model."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evotok_plugin.common.files import check_output_file, user_path
from evotok_plugin.common.locks import locked
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.recipes import check_seed
from evotok_plugin.common.weight_files import folder_fingerprint
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import GENERATION_CONFIG
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
