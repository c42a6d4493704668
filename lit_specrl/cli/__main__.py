"""`python -m lit_specrl.cli`."""

from lit_specrl.cli.main import run

if __name__ == "__main__":
    run()
