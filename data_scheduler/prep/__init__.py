"""Before training: filter, deduplicate and score raw documents, into files that the scheduler reads as sources.

    files ──► read ──► filters ──► dedup ──► scores ──► out/data/00000.parquet    id, text, kept fields, scores
                │         │          │                  out/prep_report.json      documents in = out + removed, by step
          rejects.jsonl   └─ removed/<step>/ (if asked)

The steps are datatrove's own blocks wherever it has them; here is what makes them one command: a checked
configuration, the passes that deduplication and corpus statistics need, counting, and resuming.

A worked example. Two files, steps [gopher_quality, exact_dedup, compression], become four datatrove runs ("passes"):

1. `documents`, a task a file: read → count → Gopher filter → write to work/ → write signatures of the texts.
2. `find`, one task: duplicates among all signatures.
3. `documents`, a task a file: read from work/ → drop duplicates → score → write out/data/.
4. `report`, one task: add up the counts of all tasks.

A task is a file, so the output does not depend on the number of workers or on the cluster. Finished tasks are
remembered; starting the same configuration again goes on where it stopped.

Start reading at `plan.py`. Nothing here is used by a training run; datatrove (`pip install 'headrace[prep]'`) is
imported when a preparation starts.
"""
