"""Checkpoints to and from other programs' formats, bit for bit, in one process, with no GPU.

    to_hf:    <run>/checkpoints/step-00000200   ->  config.json, model.safetensors, tokenizer.json, ...
    from_hf:  config.json, model.safetensors    ->  <run>/checkpoints/step-00000000, weights only

Both walk the same list (`tensors.py`): every weight of the model once, each native tensor with the Hugging Face tensors
that are its rows. One native tensor is in memory at a time. Example: `llama`,
hidden 64, 4 heads in 2 groups. Layer 0's fused attention input is one native tensor of 128 rows, group after group:

    decoder.layers.self_attention.linear_qkv.weight [0]      rows (16 to a head)
        q0 q1 k0 v0                                          0 to 63
        q2 q3 k1 v1                                          64 to 127
    model.layers.0.self_attn.q_proj.weight  =  q0 q1 q2 q3   [64, 64]
    model.layers.0.self_attn.k_proj.weight  =  k0 k1         [32, 64]
    model.layers.0.self_attn.v_proj.weight  =  v0 v1         [32, 64]

Open `tensors.py` first; then `to_hf.py` and `from_hf.py`, which are the two recipes. `architecture.py` translates the
configuration, `native.py` and `safetensors_folder.py` read and write weights, `tokenizer_files.py` the tokenizer;
`wonton/` is the wonton as a model of transformers.

`megatron.py` and `nyonic.py` are two more formats, by the same list. `loaded.py` holds a checkpoint in memory as a
model of transformers (`pretrain/generate.py` writes with it), `verify.py` compares two, `average.py` and `inspect.py`
do as they say.
"""
