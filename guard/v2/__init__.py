"""The open inference protocol, version 2, which Triton, KServe and MLServer speak: REST with JSON or binary tensors."""
