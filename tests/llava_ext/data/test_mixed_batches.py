"""Reading, drawing and text in one batch: losses and gradients equal those of separate samples."""

from dataclasses import replace

import pytest
import torch
from mixed_samples import CONVERSATIONS, gradients, make_sample, naive_sums, pooled

from llava_ext.assembly import NEW_PARTS
from llava_ext.data.collators import Collator

KINDS = list(CONVERSATIONS)


@pytest.fixture(scope="module")
def samples(any_mllm):
    return {kind: make_sample(*any_mllm, kind, seed=index) for index, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_kind_equals_a_naive_computation(any_mllm, samples, kind):
    model, processor = any_mllm
    output, sums = model(**Collator(processor)([samples[kind]])), naive_sums(model, samples[kind])
    torch.testing.assert_close((output.text_loss, output.image_loss), pooled([sums]), atol=1e-5, rtol=1e-5)
    assert (int(output.num_text_tokens), int(output.num_image_positions)) == (sums.num_text, sums.num_image)
    torch.testing.assert_close(output.loss, output.text_loss + output.image_loss)


@torch.no_grad()
def test_losses_of_a_mixed_batch_are_token_weighted_means(any_mllm, samples):
    model, processor = any_mllm
    output = model(**Collator(processor)(list(samples.values())))
    expected = pooled([naive_sums(model, sample) for sample in samples.values()])
    torch.testing.assert_close((output.text_loss, output.image_loss), expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_mixed_batch_equal_those_of_its_samples(any_mllm, samples):
    model, processor = any_mllm
    found = gradients(model, model(**Collator(processor)(list(samples.values()))).loss)
    expected = gradients(model, sum(pooled([naive_sums(model, sample) for sample in samples.values()])))
    for part in ("language_model", "lm_head", *(name for name in NEW_PARTS if hasattr(model, name))):
        assert any(name.startswith(part) and gradient.abs().max() > 0 for name, gradient in found.items()), part
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_each_image_goes_to_its_own_place(any_mllm, samples):
    """All images of a batch are in one tensor, in the order of their placeholders."""
    model, processor = any_mllm
    one, two = samples["read"], samples["read two"]
    swapped = [
        replace(one, read_codes=two.read_codes[:1]),
        replace(two, read_codes=one.read_codes + two.read_codes[1:]),
    ]
    losses = [model(**Collator(processor)(batch)).loss for batch in ([one, two], [two, one], swapped)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-4


@pytest.mark.parametrize(
    ("kind", "learned"),
    [
        ("read", "a ring{end}red{end}"),
        ("both", "here: {image}{end}"),
        ("draw two", "{image}{end}{image}\nhere they are{end}"),
        ("draw, then read", "{image}{end}no, a red one: {image}{end}"),
    ],
)
def test_only_assistant_text_and_drawings_are_learned(any_mllm, samples, kind, learned):
    _, processor = any_mllm
    labels = samples[kind].labels
    end = processor.tokenizer.eos_token
    said = processor.decode(labels[labels != -100])
    images, vocabulary = [], processor.vocabulary
    for codes in vocabulary.codes(labels[vocabulary.is_residual(labels)]).view(-1, processor.num_positions, 4):
        text = "".join(vocabulary.to_text(int(i)) for i in vocabulary.to_ids(codes).flatten())
        images.append(f"<|image_start|>{text}<|image_end|>")
    expected = learned.replace("{end}", end)
    for image in images:
        expected = expected.replace("{image}", image, 1)
    assert said == expected


def test_an_incomplete_image_is_an_error(any_mllm, samples):
    model, processor = any_mllm
    batch = Collator(processor)([samples["draw two"]])
    first = int(model.vocabulary.is_residual(batch["input_ids"][0]).nonzero()[0])
    short = {name: torch.cat([value[:, :first], value[:, first + 4 :]], dim=1) for name, value in batch.items()}
    drawn, whole = (68, 36) if model.config.image_head == "flat" else (17, 9)
    with pytest.raises(ValueError, match=f"{drawn} drawn steps in 2 images, expected {whole} in each image"):
        model(**short)


@pytest.mark.parametrize("kind", ["read", "draw", "text"])
def test_every_kind_gives_every_part_a_gradient(any_mllm, samples, kind):
    """So that all ranks reduce the same gradients, whatever the kinds in their batches."""
    model, processor = any_mllm
    model.train()
    try:
        loss = model(**Collator(processor)([samples[kind]])).loss
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        assert all(g is not None for g in torch.autograd.grad(loss, weights, allow_unused=True))
    finally:
        model.eval()
