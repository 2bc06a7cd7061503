"""Drawing: one LLM step an image position, one cached depth step a level, classifier-free guidance in one batch.

R rows drawn together, G = 2 R rows with guidance (conditional first), L levels, K codebook_size, D LLM width.
"""

from collections.abc import Callable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from evotok_plugin.image_head import SamplingOptions, sample

__all__ = ["ImageGenerationMixin", "SamplingOptions", "sample"]


class ImageGenerationMixin:
    """`generate_images` for a model with a language model, a write projector and a depth transformer head."""

    @torch.no_grad()
    def generate_images(
        self,
        prompt: str | Sequence[str],
        processor,
        num_images: int = 1,
        guidance_scale: float = 3.0,
        seed: int | Sequence[int] = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Image]:
        """Draw images for prompts.

        Args:
            prompt: one prompt or several.
            processor: the model's `EvoTokLlavaProcessor`.
            num_images: images a prompt.
            guidance_scale: 1 draws from the prompt alone; larger follows it more closely, at twice the cost.
            seed: an int (image i gets seed + i) or one int per image; an image depends on its prompt and seed only.
            batch_size: images drawn together.
            on_progress: called with (positions drawn, positions in all).

        Returns:
            `len(prompts) * num_images` PIL images, those of one prompt together.

        Raises:
            ValueError: no prompt, a guidance scale below 1, or seeds that do not match the number of images.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError("expected at least one prompt and none empty; say what to draw")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1, got {guidance_scale}")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
        total = len(prompts) * num_images
        seeds = [seed + i for i in range(total)] if isinstance(seed, int) else [int(s) for s in seed]
        if len(seeds) != total:
            raise ValueError(f"got {len(seeds)} seeds for {total} images ({len(prompts)} prompts x {num_images})")
        options = SamplingOptions(temperature, top_k, top_p)
        rows = [p for p in prompts for _ in range(num_images)]
        positions = self.config.vision_config.num_positions
        done, images = 0, []
        was_training = self.training
        self.eval()
        try:
            for start in range(0, total, batch_size):
                part = slice(start, start + batch_size)
                part_size = len(rows[part])

                def report(position: int, before: int = done, size: int = part_size) -> None:
                    if on_progress is not None:
                        on_progress(before + position * size, total * positions)

                codes = self.generate_codes(
                    rows[part], processor, guidance_scale, seeds[part], options, on_position=report
                )
                images += processor.image_processor.to_pil(self.vision_tower.decode_pixels(codes))
                done += part_size * positions
        finally:
            self.train(was_training)
        return images

    def generate_codes(
        self,
        prompts: list[str],
        processor,
        guidance_scale: float,
        seeds: list[int],
        options: SamplingOptions,
        on_position: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw the codes (R, N, L) of one image a prompt."""
        num_rows, guided = len(prompts), guidance_scale != 1
        inputs = processor.drawing_prompts(prompts + [""] * num_rows if guided else prompts)
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        codebooks = self.vision_tower.quantizer.codebooks

        outputs = self.language_model(
            inputs_embeds=self.get_input_embeddings()(ids),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
        )
        positions = []
        for index in range(self.config.vision_config.num_positions):
            hidden = outputs.last_hidden_state[:, -1]  # (G, D)
            positions.append(self.image_head.sample(hidden, codebooks, generators, options, guidance_scale))
            if on_position is not None:
                on_position(index + 1)
            if index + 1 == self.config.vision_config.num_positions:
                break
            place = torch.full((num_rows,), index, device=self.device)
            step = self.embed_written(positions[-1], place)[:, None]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            outputs = self.language_model(
                inputs_embeds=torch.cat([step, step]) if guided else step,
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
        return torch.stack(positions, dim=1)
