"""Generated stubs; see protos/generate.py."""
