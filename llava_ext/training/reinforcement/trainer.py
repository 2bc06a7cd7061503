"""The trainer of reinforcement: in every step it draws, judges and learns, and replays supervised samples."""

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from evotok_plugin.errors import UserError
from llava_ext.data.prompt_files import Prompt
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.rewards import WeightedRewards
from llava_ext.training.callbacks import on_any_process
from llava_ext.training.drawn_samples import NUM_DRAWINGS, NUM_PROMPTS, write_samples
from llava_ext.training.parameter_groups import plain_model
from llava_ext.training.reinforcement.advantages import diversity, group_advantages, is_mixed
from llava_ext.training.reinforcement.config import ReinforceConfig
from llava_ext.training.reinforcement.judging import judge
from llava_ext.training.reinforcement.means import Means
from llava_ext.training.reinforcement.policy_loss import DrawnGroups, policy_loss
from llava_ext.training.reinforcement.prompt_order import PromptOrder
from llava_ext.training.reinforcement.rollout import draw, drawing_seed, to_images
from llava_ext.training.trainer import EvoTokTrainer


@dataclass(frozen=True)
class Task:
    """Prompts and the rewards of their drawings.

    Attributes:
        heldout: prompts that are only evaluated.
        second_judge: rewards that are only logged.
    """

    prompts: Sequence[Prompt]
    heldout: Sequence[Prompt]
    rewards: WeightedRewards
    second_judge: WeightedRewards | None = None


@dataclass(frozen=True)
class _Part:
    """Groups of a step that are learned at once.

    Attributes:
        advantages: (G, n).
        num_left_out: further groups, whose advantages and gradients are 0.
    """

    groups: DrawnGroups
    advantages: Tensor
    num_left_out: int


def frozen_copy(model: EvoTokLlavaForConditionalGeneration) -> EvoTokLlavaForConditionalGeneration:
    """A copy of a model in evaluation mode that shares the tokenizer and everything else that is not trained."""
    shared = [model.vision_tower, *model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    frozen = copy.deepcopy(model, {id(one): one for one in shared})
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return frozen.eval()


class ReinforceTrainer(EvoTokTrainer):
    """Reinforces the drawings of a model, next to the supervised training of `EvoTokTrainer`.

    Prompts are divided over the processes, and the drawings of a prompt stay on one.

    Args:
        reference: the starting model, from `frozen_copy`.
    """

    args: ReinforceConfig
    shown_metrics = ("reward", "kl", "share_mixed", "loss")

    def __init__(
        self,
        model: EvoTokLlavaForConditionalGeneration | PeftModel,
        args: ReinforceConfig,
        *,
        task: Task,
        reference: EvoTokLlavaForConditionalGeneration,
        **kwargs: Any,
    ) -> None:
        if not args.replays:
            # DDP would look for unused parameters in the forward pass, which lacks the image head and the anchor.
            args.ddp_find_unused_parameters = False
        super().__init__(model, args, **kwargs)
        self._reference = reference
        self._reference.to(args.device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
        self._task, self._order = task, PromptOrder(task.prompts, args.seed)
        self._parts: list[_Part] = []
        self._policy_losses: list[Tensor] = []
        self._means = Means()
        self.add_callback(Observations(self))

    # Data of a step ------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.args.replays:
            return super().get_train_dataloader()
        nothing = {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
        steps: Any = range(self.args.max_steps)
        return DataLoader(steps, batch_size=1, collate_fn=lambda _: nothing)

    def describe_length(self, num_steps: int) -> str:
        args = self.args
        drawings = f"{num_steps} steps of {args.prompts_per_step} prompts x {args.drawings_per_prompt} drawings"
        if not args.replays:
            return f"{drawings}; no samples are replayed, so other abilities of the model may decline"
        return f"{drawings}; replayed: {super().describe_length(num_steps)}"

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The samples to replay in a step, as in `EvoTokTrainer`; also draws and judges the images of the step."""
        if self.args.replays:
            batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        else:
            batches, counts = list(islice(epoch_iterator, num_batches)), torch.zeros(2, device=device)
        self._parts = self._draw_step()
        return batches, counts

    def _draw_step(self) -> list[_Part]:
        """Draw and judge the groups of this process in the next step."""
        args, step, started = self.args, self.state.global_step, time.monotonic()
        first = step * args.prompts_per_step
        mine = range(self._processes.rank, args.prompts_per_step, self._processes.world_size)
        prompts = [self._order.take(first + place, 1)[0] for place in mine]
        count = args.drawings_per_prompt
        rows = [prompt.text for prompt in prompts for _ in range(count)]
        seeds = [
            drawing_seed(args.seed, step, place, prompt.text, index)
            for place, prompt in zip(mine, prompts, strict=True)
            for index in range(count)
        ]
        codes, images = self._draw(rows, seeds)
        drawn = time.monotonic()
        when = f"step {step + 1}"
        scores = judge(self._task.rewards, rows, images, self._processes, when)
        judged = time.monotonic()
        rewards = torch.tensor(self._task.rewards.total(scores), dtype=torch.float64).view(-1, count)
        codes = codes.unflatten(0, (-1, count))
        self._record(prompts, rewards, scores, codes)
        self._means.add("drawing_seconds", [drawn - started])
        self._means.add("judging_seconds", [judged - drawn])
        return self._parts_of(prompts, codes, rewards)

    def _measures(self) -> bool:
        """Whether all groups of the step are computed, with their divergence from the reference.

        Without a weight of the divergence, this is only done in steps that are logged.
        """
        return self.args.kl_weight > 0 or (self.state.global_step + 1) % max(1, self.state.logging_steps) == 0

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, list[Image]]:
        """Codes (R, N, L) and images of R prompts."""
        model, size = plain_model(self.model), self.args.drawing_batch_size
        codes = draw(model, self._processor, prompts, seeds, self.args.drawing_options(), size)
        return codes, to_images(model, self._processor, codes, size)

    @property
    def _processor(self) -> Any:
        return self.processing_class

    def _parts_of(self, prompts: Sequence[Prompt], codes: Tensor, rewards: Tensor) -> list[_Part]:
        """Divide groups: codes (G, n, N, L), rewards (G, n). The number of parts is the same on all processes."""
        size, parts = max(1, self.args.drawing_batch_size // self.args.drawings_per_prompt), []
        advantages, mixed = group_advantages(rewards), is_mixed(rewards)
        order = mixed.int().argsort(descending=True, stable=True)  # equal rewards last: few parts have to learn
        for chosen in order.split(size):
            learned = chosen if self._measures() else chosen[mixed[chosen]]
            learned = learned if len(learned) else chosen[:1]
            texts = [prompts[index].text for index in learned.tolist()]
            inputs = self._processor.drawing_prompts(texts).to(codes.device)
            groups = DrawnGroups(inputs["input_ids"], inputs["attention_mask"], codes[learned.to(codes.device)])
            parts.append(_Part(groups, advantages[learned].to(codes.device), len(chosen) - len(learned)))
        return parts

    def _record(
        self, prompts: Sequence[Prompt], rewards: Tensor, scores: dict[str, list[float]], codes: Tensor
    ) -> None:
        self._means.add("reward", rewards.flatten().tolist())
        for name, values in scores.items():
            self._means.add(f"reward/{name}", values)
        for prompt, group in zip(prompts, rewards.tolist(), strict=True):
            if prompt.tag:
                self._means.add(f"reward/tag/{prompt.tag}", group)
        self._means.add("share_mixed", is_mixed(rewards).float().tolist())
        self._means.add("diversity", diversity(codes).tolist())

    # Learning ------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of the drawings of the step, before its first replayed batch, and of the batch."""
        started, parts, self._parts = time.monotonic(), self._parts, []
        model.train()
        loss = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            is_last = not self.args.replays and index + 1 == len(parts)
            with contextlib.nullcontext() if is_last else self._accumulating(model):
                loss += self._learn(model, part, is_last)
        if self.args.replays:
            loss += super().training_step(model, inputs, num_items_in_batch)
        self._means.add("learning_seconds", [time.monotonic() - started])
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a replayed batch as in `EvoTokTrainer`, times `replay_weight`."""
        found = super().compute_loss(*args, **kwargs)
        if isinstance(found, tuple):
            return self.args.replay_weight * found[0], found[1]
        return self.args.replay_weight * found

    def _learn(self, model: nn.Module, part: _Part, is_last: bool) -> Tensor:
        """Add the gradient of a part; returns its loss."""
        args, plain, measures = self.args, plain_model(self.model), self._measures()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            found = policy_loss(
                plain,
                part.groups,
                part.advantages,
                args.drawing_temperature,
                self._reference if measures else None,
                model,
            )
            loss = found.policy + args.kl_weight * found.divergence if args.kl_weight else found.policy
            share = len(part.advantages) * self._processes.world_size / args.prompts_per_step
            loss = loss * share  # gradients are averaged over processes
            if is_last:
                # An anchor: gradients of all parameters are exchanged, also of those that drawings do not use.
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                loss = loss + 0.0 * sum(parameter.flatten()[:1].sum() for parameter in trained)
        self._policy_losses.append(loss.detach())
        count = len(part.advantages)
        self._means.add("policy_loss", [float(found.policy.detach())] * count + [0.0] * part.num_left_out)
        if measures:
            levels = found.entropy.tolist()
            self._means.add("kl", [float(found.divergence.detach())] * count)
            self._means.add("entropy", levels * count)
            for level, entropy in enumerate(levels):
                self._means.add(f"entropy/level_{level}", [entropy] * count)
        options: dict[str, Any] = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        if args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            options["learning_rate"] = self._get_learning_rate()
        self.accelerator.backward(loss, **options)
        return loss.detach()

    @contextlib.contextmanager
    def _accumulating(self, model: nn.Module) -> Iterator[None]:
        """Gradients are added up on this process; a later backward pass of the step exchanges them."""
        state, synchronizes = self.accelerator.gradient_state, self.accelerator.sync_gradients
        state._set_sync_gradients(False)
        try:
            with contextlib.nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(synchronizes)

    def check_step(self) -> None:
        losses = torch.stack(self._policy_losses)
        self._policy_losses = []
        if on_any_process([int(not bool(losses.isfinite().all()))], self._processes)[0]:
            raise UserError(
                f"step {self.state.global_step}: the loss of the drawings is NaN or infinite; the last checkpoint is "
                "kept. Run the same command again, or start over with a lower --learning_rate"
            )
        if self.args.replays:
            super().check_step()

    def window_metrics(self) -> dict[str, float]:
        replayed, means, args = super().window_metrics(), self._means.pop(self._processes), self.args
        loss = means["policy_loss"] + args.kl_weight * means.get("kl", 0.0) + args.replay_weight * replayed["loss"]
        return {**means, **replayed, "loss": loss}

    # Observation ---------------------------------------------------------------------------------------------

    def evaluate_prompts(self) -> None:
        """Log the mean rewards of held-out prompts and of as many trained ones, at fixed seeds."""
        task, args = self._task, self.args
        count = min(args.evaluation_prompts, len(task.heldout) or len(task.prompts))
        chosen = {"trained": self._order.take(0, min(count, len(task.prompts)))}
        if task.heldout:
            chosen["heldout"] = PromptOrder(task.heldout, args.seed).take(0, count)
        means = Means()
        for kind, prompts in chosen.items():
            mine = list(enumerate(prompts))[self._processes.rank :: self._processes.world_size]
            rows = [prompt.text for _, prompt in mine]
            seeds = [drawing_seed(args.seed, -1, place, prompt.text, 0) for place, prompt in mine]
            _, images = self._draw(rows, seeds)
            when = f"evaluation after step {self.state.global_step}"
            scores = judge(task.rewards, rows, images, self._processes, when)
            means.add(f"{kind}/reward", task.rewards.total(scores))
            for name, values in scores.items():
                means.add(f"{kind}/reward/{name}", values)
            if task.second_judge is not None:
                scores = judge(task.second_judge, rows, images, self._processes, when)
                means.add(f"{kind}/second_judge", task.second_judge.total(scores))
        self.log(means.pop(self._processes))

    def write_samples(self) -> None:
        """Write a picture of the first prompts with fixed seeds, on the first process."""
        if not self._processes.is_first:
            return
        prompts = [prompt.text for prompt in self._order.take(0, min(NUM_PROMPTS, len(self._task.prompts)))]
        rows = [prompt for prompt in prompts for _ in range(NUM_DRAWINGS)]
        seeds = [drawing_seed(self.args.seed, -1, row, prompt, 0) for row, prompt in enumerate(rows)]
        _, images = self._draw(rows, seeds)
        write_samples(self.args.output_dir, self.state.global_step, prompts, images)


class Observations(TrainerCallback):
    """Evaluates prompts and writes pictures at their intervals, and before the first step."""

    def __init__(self, trainer: ReinforceTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._observe(0, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._observe(state.global_step, control)

    def _observe(self, step: int, control: TrainerControl) -> None:
        args, logs = self._trainer.args, control.should_log
        if args.evaluate_every and step % args.evaluate_every == 0:
            self._trainer.evaluate_prompts()
            control.should_log = logs  # the entry of the evaluation does not replace that of the step
        if args.sample_every and step % args.sample_every == 0:
            self._trainer.write_samples()
