"""Training methods: LoRA, QLoRA, ZeRO-3, learning rates per group, gradient checkpointing, other backbones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import losses, prepared_config, run, run_forked, stage_exit, write_recipe

from evotok_plugin.errors import UserError
from llava_ext.assembly import assemble
from llava_ext.cli import main
from llava_ext.model_folder import load_model
from llava_ext.processing_evotok_llava import IMAGE_TOKENS
from llava_ext.training import train
from llava_ext.training.adapters import merge
from llava_ext.training.trainer import EvoTokTrainer


@pytest.fixture(scope="module")
def base(tiny_mllm, tmp_path_factory):
    """The model folder that runs continue from."""
    folder = tmp_path_factory.mktemp("base")
    model, processor = tiny_mllm
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(base, tiny_evotok_folder, scene_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipes"), base, tiny_evotok_folder, scene_folder)


LORA = {"lora_enable": "true", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
WITHOUT_DROPOUT = {**LORA, "lora_dropout": 0.0}
FULL_AND_LORA = [pytest.param({}, id="full"), pytest.param(WITHOUT_DROPOUT, id="lora", marks=pytest.mark.slow)]
MODULES = ("read_projector", "write_projector", "image_head")
QUERY = "language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def lora_run(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "lora"
    run_forked(run, recipe, output, {**LORA, "image_generation": "{guidance_scale: 2.0, top_k: 5}"})
    return output


@pytest.fixture(scope="module")
def qlora_run(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "qlora"
    run_forked(run, recipe, output, {**LORA, "bits": 4})
    return output


def weights(folder):
    return load_file(folder / "model.safetensors")


# LoRA --------------------------------------------------------------------------------------------------------


def test_lora_writes_the_adapter_and_the_merged_model(lora_run, base):
    adapter, before, after = (
        load_file(lora_run / "adapter" / "adapter_model.safetensors"),
        weights(base),
        weights(lora_run),
    )
    a, b = (adapter[f"base_model.model.{QUERY}.lora_{side}.weight"] for side in "AB")
    assert b.abs().sum() > 0
    torch.testing.assert_close(after[f"{QUERY}.weight"], before[f"{QUERY}.weight"] + (8 / 4) * b @ a)
    for name, tensor in after.items():
        if name.startswith(MODULES):
            assert torch.equal(tensor, adapter[f"base_model.model.{name}"]), name
        elif "embed_tokens" in name or name == "lm_head.weight":
            assert (tensor != before[name]).any(dim=1).sum() <= len(IMAGE_TOKENS), name
        elif name.startswith("vision_tower.") or "norm" in name:
            assert torch.equal(tensor, before[name]), name
    assert set(after) == set(before) and not any("lora" in name for name in after)
    load_model(lora_run)


def test_drawing_settings_are_saved_with_the_adapter_and_the_merged_model(lora_run, base, tmp_path):
    merge(base, lora_run / "adapter", tmp_path / "merged")
    for folder in (lora_run, lora_run / "adapter", lora_run / "checkpoint-4", tmp_path / "merged"):
        settings = json.loads((folder / "generation_config.json").read_text())["image_generation"]
        assert (settings["guidance_scale"], settings["top_k"], settings["temperature"]) == (2.0, 5, 1.0)
    assert json.loads((base / "generation_config.json").read_text())["image_generation"]["guidance_scale"] == 3.0


def test_adapters_and_their_checkpoints_hold_only_trained_parameters(lora_run):
    for folder in (lora_run / "adapter", lora_run / "checkpoint-4"):
        names = {name.removeprefix("base_model.model.") for name in load_file(folder / "adapter_model.safetensors")}
        assert all(name.startswith(MODULES) or ".lora_" in name or "token_adapter" in name for name in names)
    state = lora_run / "checkpoint-4" / "global_step4" / "mp_rank_00_model_states.pt"
    merged = (lora_run / "model.safetensors").stat().st_size
    assert state.stat().st_size < 0.5 * merged


def test_peft_alone_can_read_the_adapter_folder(lora_run, base):
    from peft import PeftModel

    model, _ = load_model(base)
    merged = PeftModel.from_pretrained(model, lora_run / "adapter").merge_and_unload().state_dict()
    for name, tensor in weights(lora_run).items():
        torch.testing.assert_close(tensor, merged[name])


def test_nothing_in_the_adapter_folder_names_this_machine(lora_run, base):
    for file in (lora_run / "adapter").glob("*.json"):
        assert str(base.parent) not in file.read_text(), file.name


def test_merge_gives_the_same_model_as_the_run(lora_run, base, tmp_path, capsys):
    assert main(["merge", str(base), str(lora_run / "adapter"), "-o", str(tmp_path / "merged")]) == 0
    for name, tensor in weights(lora_run).items():
        assert torch.equal(tensor, weights(tmp_path / "merged")[name]), name
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")


@pytest.mark.parametrize("row", [0, -1])
def test_merge_rejects_another_base(lora_run, base, tmp_path, row):
    other, _ = load_model(base)
    with torch.no_grad():
        other.language_model.layers[0].mlp.up_proj.weight[row] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="trained on .* with other weights than those in"):
        merge(tmp_path / "other", lora_run / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_compares_an_adapter_of_an_earlier_version_by_its_fingerprint(lora_run, base, tmp_path):
    shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "base.json").read_text())
    del facts["sha256"]
    (tmp_path / "adapter" / "base.json").write_text(json.dumps(facts))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({**facts, "fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="with other weights than those in"):
        merge(base, tmp_path / "adapter", tmp_path / "again")


def test_merge_rejects_an_adapter_that_lacks_a_parameter(lora_run, base, tmp_path):
    shutil.copytree(lora_run / "adapter", tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    del tensors[f"base_model.model.{QUERY}.lora_A.weight"]
    save_file(tensors, tmp_path / "cut" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="q_proj.lora_A"):
        merge(base, tmp_path / "cut", tmp_path / "merged")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("", "did you mean"), ("checkpoint-4/global_step4", "holds no adapter"), ("../absent", "holds no adapter")],
)
def test_merge_rejects_a_folder_without_an_adapter(lora_run, base, tmp_path, capsys, adapter, message):
    assert main(["merge", str(base), str(lora_run / adapter), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_merge_rejects_weights_that_are_not_finite(lora_run, base, tmp_path):
    shutil.copytree(lora_run / "adapter", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    tensors[f"base_model.model.{QUERY}.lora_A.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be loaded: NaNs detected.*train the adapter"):
        merge(base, tmp_path / "broken", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_names_the_settings_of_an_adapter_for_other_layers(lora_run, base, tmp_path):
    shutil.copytree(lora_run / "adapter", tmp_path / "other")
    file = tmp_path / "other" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["absent"]}))
    with pytest.raises(UserError, match="adapter_config.json cannot be loaded: Target modules .*absent"):
        merge(base, tmp_path / "other", tmp_path / "merged")


def test_lora_from_a_causal_lm_can_be_merged_with_its_tokenizer(
    recipe, tiny_backbone_folder, tiny_evotok_folder, tmp_path
):
    overrides = {**LORA, "model_name_or_path": str(tiny_backbone_folder), "max_steps": 2}
    run_forked(run, recipe, tmp_path / "run", overrides)
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    with pytest.raises(UserError, match="pass --vision_tower"):
        merge(tiny_backbone_folder, adapter, merged)
    merge(tiny_backbone_folder, adapter, merged, tiny_evotok_folder)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(merged)[name]), name


# QLoRA -------------------------------------------------------------------------------------------------------


def test_qlora_keeps_the_backbone_in_four_bits_and_nothing_else(recipe, tmp_path):
    import bitsandbytes

    def layer_types():
        config = prepared_config(recipe, {"output_dir": str(tmp_path), "bits": 4, **LORA})
        model, _ = train.build_model(config)
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        quantized = {name.split(".")[0] for name, m in layers if isinstance(m, bitsandbytes.nn.Linear4bit)}
        plain = {name.split(".")[0] for name, m in layers if not isinstance(m, bitsandbytes.nn.Linear4bit)}
        state = model.language_model.layers[0].mlp.up_proj.weight.quant_state
        return quantized, plain, state.quant_type, state.nested

    quantized, plain, quant_type, nested = run_forked(layer_types)
    assert quantized == {"language_model"} and (quant_type, nested) == ("nf4", True)
    assert plain == {"vision_tower", "lm_head", *MODULES}


def test_qlora_writes_an_adapter_that_can_be_merged_into_the_unquantized_base(qlora_run, base, tmp_path):
    assert not (qlora_run / "model.safetensors").exists()
    with pytest.raises(UserError, match="holds an adapter.*evotok-llava merge"):
        load_model(qlora_run / "adapter")
    merge(base, qlora_run / "adapter", tmp_path / "merged")
    adapter, before, after = (
        load_file(qlora_run / "adapter" / "adapter_model.safetensors"),
        weights(base),
        weights(tmp_path / "merged"),
    )
    a, b = (adapter[f"base_model.model.{QUERY}.lora_{side}.weight"] for side in "AB")
    assert b.abs().sum() > 0
    torch.testing.assert_close(after[f"{QUERY}.weight"], before[f"{QUERY}.weight"] + (8 / 4) * b @ a)
    model, processor = load_model(tmp_path / "merged")
    assert len(model.generate_images("a ring", processor)) == 1


def test_a_four_bit_backbone_without_adapters_is_rejected(recipe, tmp_path):
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", ["--bits", "4"])
    assert code == 2 and "--lora_enable true" in line


def test_zero3_that_would_save_no_weights_is_rejected(recipe, tmp_path):
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "own.json").write_text(json.dumps(settings))
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", ["--deepspeed", str(tmp_path / "own.json")])
    assert code == 2 and "without stage3_gather_16bit_weights_on_model_save" in line


def test_a_deepspeed_configuration_that_contradicts_the_settings_is_rejected(recipe, tmp_path):
    settings = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3}
    (tmp_path / "own.json").write_text(json.dumps(settings))
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", ["--deepspeed", str(tmp_path / "own.json")])
    assert code == 2 and "train_micro_batch_size_per_gpu=3 vs hf per_device_train_batch_size=4" in line


# ZeRO-3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FULL_AND_LORA)
def test_zero3_on_two_processes_gives_the_model_of_zero2(recipe, tmp_path, method):
    for engine in ("zero2", "zero3"):
        run_forked(run, recipe, tmp_path / engine, {**method, "deepspeed": engine, "max_steps": 2}, world_size=2)
    expected, got = weights(tmp_path / "zero2"), weights(tmp_path / "zero3")
    assert set(expected) == set(got)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "zero2"), abs=1e-4)
    load_model(tmp_path / "zero3")


def test_zero3_does_not_change_the_tokenizer_of_a_bf16_run(recipe, base, tmp_path):
    overrides = {"deepspeed": "zero3", "bf16": "true", "use_cpu": "true", "max_steps": 2}
    run_forked(run, recipe, tmp_path / "run", overrides)
    saved = weights(tmp_path / "run")
    for name, tensor in weights(base).items():
        if name.startswith("vision_tower."):
            assert torch.equal(tensor, saved[name]), name
    assert saved[f"{QUERY}.weight"].dtype == torch.bfloat16


def test_optimizer_and_weights_can_be_offloaded_to_the_host(recipe, tmp_path):
    run_forked(run, recipe, tmp_path / "offload", {"deepspeed": "zero3_offload", "max_steps": 2})
    run_forked(run, recipe, tmp_path / "plain", {"deepspeed": "none", "max_steps": 2})
    assert losses(tmp_path / "offload") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


# Learning rates ----------------------------------------------------------------------------------------------

RATES = {"language_model_lr": 1e-4, "mm_projector_lr": 2e-4, "image_head_lr": 3e-4}


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_every_parameter_is_in_one_optimizer_group_with_the_learning_rate_of_its_group(recipe, tmp_path, method):
    groups = run_forked(_optimizer_groups, recipe, tmp_path, {**method, **RATES, "weight_decay": 0.1})
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names)) and set(names) == set(groups[0]["trained"])
    for group in groups:
        assert group["names"], "DeepSpeed rejects empty groups"
        for name in group["names"]:
            part = name.removeprefix("base_model.model.").split(".")[0]
            projectors = ("read_projector", "write_projector", "new_token_rows")
            rate = {"image_head": 3e-4, **dict.fromkeys(projectors, 2e-4)}.get(part, 1e-4)
            assert group["lr"] == rate, name
            never = ("bias", "norm.weight", "layernorm.weight", "position_embedding", "level_embedding")
            never += ("new_token_rows.inputs", "new_token_rows.outputs")
            is_norm = name.endswith(never) or ".norm_" in name or ".classifiers." in name and name.endswith(".0.weight")
            assert group["weight_decay"] == (0.0 if is_norm else 0.1), name


def _optimizer_groups(recipe, output, overrides):
    config = prepared_config(recipe, {"output_dir": str(output), "deepspeed": None, **overrides})
    model, processor = train.build_model(config)
    model = train.make_trainable(model, config)
    trainer = EvoTokTrainer(model, config, shape=train.RunShape(1), processing_class=processor)
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"names": [names[p] for p in group["params"]], "trained": trained}
        | {key: group[key] for key in ("lr", "weight_decay")}
        for group in trainer.create_optimizer().param_groups
    ]


@pytest.mark.parametrize("engine", ["none", "zero3"])
def test_a_group_with_learning_rate_zero_does_not_change(recipe, base, tmp_path, engine):
    overrides = {"deepspeed": engine, "max_steps": 2, "mm_projector_lr": 0.0, "weight_decay": 0.1}
    run_forked(run, recipe, tmp_path / "run", overrides)
    before, after = weights(base), weights(tmp_path / "run")
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"language_model", "lm_head", "image_head"}


def test_learning_rates_per_group_are_rejected_with_an_optimizer_of_deepspeed(recipe, tmp_path):
    settings = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    (tmp_path / "own.json").write_text(json.dumps(settings))
    flags = ["--deepspeed", str(tmp_path / "own.json"), "--mm_projector_lr", "1e-5"]
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags)
    assert code == 2 and 'remove its "optimizer" block' in line


# Gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{}, WITHOUT_DROPOUT], ids=["full", "lora"])
@pytest.mark.parametrize("engine", ["none", pytest.param("zero3", marks=pytest.mark.slow)])
def test_gradient_checkpointing_does_not_change_losses(recipe, tmp_path, engine, method):
    for name, on in (("with", "true"), ("without", "false")):
        run_forked(
            run, recipe, tmp_path / name, {**method, "deepspeed": engine, "max_steps": 3, "gradient_checkpointing": on}
        )
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), abs=1e-6)


def test_gradient_checkpointing_reaches_every_layer_of_the_backbone(recipe, tmp_path):
    def layers():
        overrides = {"output_dir": str(tmp_path), "gradient_checkpointing": "true", "deepspeed": None}
        config = prepared_config(recipe, overrides)
        model, _ = train.build_model(config)
        model = train.make_trainable(model, config)
        model.gradient_checkpointing_enable()
        return [layer.gradient_checkpointing for layer in model.language_model.layers]

    assert run_forked(layers) == [True, True]


# Backbones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("backbone", ["qwen2", "qwen3", "llama", "mistral", "gemma2"])
def test_other_backbones_are_assembled_trained_saved_and_used(
    backbone, tied, make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, recipe, tmp_path
):
    folder = make_backbone(tiny_tokenizer_folder, tmp_path / "lm", backbone, tie_word_embeddings=tied)
    overrides = {"model_name_or_path": str(folder), "max_steps": 1, "learning_rate": 1e-2, "deepspeed": "none"}
    run_forked(run, recipe, tmp_path / "run", overrides)
    started, _ = assemble(folder, tiny_evotok_folder, 32, 2, 2)
    model, processor = load_model(tmp_path / "run")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied == model.config.tie_word_embeddings
    for name, parameter in started.language_model.named_parameters():
        assert not torch.equal(parameter, model.language_model.get_parameter(name)), f"{name} did not train"
    inputs = processor.user_turns("What is a ring?")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert len(model.generate_images("a ring", processor)) == 1


@pytest.mark.parametrize("method", FULL_AND_LORA)
def test_tied_embeddings_stay_tied_under_zero3(
    method, make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, recipe, tmp_path
):
    folder = make_backbone(tiny_tokenizer_folder, tmp_path / "lm", "qwen2", tie_word_embeddings=True)
    model, processor = assemble(folder, tiny_evotok_folder, 32, 2, 2)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    overrides = {**method, "model_name_or_path": str(tmp_path / "base"), "max_steps": 2}
    for engine in ("zero2", "zero3"):
        run_forked(run, recipe, tmp_path / engine, {**overrides, "deepspeed": engine})
    assert "lm_head.weight" not in weights(tmp_path / "zero3")
    for name, tensor in weights(tmp_path / "zero2").items():
        torch.testing.assert_close(weights(tmp_path / "zero3")[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    loaded, _ = load_model(tmp_path / "zero3")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
