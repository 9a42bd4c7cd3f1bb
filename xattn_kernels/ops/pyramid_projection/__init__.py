"""The pyramid projection: schema, autograd, and one module per engine."""
