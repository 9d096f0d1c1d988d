"""Where the run runs: processes, devices and how the model is spread over them.

In comes a `Layout` (how many processes, split how), out come a place in the process grid (`Ranks`) and the pieces
that a spread-out model is made of. megatron-core does the parallel work; it is used through two doors:

* `accelerator.py` is the only file that knows which device there is. With a GPU it is CUDA and NCCL; without one it
  makes the same megatron-core code run on CPU and gloo.
* `engine.py` is the only file that imports megatron-core. Everybody else imports megatron's names from there, so the
  CPU door is always installed first.

Example: 8 processes, tensor parallel 2, pipeline parallel 2, so data parallel 2. `Layout(8, tensor_parallel_size=2,
pipeline_parallel_size=2).rank_map()` prints

    rank  pp cp dp tp
       0   0  0  0  0
       1   0  0  0  1
       2   0  0  1  0
     ...
       7   1  0  1  1

Open `layout.py` first (pure arithmetic), then `process_groups.py` (what becomes of it), then `attention.py` (how packed
documents attend), `context_parallel.py` (where ranks share their tokens) and `fully_sharded.py` (where they share the
weights). Nothing here is imported eagerly: `parallel.layout` needs neither torch nor megatron-core.
"""
