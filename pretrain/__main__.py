"""`python -m pretrain` is `headrace`, also where no script of that name is on the path: in launched processes."""

from pretrain.cli import main

if __name__ == "__main__":  # megatron's checkpoint writer spawns processes that import this module again
    main()
