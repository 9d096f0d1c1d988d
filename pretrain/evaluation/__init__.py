"""What a trained model can do: tasks of the library lm-eval, run on a checkpoint or a Hugging Face folder, offline.

    headrace eval runs/quickstart --tasks headrace_tiny                       # built-in, no files needed
    headrace eval runs/quickstart --tasks winogrande,piqa --task-data tasks   # tasks/winogrande/validation.jsonl, …

`task_files` finds a task's definition and its local data, `language_model` answers lm-eval's requests with the model,
`score` brings both together, `results` writes what came out. lm-eval itself is imported when tasks are run, not before.
"""
