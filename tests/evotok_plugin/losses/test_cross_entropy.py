"""Chunked cross-entropy against the plain computation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evotok_plugin.losses.cross_entropy import chunked_cross_entropy

ROWS, WIDTH, CLASSES = 23, 8, 50


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, as in peft."""

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
def test_loss_and_gradients_equal_the_plain_computation(kind, chunk):
    torch.manual_seed(chunk)
    classifier, (hidden, targets) = CLASSIFIERS[kind](), rows()
    chunked = chunked_cross_entropy(classifier, hidden, targets, CLASSES, max_logits=chunk * CLASSES)
    plain = F.cross_entropy(classifier(hidden), targets, reduction="sum")
    torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-6)
    found, expected = gradients(chunked, hidden, classifier), gradients(plain, hidden, classifier)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_bfloat16_is_as_accurate_as_in_the_plain_computation():
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


def test_rows_are_classified_in_chunks():
    class Watch(nn.Linear):
        largest = 0

        def forward(self, x):
            self.largest = max(self.largest, x.shape[0])
            return super().forward(x)

    classifier, (hidden, targets) = Watch(WIDTH, CLASSES), rows(100)
    chunked_cross_entropy(classifier, hidden, targets, CLASSES, max_logits=10 * CLASSES).backward()
    assert classifier.largest == 10


def test_without_rows_the_loss_is_zero_and_every_weight_has_a_gradient():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows(0)
    loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES)
    loss.backward()
    assert loss == 0 and classifier.weight.grad.abs().sum() == 0 and hidden.grad.shape == (0, WIDTH)


def test_the_loss_can_be_computed_without_gradients():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    with torch.no_grad():
        loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES)
        torch.testing.assert_close(loss, F.cross_entropy(classifier(hidden), targets, reduction="sum"))
    assert not loss.requires_grad


def test_the_weights_are_needed_only_within_one_call_of_the_classifier():
    """Imitates ZeRO-3, which gathers the weight before the call, releases it after, and gathers it for backward."""
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
    gather()  # as ZeRO-3 does before the classifier's backward pass
    torch.testing.assert_close(gradients(loss, hidden, classifier), expected, atol=1e-6, rtol=1e-6)


def test_inner_layers_with_hooks_are_called_once_for_any_number_of_rows():
    classifier, calls = Adapted(), []
    classifier.base.register_forward_pre_hook(lambda *_: calls.append(1))
    for num_rows in (0, 3, 100):
        chunked_cross_entropy(classifier, *rows(num_rows), CLASSES, max_logits=5 * CLASSES)
    assert len(calls) == 3


def test_the_classifier_is_restored_after_an_error():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    with pytest.raises(IndexError):
        chunked_cross_entropy(classifier, hidden, targets + CLASSES, CLASSES)
    assert "forward" not in vars(classifier) and classifier(hidden).shape == (ROWS, CLASSES)
    with pytest.raises(ValueError, match="one target per row"):
        chunked_cross_entropy(classifier, hidden, targets[:-1], CLASSES)


def test_a_second_backward_pass_raises():
    classifier, (hidden, targets) = nn.Linear(WIDTH, CLASSES), rows()
    loss = chunked_cross_entropy(classifier, hidden, targets, CLASSES)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
