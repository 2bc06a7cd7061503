"""Drawing images for prompts: one step of the language model an image position, guidance in one batch.

R rows drawn together, G = 2 R rows with guidance (conditional first), N positions, L levels, D LLM width.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from evotok_plugin.errors import UserError
from evotok_plugin.sampling import uniform_noise
from llava_ext.generation.evaluation_view import evaluation_view
from llava_ext.generation.graph_steps import GraphSteps, SingleSteps
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.options import DrawingOptions, seeds_for
from llava_ext.generation.previews import preview
from llava_ext.generation.steps import Steps, can_be_fixed, check_room


class ImageGenerationMixin:
    """`generate_images` for a model with a language model, an image head and an EvoTok tokenizer."""

    @torch.no_grad()
    def generate_images(
        self,
        prompt: str | Sequence[str],
        processor,
        num_images: int = 1,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        negative_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
        on_preview: Callable[[list[Image]], None] | None = None,
        preview_every: int = 0,
        output_type: str = "pil",
        use_graphs: bool = False,
    ) -> list[Image] | Tensor:
        """Draw images for prompts.

        Args:
            prompt: one prompt or several.
            processor: the model's `EvoTokLlavaProcessor`.
            num_images: images a prompt.
            guidance_scale, guidance_schedule, negative_prompt: of `DrawingOptions`. Where they, or the four sampling
                values, are None, the model's own are used (`generation_config.image_generation`).
            seed: an int (image i gets seed + i) or one int per image; an image depends on its prompt, its seed and the
                settings only.
            temperature, top_k, top_p, min_p: of `SamplingOptions`, each a number or one a level.
            batch_size: images drawn together.
            on_progress: called with (positions drawn, positions in all).
            on_preview: called after every `preview_every` positions with the images being drawn as they are, grey where
                nothing is drawn.
            output_type: "pil", or "pt" for a tensor of pixels (images, 3, H, W) in [-1, 1].
            use_graphs: on CUDA record one step and repeat it, without the time that starting its kernels takes; for
                backbones with full attention in every layer, computed by PyTorch's SDPA, others draw as without it.

        Returns:
            `len(prompts) * num_images` images, those of one prompt together.

        Raises:
            UserError: no prompt or one that is too long, impossible settings, or seeds that do not match the number of
                images.
        """
        self.config.check_processor(processor)
        prompts = _checked_prompts(prompt)
        if num_images < 1 or batch_size < 1 or preview_every < 0:
            raise UserError(
                "num_images and batch_size must be at least 1 and preview_every at least 0, got "
                f"{num_images}, {batch_size} and {preview_every}"
            )
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type: expected 'pil' or 'pt', got {output_type!r}")
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        options = DrawingOptions(guidance_scale, guidance_schedule, negative_prompt, **sampling).for_model(self)
        rows = [p for p in prompts for _ in range(num_images)]
        seeds = seeds_for(seed, len(rows), f"{len(prompts)} prompts x {num_images}")
        positions, pixels = self.config.vision_config.num_positions, []
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            for codes in self.draw_codes(rows[part], processor, seeds[part], options, use_graphs):
                drawn = codes.shape[1]
                if on_progress is not None:
                    on_progress(start * positions + drawn * codes.shape[0], len(rows) * positions)
                if on_preview is not None and preview_every and drawn % preview_every == 0 and drawn < positions:
                    on_preview(preview(self.vision_tower, processor, codes))
            pixels.append(self.vision_tower.decode_pixels(codes))
        pixels = torch.cat(pixels)
        return pixels if output_type == "pt" else processor.image_processor.to_pil(pixels)

    @torch.no_grad()
    def draw_codes(
        self,
        prompts: Sequence[str],
        processor,
        seeds: Sequence[int],
        options: DrawingOptions | None = None,
        use_graphs: bool = False,
    ) -> Iterator[Tensor]:
        """Draw one image a prompt: the codes so far, (R, p, L), after every position p = 1 ... N.

        The mode of the model (training or evaluation) makes no difference and is left alone.

        Args:
            options: what differs from the model's own settings.
            use_graphs: as `generate_images` takes it.

        Raises:
            UserError: settings for another number of levels, or a prompt that is too long.
        """
        options, model = (options or DrawingOptions()).for_model(self), evaluation_view(self)
        stepper, vision = stepper_for(model), self.config.vision_config
        noise = torch.stack([uniform_noise(s, stepper.steps_per_image, stepper.codes_per_step) for s in seeds])
        noise = noise.to(self.device)
        fixed = use_graphs and can_be_fixed(model.language_model)
        # Steps that are all alike include one behind the last codes, which nobody reads.
        steps = model._take_in(prompts, processor, options, stepper.steps_per_image - (not fixed))
        positions = GraphSteps if fixed else SingleSteps
        drawn = []
        for codes in positions(stepper, steps, noise, options):
            drawn.append(codes)
            together = torch.cat(drawn, dim=1)
            if together.shape[1] % vision.pixel_depth == 0:
                yield together.unflatten(1, (-1, vision.pixel_depth))

    def _take_in(self, prompts: Sequence[str], processor, options: DrawingOptions, num_steps: int) -> Steps:
        """Every different prompt once, then a row for each image, with guidance one more for each."""
        asked = list(dict.fromkeys(prompts))
        rows = [asked.index(p) for p in prompts]
        if options.guided:
            rows += [len(asked)] * len(prompts)
            asked.append(options.negative_prompt)
        inputs = processor.drawing_prompts(asked).to(self.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        check_room(self.language_model.config, int(mask.sum(dim=1).max()) + num_steps)
        steps = Steps(self.language_model, self.get_input_embeddings()(ids), mask, ids.shape[1] + num_steps)
        steps.select(rows)
        return steps


def _checked_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise UserError("expected at least one prompt and none empty; say what to draw")
    return prompts
