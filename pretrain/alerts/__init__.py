"""What a run tells people: over a webhook, Slack, e-mail or a program of their own.

    alerts:
      hooks:
        - {kind: slack, url_env: HEADRACE_SLACK_URL}
        - {kind: email, host: mail.example.org, sender: mill@example.org, to: [me@example.org], events: [run_failed]}

Rank 0 starts a second process, the courier, and writes one line a step into a pipe to it, without ever waiting:

    run.py      rank 0's side: beats, events, how the run ended      open this first
    courier.py  the process: notices silence and death, holds back repetitions, tries again
    hooks.py    one attempt at one delivery

A courier of its own hears of what the trainer cannot tell: that it hangs with Python's lock held, or was killed. It
imports the standard library only, and starts in a tenth of a second.
"""
