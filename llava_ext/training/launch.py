"""Start of a stage in each of its processes: environment variables, device, process group, DeepSpeed."""

import json
import os
import socket

import torch
from transformers import TrainingArguments

from evotok_plugin.common.allocation import keep_freed_memory
from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.errors import UserError
from llava_ext.training.config import StageConfig
from llava_ext.training.deepspeed_config import find_deepspeed_config, read_deepspeed_config

_GATHERS_WEIGHTS = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def prepare_processes(config: StageConfig) -> None:
    """Join the run that a launcher has started, or be its only process, and complete the config for it.

    This is the only place of training with side effects on the process. It sets `TENSORBOARD_LOGGING_DIR`; with
    DeepSpeed and without a launcher also `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and
    `MASTER_PORT`; on the CPU `DS_ACCELERATOR`, and that freed memory is kept (`keep_freed_memory`).
    `TrainingArguments.__post_init__`, which it calls, validates and converts the values of `TrainingArguments`, resets
    accelerate's shared state, chooses the device, starts the process group, sets TF32 and makes the DeepSpeed
    configuration known to transformers, all in one function.

    Raises:
        UserError: a value that transformers or DeepSpeed rejects, or processes that do not fit the launcher or GPUs.
    """
    if isinstance(config.deepspeed, str):
        config.deepspeed = str(find_deepspeed_config(config.deepspeed))
    read_deepspeed_config(config.deepspeed)
    _check_json_values(config)
    _set_environment(config)
    _adapt_to_device(config)
    try:
        TrainingArguments.__post_init__(config)
    except ValueError as error:
        raise UserError(f"{describe_error(error)}; change the setting in the recipe or on the command line") from error
    if config.n_gpu > 1:
        raise UserError(
            f"{config.n_gpu} GPUs are visible to one process, which cannot split a batch over them; start one process "
            "per GPU with NPROC=N or torchrun, or choose a GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if config.deepspeed:
        _prepare_deepspeed(config)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world_size != launched:
        raise UserError(
            f"the launcher started {launched} processes but training sees {config.world_size}; "
            "start it with scripts/*.sh and NPROC, or with torchrun"
        )


def _check_json_values(config: StageConfig) -> None:
    """Check the values that `TrainingArguments` parses as JSON, whose errors would not name the setting."""
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise UserError(f"{name}: {value} is not valid JSON: {error}") from error


def _set_environment(config: StageConfig) -> None:
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(config.output_dir, "tensorboard")
    if config.deepspeed and "RANK" not in os.environ:
        # Without a launcher DeepSpeed would look for MPI.
        single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in single.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _adapt_to_device(config: StageConfig) -> None:
    """Let the same settings run on the CPU where CUDA is not available."""
    if torch.cuda.is_available() and not config.use_cpu:
        return
    for name in ("bf16", "fp16"):
        if getattr(config, name) and not config.use_cpu:
            raise UserError(
                f"{name} is true, but no CUDA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES, or pass "
                f"--use_cpu true to train on the CPU"
            )
    config.use_cpu = True
    keep_freed_memory()
    config.tf32 = None
    config.dataloader_pin_memory = False
    if config.deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # An all-reduce kernel for inference only, which would otherwise be compiled for minutes at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _prepare_deepspeed(config: StageConfig) -> None:
    if config.use_cpu:
        import deepspeed

        # ZeRO-3 partitions while the model loads and asks deepspeed.comm for the number of ranks.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    engine = config.hf_deepspeed_config
    if engine.mismatches:
        differences = "; ".join(difference.removeprefix("- ") for difference in engine.mismatches)
        raise UserError(
            f"the DeepSpeed configuration contradicts the settings of the stage: {differences}; set these values to "
            '"auto" in the DeepSpeed configuration'
        )
    if engine.is_zero3() and not engine.is_true(_GATHERS_WEIGHTS):
        raise UserError(
            f"{config.deepspeed}: without {_GATHERS_WEIGHTS.split('.')[1]} the saved model would lack its weights; "
            "set it to true"
        )
