"""`python -m folovllm`: the same as the `folovllm` command, for when it is not on the path."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
