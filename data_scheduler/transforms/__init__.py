"""What is done to a document anew in every epoch, between extraction and packing.

    record ──► Versions (every template's text) ──► one text ──► fim ──► encoding ──► prefix ──► MarkedTokens
               extract                             templates   fim.py   bpe_dropout.py

A worked example: document 7 of source `code` in epoch 2, with the transforms `fim` and `prefix` (`<|code|>`). Philox
streams named by (data.seed, source, epoch, document, transform) say: transform it, prefix first, cut "abcdef" at 2 and
5. It becomes `<|code|> <|fim_prefix|> ab <|fim_suffix|> f <|fim_middle|> cde`, each piece of text encoded by itself.
Nothing else is drawn from, so a resumed, replayed or regrouped run makes the same tokens, and epoch 3 others.

Start reading at `source_transforms.py`; `config.py` has what a configuration may say.
"""
