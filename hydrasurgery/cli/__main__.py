"""`python -m hydrasurgery.cli`, the same as the `hydrasurgery` script."""

from hydrasurgery.cli import main

if __name__ == "__main__":
    main()
