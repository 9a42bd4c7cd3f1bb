"""One folder an operator: schema, fake kernel and autograd once, then one file an engine."""
