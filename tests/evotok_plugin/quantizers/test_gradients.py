"""Gradients through the choice of codes against matrices that are built by definition, and against the library."""

import pytest
import torch

from evotok_plugin import ResidualVectorQuantizer
from evotok_plugin.quantizers.gradients import rotation, straight_through


def pairs(count=6, dim=5, scale=1.0):
    torch.manual_seed(0)
    return torch.randn(count, dim, dtype=torch.float64), scale * torch.randn(count, dim, dtype=torch.float64)


def rotation_matrix(e, q):
    """|q| / |e| times the rotation that turns e to q, from an orthonormal basis of their plane."""
    first = e / e.norm()
    second = q - (q @ first) * first
    second = second / second.norm()
    cosine, sine = q @ first / q.norm(), q @ second / q.norm()
    plane = torch.stack([first, second])
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return q.norm() / e.norm() * (torch.eye(len(e)).to(e) + plane.T @ (turn - torch.eye(2).to(e)) @ plane)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])
def test_the_rotation_trick_has_the_jacobian_of_a_rotation_and_scaling(scale):
    latents, quantized = pairs(scale=scale)
    for e, q in zip(latents, quantized, strict=True):
        matrix = rotation_matrix(e, q)
        torch.testing.assert_close(matrix @ e, q)
        jacobian = torch.autograd.functional.jacobian(lambda x, q=q: rotation(x, q), e)
        torch.testing.assert_close(jacobian, matrix)


def test_values_are_those_of_the_codes_to_the_bit():
    latents, quantized = (tensor.float().requires_grad_() for tensor in pairs())
    assert torch.equal(rotation(latents, quantized), quantized)
    torch.testing.assert_close(straight_through(latents, quantized), quantized)


def test_undefined_rotations_are_straight_through():
    latents = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    quantized = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-2.0, -4.0]])
    rotation(latents, quantized).sum().backward()
    assert torch.equal(latents.grad, torch.ones(3, 2))


def test_vector_quantize_pytorch_has_the_same_rotation():
    library = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    latents, quantized = pairs()
    weight = torch.randn_like(latents)
    found = []
    for function in (rotation, library.rotate_to):
        x = latents.clone().requires_grad_()
        out = function(x, quantized)
        (out * weight).sum().backward()
        found.append((out.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_quantizer_rotates_the_latents_to_the_sum_of_its_levels(depth):
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(3, 16, 4, gradient="rotation").eval()
    z = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    result = quantizer(z)
    (result.latents_at(depth) * weight).sum().backward()
    total = quantizer.codes_to_latents(result.codes[:, :depth])
    assert torch.equal(result.latents_at(depth), total)
    for place in range(5):
        expected = rotation_matrix(z[place].detach().double(), total[place].double()).T @ weight[place].double()
        torch.testing.assert_close(z.grad[place].double(), expected, rtol=1e-4, atol=1e-5)
