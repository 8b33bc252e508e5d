"""What an operation costs on a target."""

if __name__ != "dcc.cost_model":
    raise ImportError("import this package as dcc.cost_model: a second copy of its classes must not exist")
