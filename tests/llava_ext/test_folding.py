import pytest
import torch

from llava_ext.folding import count_learned, fold_residual_tokens, merge_features
from llava_ext.vocabulary import ResidualVocabulary

VOCABULARY = ResidualVocabulary(offset=100, num_levels=3, codebook_size=10)
IMAGE = VOCABULARY.to_ids(torch.tensor([[1, 2, 3], [4, 5, 6]])).flatten().tolist()


def batch(rows, side):
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
        for r, p in zip(rows, pads, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_folding_keeps_order_and_padding_side(side):
    ids, mask = batch([[7, 8, *IMAGE, 9], [5, 6]], side)
    folded = fold_residual_tokens(VOCABULARY, ids, mask, None)
    rows = [row[m.bool()].tolist() for row, m in zip(folded.input_ids, folded.attention_mask, strict=True)]
    assert rows == [[7, 8, IMAGE[0], IMAGE[3], 9], [5, 6]]
    edge = 0 if side == "left" else -1
    assert folded.attention_mask[1, edge] == 0 and folded.attention_mask.sum(1).tolist() == [5, 2]
    assert folded.codes.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert folded.input_ids[folded.written].tolist() == [IMAGE[0], IMAGE[3]]


def test_labels_follow_their_tokens():
    ids, mask = batch([[7, *IMAGE, 9], [5, 6]], "right")
    labels = torch.where(ids == 9, ids, -100)
    folded = fold_residual_tokens(VOCABULARY, ids, mask, labels)
    assert folded.labels.tolist() == [[-100, -100, -100, 9], [-100] * 4]


def test_text_alone_passes_through_untouched():
    ids, mask = batch([[7, 8, 9]], "right")
    folded = fold_residual_tokens(VOCABULARY, ids, mask, None)
    assert torch.equal(folded.input_ids, ids) and not folded.written.any() and folded.codes.shape == (0, 3)


@pytest.mark.parametrize("broken", [IMAGE[:-1], IMAGE[1:] + IMAGE[:1]])
def test_an_image_cut_in_half_is_an_error(broken):
    with pytest.raises(ValueError, match="cut in half"):
        fold_residual_tokens(VOCABULARY, torch.tensor([[7, *broken]]), None, None)


def test_packed_samples_keep_their_segments_positions_and_places():
    ids = torch.tensor([[7, 8, *IMAGE, 9, 5, 6, *IMAGE, 9], [5, *IMAGE, 9, *[0] * 10]])
    segments = torch.tensor([[1] * 9 + [2] * 9, [1] * 8 + [2] + [0] * 9])
    ids[1, 8] = 4
    labels = torch.where(segments > 0, ids, -100)
    folded = fold_residual_tokens(VOCABULARY, ids, None, labels, segments)
    assert folded.segment_ids.tolist() == [[1] * 5 + [2] * 5, [1, 1, 1, 1, 2] + [0] * 5]
    assert folded.position_ids.tolist() == [[*range(5), *range(5)], [*range(4), 0, *range(5)]]
    assert folded.written_positions(2).tolist() == [0, 1] * 3
    first = [[0, 5], [0, 4]]
    for row, places in enumerate(first):
        assert (folded.labels[row][places] == -100).all(), "nothing stands before a sample's first token"
    assert folded.labels[0, 1:5].tolist() == [8, IMAGE[0], IMAGE[3], 9]
    assert (folded.labels[1, 5:] == -100).all()


def test_rows_laid_end_to_end_lose_padding_and_nothing_else():
    ids = torch.tensor([[7, *IMAGE, 5, 6], [8, 9, 4, 0, 0, 0, 0, 0, 0]])
    segments = torch.tensor([[1] * 7 + [2] * 2, [1, 1, 2] + [0] * 6])
    row = fold_residual_tokens(VOCABULARY, ids, None, ids, segments).as_one_row()
    assert row.input_ids.tolist() == [[7, IMAGE[0], IMAGE[3], 5, 6, 8, 9, 4]]
    assert row.starts.int().tolist() == [[1, 0, 0, 1, 0, 1, 0, 1]]
    assert row.written.int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]] and row.codes.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert row.labels.tolist() == [[-100, IMAGE[0], IMAGE[3], -100, 6, -100, 9, -100]]


@pytest.mark.parametrize(
    "rows", [[[7, *IMAGE[:3], 9]], [[7, *IMAGE[:3], 9, *IMAGE, *IMAGE[:3]]], [[7, *IMAGE, *IMAGE]]]
)
def test_images_of_another_size_are_refused(rows):
    folded = fold_residual_tokens(VOCABULARY, torch.tensor(rows), None, None)
    with pytest.raises(ValueError, match="expected 2 in each image"):
        folded.written_positions(2)


def test_a_left_padded_samples_first_label_is_not_learned():
    ids, mask = batch([[7, 8, *IMAGE, 9], [5, 6]], "left")
    folded = fold_residual_tokens(VOCABULARY, ids, mask, ids.masked_fill(mask == 0, -100))
    assert (folded.labels != -100).sum(dim=1).tolist() == [4, 1]


def test_merge_counts_places_and_features():
    embeddings, where = torch.zeros(1, 3, 2), torch.tensor([[True, False, True]])
    merged = merge_features(embeddings, where, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "image")
    assert merged.tolist() == [[[1, 2], [0, 0], [3, 4]]]
    with pytest.raises(ValueError, match="2 image placeholders .* 1 image positions"):
        merge_features(embeddings, where, torch.zeros(1, 2), "image")


def test_without_folding_each_residual_token_is_a_step_and_all_is_checked_alike():
    ids, mask = batch([[7, *IMAGE, 9], [5, 6]], "right")
    folded = fold_residual_tokens(VOCABULARY, ids, mask, ids, fold=False)
    assert torch.equal(folded.input_ids, ids) and torch.equal(folded.attention_mask, mask)
    assert torch.equal(folded.written, VOCABULARY.is_residual(ids))
    assert folded.codes.tolist() == [[1, 2, 3], [4, 5, 6]] and folded.written_positions(6).tolist() == [*range(6)]
    with pytest.raises(ValueError, match="expected 9 in each image"):
        folded.written_positions(9)
    with pytest.raises(ValueError, match="in another order"):
        fold_residual_tokens(VOCABULARY, ids[:1, :5], None, None, fold=False)


def test_learned_tokens_are_counted_without_first_tokens_and_padding():
    vocabulary = ResidualVocabulary(offset=100, num_levels=2, codebook_size=10)
    position = [103, 117]
    labels = torch.tensor([[5, 6, *position, *position, 7, -100], [-100, 8, -100, 9, -100, -100, -100, -100]])
    counts = count_learned(labels, vocabulary)
    assert (int(counts.text_tokens), int(counts.image_positions)) == (4, 2)
    segments = torch.tensor([[1, 1, 1, 1, 1, 1, 2, 0], [1, 1, 1, 2, 2, 2, 0, 0]])
    assert int(count_learned(labels, vocabulary, segments).text_tokens) == 2  # 7 and 9 begin samples
