"""Flags of LLaVA's scripts: each has the meaning, the notice or the error that the documentation shows."""

from dataclasses import fields
from pathlib import Path

import pytest

from evotok_plugin.errors import UserError
from llava_ext.training.config import StageConfig
from llava_ext.training.flag_tables import page
from llava_ext.training.llava_flags import FLAGS, LLAVA, SAME
from llava_ext.training.settings import stage_values
from llava_ext.training.stage_flags import VALUE_FLAGS, translate_flags
from llava_ext.training.supported_arguments import UNSUPPORTED
from llava_ext.training.train import parse

DOCS = Path(__file__).parents[3] / "docs" / "llava_flags.md"
SETTINGS = {field.name for field in fields(StageConfig)}
# The arguments of LLaVA and of LLaVA-NeXT, without those of transformers.
ARGUMENTS = """
    model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
    pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
    mm_vision_select_feature data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio cache_dir
    remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type bits lora_enable
    lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr group_by_modality_length
    model_class_name mm_tunable_parts tune_mm_vision_resampler vision_tower_pretrained unfreeze_mm_vision_tower
    unfreeze_language_model mm_resampler_type mm_mask_drop_mode mm_mask_drop_skip_percentage mm_mask_drop_ratio
    mm_mask_drop_ratio_upper mm_mask_drop_ratio_lower mm_spatial_pool_stride mm_spatial_pool_mode
    mm_spatial_pool_out_channels mm_perceiver_depth mm_perceiver_latents mm_perceiver_ff_mult mm_perceiver_pretrained
    mm_qformer_depth mm_qformer_latents mm_qformer_pretrained rope_scaling_factor rope_scaling_type s2 s2_scales
    use_pos_skipping pos_skipping_range mm_newline_position delay_load add_faster_video faster_token_stride
    early_mix_text image_grid_pinpoints image_crop_resolution image_split_resolution video_folder video_fps
    frames_upbound add_time_instruction force_sample freeze_mm_vision_resampler mm_vision_tower_lr group_by_varlen
    group_by_modality_length_auto gradient_checkpointing verbose_logging attn_implementation trainer_mode zo_eps
    zo_num_directions
""".split()
# Of the scripts v1_5/finetune.sh and v1_5/finetune_lora.sh; {folder} and the paths are the user's.
FINETUNE = """
    --deepspeed ./scripts/zero3.json --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data --vision_tower {tower}
    --pretrain_mm_mlp_adapter {folder}/mm_projector.bin --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True
    --bf16 True --output_dir ./checkpoints/llava-v1.5-13b --num_train_epochs 1 --per_device_train_batch_size 16
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
    --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to none
"""
LORA = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5"


def translated(line):
    notices = []
    return translate_flags(line.split(), notices.append), notices


@pytest.fixture
def stage_1(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "evotok_llava"}')
    return tmp_path


def test_every_argument_of_llava_is_known_once():
    assert [name for name in ARGUMENTS if name not in SETTINGS | set(FLAGS) | set(VALUE_FLAGS)] == []
    assert set(SAME) <= SETTINGS and not set(SAME) & set(FLAGS)
    assert not set(LLAVA) & SETTINGS and set(FLAGS) & SETTINGS <= set(UNSUPPORTED)


def test_the_documentation_shows_the_tables_of_the_code():
    assert DOCS.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("recipe", ["finetune", "paper_finetune", "paper_finetune_lora"])
@pytest.mark.parametrize("extra", ["", LORA])
def test_the_scripts_of_llava_need_only_other_paths(stage_1, recipe, extra):
    line = FINETUNE.format(folder=stage_1, tower=stage_1)
    values = stage_values(*parse(["--recipe", recipe, *line.split(), *extra.split()]))
    config = StageConfig(**values)
    assert config.model_name_or_path == str(stage_1) and config.deepspeed == "zero3"
    assert config.num_train_epochs == 1 and config.max_steps == -1 and config.save_steps == 50000
    assert config.group_by_modality_length and not config.packing and config.data_weights is None
    assert config.image_folder == ["./playground/data"] and config.warmup_steps == 0.03


def test_flags_are_translated_ignored_with_a_notice_or_rejected():
    line = (
        "--version v1 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False "
        "--mm_use_im_patch_token False --image_aspect_ratio pad --evaluation_strategy no --lazy_preprocess True "
        "--per_device_eval_batch_size 4 --group_by_modality_length True --mm_projector_lr=2e-5 --data_path a b"
    )
    rest, notices = translated(line)
    assert rest == "--group_by_modality_length True --mm_projector_lr=2e-5 --data_path a b".split()
    assert len(notices) == 9 and notices[2].startswith("--mm_vision_select_layer -2: ")
    assert translated("--tune_mm_mlp_adapter True")[0] == ["--tune_language_model", "false"]
    assert translated("--freeze_backbone False")[0] == []
    assert translated("--max_seq_length 512")[0] == ["--model_max_length", "512"]
    for flag, value, instead in [
        ("mm_projector_type", "linear", "mlp2x_gelu"),
        ("overwrite_output_dir", "True", "--overwrite true"),
        ("evaluation_strategy", "steps", "--eval_data"),
        ("image_aspect_ratio", "anyres_max_9", "cropped to a square"),
    ]:
        with pytest.raises(UserError, match=f"--{flag} {value} of LLaVA is not supported; instead: .*{instead}"):
            translated(f"--{flag} {value}")


def test_the_tunable_parts_of_llava_next_are_translated():
    both, _ = translated("--mm_tunable_parts=mm_mlp_adapter,mm_language_model")
    assert both == ["--tune_projectors", "true", "--tune_language_model", "true"]
    assert translated("--mm_tunable_parts mm_mlp_adapter")[0][-1] == "false"
    with pytest.raises(UserError, match="got mm_vision_tower; the tokenizer is trained with `evotok train`"):
        translated("--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model")


def test_the_adapter_of_stage_1_is_its_model_folder(stage_1):
    rest, (notice,) = translated(f"--pretrain_mm_mlp_adapter {stage_1} --model_name_or_path lmsys/vicuna --seed 3")
    assert rest[-2:] == ["--model_name_or_path", str(stage_1)] and "which includes the LLM" in notice
    with pytest.raises(UserError, match="--pretrain_mm_mlp_adapter x: expected the output folder of stage 1"):
        translated("--pretrain_mm_mlp_adapter x")


def test_a_missing_deepspeed_file_of_llava_is_that_of_the_project(tmp_path):
    rest, (notice,) = translated("--deepspeed ./scripts/zero2.json")
    assert rest == ["--deepspeed", "zero2"] and "does not exist" in notice
    (tmp_path / "zero2.json").write_text("{}")
    own = ["--deepspeed", str(tmp_path / "zero2.json")]
    assert translated(" ".join(own)) == (own, [])


def test_an_unknown_flag_suggests_the_nearest_of_llava_or_the_stage():
    for wrong, right in (("mm_projector_typ", "mm_projector_type"), ("dataset_path", "data_path")):
        with pytest.raises(UserError, match=f"--{wrong}; did you mean --{right}?"):
            translated(f"--{wrong} x")


def test_flags_can_be_written_as_transformers_writes_them():
    assert translated("--per-device-train-batch-size 4 --no_double_quant --no-tune_projectors")[0] == [
        "--per_device_train_batch_size", "4", "--double_quant", "false", "--tune_projectors", "false",
    ]  # fmt: skip
