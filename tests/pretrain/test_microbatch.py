"""Micro-batches: labels, masks, positions and document bounds of packed sequences."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretrain.microbatch import split_batch


def test_the_example_of_the_docstring() -> None:
    tokens = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    starts = [np.array([0, 3], dtype=np.int32), np.array([0], dtype=np.int32)]
    [batch] = split_batch(tokens, starts, np.array([1, 0]), 2)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[2, 3, 4, 5, 7, 8, 9, 10]]
    assert batch.loss_mask.int().tolist() == [[1, 1, 0, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert (batch.max_seqlen, batch.source_ids.tolist(), batch.seq_len) == (4, [1, 0], 4)


def test_a_document_that_starts_at_the_last_token_is_only_a_masked_label() -> None:
    [batch] = split_batch(np.array([[1, 2, 3]]), [np.array([0, 2], dtype=np.int32)], np.array([0]), 1)
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert batch.loss_mask.tolist() == [[True, False]]


@given(st.data())
def test_against_a_walk_over_every_token(data: st.DataObject) -> None:
    seq_len, micro, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rows = micro * count
    inner = st.sets(st.integers(1, seq_len), max_size=seq_len)
    starts = [np.array([0, *sorted(data.draw(inner))], dtype=np.int32) for _ in range(rows)]
    tokens = np.arange(rows * (seq_len + 1)).reshape(rows, seq_len + 1)
    sources = np.arange(rows) % 3
    batches = split_batch(tokens, starts, sources, micro)
    assert len(batches) == count
    for number, batch in enumerate(batches):
        assert batch.source_ids.tolist() == sources[number * micro : (number + 1) * micro].tolist()
        bounds = [0]
        for local in range(micro):
            row = number * micro + local
            document = np.searchsorted(starts[row], np.arange(seq_len + 1), side="right") - 1
            for at in range(seq_len):
                flat = local * seq_len + at
                assert batch.input_ids[0, flat] == tokens[row, at]
                assert batch.labels[0, flat] == tokens[row, at + 1]
                assert batch.loss_mask[0, flat] == (document[at] == document[at + 1])
                assert batch.position_ids[0, flat] == at - starts[row][document[at]]
                if at == seq_len - 1 or document[at] != document[at + 1]:
                    bounds.append(flat + 1)
        assert batch.cu_seqlens.tolist() == bounds
        assert batch.max_seqlen == max(np.diff(bounds))
