"""Small conversations of every kind, and their losses computed one step at a time from the parts of the model."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_ext.data.dataset import Sample

# Turns of user and assistant; every image is random.
CONVERSATIONS = {
    "read": [("<image>\nWhat is it?", "a ring"), ("Which color?", "red")],
    "draw": [("a photo of a ring", "<image>")],
    "both": [("<image>\nDraw it again.", "here: <image>")],
    "text": [("What is a ring?", "a round shape")],
    "read two": [("<image>\nWhat is it?", "a ring"), ("<image>\nAnd this?", "a blue square, and not a ring")],
    "draw two": [("a ring", "<image>"), ("now two rings", "<image>\nhere they are")],
    "draw, then read": [("a ring", "<image>"), ("<image>\nLike this one?", "no, a red one: <image>")],
    "unconditional": [("", "<image>")],
}


def make_sample(model, processor, kind: str, seed: int = 0) -> Sample:
    """Encode a conversation as the data set does, with random codes."""
    generator, vision = torch.Generator().manual_seed(seed), model.config.vision_config
    messages, drawn, read = [], [], []
    for question, answer in CONVERSATIONS[kind]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for text, images in ((question, read), (answer, drawn)):
            for _ in range(text.count("<image>")):
                shape = (vision.num_positions, vision.num_quantizers)
                codes = torch.randint(vision.codebook_size, shape, generator=generator)
                images.append(codes)
                if images is read:
                    drawn.append(None)
    encoded = processor.encode_conversation(messages, drawn)
    return Sample(encoded.input_ids, encoded.labels, read)


@dataclass
class Sums:
    """Sums of cross-entropies, and numbers of tokens and positions; image terms are means over levels."""

    text: Tensor
    image: Tensor
    num_text: int
    num_image: int


def naive_sums(model, sample: Sample) -> Sums:
    """Losses of one sample from its flat ids: embed each step, run the backbone on the sample, classify every step."""
    steps, targets = (naive_flat_steps if model.config.image_head == "flat" else naive_steps)(model, sample)
    hidden = model.language_model(inputs_embeds=torch.stack(steps)[None]).last_hidden_state[0]
    text, image, tower, levels = [], [], model.vision_tower, model.config.vision_config.pixel_depth
    for before, target in zip(hidden[:-1], targets[1:], strict=True):
        if target is None:
            continue
        if isinstance(target, int):
            text.append(F.cross_entropy(model.lm_head(before), torch.tensor(target)))
        elif isinstance(target, FlatTarget):
            logits = model.image_head.logits(before[None], target.level, tower.quantizer.codebooks)[0]
            image.append(F.cross_entropy(logits, torch.tensor(target.code)) / levels)
        else:
            logits = model.image_head(before[None], tower.level_latents(target[None, None])[0])
            terms = [F.cross_entropy(x[0], code) for x, code in zip(logits, target, strict=True)]
            image.append(torch.stack(terms).mean())
    add = lambda terms: torch.stack(terms).sum() if terms else torch.zeros(())  # noqa: E731
    per_position = levels if model.config.image_head == "flat" else 1
    return Sums(add(text), add(image), len(text), len(image) // per_position)


@dataclass
class FlatTarget:
    """A learned residual token."""

    level: int
    code: int


def naive_steps(model, sample: Sample) -> tuple[list[Tensor], list]:
    """LLM input of each step, one per position, and the target there: None, a token, or codes (L,)."""
    vocabulary, levels = model.vocabulary, model.config.vision_config.pixel_depth
    read = [step for codes in sample.read_codes for step in model.embed_read(image_codes=codes[None])[0]]
    ids, labels, at, position = sample.input_ids, sample.labels, 0, 0
    steps, targets = [], []
    while at < len(ids):
        token, learned = int(ids[at]), int(labels[at]) != -100
        if vocabulary.is_residual(ids[at]):
            codes = vocabulary.codes(ids[at : at + levels])
            steps.append(model.embed_written(codes[None], torch.tensor([position]))[0])
            targets.append(codes if learned else None)
            position, at = position + 1, at + levels
            continue
        position, at = 0, at + 1
        is_placeholder = token == model.config.image_token_id
        steps.append(read.pop(0) if is_placeholder else model.get_input_embeddings()(torch.tensor(token)))
        targets.append(token if learned else None)
    assert not read
    return steps, targets


def naive_flat_steps(model, sample: Sample) -> tuple[list[Tensor], list]:
    """LLM input of each step with the flat head, one per token, and the target: None, a token, or a `FlatTarget`."""
    vocabulary, head, codebooks = model.vocabulary, model.image_head, model.vision_tower.quantizer.codebooks
    read = [step for codes in sample.read_codes for step in model.embed_read(image_codes=codes[None])[0]]
    steps, targets = [], []
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        level, code = divmod(token - vocabulary.offset, vocabulary.codebook_size)
        target = token
        if 0 <= level < vocabulary.num_levels:
            target = FlatTarget(level, code)
            steps.append(head.embed_level(torch.tensor([code]), level, codebooks)[0])
        elif token == model.config.image_token_id:
            steps.append(read.pop(0))
        else:
            steps.append(model.get_input_embeddings()(torch.tensor(token)))
        targets.append(None if label == -100 else target)
    assert not read
    return steps, targets


def pooled(sums: list[Sums]) -> tuple[Tensor, Tensor]:
    """Text and image loss of several samples together, with equal weight for every token."""
    text = sum(s.text for s in sums) / max(1, sum(s.num_text for s in sums))
    image = sum(s.image for s in sums) / max(1, sum(s.num_image for s in sums))
    return text, image


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all trained weights by name; zero if the loss does not depend on a weight."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, [weight for _, weight in named], allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(named, found, strict=True)
    }
