"""Transformations of a Program, one file per technique."""

if __name__ != "dcc.passes":
    raise ImportError("import this package as dcc.passes: a second copy of its classes must not exist")
