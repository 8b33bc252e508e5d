"""The torch-free runtime."""

if __name__ != "dcc.runtime":
    raise ImportError("import this package as dcc.runtime: a second copy of its classes must not exist")
