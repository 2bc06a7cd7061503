"""Exact residual search: level by level the Euclidean nearest code, identical to a search in float64.

M vectors, L levels, K codes per level, C dimensions.

||x - c||^2 is smallest where the score x.c - ||c||^2 / 2 is largest. Scores are computed in float32 by matrix products
alone, in blocks that fit the cache: each code has its negative half norm as an additional coordinate, each vector a 1.
Only the maximum of every group of codes is kept; nothing of size vectors x codes is ever stored.

Float32 alone would confuse codes at nearly equal distances (about one in several thousand). Therefore the half norm is
reduced by the largest rounding error that a score of this code can have. A computed score is then never below the true
score minus a `slack` of the vector, so a code can be excluded if its computed score is below the true score of the best
code minus that slack. Almost always a single code remains; otherwise float64 decides. For n terms and unit roundoff u,
the error of a computed product is at most n u |x||c|, and |x||c| <= (|x|^2 / t + t |c|^2) / 2 for every t > 0 splits
this bound into a part that depends on the vector and a part that depends on the code.

On a CPU with instructions for bfloat16 the maxima are computed with those (`evotok_plugin.kernels.half_maxima`), and
float32 decides within the groups that remain.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evotok_plugin.kernels.half_maxima import HalfMaxima, can_use_bfloat16

_UNIT_ROUNDOFF = 2.0**-24
_GROUP = 32  # codes that share one kept maximum
_GROUPS_TOGETHER = 32  # groups that form a supergroup in the search for the best group
# Scores computed at a time: on a CPU 1 MiB, to fit each core's L2 cache; elsewhere enough to occupy the device.
_CPU_VECTORS, _CPU_SCORES = 512, 1 << 18
_DEVICE_VECTORS, _DEVICE_SCORES = 4096, 1 << 24
_SMALL_CODEBOOK = 1024  # up to this size a float64 search costs no more than float32 and its bookkeeping
_FLOAT64_SCORES = 1 << 19  # scores per block in float64
_BFLOAT16_VECTORS = 512  # below, preparing the codes in bfloat16 takes longer than the products save
_MANY_GROUPS = 32  # candidate groups per vector above which searching all codes in float64 is faster


def residual_codes(latents: Tensor, codebooks: Tensor) -> Tensor:
    """Level by level the code nearest to the residual of the levels before: (M, C), (l, K, C) -> (M, l).

    The residual is kept in float64, so the codes equal those of a search entirely in float64; among codes that are
    equally near up to float64 rounding, any may be chosen. Autocast and the precision set for matrix products have no
    effect.
    """
    if is_compiling():
        return torch.ops.evotok.residual_codes(latents, codebooks)
    if latents.is_cuda and (kernel := _kernel()) is not None:
        return kernel(latents, codebooks)
    if latents.device.type not in ("cpu", "cuda"):  # other devices lack float64
        return residual_codes(latents.cpu(), codebooks.cpu()).to(latents.device)
    residual = latents.double()
    codes = torch.empty(latents.shape[0], codebooks.shape[0], dtype=torch.long, device=latents.device)
    size, dim = codebooks.shape[1:]
    search = _search_float64 if size <= _SMALL_CODEBOOK else _GroupedSearch(latents, size, dim)
    with _full_precision(latents.device.type):
        for level, codebook in enumerate(codebooks):
            chosen = search(residual, codebook)
            codes[:, level] = chosen
            if level + 1 < codebooks.shape[0]:
                residual -= F.embedding(chosen, codebook)
    return codes


def _fake_residual_codes(latents: Tensor, codebooks: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0], codebooks.shape[0], dtype=torch.long)


if hasattr(torch.library, "custom_op"):  # from PyTorch 2.4
    # The search as a single operator that torch.compile does not trace, because its work depends on the data.
    torch.library.custom_op("evotok::residual_codes", residual_codes, mutates_args=()).register_fake(
        _fake_residual_codes
    )

    def is_compiling() -> bool:
        """Whether torch.compile traces the caller."""
        return torch.compiler.is_compiling()

else:

    def is_compiling() -> bool:
        """Whether torch.compile traces the caller."""
        return False


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Indices of the exact Euclidean nearest codes: (M, C), (K, C) -> (M,)."""
    return residual_codes(vectors, codebook[None])[:, 0]


def _kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The fused CUDA search, or None if Triton is not installed."""
    try:
        from evotok_plugin.kernels.residual_search import residual_codes as fused
    except ImportError:
        return None
    return fused


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Compute float32 products in float32: without autocast, TF32 or bf16, which a user may have allowed."""
    allowed = torch.get_float32_matmul_precision()
    with torch.autocast(device_type, enabled=False):
        if allowed == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)


def _search_float64(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The search by its definition, in blocks: float64 (M, C), (K, C) -> (M,)."""
    codes = codebook.double()
    half_norms = codes.square().sum(dim=1) / 2
    num_codes = min(codes.shape[0], 4096)
    winners = []
    for block in vectors.split(max(_FLOAT64_SCORES // num_codes, 1)):
        best: Tensor | None = None
        winner = torch.empty(0, dtype=torch.long)
        for first in range(0, codes.shape[0], num_codes):
            part = slice(first, first + num_codes)
            top, index = torch.addmm(half_norms[part], block, codes[part].T, beta=-1).max(dim=1)
            if best is None:
                best, winner = top, index
            else:
                better = top > best  # not >=: the first of equally near codes
                best, winner = torch.where(better, top, best), torch.where(better, index + first, winner)
        winners.append(winner)
    return winners[0] if len(winners) == 1 else torch.cat(winners)


def _below(values: Tensor) -> Tensor:
    """The next float32 numbers below float64 values."""
    rounded = values.float()
    return torch.nextafter(rounded, rounded.new_tensor(-torch.inf))


@dataclass
class _Block:
    """Views of the search's work memory for a block of codes."""

    codes: Tensor  # coordinates and bias of every code, the bias last
    coordinates: Tensor
    bias: Tensor  # minus the reduced half norms
    squares: Tensor
    scores: Tensor  # (codes, V)
    grouped_scores: Tensor  # (groups, codes per group, V)
    maxima: Tensor  # (groups, V)


class _GroupedSearch:
    """The float32 search and its work memory, which all levels share."""

    def __init__(self, like: Tensor, size: int, dim: int) -> None:
        self.size, self.num_groups = size, -(-size // _GROUP)
        num_scores, num_vectors = _DEVICE_SCORES, _DEVICE_VECTORS
        in_half = like.shape[0] >= _BFLOAT16_VECTORS and can_use_bfloat16(like)
        if like.device.type == "cpu":
            threads = min(torch.get_num_threads(), 8)
            num_scores, num_vectors = _CPU_SCORES * threads, _CPU_VECTORS * (1 if in_half else threads)
        self.num_vectors = max(min(num_vectors, like.shape[0]), 1)
        self.groups_at_once = min(max(num_scores // (self.num_vectors * _GROUP), 1), self.num_groups)
        self.together = min(_GROUPS_TOGETHER, self.num_groups)
        # Padding codes fill the last group, and padding groups the last supergroup; their scores are never the best.
        self.codes = like.new_zeros(self.num_groups * _GROUP, dim + 1)
        self.codes[size:, dim] = -torch.inf
        self.padded = padded = -(-self.num_groups // self.together) * self.together
        self.squares = like.new_empty(min(self.groups_at_once * _GROUP, size), dim)
        self.gathered = like.new_empty(self.num_vectors, _GROUP * (dim + 1))
        self.blocks: list[_Block] = []
        self.error = (dim + 4) * _UNIT_ROUNDOFF  # of a product of dim + 1 terms from rounded vectors and half norms
        self.half: HalfMaxima | None = None
        if in_half:
            self.half = HalfMaxima(
                size, dim, self.num_groups, _GROUP, padded, 2 * self.groups_at_once, self.num_vectors
            )

    def __call__(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Nearest codes of float64 vectors: (M, C), (K, C) -> (M,)."""
        dim = codebook.shape[1]
        sample = codebook[:: max(self.size // 1024, 1)]
        balance = float(vectors.square().mean() / sample.square().mean()) ** 0.5  # t above: any value is valid
        balance = balance if 1e-12 < balance < 1e12 else 1.0
        self.codebook = codebook
        self.vector_slack = self.error / (2 * balance)  # times |x|^2
        self.reduced = codebook.new_full((dim,), (self.error * (balance + 2) - 1) / 2)
        self.in_half = self.half is not None and self.half.start(vectors, codebook)
        if self.half is not None and self.in_half:
            self.codes[: self.size, :dim] = codebook
            torch.mul(self.half.squares, self.reduced[0], out=self.codes[: self.size, dim])
        elif not self.blocks:
            self._allocate(like=codebook)
        parts = vectors.split(self.num_vectors)
        found = [self._search_block(part, first=number == 0) for number, part in enumerate(parts)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _allocate(self, like: Tensor) -> None:
        """Make the memory for the scores in float32."""
        self.maxima = like.new_full((self.padded, self.num_vectors), -torch.inf)
        self.scores = like.new_empty(self.groups_at_once * _GROUP * self.num_vectors)
        self.blocks = self._cut_blocks(self.num_vectors)

    def _cut_blocks(self, num_vectors: int) -> list[_Block]:
        """Views of all blocks of codes, for `num_vectors` vectors; cut once for all levels to save time."""
        blocks, dim = [], self.squares.shape[1]
        for first in range(0, self.num_groups, self.groups_at_once):
            last = min(first + self.groups_at_once, self.num_groups)
            count = min(last * _GROUP, self.size) - first * _GROUP
            codes = self.codes[first * _GROUP : last * _GROUP]
            scores = self.scores[: codes.shape[0] * num_vectors].view(codes.shape[0], num_vectors)
            blocks.append(
                _Block(
                    codes=codes,
                    coordinates=codes[:count, :dim],
                    bias=codes[:count, dim],
                    squares=self.squares[:count],
                    scores=scores,
                    grouped_scores=scores.view(last - first, _GROUP, num_vectors),
                    maxima=self.maxima[first:last, :num_vectors],
                )
            )
        return blocks

    def _distances(self, vectors: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distances to a code, the score of that code in float64, and the squares of the vectors: (V,) each."""
        norms = vectors.square().sum(dim=1)
        distance = (vectors - F.embedding(code, self.codebook)).square_().sum(dim=1)
        return distance, (norms - distance) / 2, norms

    def _search_block(self, vectors: Tensor, first: bool) -> Tensor:
        """Nearest codes of a block of float64 vectors: (V, C) -> (V,); the first block of a level copies its codes."""
        num_vectors, dim = vectors.shape
        columns = self.codebook.new_ones(dim + 1, num_vectors)
        columns[:dim] = vectors.T
        rows = columns.T.contiguous()
        maxima, slack = self._group_maxima(vectors, columns, first)  # (supergroups, groups together, V)

        tops = maxima.amax(dim=1)
        best = tops.max(dim=0).indices  # argmax takes five times as long over the first dimension
        within = maxima[best, :, torch.arange(num_vectors, device=best.device)]  # (V, groups together)
        group = best * self.together + within.argmax(dim=1)
        group.clamp_(max=self.num_groups - 1)  # a vector that is not finite may select the padding
        scores = self._scores_in_groups(rows, group)
        code = (group * _GROUP + scores.argmax(dim=1)).clamp_(max=self.codebook.shape[0] - 1)

        distance, score, norms = self._distances(vectors, code)
        least = _below(score - self.vector_slack * norms)  # a bound for the computed score of any nearer code
        # The same for maxima, which are keys of bfloat16 numbers if there is a slack of their own.
        least_maximum = least if slack is None else HalfMaxima.bounds(_below(score - slack))
        if self.half is not None and self.in_half and not self.half.signed and bool((least_maximum < 0).any()):
            self.half.signed = True
            return self._search_block(vectors, first=False)
        # One supergroup, one group and one code reach the bounds: those of the chosen code. With more, float64 decides.
        near = tops >= least_maximum
        rivals = near.sum(dim=0) + (within >= least_maximum[:, None]).sum(dim=1) + (scores >= least[:, None]).sum(dim=1)
        unsettled = (rivals > 3).nonzero()[:, 0]
        if unsettled.numel():
            groups, owners = self._groups_within(maxima, near, least_maximum[unsettled], unsettled)
            code[unsettled] = self._settle(
                vectors[unsettled],
                rows[unsettled],
                least[unsettled],
                groups,
                owners,
                code[unsettled],
                distance[unsettled],
            )
        return code

    def _group_maxima(self, vectors: Tensor, columns: Tensor, first: bool) -> tuple[Tensor, Tensor | None]:
        """Largest computed score of every group: (C + 1, V) -> (supergroups, groups per supergroup, V).

        In bfloat16 the scores are keys, and the slack (V,) of every vector comes with them.
        """
        if self.half is not None and self.in_half:
            maxima, slack = self.half.of_block(vectors)
            return maxima.unflatten(0, (-1, self.together)), slack
        num_vectors = columns.shape[1]
        blocks = self.blocks if num_vectors == self.num_vectors else self._cut_blocks(num_vectors)
        for block, codes in zip(blocks, self.codebook.split(self.groups_at_once * _GROUP), strict=True):
            if first:
                block.coordinates.copy_(codes)
                torch.mul(codes, codes, out=block.squares)
                torch.mv(block.squares, self.reduced, out=block.bias)
            torch.mm(block.codes, columns, out=block.scores)
            torch.amax(block.grouped_scores, dim=1, out=block.maxima)
        return self.maxima[:, :num_vectors].unflatten(0, (-1, self.together)), None

    def _scores_in_groups(self, rows: Tensor, groups: Tensor) -> Tensor:
        """Scores of the codes of one group per row: (P, C + 1), (P,) -> (P, codes per group)."""
        codes = self.codes.view(self.num_groups, -1)
        codes = torch.index_select(codes, 0, groups, out=self.gathered[: groups.shape[0]])
        return torch.bmm(rows.unsqueeze(1), codes.view(-1, _GROUP, rows.shape[1]).transpose(1, 2)).squeeze(1)

    def _groups_within(self, maxima: Tensor, near: Tensor, least: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Groups whose maxima reach the bounds of chosen vectors, and the vector of each: two tensors (P,).

        Args:
            maxima, near: of all vectors; `near` (supergroups, V) marks the supergroups that reach the bounds.
            least: bounds of the chosen vectors (W,); `chosen` (W,) has their places among all vectors.
        """
        supergroups, owners = near[:, chosen].nonzero(as_tuple=True)
        inside = maxima[supergroups, :, chosen[owners]] >= least[owners][:, None]  # (supergroups found, together)
        found, place = inside.nonzero(as_tuple=True)
        groups, owners = supergroups[found] * self.together + place, owners[found]
        exists = groups < self.num_groups  # a bound of -inf admits the padding
        return groups[exists], owners[exists]

    def _settle(
        self,
        vectors: Tensor,
        rows: Tensor,
        least: Tensor,
        groups: Tensor,
        owners: Tensor,
        code: Tensor,
        distance: Tensor,
    ) -> Tensor:
        """Decide in float64 between all codes that may be nearest: those of `groups` for the vectors `owners` (P,)."""
        if groups.numel() > _MANY_GROUPS * vectors.shape[0]:
            return _search_float64(vectors, self.codebook)
        for group, owner in zip(groups.split(self.num_vectors), owners.split(self.num_vectors), strict=True):
            scores = self._scores_in_groups(rows[owner], group)
            pair, place = (scores >= least[owner][:, None]).nonzero(as_tuple=True)
            rival, owner = group[pair] * _GROUP + place, owner[pair]
            found = (vectors[owner] - F.embedding(rival, self.codebook)).square_().sum(dim=1)
            nearest = distance.scatter_reduce(0, owner, found, "amin")
            code = torch.where(nearest < distance, self.codebook.shape[0], code)
            tied = found == nearest[owner]
            code = code.scatter_reduce(0, owner[tied], rival[tied], "amin")
            distance = nearest
        return code
