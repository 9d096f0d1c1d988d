"""The arms of `train_throughput.py`: the same model on the same tokens, each in a process of its own.

    train_throughput.py ──starts──► child.py ARM ──► ours.py    pretrain.step.train_step, the step of a real run
          │                                          plain.py   a plain PyTorch loop
          │                                          hf.py      Hugging Face Trainer
          └──"run n steps"──► gate.py: the arm goes on for n steps, says what they took, and waits

Arms live side by side and take turns (A B C C B A …), so that a change of the machine's load meets all of them alike.
Processes of their own, because `parallel.accelerator` redirects torch functions where there is no GPU, which no peer
shall pay for. Open `child.py` first.
"""
