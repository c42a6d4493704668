"""`python -m lit_specrl.cli`."""

from lit_specrl.cli.main import main

if __name__ == "__main__":
    main()
