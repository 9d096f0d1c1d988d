"""Live control: people change a run while it goes on, from a shell, another machine or a program.

    headrace ctl ──► file in <run>/control/inbox/ ──► inbox ──┐
                └──► POST /commands ──► server (rank 0) ──────┤
                                                              ▼
                        desk (rank 0, between two steps): checked, decided, journaled, answered
                                                              │ broadcast
                                                              ▼
                        live (every rank): the same events into every rank's plan, at the same step boundary

A command is one JSON object (`request`), wherever it comes from. A worked example: step 100 is next, prefetch is 2.

1. `headrace ctl runs/x set-mix web=0.5 code=0.5 --why "code is flat"` puts `1763…-9f2c.json` into the inbox.
2. The inbox's thread on rank 0 moves it to `control/taken/`, reads it and hands it to the desk.
3. Before step 100, the ranks learn that something waits (one number more in a message they exchange anyway). The desk
   decides: a mixture from step 103 on. It is event 57 of the journal, on disk, before anybody hears of it.
4. The answer, `{"status": "accepted", "event": 57, "step": 103, …}`, appears in `control/answers/`; the taken file
   goes.
5. Every rank puts the event into its plan. Batches of step 103 are the first with the new shares.

Killed between 2 and 3: the taken file is there when the run is started again, and the command is carried out then.
Killed between 3 and 4: the journal has the command's id, so it is answered then and not carried out twice.

Start reading at `request.py`, then `desk.py`.
"""
