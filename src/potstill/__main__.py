"""`python -m potstill`, so that `torchrun -m potstill distill ...` starts the same command line as `potstill`."""

from potstill.cli import main

if __name__ == "__main__":
    main()
