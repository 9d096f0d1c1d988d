"""Tables of the training benchmark, from its result file alone."""

from typing import Any

Result = dict[str, Any]
Rows = list[tuple[str, ...]]

ARMS = {
    "ours": "Headrace",
    "plain": "plain PyTorch loop",
    "hf": "Hugging Face Trainer, documents apart",
    "hf_whole_rows": "Hugging Face Trainer, attention over whole sequences",
}


def cpu_table(result: Result) -> tuple[tuple[str, ...], Rows]:
    """(head, rows): what one process of each arm does, and ours over it."""
    cpu = result["cpu"]
    rows = []
    for name, arm in cpu["arms"].items():
        ratio = cpu["ours_over"].get(name)
        told = ("", "")
        if ratio:
            told = (
                f"{ratio['cpu']['median']:.2f} ({ratio['cpu']['min']:.2f} to {ratio['cpu']['max']:.2f})",
                f"{ratio['wall']['median']:.2f}",
            )
        rows.append((ARMS[name], f"{arm['tokens_per_cpu_s']['median']:,.0f}", *told))
    return ("one process", "tokens per CPU second", "ours over it, CPU time", "wall time"), rows


def cpu_settings(result: Result) -> str:
    """What the rows of `cpu_table` are of, and how two processes scale, in sentences."""
    cpu = result["cpu"]
    settings = cpu["settings"]
    return (
        f"A llama of {cpu['parameters'] / 1e6:.1f} million parameters, fp32, one thread, {settings['sequences']} "
        f"packed sequences of {settings['seq_len']} tokens a step; arms take turns, {result['rounds']} rounds. Two "
        f"processes of ours train {cpu['scaling']['speedup']:.2f} times the tokens per second of one."
    )


def gpu_table(result: Result) -> tuple[tuple[str, ...], Rows]:
    """(head, rows): every model that was measured on a GPU."""
    head = ("one GPU, bf16, 4,096 tokens", "arm", "tokens/s", "MFU, full / causal attention", "peak memory")
    return head, [
        (
            f"`{row['shape']}`",
            f"{row['arm']} ({row['layers']} layers)",
            f"{row['tokens_per_s']:,.0f}",
            f"{100 * row['mfu_full']:.1f} / {100 * row['mfu_causal']:.1f} %",
            f"{row['peak_memory_bytes'] / 1e9:.1f} GB",
        )
        for row in result["gpu"]
        if "tokens_per_s" in row
    ]
