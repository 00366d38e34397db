"""`python -m phatgoose` is the command `phatgoose`."""

from phatgoose.cli import main

if __name__ == "__main__":
    main()
