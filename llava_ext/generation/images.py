"""Image generation from prompts: one or more language model steps per image position, guidance in the same batch.

R rows drawn together, G = 2 R rows with guidance (conditional first), N positions, L levels, D LLM width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import uniform_noise
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.graph_steps import GraphSteps, SingleSteps
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import DrawingOptions, seeds_for
from llava_ext.generation.previews import preview
from llava_ext.generation.prompt_cache import PromptCache
from llava_ext.generation.selection import Choice, candidates_for, make_selector
from llava_ext.generation.selection_options import SelectionOptions
from llava_ext.generation.speculative_steps import check_speculation, speculative_steps
from llava_ext.generation.steps import Steps, can_use_fixed_steps, check_room
from llava_ext.generation.thin_view import thin_view
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.rewards import Reward


class ImageGenerationMixin(ModelInterface):
    """`generate_images` and `draw_codes` of the model class."""

    @torch.no_grad()
    def generate_images(
        self,
        prompt: str | Sequence[str],
        processor: EvoTokLlavaProcessor,
        num_images: int = 1,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_schedule: str | None = None,
        negative_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float | None = None,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
        on_preview: Callable[[list[Image]], None] | None = None,
        preview_every: int = 0,
        output_type: str = "pil",
        use_graphs: bool = False,
        best_of: int | None = None,
        judge: Reward | None = None,
        on_choice: Callable[[list[Choice]], None] | None = None,
        speculate: int = 1,
    ) -> list[Image] | Tensor:
        """Draw images for prompts.

        Args:
            prompt: one prompt or several.
            processor: the model's `EvoTokLlavaProcessor`.
            num_images: images per prompt.
            guidance_scale, guidance_schedule, guidance_interval, guidance_rescale, negative_prompt: as in
                `DrawingOptions`. Where these or the four sampling values are None, the model's own settings apply
                (`generation_config.image_generation`).
            seed: an int (image i gets seed + i) or one int per image; an image depends only on its prompt, its seed and
                the settings.
            temperature, top_k, top_p, min_p: as in `SamplingOptions`, each one number or one per level.
            batch_size: images drawn together; with `best_of`, candidates.
            on_progress: called with (positions drawn, total positions); with `best_of`, those of all candidates.
            on_preview: called after every `preview_every` positions with previews of the images being drawn, in which
                missing positions are gray; with `best_of`, of the candidates being drawn.
            output_type: "pil", or "pt" for a tensor of pixels (images, 3, H, W) in [-1, 1].
            use_graphs: on CUDA, record one step and replay it, which saves the time to launch its kernels. Needs a
                backbone with full attention in every layer, computed by PyTorch's SDPA; it has no effect on others.
            best_of: candidates drawn per image, of which the best one is kept: the one under which the model's own
                reading makes the prompt most likely (`PromptReader`). Candidate 0 has the image's own seed, so 1 draws
                each image once; the first candidates are the same for every `best_of`. None takes the model's setting
                (`generation_config.image_selection`), or 1.
            judge: scores the candidates instead of the model's reading; of equal scores the first counts.
            on_choice: called with the choices for images, in order, when all their candidates are drawn.
            speculate: positions per step of the language model, 1 or more. With more than 1 the following codes are
                drafted and those that turn out wrong are drawn again (`SpeculativeSteps`): the same images up to
                rounding, in fewer steps. The images of a batch take steps of their own, so that it is faster only
                for one image at a time.

        Returns:
            `len(prompts) * num_images` images, those of one prompt together.

        Raises:
            UserError: a prompt is missing or too long, a setting is invalid, the number of seeds is not that of the
                images, a judge has no candidates to choose from, or the model does not support `speculate`.
        """
        check_speculation(self, speculate, use_graphs)
        self.config.check_processor(processor)
        prompts = _checked_prompts(prompt)
        if num_images < 1 or batch_size < 1 or preview_every < 0:
            raise UserError(
                "num_images and batch_size must be at least 1 and preview_every at least 0, got "
                f"{num_images}, {batch_size} and {preview_every}"
            )
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type: expected 'pil' or 'pt', got {output_type!r}")
        options = DrawingOptions(
            guidance_scale,
            guidance_schedule,
            negative_prompt,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
        ).for_model(self)
        rows = [p for p in prompts for _ in range(num_images)]
        seeds = seeds_for(seed, len(rows), f"{len(prompts)} prompts x {num_images}")
        count = SelectionOptions(best_of).for_model(self).best_of
        candidates, selector = candidates_for(rows, seeds, count), make_selector(self, processor, count, judge)
        positions, batches, prompt_cache = self.config.vision_config.num_positions, [], PromptCache()
        for start in range(0, len(candidates), batch_size):
            part = candidates[start : start + batch_size]
            texts, own_seeds = [one.prompt for one in part], [one.seed for one in part]
            for codes in self.draw_codes(texts, processor, own_seeds, options, use_graphs, prompt_cache, speculate):
                drawn = codes.shape[1]
                if on_progress is not None:
                    on_progress(start * positions + drawn * codes.shape[0], len(candidates) * positions)
                if on_preview is not None and preview_every and drawn % preview_every == 0 and drawn < positions:
                    on_preview(preview(self.vision_tower, processor, codes))
            choices = selector.add(part, codes)
            if choices:
                batches.append(self.vision_tower.decode_pixels(torch.stack([one.codes for one in choices])))
                if on_choice is not None:
                    on_choice(choices)
        pixels = torch.cat(batches)
        return pixels if output_type == "pt" else processor.image_processor.to_pil(pixels)

    @torch.no_grad()
    def draw_codes(
        self,
        prompts: Sequence[str],
        processor: EvoTokLlavaProcessor,
        seeds: Sequence[int],
        options: DrawingOptions | None = None,
        use_graphs: bool = False,
        prompt_cache: PromptCache | None = None,
        speculate: int = 1,
    ) -> Iterator[Tensor]:
        """Draw one image per prompt; yields the codes so far, (R, p, L), after every position p = 1 ... N.

        Images are drawn in evaluation mode; the mode of the model itself does not change.

        Args:
            options: settings that differ from the model's own.
            use_graphs, speculate: as in `generate_images`.
            prompt_cache: prompts that were run before, by the same model with the same weights; new ones are added.

        Raises:
            UserError: a setting has values for another number of levels, a prompt is too long, or the model does not
                support `speculate`.
        """
        check_speculation(self, speculate, use_graphs)
        options, model = (options or DrawingOptions()).for_model(self), thin_view(evaluation_view(self))
        stepper, vision = stepper_for(model), self.config.vision_config
        noise = torch.stack([uniform_noise(s, stepper.steps_per_image, stepper.codes_per_step) for s in seeds])
        noise = noise.to(self.device)
        fixed = use_graphs and can_use_fixed_steps(model.language_model)
        # Identical steps include one after the last codes, whose result is not used.
        num_steps = stepper.steps_per_image - (not fixed)
        cache = PromptCache() if prompt_cache is None else prompt_cache
        texts: list[str | None] = [*prompts, options.negative_prompt] if options.guided else [*prompts]
        after = model._run_prompts(texts, processor, cache, num_steps)
        unconditional = after[len(prompts)] if options.guided else None
        every_step: Iterable[Tensor]
        if speculate > 1:
            rows = [Steps.joined([one], num_steps) for one in after[: len(prompts)]]
            every_step = speculative_steps(
                stepper, rows, noise, options, unconditional, window=speculate, grid_size=vision.grid_size
            )
        else:
            steps = Steps.joined(after[: len(prompts)], num_steps)
            every_step = (GraphSteps if fixed else SingleSteps)(stepper, steps, noise, options, unconditional)
        drawn: list[Tensor] = []
        for codes in every_step:
            drawn.append(codes)
            together = torch.cat(drawn, dim=1)
            if together.shape[1] % vision.pixel_depth == 0:
                yield together.unflatten(1, (-1, vision.pixel_depth))

    def decode_image_tokens(self, ids: Tensor) -> Tensor:
        """Decode the last image drawn in each row of ids (B, T) to pixels (B, 3, H, W) in [-1, 1].

        transformers' pipelines call it with what `generate` returns.

        Raises:
            UserError: a row without a drawn image.
        """
        size = self.config.vision_config.num_positions * self.vocabulary.num_levels
        drawn = [row[self.vocabulary.is_residual(row)][-size:] for row in ids]
        if missing := [number for number, tokens in enumerate(drawn) if tokens.numel() < size]:
            raise UserError(f"rows {missing} contain no whole drawn image; generate with modalities='image'")
        codes = self.vocabulary.codes(torch.stack(drawn)).unflatten(1, (-1, self.vocabulary.num_levels))
        return self.vision_tower.decode_pixels(codes)

    def _run_prompts(
        self, texts: Sequence[str | None], processor: EvoTokLlavaProcessor, cache: PromptCache, num_steps: int
    ) -> list[Steps]:
        """Return the steps after each prompt, a single row each; prompts that are not in the cache are run once.

        Args:
            num_steps: steps that will follow the prompts.
        """
        known = {text: cache.get(text) for text in texts}
        after = {text: steps for text, steps in known.items() if steps is not None}
        if new := [text for text in known if text not in after]:
            inputs = processor.drawing_prompts(new).to(self.device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            check_room(self.language_model.config, int(mask.sum(dim=1).max()) + num_steps)
            together = Steps(self.language_model, self.get_input_embeddings()(ids), mask, ids.shape[1])
            for text, steps in zip(new, together.split(), strict=True):
                after[text] = steps
                cache.put(text, steps)
        return [after[text] for text in texts]


def _checked_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise UserError("expected at least one prompt and none empty; say what to draw")
    return prompts
