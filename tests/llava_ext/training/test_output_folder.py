"""The output folder of a stage: foreign files are kept, and a run is replaced only by one that works."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from stage_runs import losses, prepared_config, run, run_forked, stage_exit, write_recipe

from evotok_plugin.errors import UserError
from llava_ext.training.checkpoints import (
    MARKER,
    REPORTS,
    RunShape,
    checkpoints,
    finished_facts,
    owned_folder,
)
from llava_ext.training.output_folder import plan_output
from llava_ext.training.sample_reports import StageReport, place_reports, prepare_report


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return write_recipe(folder, tiny_backbone_folder, tiny_evotok_folder, scene_folder)


PLAIN = {"deepspeed": "none", "max_steps": 2, "save_steps": 1}
OVERWRITE = ["--deepspeed", "none", "--max_steps", "1", "--overwrite", "true"]


@pytest.fixture
def finished(recipe, tmp_path):
    """A finished run, with files of the user in its folder and in one of its checkpoints."""
    run_forked(run, recipe, tmp_path / "run", PLAIN)
    for name in ("thesis.tex", "checkpoint-1/notes.txt", "checkpoint-note.txt"):
        (tmp_path / "run" / name).write_text("mine")
    return tmp_path / "run"


def state(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwriting_keeps_files_that_the_run_has_not_written(recipe, finished):
    (finished / "checkpoint-500").mkdir()
    (finished / "checkpoint-500" / "trainer_state.json").write_text("of another program")
    run_forked(run, recipe, finished, {**PLAIN, "max_steps": 1, "overwrite": True, "save_total_limit": 1})
    for name in ("thesis.tex", "checkpoint-1/notes.txt", "checkpoint-note.txt", "checkpoint-500/trainer_state.json"):
        assert (finished / name).is_file(), name
    assert [path.name for path in checkpoints(finished)] == ["checkpoint-1"]
    assert "notes.txt" not in json.loads((finished / "checkpoint-1" / MARKER).read_text())["files"]
    assert finished_facts(finished)["steps"] == 1 and list(losses(finished)) == [1]
    assert not (finished / ".replaced").exists() and not (finished / "checkpoint-2").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_path", "/no/such.json"], "/no/such.json does not exist"),
        (["--learnin_rate", "1"], "did you mean --learning_rate"),
        (["--model_name_or_path", "nowhere"], "'nowhere' does not exist"),
        (["--image_folder", "nowhere"], "not found in nowhere"),
        (["--learning_rate", "nan", "--lr_scheduler_type", "constant", "--max_steps", "2"], "the loss is"),
    ],
)
def test_a_run_that_does_not_reach_its_first_step_replaces_nothing(recipe, finished, flags, message):
    for name in REPORTS:  # files of the run: its record names them
        (finished / name).write_text("of the run")
    before = state(finished)
    if "nan" in flags:
        code, line = run_forked(_with_a_first_step_that_fails, recipe, finished, OVERWRITE)
        message = "no step"
    else:
        code, line = run_forked(stage_exit, recipe, finished, [*OVERWRITE, *flags])
    assert code == 2 and message in line
    after = state(finished)
    reports = {finished / "bad_samples.new.jsonl"}
    assert {path: after[path] for path in before} == before and set(after) - set(before) <= reports


def _with_a_first_step_that_fails(recipe, output, flags):
    from llava_ext.training.trainer import EvoTokTrainer

    def fail(self):
        assert (output / ".replaced").is_dir() and not (output / "model.safetensors").exists()
        raise UserError("no step")

    EvoTokTrainer.check_step = fail
    return stage_exit(recipe, output, flags)


def test_reports_are_kept_until_those_of_the_next_run_are_placed(tmp_path):
    bad, too_long = REPORTS
    assert prepare_report(tmp_path / "new", bad) == tmp_path / "new" / bad and not (tmp_path / "new").exists()
    owned_folder(tmp_path).claim("recipe.yaml", bad, too_long)
    for name in ("recipe.yaml", bad, too_long):
        (tmp_path / name).write_text("of the run")
    for name, reasons in ((bad, {"a17": "broken"}), (too_long, {})):
        StageReport(prepare_report(tmp_path, name), 1.0, reasons).check(1)
    assert [(tmp_path / name).read_text() for name in (bad, too_long)] == ["of the run", "of the run"]
    place_reports(tmp_path)
    assert "a17" in (tmp_path / bad).read_text() and not (tmp_path / too_long).exists()
    assert not list(tmp_path.glob("*.new.jsonl")) and owned_folder(tmp_path).owns(bad)


def test_a_report_of_a_failed_validation_is_replaced_in_a_folder_without_a_run(tmp_path):
    for sample in ("first", "second"):
        StageReport(prepare_report(tmp_path, REPORTS[0]), 1.0, {sample: "broken"}).check(1)
    assert "second" in (tmp_path / REPORTS[0]).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".evotok.json", REPORTS[0]]


def test_a_failed_first_start_does_not_create_the_folder(recipe, tmp_path):
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", ["--vision_tower", str(tmp_path)])
    assert code == 2 and "is not a model folder" in line and not (tmp_path / "out").exists()


def test_a_model_of_another_program_is_not_overwritten(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("of another model")
    for flags in (OVERWRITE, OVERWRITE[:-2]):
        code, line = run_forked(stage_exit, recipe, tmp_path / "run", flags)
        assert code == 2 and "config.json was not written by this program" in line
    assert (tmp_path / "run" / "config.json").read_text() == "of another model"


def test_a_checkpoint_of_another_program_is_not_overwritten(recipe, tmp_path):
    foreign = tmp_path / "run" / "checkpoint-1" / "trainer_state.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("of another program")
    code, line = run_forked(stage_exit, recipe, tmp_path / "run", OVERWRITE[:-2])
    assert code == 2 and "checkpoint-1/trainer_state.json was not written by this program" in line
    assert foreign.read_text() == "of another program" and not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_folder_that_a_run_reads_is_not_replaced(recipe, finished):
    before = state(finished)
    code, line = run_forked(stage_exit, recipe, finished, [*OVERWRITE, "--model_name_or_path", str(finished)])
    assert code == 2 and "model_name_or_path" in line and "which the run reads" in line
    assert state(finished) == before


def test_a_run_of_a_version_without_records_is_recognized_by_its_files(finished):
    (finished / ".evotok.json").unlink()
    owned = owned_folder(finished)
    assert owned.owns("model.safetensors") and owned.owns("checkpoint-2/trainer_state.json")
    assert not any(name in owned.entries for name in ("thesis.tex", "checkpoint-1/notes.txt"))


# Resuming ----------------------------------------------------------------------------------------------------


def unfinished(folder):
    owned_folder(folder).delete("finished.json")
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-5}, "learning_rate: 0.001 before, 1e-05 now"),
        ({"tune_language_model": "false"}, "tune_language_model: True before, False now"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 4 before, 2 now"),
        ({"prompt_dropout": 0.3}, "prompt_dropout"),
    ],
)
def test_a_changed_setting_is_rejected_with_both_values(recipe, finished, changed, message):
    for folder in (finished, unfinished(finished)):
        before = state(folder)
        with pytest.raises(RuntimeError, match=f"trained with other settings: .*{message}.*--overwrite true"):
            run_forked(run, recipe, folder, {**PLAIN, "max_steps": 3, **changed})
        assert state(folder) == before


def test_a_run_without_its_recipe_warns_that_settings_are_not_compared(recipe, finished, caplog):
    config = prepared_config(recipe, {**PLAIN, "output_dir": str(finished)})
    (finished / "recipe.yaml").write_text("learning_rate: [")
    with pytest.raises(UserError, match="recipe.yaml cannot be read as settings.*a finished run.*--overwrite true"):
        plan_output(config, {}, RunShape(1))
    (finished / "recipe.yaml").unlink()
    assert plan_output(config, {}, RunShape(1)).finished_steps == 2
    assert "recipe.yaml is missing, so the settings cannot be compared" in caplog.text


def test_changed_records_are_rejected_and_moved_records_are_accepted(recipe, tmp_path):
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    records = [{"id": str(i), "conversations": turns} for i in range(9)]
    data.write_text(json.dumps(records))
    settings = {**PLAIN, "data_path": [str(data)], "tune_projectors": False, "tune_image_head": False}
    run_forked(run, recipe, tmp_path / "run", settings)
    moved = data.rename(tmp_path / "moved.json")
    run_forked(run, recipe, tmp_path / "run", {**settings, "data_path": [str(moved)], "max_steps": 3})
    assert finished_facts(tmp_path / "run")["steps"] == 3
    records[4]["conversations"] = [turns[0], {"from": "gpt", "value": "oh"}]
    data.write_text(json.dumps(records))
    unfinished(tmp_path / "run")
    with pytest.raises(RuntimeError, match="data: 9 records, digest .* before, 9 records, digest .* now"):
        run_forked(run, recipe, tmp_path / "run", {**settings, "max_steps": 4})


def test_other_images_with_the_same_names_are_rejected(recipe, scene_folder, tmp_path):
    folders = [tmp_path / name for name in ("first", "others")]
    images = sorted((scene_folder / "train" / "images").iterdir())
    for folder, shift in zip(folders, (0, 1), strict=True):
        folder.mkdir()
        for number in range(8):
            (folder / f"{number}.png").write_bytes(images[number + shift].read_bytes())
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]
    draw = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<image>"}]
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": (turns, draw)[i % 2]} for i in range(8)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    settings = {**PLAIN, "data_path": [str(data)], "code_cache": str(tmp_path / "codes")}
    run_forked(run, recipe, tmp_path / "run", {**settings, "image_folder": str(folders[0])})
    with pytest.raises(RuntimeError, match="images: 8 compared before, 8 of them with other content"):
        run_forked(run, recipe, tmp_path / "run", {**settings, "image_folder": str(folders[1]), "max_steps": 3})
    folders[0].rename(tmp_path / "moved")
    moved = {**settings, "image_folder": str(tmp_path / "moved"), "max_steps": 3}
    run_forked(run, recipe, tmp_path / "run", moved)
    assert finished_facts(tmp_path / "run")["steps"] == 3


def test_more_steps_continue_a_finished_run_and_the_recipe_records_the_change(recipe, finished):
    run_forked(run, recipe, finished, {**PLAIN, "max_steps": 4, "save_steps": 2, "max_grad_norm": 0.5})
    assert finished_facts(finished)["steps"] == 4 and sorted(losses(finished)) == [1, 2, 3, 4]
    text = (finished / "recipe.yaml").read_text()
    assert "# step 2: max_steps: 2 before, 4 now" in text and "# step 2: max_grad_norm: 1.0 before, 0.5 now" in text
    assert yaml.safe_load(text)["max_steps"] == 4
    assert (finished / "thesis.tex").is_file() and load_file(finished / "model.safetensors")
