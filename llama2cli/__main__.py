"""`python -m llama2cli` is `llama2`."""

from llama2cli.cli import main

if __name__ == "__main__":
    main()
