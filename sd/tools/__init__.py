"""Tools on files: plain functions, each also a command of `python -m sd`."""
