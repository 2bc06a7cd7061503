"""Chunked cross-entropy against the plain one, and the parts of a step against one batch."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead, image_head
from evotok_plugin.losses.cross_entropy import chunked_cross_entropy
from llava_ext.folding import count_learned
from llava_ext.vocabulary import ResidualVocabulary

ROWS, WIDTH, CLASSES = 23, 8, 50


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, as peft has it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, CLASSES, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


CLASSIFIERS = {
    "linear": lambda: nn.Linear(WIDTH, CLASSES),
    "frozen": lambda: nn.Linear(WIDTH, CLASSES).requires_grad_(False),
    "adapted": Adapted,
}


def rows(num_rows=ROWS, dtype=torch.float32):
    return torch.randn(num_rows, WIDTH, dtype=dtype, requires_grad=True), torch.randint(CLASSES, (num_rows,))


def gradients(loss, *sources):
    leaves = [p for source in sources for p in (source.parameters() if isinstance(source, nn.Module) else [source])]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(0.3 * loss, wanted)


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_loss_and_gradients_are_those_of_the_plain_computation(kind, chunk):
    torch.manual_seed(chunk)
    classifier, (hidden, targets) = CLASSIFIERS[kind](), rows()
    chunked = chunked_cross_entropy(classifier, hidden, targets, CLASSES, max_logits=chunk * CLASSES)
    plain = F.cross_entropy(classifier(hidden), targets, reduction="sum")
    torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-6)
    found, expected = gradients(chunked, hidden, classifier), gradients(plain, hidden, classifier)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_computation():
    torch.manual_seed(0)
    exact, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows(200)
    rough, rough_hidden = copy.deepcopy(exact).bfloat16(), hidden.detach().bfloat16().requires_grad_()
    expected = F.cross_entropy(exact(hidden), targets, reduction="sum")
    plain = F.cross_entropy(rough(rough_hidden).float(), targets, reduction="sum")
    chunked = chunked_cross_entropy(rough, rough_hidden, targets, CLASSES, max_logits=20 * CLASSES)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, expected, rtol=2e-3, atol=0)

    wanted = gradients(expected, hidden, exact)

    def error(loss):
        found = gradients(loss, rough_hidden, rough)
        return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))

    assert error(chunked) < max(0.01, 1.5 * error(plain))


def test_a_weight_tied_to_embeddings_gets_both_gradients():
    torch.manual_seed(0)
    embeddings, head = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
    head.weight = embeddings.weight
    ids, targets = torch.randint(CLASSES, (2, ROWS))
    chunked = chunked_cross_entropy(head, embeddings(ids), targets, CLASSES, max_logits=7 * CLASSES)
    plain = F.cross_entropy(head(embeddings(ids)), targets, reduction="sum")
    torch.testing.assert_close(gradients(chunked, head), gradients(plain, head), atol=1e-6, rtol=1e-6)


def test_the_logits_of_all_rows_are_never_there_together():
    class Watch(nn.Linear):
        largest = 0

        def forward(self, x):
            self.largest = max(self.largest, x.shape[0])
            return super().forward(x)

    classifier, (hidden, targets) = Watch(WIDTH, CLASSES), rows(100)
    chunked_cross_entropy(classifier, hidden, targets, CLASSES, max_logits=10 * CLASSES).backward()
    assert classifier.largest == 10


def test_without_rows_the_loss_is_zero_and_every_weight_takes_part():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows(0)
    loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES)
    loss.backward()
    assert loss == 0 and classifier.weight.grad.abs().sum() == 0 and hidden.grad.shape == (0, WIDTH)


def test_without_gradients_nothing_is_kept():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    with torch.no_grad():
        loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES)
        torch.testing.assert_close(loss, F.cross_entropy(classifier(hidden), targets, reduction="sum"))
    assert not loss.requires_grad


def test_hooks_see_one_call_with_the_weights_needed_only_inside_it():
    """ZeRO-3 in small: the weight is there from before the classifier's call until after it, and again for backward."""
    torch.manual_seed(0)
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    plain = F.cross_entropy(classifier(hidden), targets, reduction="sum")
    expected = gradients(plain, hidden, classifier)
    whole, calls = classifier.weight.data, []

    def gather(*_):
        classifier.weight.data = whole
        calls.append("gather")

    def release(*_):
        classifier.weight.data = torch.empty(0)

    classifier.register_forward_pre_hook(gather)
    classifier.register_forward_hook(release)
    release()
    loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES, max_logits=5 * CLASSES)
    assert calls == ["gather"] and classifier.weight.numel() == 0
    gather()  # as before the classifier's backward
    torch.testing.assert_close(gradients(loss, hidden, classifier), expected, atol=1e-6, rtol=1e-6)


def test_hooks_of_inner_layers_see_one_call_whatever_the_number_of_rows():
    classifier, calls = Adapted(), []
    classifier.base.register_forward_pre_hook(lambda *_: calls.append(1))
    for num_rows in (0, 3, 100):
        chunked_cross_entropy(classifier, *rows(num_rows), CLASSES, max_logits=5 * CLASSES)
    assert len(calls) == 3


def test_the_classifier_is_left_as_it_was_even_after_an_error():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    with pytest.raises(IndexError):
        chunked_cross_entropy(classifier, hidden, targets + CLASSES, CLASSES)
    assert "forward" not in vars(classifier) and classifier(hidden).shape == (ROWS, CLASSES)
    with pytest.raises(ValueError, match="one target a row"):
        chunked_cross_entropy(classifier, hidden, targets[:-1], CLASSES)


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_the_image_heads_loss_in_chunks_is_that_of_its_logits(monkeypatch):
    torch.manual_seed(0)
    head = DepthTransformerHead(DepthTransformerConfig(16, 8, 40, 4, 32, 2, 2))
    hidden, latents = torch.randn(11, 16, requires_grad=True), torch.randn(11, 4, 8)
    codes = torch.randint(40, (11, 4))
    plain = torch.stack([F.cross_entropy(x, codes[:, i]) for i, x in enumerate(head(hidden, latents))]).mean()
    monkeypatch.setattr(image_head, "chunked_cross_entropy", partial(chunked_cross_entropy, max_logits=3 * 40))
    chunked = head.loss(hidden, latents, codes)
    torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(chunked, hidden, head), gradients(plain, hidden, head), atol=1e-6, rtol=1e-6)


def test_the_image_head_with_gradient_checkpointing_gives_the_same_gradients(tiny_backbone_folder, tiny_evotok_folder):
    from llava_ext.assembly import assemble

    torch.manual_seed(0)
    model, _ = assemble(tiny_backbone_folder, tiny_evotok_folder, 32, 2, 2)
    model.train()
    head, hidden = model.image_head, torch.randn(5, 32, requires_grad=True)
    codes = torch.randint(model.vocabulary.codebook_size, (5, 4))
    latents = model.vision_tower.level_latents(codes[None])[0]
    expected = gradients(head.loss(hidden, latents, codes), hidden, head)
    model.gradient_checkpointing_enable()
    assert head.blocks[0].gradient_checkpointing
    found = gradients(head.loss(hidden, latents, codes), hidden, head)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_what_is_learned_is_counted_without_first_tokens_and_padding():
    vocabulary = ResidualVocabulary(offset=100, num_levels=2, codebook_size=10)
    position = [103, 117]
    labels = torch.tensor([[5, 6, *position, *position, 7, -100], [-100, 8, -100, 9, -100, -100, -100, -100]])
    counts = count_learned(labels, vocabulary)
    assert (int(counts.text_tokens), int(counts.image_positions)) == (4, 2)
    segments = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 0], [1, 1, 1, 2, 2, 2, 0, 0]])
    assert int(count_learned(labels, vocabulary, segments).text_tokens) == 2  # 7 and 9 begin samples
