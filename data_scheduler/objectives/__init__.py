"""What a document teaches: which of its tokens are read, which are predicted, and in which order they stand.

    document's tokens ──► draw ──► causal            all of them predicted, left to right
                                ├► prefix_lm         a first part is read in both directions, the rest predicted
                                ├► span_corruption   spans are taken out and predicted after the text without them
                                └► fim               the middle is predicted after both sides (transforms/fim.py)

A worked example: document 7 of source `code` in epoch 2 has the tokens `a b c d e f g h`. The Philox stream named by
(data.seed, "objective", code, 2, 7) draws span corruption, two spans, `c d` and `h`. It becomes

    input     a b <extra_id_0> e f g <extra_id_1>                   read, no loss
    target    <extra_id_0> c d <extra_id_1> h <|endoftext|>          predicted

Nothing else is drawn from, so what a document becomes does not depend on ranks, prefetching, packing or restarts.

Start reading at `draw.py`; `config.py` has what a configuration may say, `span_corruption.py` and `prefix_lm.py` what
is done to the tokens.
"""
