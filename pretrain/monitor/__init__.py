"""The dashboard: a web page that shows the runs of a folder while they train, and lets their owner change them.

In: run folders (`metrics.jsonl`, `journal.jsonl`, `config.yaml`, `rejects.jsonl`), which it only reads. Out: a page,
the JSON behind it, and commands that go to a live run the way `headrace ctl` sends them.

    metrics.jsonl ──► metrics_index (columns in memory, kept in the user's cache) ──► views ──► app ──► browser
    journal.jsonl ──► journal_tail ───────────────────────────────────────────────────┘          │
    <run>/control/inbox ◄── pretrain.control.client ◄────────────────────────────────────────────┘

A worked example: a browser 900 pixels wide asks for the loss of a run of 10⁶ steps.

1. `runs` finds the run by its name in the list of folders it has seen; the name never becomes part of a path.
2. `metrics_index` parses what `metrics.jsonl` has got since it was last asked, some lines.
3. `downsample` cuts the 10⁶ points into 900 buckets and keeps the least and the largest of each: 1,800 points, every
   spike among them.
4. `live` tells all pages over one stream that there is more; each asks again, and the same question is answered once.

The trainer knows nothing of it: another process reads files, so a hundred viewers take none of its time.

Open `app.py` first: every address and what answers it. What may be seen by whom is in `access.py`; the page's sources
are in `frontend/`, what a browser gets of them in `static/`.
"""
